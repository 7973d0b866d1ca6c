# SPDX-License-Identifier: Apache-2.0
"""What the emitted C can do today, in one rule. A graph can be sound, and the reference can run it, and there is no C
for it yet: that is said here, by name, instead of C that computes something else."""

from __future__ import annotations

from trainlet.ir import Graph, Kind, Node, Stage
from trainlet.ops.roles import heads
from trainlet.verify.errors import check, fail


def verify_compilable(graph: Graph) -> None:
    """Raises VerifyError naming what of an INT8 graph the C has no form for: it takes one int8 image (H, W, C) and
    gives the logits of one head, the last layer of the model, which reads int8 features."""
    check(
        graph.stage is Stage.INT8, graph, f"C is made from stage int8, not {graph.stage.value}; quantize a float model"
    )
    images = [v for v in graph.values.values() if v.kind is Kind.INPUT]
    for v in images:
        check(len(v.shape) == 3 and v.dtype == "s8", v, f"the C takes an int8 image (H, W, C), not {v.dtype} {v.shape}")
    check(len(images) == 1, graph, f"the C takes one image, not {', '.join(v.name for v in images) or 'none'}")
    _check_head(graph, heads(graph))


def _check_head(graph: Graph, found: list[Node]) -> None:
    if not found:
        raise fail(graph, "the C gives the logits of a dense head; attach a head for your classes first")
    for node in found:
        x = graph.values[node["x"]]
        check(
            x.dtype == "s8", node, f"the C computes a {node.op} layer from int8 features, and {x.name!r} is {x.dtype}"
        )
    for node in found[:-1]:
        check(False, node, f"the C has one head, and {found[-1].name!r} is another")
    (head,) = found
    check(graph.outputs == head.outputs, graph, f"the C gives what {head.name!r} makes and nothing else")
    behind = [n.name for n in graph.nodes if head.output in n.inputs]
    check(not behind, head, f"the head is the last layer of a model, and {behind} read it")
