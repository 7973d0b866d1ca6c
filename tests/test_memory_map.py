# SPDX-License-Identifier: Apache-2.0
"""The picture of the arena: every buffer where the plan puts it, and what exists at the peak by name."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from random_nets import NAMED, named_case

from trainlet.compiler import Compiled, compile_model
from trainlet.measure.memory_map import KINDS, buffers, memory_svg

SVG = "{http://www.w3.org/2000/svg}"


def compiled(name: str) -> Compiled:
    case = named_case(name, 12)
    return compile_model(case.model, case.scheme)


@pytest.mark.parametrize("name", NAMED)
def test_no_two_buffers_cover_each_other(name: str) -> None:
    """But for rows that a stream writes over rows it has used up, which are one buffer here."""
    c = compiled(name)
    made = buffers(c)
    assert max(b.begin + b.nbytes for b in made) == c.plan.arena_bytes
    for i, a in enumerate(made):
        for b in made[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or a.begin + a.nbytes <= b.begin or b.begin + b.nbytes <= a.begin, (a, b)


def test_the_picture_shows_each_buffer_and_names_the_peak() -> None:
    c = compiled("wide")
    root = ElementTree.fromstring(memory_svg(c))
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    assert len(titles) == len(buffers(c))
    texts = [t.text or "" for t in root.iter(f"{SVG}text")]
    assert any(f"{c.plan.lower_bound} bytes" in t for t in texts)
    node = c.graph.nodes[c.plan.peak]
    assert f"{node.layer}: {node.op}" in texts
    assert {label for label, _ in KINDS.values()} <= set(texts)


def test_kinds() -> None:
    made = {b.name: b for b in buffers(compiled("add_with_activation"))}
    assert {b.kind for b in made.values()} <= set(KINDS)
    assert all(b.kind == "gradient" for name, b in made.items() if name.endswith(".grad") and "logits" not in name)
    assert all(b.kind == "kept" for name, b in made.items() if name.endswith((".kept", ".mask")))
