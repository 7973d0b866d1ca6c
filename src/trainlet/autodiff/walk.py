# SPDX-License-Identifier: Apache-2.0
"""From a model to its training step: a reverse walk towards the chosen parameters only.

The TRAIN graph is the forward pass (which also keeps what the backward pass needs: masks, selected channels), the
loss, the head's update, all gradients, and then all other updates: the classical order, in which every gradient is
computed with the weights before their update. One integer tensor has one rounding: the consumer that comes first owns
it, the others' shares are added before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainlet.attrs import Add, Attrs, AvgPool, CheckLr, Conv2d, EnterGrad, Mask, MaskFrom, RoundGrad, SelectChannels
from trainlet.autodiff.scheme import UpdateScheme, check_scheme, selected_channels
from trainlet.errors import UnsupportedError, UsageError
from trainlet.ir.graph import Array, Graph, GraphBuilder, Kind, Node, Stage, Value
from trainlet.numerics import RHO_START, bias_rate, weight_rate
from trainlet.verify import verify_graph
from trainlet.verify.graph import REFUSES
from trainlet.vjp import VJP, Shared, Sums

UPDATES = frozenset({"sgd_weight", "sgd_bias"})
"""Operators that come after all gradients."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The trained slice of a layer's weights: states, channel table, and the value that holds its kept inputs."""

    weight: str
    fraction: str | None
    channels: str
    kept: str
    whole: bool


class Tape:
    """The walk in progress: what rules read (values, choices, sites) and where they append."""

    def __init__(self, graph: Graph, scheme: UpdateScheme) -> None:
        self.graph, self.scheme = graph, scheme
        self.builder = GraphBuilder(graph.name, graph)
        self.integer = graph.stage is Stage.INT8
        self.gradient = "s8" if self.integer else "f32"
        self.sums = "s32" if self.integer else "f32"
        self.fraction_bits = scheme.fraction_bits if self.integer else 0
        self.trained: dict[str, Trained] = {}
        self._position = {n.name: i for i, n in enumerate(graph.nodes)}
        self._kept: dict[str, list[Node]] = {}  # producer ("" for the input) -> nodes to run right after it
        self._shares: dict[str, list[tuple[Node, Sums | Shared]]] = {}
        self._grads: dict[str, str] = {}
        self._deferred: list[Node] = []
        self._exponents = 0
        self._moving = self._values_that_move()

    # -- what rules ask ------------------------------------------------------------------------------------

    def value(self, name: str) -> Value:
        """The value of that name, of the model or of the step so far."""
        return self.builder.values[name]

    def needs_gradient(self, name: str) -> bool:
        """Whether a trained parameter lies before this value."""
        return name in self._moving

    def site(self, node: Node, slot: int) -> int:
        """The number of a rounding (docs/arithmetic.md, section 2): of the gradient of operand ``slot`` of a node of
        the model, or from 32 on of a parameter."""
        return 64 * self._position[node.name] + slot

    def operand_site(self, node: Node, x: str) -> int:
        """The site of the gradient of ``x``, an operand of ``node``."""
        return self.site(node, node.inputs.index(x))

    def takes_reals(self, x: str) -> bool:
        """Whether what makes ``x`` takes its gradient in reals: a global average pool that only the head reads."""
        maker = self.graph.producer(x)
        a = maker.attrs if maker else None
        whole = isinstance(a, AvgPool) and maker is not None and a.kernel == self.value(maker.inputs[0]).shape[:2]
        return whole and len(self.graph.consumers(x)) == 1

    def x_scale(self, conv: Node) -> float:
        """Scale of a convolution's input; 1 in reals."""
        q = self.value(conv.inputs[0]).q
        return q.scale if q else 1.0

    def scale_of(self, conv: Node) -> str | None:
        """The constant with the convolution's weight scales; None in reals."""
        return conv.inputs[3] if self.integer else None

    def weights_of(self, conv: Node) -> tuple[str, ...]:
        """weight[, scale][, trained, channels]: what an input gradient reads."""
        choice = self.trained.get(conv.name)
        scale = self.scale_of(conv)
        return (
            conv.inputs[1],
            *((scale,) if scale else ()),
            *((choice.weight, choice.channels) if choice else ()),
        )

    def new_exponent(self) -> int | None:
        """A slot of the run-time exponent table; None in reals."""
        if not self.integer:
            return None
        self._exponents += 1
        return self._exponents - 1

    # -- where rules append --------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        name: str,
        layer: str,
        inputs: tuple[str, ...],
        attrs: Attrs,
        *outputs: Value,
        writes: tuple[str, ...] = (),
    ) -> None:
        """Appends a node."""
        names = tuple(v.name for v in outputs)
        self.builder.emit(Node(op, name, layer, inputs, names, attrs, writes), *outputs)

    def defer(self, node: Node) -> None:
        """Appends ``node`` once nothing can refuse the step any more."""
        self._deferred.append(node)

    def enter(self, node: Node, x: str, g: str, factor: float) -> str:
        """The gradient ``g``, in reals, times ``factor`` as that of the operand ``x`` of ``node``."""
        v = self.value(x)
        h, w, c = v.shape
        shape = (1, 1, c) if self.value(g).size == c else v.shape
        grad = Value(f"{x}.entered", shape, self.gradient, exponent=self.new_exponent())
        attrs = EnterGrad((h, w, c), factor, self.operand_site(node, x), "s8" if self.integer else "f32")
        self.emit("enter_grad", f"{node.name}.enter", node.layer, (g,), attrs, grad)
        return grad.name

    def reach(self, x: str, consumer: Node, share: Sums | Shared) -> None:
        """``share`` is what ``consumer`` adds to the gradient of ``x``."""
        first = self.graph.consumers(x)[0]
        if isinstance(share, Sums) and consumer is not first:
            share = Shared(
                self._round(x, share, [], site=self.operand_site(consumer, x), masked=False, tag=consumer.name)
            )
        self._shares.setdefault(x, []).append((consumer, share))

    # -- the walk ------------------------------------------------------------------------------------------

    def run(self) -> Graph:
        """The TRAIN graph."""
        head = self.graph.nodes[-1]
        if head.op != "dense" or head.outputs != self.graph.outputs:
            raise UnsupportedError(
                f"{self.graph.name}: a model to be trained ends in a dense head, not in {head.op!r} ({head.layer}); "
                "attach a head for your classes first"
            )
        forward = [self._choose(n) for n in self.graph.nodes]
        self._loss(head)
        for node in reversed(self.graph.nodes):
            self._step(node, head)
        self._flush()
        kept = [*self._kept.get("", [])]
        for n in forward:
            kept += [n, *self._kept.get(n.name, [])]
        gradients = [n for n in self.builder.nodes if n.op not in UPDATES]
        updates = [n for n in self.builder.nodes if n.op in UPDATES]
        self.builder.nodes = kept + gradients + updates
        return self.builder.build(Stage.TRAIN, (*self.graph.outputs, "loss"))

    def _step(self, node: Node, head: Node) -> None:
        out = node.outputs[0]
        g = f"{out}.grad" if node is head else self._grads.get(out)
        if g is None:
            return
        rule = VJP.get(node.op)
        if rule is None:
            raise UnsupportedError(f"{node.layer}: {node.op!r} has no gradient; train no layer before it")
        at = len(self.builder.nodes)
        rule(self, node, g)
        parameters = [n for n in self.builder.nodes[at:] if n.op not in ("conv2d_dx", "round_grad")]
        if node.op == "conv2d":
            # the sums of the input's gradient are rounded right after they are made
            self.builder.nodes[at:] = [n for n in self.builder.nodes[at:] if n not in parameters]
        for x in dict.fromkeys(node.inputs):
            if x in self._shares and self.graph.consumers(x)[0] is node:
                self._grads[x] = self._finish(x)
        if node.op == "conv2d":
            self.builder.nodes += parameters
        if any(n.op in REFUSES for n in self.builder.nodes[at:]):
            self._flush()

    def _flush(self) -> None:
        self.builder.nodes += self._deferred
        self._deferred = []

    def _loss(self, head: Node) -> None:
        logits = head.outputs[0]
        label = self.builder.add(Value("label", (1,), "s32", Kind.INPUT))
        lr = self.builder.add(Value("lr", (1,), "f32", Kind.INPUT))
        self.emit("check_lr", "check_lr", "lr", (lr,), CheckLr(self._largest_rate()))
        loss, g = Value("loss", (1,), "f32"), Value(f"{logits}.grad", self.value(logits).shape, "f32")
        self.emit("softmax_xent", "softmax_xent", "loss", (logits, label), Attrs(), loss, g)

    # -- one gradient from several shares ------------------------------------------------------------------

    def _finish(self, x: str) -> str:
        """All consumers of ``x`` have spoken: the masked gradient of ``x``."""
        order = {n.name: i for i, n in enumerate(self.graph.nodes)}
        shares = sorted(self._shares.pop(x), key=lambda s: order[s[0].name])
        (owner, first), rest = shares[0], shares[1:]
        further = [s.grad for _, s in rest if isinstance(s, Shared)]
        if isinstance(first, Sums):
            return self._round(x, first, further, site=self.operand_site(owner, x), masked=True, tag=owner.name)
        if rest:
            site = self.operand_site(owner, x)
            return self._round(x, None, [first.grad, *further], site=site, masked=True, tag=x)
        return self._masked(x, first.grad)

    def _masked(self, x: str, grad: str) -> str:
        clamp = self._activation(x)
        if clamp is None:
            return grad
        source, name = self._mask_source(x, clamp)
        out = Value(f"{x}.grad", self.value(x).shape, self.gradient, exponent=self.value(grad).exponent)
        self.emit("mask_grad", f"{x}.mask_grad", self._layer(x), (grad, name), Mask(clamp, source), out)
        return out.name

    def _round(self, x: str, sums: Sums | None, further: list[str], *, site: int, masked: bool, tag: str) -> str:
        clamp = self._activation(x) if masked else None
        source: MaskFrom = "none"
        ins = [v for v in (sums.acc, sums.scale) if v] if sums else []
        if clamp is not None:
            source, name = self._mask_source(x, clamp)
            ins.append(name)
        conv = sums.node.attrs if sums else None
        assert conv is None or isinstance(conv, Conv2d)
        attrs = RoundGrad(site, sums is not None, conv, source, clamp)
        out = Value(f"{x}.grad" if masked else f"{tag}.share", self.value(x).shape, self.gradient,
                    exponent=self.new_exponent())  # fmt: skip
        writes: tuple[str, ...] = ()
        if self.integer:
            start = np.array([RHO_START], np.int8)
            writes = (self.builder.add(Value(f"{tag}.rho", (1,), "s8", Kind.STATE), start),)
        self.emit("round_grad", f"{tag}.round", self._layer(x), (*ins, *further), attrs, out, writes=writes)
        return out.name

    def _layer(self, x: str) -> str:
        producer = self.graph.producer(x)
        return producer.layer if producer else x

    def _activation(self, x: str) -> tuple[float, float] | None:
        """The bounds within which ``x`` passes a gradient; None where it has no activation."""
        producer = self.graph.producer(x)
        a = producer.attrs if producer else None
        return a.clamp if isinstance(a, Conv2d | Add) and a.activation else None

    def _mask_source(self, x: str, clamp: tuple[float, float]) -> tuple[MaskFrom, str]:
        """The stored output itself where it is kept anyway, else one bit per element."""
        if any(t.whole and t.kept == x for t in self.trained.values()):
            return "value", x
        bits = Value(f"{x}.mask", self.value(x).shape, "b1")
        if bits.name not in self.builder.values:
            self.builder.add(bits)
            node = Node("clip_mask", bits.name, self._layer(x), (x,), (bits.name,), Mask(clamp, "bits"))
            self._keep(x, node)
        return "bits", bits.name

    def _keep(self, x: str, node: Node) -> None:
        producer = self.graph.producer(x)
        self._kept.setdefault(producer.name if producer else "", []).append(node)

    # -- choices -------------------------------------------------------------------------------------------

    def _values_that_move(self) -> frozenset[str]:
        """Values behind a trained parameter."""
        layers = {*self.scheme.biases, *self.scheme.weights}
        moving: set[str] = set()
        for n in self.graph.nodes:
            if n.layer in layers or not moving.isdisjoint(n.inputs):
                moving.update(n.outputs)
        return frozenset(moving)

    def _choose(self, node: Node) -> Node:
        """A forward node with its trained parameters turned into states."""
        if node.op == "dense":
            for name in node.inputs[1:]:
                self.builder.values[name] = replace(self.value(name), kind=Kind.STATE)
        if node.layer in self.scheme.biases:
            bias = node.inputs[2]
            self.builder.values[bias] = replace(self.value(bias), kind=Kind.STATE)
        ratio = self.scheme.weights.get(node.layer)
        if ratio is None or node.op != "conv2d":
            return node
        a = node.attrs
        assert isinstance(a, Conv2d)
        w = self.graph.data[node.inputs[1]]
        channels = selected_channels(w, ratio, a.depthwise, node.layer)
        axis = 0 if a.depthwise else 3
        data: Array = np.ascontiguousarray(np.take(w, channels, axis))
        whole = len(channels) == w.shape[axis]
        table = self.builder.const(f"{node.name}.channels", channels, "u16")
        dtype = self.value(node.inputs[1]).dtype
        weight = self.builder.add(Value(f"{node.name}.trained", data.shape, dtype, Kind.STATE), data)
        fraction = None
        if self.fraction_bits:
            v = Value(f"{node.name}.fraction", data.shape, f"s{self.fraction_bits}", Kind.STATE)
            fraction = self.builder.add(v, np.zeros(data.shape, np.int8))
        kept = node.inputs[0] if whole else self._select(node, a, table)
        self.trained[node.name] = Trained(weight, fraction, table, kept, whole)
        return replace(node, inputs=(*node.inputs, weight, table))

    def _select(self, node: Node, a: Conv2d, table: str) -> str:
        x = self.value(node.inputs[0])
        groups = 1 if a.depthwise else a.groups
        kept = Value(f"{node.name}.kept", (*x.shape[:2], self.value(table).size * groups), x.dtype, q=x.q)
        self.builder.add(kept)
        select = Node("select_channels", kept.name, node.layer, (x.name, table), (kept.name,), SelectChannels(groups))
        self._keep(x.name, select)
        return kept.name

    def _largest_rate(self) -> float:
        """The largest constant that lr is multiplied by; 0 in reals and where only the head trains."""
        largest = 0.0
        for node in self.graph.find("conv2d") if self.integer else ():
            a = node.attrs
            assert isinstance(a, Conv2d)
            scale = self.graph.data[node.inputs[3]].astype(np.float32)
            if node.layer in self.scheme.biases:
                largest = max(largest, float(bias_rate(a, scale, self.x_scale(node)).max()))
            if node.layer in self.scheme.weights:
                largest = max(largest, float(weight_rate(a, scale, self.x_scale(node)).max()))
        return largest


def differentiate(graph: Graph, scheme: UpdateScheme) -> Graph:
    """The TRAIN graph of one step of SGD at batch 1 with cross-entropy loss.

    ``graph`` is a verified FLOAT or INT8 graph that ends in a dense head; ``scheme`` names layers of it. New inputs:
    ``label`` (s32) and ``lr`` (f32); new output: ``loss``. Raises UsageError for a scheme that does not fit the graph,
    and UnsupportedError, naming the layer, where a gradient cannot be had."""
    if graph.stage not in (Stage.FLOAT, Stage.INT8):
        raise UsageError(f"{graph.name}: only a model is differentiated, not a graph of stage {graph.stage.value!r}")
    step = Tape(graph, check_scheme(scheme, graph)).run()
    verify_graph(step)
    return step
