# SPDX-License-Identifier: Apache-2.0
"""The table of operators and that of kernels, filled by the families (``ops/__init__.py``). A row with a hole is an
error when trainlet is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trainlet.ir import Graph, Node, Stage
from trainlet.ops.op import FIRST_PARAM, Core, Kernel, No, Op

OPS: Final[dict[str, Op]] = {}
KERNELS: Final[dict[str, Kernel]] = {}


def register(rows: Iterable[Op]) -> None:
    """Adds the rows of a family. ValueError naming the operator and the fact where one contradicts another."""
    for row in rows:
        _check(row)
        OPS[row.name] = row
        KERNELS.update((k.name, k) for k in _kernels(row))


def _kernels(row: Op) -> tuple[Kernel, ...]:
    return () if isinstance(row.kernels, No) else row.kernels


def _check(row: Op) -> None:
    names = [o.name for o in row.operands]
    model, lowered = Stage.INT8 in row.stages, Stage.LOWERED in row.stages
    rules = {
        "its name is its own": row.name not in OPS,
        "operands have different names": len(set(names)) == len(names) <= FIRST_PARAM,
        "parameters are operands": all(p.operand in names for p in row.params),
        "it is admitted to a stage": bool(row.stages),
        "it has kernels exactly where stage lowered admits it": lowered == bool(_kernels(row)),
        "kernels have names of their own": not any(k.name in KERNELS for k in _kernels(row)),
        "what a model may contain can be quantized": model != isinstance(row.quantize, No),
        "it has a gradient, or a reason why not": not model or row.vjp is not None,
        "only what makes no gradient has parameters": not row.params or isinstance(row.exponent, No),
        "a kernel writes over operands exactly where the row says so": _agree_on_memory(row),
    }
    wrong = [rule for rule, holds in rules.items() if not holds]
    if wrong:
        raise ValueError(f"operator {row.name!r}: {wrong[0]}")


def _agree_on_memory(row: Op) -> bool:
    can = any(not isinstance(k.in_place, No) for k in _kernels(row))
    return can != isinstance(row.overwrites, No) or not _kernels(row)


def kernel_of(node: Node) -> Kernel:
    """The kernel that was chosen for a node. ValueError where none has been."""
    if node.kernel not in KERNELS:
        raise ValueError(f"{node.name}: no kernel has been chosen for {node.op!r}; run the pass choose_kernels")
    return KERNELS[node.kernel]


def choose_kernel(graph: Graph, node: Node, target: Core) -> Kernel | None:
    """The first kernel of the operator's row that applies to the node and the target, or None."""
    return next((k for k in _kernels(OPS[node.op]) if k.applies(graph, node, target)), None)


def scratch_bytes(graph: Graph, node: Node) -> int:
    """Scratch of a node's kernel in bytes, with what writing over an operand takes."""
    kernel = kernel_of(node)
    if not node.overwrites:
        return kernel.scratch(graph, node)
    if isinstance(kernel.in_place, No):
        raise ValueError(f"{node.name}: {kernel.name} cannot write over {node.overwrites!r}: {kernel.in_place.why}")
    return kernel.scratch(graph, node) + kernel.in_place(graph, node)


def overwritable(node: Node) -> tuple[str, ...]:
    """What of its operands the node's kernel may write over, were it of the type of the output."""
    rule = OPS[node.op].overwrites
    if isinstance(rule, No) or not rule.when(node.attrs):
        return ()
    if node.kernel and isinstance(kernel_of(node).in_place, No):
        return ()
    return tuple(v for o in rule.operands for v in node.all(o))


def runs_by_rows(node: Node) -> bool:
    """Whether the rows of its output can be made one by one."""
    return not isinstance(OPS[node.op].rows, No)
