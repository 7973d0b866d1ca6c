# SPDX-License-Identifier: Apache-2.0
"""From a model to its training step: a reverse walk towards the chosen parameters only.

The TRAIN graph is the forward pass (which also keeps what the backward pass needs: masks, selected channels), the
loss, the head's update, all gradients, and then all other updates: the classical order, in which every gradient is
computed with the weights before their update.
"""

from __future__ import annotations

from trainlet.autodiff.scheme import UpdateScheme, check_scheme
from trainlet.autodiff.tape import LR, Tape
from trainlet.errors import UnsupportedError, UsageError
from trainlet.ir import Attrs, Graph, Kind, Node, Operands, Stage, Value
from trainlet.ops import OPS, CheckLr, No
from trainlet.ops.roles import heads
from trainlet.verify import verify_graph

LOSS = "softmax_xent"


def differentiate(graph: Graph, scheme: UpdateScheme) -> Graph:
    """The TRAIN graph of one step of SGD at batch 1 with cross-entropy loss.

    ``graph`` is a verified FLOAT or INT8 graph that ends in a dense head; ``scheme`` names layers of it. New inputs:
    ``label`` (s32) and ``lr`` (f32); new output: ``loss``. Raises UsageError for a scheme that does not fit the graph,
    and UnsupportedError, naming the layer, where a gradient cannot be had."""
    if graph.stage not in (Stage.FLOAT, Stage.INT8):
        raise UsageError(f"{graph.name}: only a model is differentiated, not a graph of stage {graph.stage.value!r}")
    tape = Tape(graph, check_scheme(scheme, graph))
    head = _head(graph)
    _need_readers(graph)
    forward = [tape.choose(n) for n in graph.nodes]
    targets, losses = _loss(tape, head)
    for node in reversed(graph.nodes):
        _step(tape, node)
    tape.flush()
    kept = [*tape.kept.get("", [])]
    for n in forward:
        kept += [n, *tape.kept.get(n.name, [])]
    made = tape.builder.nodes
    updates = [n for n in made if not n.outputs and n.stores and n not in tape.early]
    tape.builder.nodes = kept + [n for n in made if n not in updates] + updates
    step = tape.builder.build(Stage.TRAIN, graph.outputs, targets=targets, rate=LR, losses=losses)
    verify_graph(step)
    return step


def _head(graph: Graph) -> Node:
    last, found = graph.nodes[-1], heads(graph)
    if last not in found or last.outputs != graph.outputs:
        raise UnsupportedError(
            f"{graph.name}: a model to be trained ends in a dense head, not in {last.op!r} ({last.layer}); "
            "attach a head for your classes first"
        )
    return last


def _need_readers(graph: Graph) -> None:
    """UnsupportedError for a layer that nothing reads: its input would wait for a gradient from it."""
    read = {v for n in graph.nodes for v in n.inputs} | set(graph.outputs)
    dead = next((n for n in graph.nodes if not read & set(n.outputs)), None)
    if dead is not None:
        raise UnsupportedError(
            f"{graph.name}: nothing reads what {dead.layer} gives; leave that layer out of the model"
        )


def _loss(tape: Tape, head: Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the loss compares with, and the loss itself, by name."""
    rule = OPS[LOSS].loss
    assert not isinstance(rule, No)
    logits = tape.value(head.output)
    target = tape.builder.add(rule.target(logits))
    lr = tape.builder.add(Value(LR, (1,), "f32", Kind.INPUT))
    tape.emit(Node("check_lr", "check_lr", "lr", Operands(lr=lr), (), CheckLr(tape.largest_rate())))
    loss, g = Value("loss", (1,), "f32"), Value(f"{logits.name}.grad", logits.shape, "f32")
    read = Operands(logits=logits.name, label=target)
    tape.emit(Node(LOSS, LOSS, "loss", read, (loss.name, g.name), Attrs()), loss, g)
    tape.grads[logits.name] = g.name
    return (target,), (loss.name,)


def _step(tape: Tape, node: Node) -> None:
    """What a node of the model adds to the step: gradients first, then what updates its own parameters."""
    g = tape.grads.get(node.output)
    if g is None:
        return
    rule = OPS[node.op].vjp
    if isinstance(rule, No):
        raise UnsupportedError(f"{node.layer}: {node.op!r} has no gradient, since {rule.why}; train no layer before it")
    nodes = tape.builder.nodes
    at = len(nodes)
    rule(tape, node, g)
    made = nodes[at:]
    shares = tape.contributing(made)
    nodes[at:] = shares
    tape.settle(node)  # the sums of an input's gradient are rounded right after they are made
    nodes += [n for n in made if n not in shares]
    if any(OPS[n.op].refuses for n in shares):
        tape.flush()
