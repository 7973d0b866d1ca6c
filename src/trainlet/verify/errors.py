# SPDX-License-Identifier: Apache-2.0
"""How a check fails: one error, which names the thing and the rule."""

from __future__ import annotations

from trainlet.errors import UnsupportedError
from trainlet.ir.graph import Graph, Node, Value

Subject = Node | Value | Graph | str


class VerifyError(UnsupportedError):
    """A graph or a plan breaks a rule. ``where`` names node and layer, or the value; ``rule`` says what has to hold."""

    def __init__(self, where: str, rule: str) -> None:
        super().__init__(f"{where}: {rule}")
        self.where = where
        self.rule = rule


def node_label(node: Node) -> str:
    """How messages name a node."""
    return f"node {node.name!r} ({node.op}, layer {node.layer!r})"


def fail(subject: Subject, rule: str) -> VerifyError:
    """The error of a broken rule, for ``raise``."""
    if isinstance(subject, Node):
        return VerifyError(node_label(subject), rule)
    if isinstance(subject, Value):
        return VerifyError(f"value {subject.name!r}", rule)
    if isinstance(subject, Graph):
        return VerifyError(f"graph {subject.name!r}", rule)
    return VerifyError(subject, rule)


def check(ok: bool, subject: Subject, rule: str) -> None:
    """Raises VerifyError unless ``ok``."""
    if not ok:
        raise fail(subject, rule)
