# SPDX-License-Identifier: Apache-2.0
"""What the emitted C can do today, in one rule. A graph can be sound, and the reference can run it, and there is no C
for it yet: that is said here, by name, instead of C that computes something else."""

from __future__ import annotations

from trainlet.ir import Graph, Kind, Stage
from trainlet.verify.errors import check, fail


def verify_compilable(graph: Graph) -> None:
    """Raises VerifyError naming what of an INT8, TRAIN or LOWERED graph the C has no form for: it takes one int8 image
    (H, W, C) and gives the logits of one dense head, the last layer of the model, which reads int8 features."""
    check(graph.stage is not Stage.FLOAT, graph, "C computes in integers; quantize the model first")
    images = [v for v in graph.values.values() if v.kind is Kind.INPUT and v.name not in ("label", "lr")]
    for v in images:
        check(len(v.shape) == 3 and v.dtype == "s8", v, f"the C takes an int8 image (H, W, C), not {v.dtype} {v.shape}")
    check(len(images) == 1, graph, f"the C takes one image, not {', '.join(v.name for v in images) or 'none'}")
    heads = graph.find("dense")
    if not heads:
        raise fail(graph, "the C gives the logits of a dense head; attach a head for your classes first")
    for node in heads:
        x = graph.values[node.inputs[0]]
        check(x.dtype == "s8", node, f"the C computes a dense layer from int8 features, and {x.name!r} is {x.dtype}")
    for node in heads[:-1]:
        check(False, node, f"the C has one dense head, and {heads[-1].name!r} is another")
    head = heads[0]
    gives = graph.outputs[:1] == head.outputs and len(graph.outputs) == 1 + bool(graph.find("softmax_xent"))
    check(gives, graph, f"the C gives the output of its head {head.name!r} and nothing else, not {graph.outputs}")
    behind = [n for n in graph.nodes if head.outputs[0] in n.inputs and n.op != "softmax_xent"]
    check(not behind, head, "the dense head is the last layer of a model")
