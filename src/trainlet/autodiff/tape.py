# SPDX-License-Identifier: Apache-2.0
"""The tape that gradient rules write on (``ops.op.Tape``): what they may ask of the model and of what trains, and how
the shares of several consumers become one gradient with one mask and one rounding.

One integer tensor has one rounding: the consumer that comes first owns it, the others' shares are added before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from trainlet.autodiff.scheme import UpdateScheme, selected_channels
from trainlet.ir import Array, Graph, GraphBuilder, Kind, Node, Operands, Stage, Value
from trainlet.ops import FIRST_PARAM, OPS, EnterGrad, Mask, MaskFrom, No, Param, RoundGrad, SelectChannels
from trainlet.ops.numerics import RHO_START
from trainlet.ops.op import Channels, Move, Sums, Trained

SITES_PER_NODE: Final = 64
LR: Final = "lr"


@dataclass(frozen=True, slots=True)
class _Share:
    """What ``consumer`` adds to the gradient of the value at its operand."""

    consumer: Node
    operand: str
    part: Sums | Move


class Tape:
    """The walk in progress; see ``ops.op.Tape`` for what rules use."""

    def __init__(self, graph: Graph, scheme: UpdateScheme) -> None:
        self.graph, self.scheme = graph, scheme
        self.builder = GraphBuilder(graph.name, graph)
        self.integer = graph.stage is Stage.INT8
        self.gradient = "s8" if self.integer else "f32"
        self.sums = "s32" if self.integer else "f32"
        self.fraction_bits = scheme.fraction_bits if self.integer else 0
        self.rate = LR
        self.kept: dict[str, list[Node]] = {}  # producer ("" for the input) -> nodes to run right after it
        self.grads: dict[str, str] = {}
        self.early: list[Node] = []  # updates that come right behind what may refuse the step
        self._position = {n.name: i for i, n in enumerate(graph.nodes)}
        self._trained: dict[tuple[str, str], Trained] = {}
        self._shares: dict[str, list[_Share]] = {}
        self._reached: set[str] = set()
        self._deferred: list[Node] = []
        self._exponents = 0
        self._moving = self._values_that_move()

    # -- what rules ask ------------------------------------------------------------------------------------------

    def value(self, name: str) -> Value:
        return self.builder.values[name]

    def scale_of(self, name: str) -> float:
        q = self.value(name).q
        return q.scale if q else 1.0

    def needs_gradient(self, name: str) -> bool:
        return name in self._moving

    def trained(self, node: Node, operand: str) -> Trained | None:
        return self._trained.get((node.name, operand))

    def site(self, node: Node, operand: str) -> int:
        """docs/arithmetic.md, section 2."""
        row = OPS[node.op]
        params = [p.operand for p in row.params]
        names = [o.name for o in row.operands]
        slot = FIRST_PARAM + params.index(operand) if operand in params else names.index(operand)
        return SITES_PER_NODE * self._position[node.name] + slot

    def takes_reals(self, name: str) -> bool:
        """A maker that could take reals still cannot where it has to add several gradients."""
        maker = self.graph.producer(name)
        if maker is None or len(self.graph.consumers(name)) > 1:
            return False
        takes = OPS[maker.op].takes_reals
        return not isinstance(takes, No) and takes(maker, self.value(maker["x"]))

    def same_exponent(self, name: str) -> int | None:
        return self.value(name).exponent

    # -- where rules write ---------------------------------------------------------------------------------------

    def keep(self, node: Node, *made: Value) -> None:
        for v in made:
            self.builder.add(v)
        producer = self.graph.producer(node["x"])
        self.kept.setdefault(producer.name if producer else "", []).append(node)

    def emit(self, node: Node, *made: Value) -> None:
        self.builder.emit(node, *made)

    def defer(self, node: Node) -> None:
        self._deferred.append(node)

    def enter(self, node: Node, operand: str, g: str, factor: float) -> str:
        x = self.value(node[operand])
        h, w, c = x.shape
        shape = (1, 1, c) if self.value(g).size == c else (h, w, c)
        grad = Value(f"{x.name}.entered", shape, self.gradient, exponent=self._new_exponent())
        attrs = EnterGrad((h, w, c), factor, self.site(node, operand), "s8" if self.integer else "f32")
        self.emit(Node("enter_grad", f"{node.name}.enter", node.layer, Operands(g=g), (grad.name,), attrs), grad)
        return grad.name

    def reach(self, node: Node, operand: str, share: Sums | Move) -> None:
        x = node[operand]
        self._reached.add(share.acc if isinstance(share, Sums) else share.grad)
        if isinstance(share, Sums) and node is not self.graph.consumers(x)[0]:
            share = Move(self._round(x, share, (), self.site(node, operand), masked=False, tag=node.name))
            self._reached.add(share.grad)
        self._shares.setdefault(x, []).append(_Share(node, operand, share))

    # -- what the walk uses --------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Nothing can refuse the step any more: what was deferred is due."""
        self.builder.nodes += self._deferred
        self.early += self._deferred
        self._deferred = []

    def contributing(self, nodes: Iterable[Node]) -> list[Node]:
        """Those of ``nodes`` that make what has been reached; the others are the updates of parameters."""
        wanted, found = set(self._reached), []
        for n in reversed([*nodes]):
            if not wanted.isdisjoint(n.outputs):
                wanted.update(n.inputs)
                found.append(n)
        return found[::-1]

    def settle(self, node: Node) -> None:
        """Finishes the gradients of those operands whose first consumer is ``node``: all others have spoken."""
        for x in dict.fromkeys(node.inputs):
            if x in self._shares and self.graph.consumers(x)[0] is node:
                self.grads[x] = self._finish(x)

    # -- one gradient from several shares ------------------------------------------------------------------------

    def _finish(self, x: str) -> str:
        """The masked gradient of ``x``."""
        first, *rest = sorted(self._shares.pop(x), key=lambda s: self._position[s.consumer.name])
        site = self.site(first.consumer, first.operand)
        further = tuple(s.part.grad for s in rest if isinstance(s.part, Move))
        if isinstance(first.part, Sums):
            return self._round(x, first.part, further, site, masked=True, tag=first.consumer.name)
        if rest:
            return self._round(x, None, (first.part.grad, *further), site, masked=True, tag=x)
        return self._masked(x, first.part.grad)

    def _masked(self, x: str, grad: str) -> str:
        clamp = self._activation(x)
        if clamp is None:
            return grad
        source, name = self._mask_source(x, clamp)
        out = Value(f"{x}.grad", self.value(x).shape, self.gradient, exponent=self.value(grad).exponent)
        read = Operands(g=grad, mask=name)
        self.emit(Node("mask_grad", f"{x}.mask_grad", self._layer(x), read, (out.name,), Mask(clamp, source)), out)
        return out.name

    def _round(self, x: str, sums: Sums | None, further: tuple[str, ...], site: int, *, masked: bool, tag: str) -> str:
        clamp = self._activation(x) if masked else None
        no_mask: tuple[MaskFrom, None] = ("none", None)
        source, mask = self._mask_source(x, clamp) if clamp else no_mask
        levels, bound = (sums.levels, sums.bound) if sums else (0, 0)
        attrs = RoundGrad(site, source, clamp, levels, bound)
        name = f"{x}.grad" if masked else f"{tag}.share"
        out = Value(name, self.value(x).shape, self.gradient, exponent=self._new_exponent())
        acc, scale = (sums.acc, sums.scale) if sums else (None, None)
        read = Operands(acc=acc, scale=scale, mask=mask, further=further)
        rho = self._rho(tag) if self.integer else None
        node = Node("round_grad", f"{tag}.round", self._layer(x), read, (name,), attrs, Operands(rho=rho))
        self.emit(node, out)
        return name

    def _rho(self, tag: str) -> str:
        return self.builder.add(Value(f"{tag}.rho", (1,), "s8", Kind.STATE), np.array([RHO_START], np.int8))

    def _new_exponent(self) -> int | None:
        """A slot of the run-time exponent table; None in reals."""
        if not self.integer:
            return None
        self._exponents += 1
        return self._exponents - 1

    def _layer(self, x: str) -> str:
        producer = self.graph.producer(x)
        return producer.layer if producer else x

    def _activation(self, x: str) -> tuple[float, float] | None:
        """The bounds within which ``x`` passes a gradient; None where it has no activation."""
        producer = self.graph.producer(x)
        activation = OPS[producer.op].activation if producer else No("it is given")
        return None if producer is None or isinstance(activation, No) else activation(producer.attrs)

    def _mask_source(self, x: str, clamp: tuple[float, float]) -> tuple[MaskFrom, str]:
        """The stored output itself where it is kept anyway, else one bit per element."""
        if any(t.whole and t.kept == x for t in self._trained.values()):
            return "value", x
        bits = Value(f"{x}.mask", self.value(x).shape, "b1")
        if bits.name not in self.builder.values:
            node = Node("clip_mask", bits.name, self._layer(x), Operands(x=x), (bits.name,), Mask(clamp, "bits"))
            self.keep(node, bits)
        return "bits", bits.name

    # -- what trains ---------------------------------------------------------------------------------------------

    def _values_that_move(self) -> frozenset[str]:
        """Values behind a trained parameter."""
        layers = {*self.scheme.biases, *self.scheme.weights}
        moving: set[str] = set()
        for n in self.graph.nodes:
            if n.layer in layers or not moving.isdisjoint(n.inputs):
                moving.update(n.outputs)
        return frozenset(moving)

    def choose(self, node: Node) -> Node:
        """A forward node with its trained parameters turned into states."""
        for p in OPS[node.op].params:
            if p.always or node.layer in self.scheme.trains(p.operand):
                node = self._train(node, p)
        return node

    def _train(self, node: Node, p: Param) -> Node:
        name = node[p.operand]
        if isinstance(p.channels, No):
            self.builder.values[name] = replace(self.value(name), kind=Kind.STATE)
            self._trained[node.name, p.operand] = Trained(name, None, None, None, True)
            return node
        return self._train_channels(node, p.operand, p.channels)

    def _train_channels(self, node: Node, operand: str, rule: Channels) -> Node:
        """Some or all channels of a weight, compact."""
        w, axis = self.graph.data[node[operand]], rule.axis(node.attrs)
        channels = selected_channels(w, self.scheme.weights[node.layer], axis=axis, layer=node.layer)
        data: Array = np.ascontiguousarray(np.take(w, channels, axis))
        whole = len(channels) == w.shape[axis]
        table = self.builder.const(f"{node.name}.channels", channels, "u16")
        dtype = self.value(node[operand]).dtype
        state = self.builder.add(Value(f"{node.name}.trained", data.shape, dtype, Kind.STATE), data)
        fraction = None
        if self.fraction_bits:
            v = Value(f"{node.name}.fraction", data.shape, f"s{self.fraction_bits}", Kind.STATE)
            fraction = self.builder.add(v, np.zeros(data.shape, np.int8))
        x = node[rule.operand]
        kept = x if whole else self._select(node, x, table, rule.groups(node.attrs))
        self._trained[node.name, operand] = Trained(state, fraction, table, kept, whole)
        return node.reading(trained=state, channels=table)

    def _select(self, node: Node, x: str, table: str, groups: int) -> str:
        v = self.value(x)
        kept = Value(f"{node.name}.kept", (*v.shape[:2], self.value(table).size * groups), v.dtype, q=v.q)
        read, attrs = Operands(x=x, channels=table), SelectChannels(groups)
        self.keep(Node("select_channels", kept.name, node.layer, read, (kept.name,), attrs), kept)
        return kept.name

    def largest_rate(self) -> float:
        """The largest constant that lr is multiplied by; 0 in reals and where only the head trains."""
        found = [0.0]
        for node in self.graph.nodes if self.integer else ():
            for p in OPS[node.op].params:
                if not isinstance(p.rate, No) and self.trained(node, p.operand):
                    scale = self.graph.data[node["scale"]].astype(np.float32)
                    found.append(float(p.rate(node.attrs, scale, self.scale_of(node["x"])).max()))
        return max(found)
