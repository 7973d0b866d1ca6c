# SPDX-License-Identifier: Apache-2.0
"""What each step of the compiler saves: the same model built with one pass more each time, linked for a chip and run
there. After Figures 1 and 10 of On-Device Training Under 256KB Memory (NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from trainlet.autodiff.scheme import UpdateScheme, resolve
from trainlet.compiler import Passes, compile_model
from trainlet.errors import UnsupportedError
from trainlet.ir.graph import Graph
from trainlet.session.emulator import EmulatorSession
from trainlet.toolchain.targets import Target
from trainlet.toolchain.vectors import LR, synthetic_image
from trainlet.train.statefile import state_sha256

_NONE: Final = Passes(fuse=False, reorder=False, inplace=False, depth_first=False, by_rows=False)
STAGES: Final = (
    ("full update", True, _NONE),
    ("+ sparse update", False, _NONE),
    ("+ reorder", False, Passes(fuse=False, inplace=False, depth_first=False, by_rows=False)),
    ("+ fuse", False, Passes(inplace=False, depth_first=False, by_rows=False)),
    ("+ in place", False, Passes(depth_first=False, by_rows=False)),
    ("+ depth first", False, Passes(by_rows=False)),
    ("+ image by rows", False, Passes()),
)
"""Name, whether everything trains, passes."""

_COLORS: Final = {"arena": "#d98a4e", "state": "#1f5f99", "stack": "#9ad1b8", "rest": "#b9b9b9"}


@dataclass(frozen=True, slots=True)
class Step:
    """One bar: measured bytes of SRAM after a training step, the stack included, and its instructions. ``state_sha256``
    is the same for all steps of one scheme. Where ``problem`` is said there is no such program."""

    name: str
    ram_bytes: int = 0
    arena_bytes: int = 0
    state_bytes: int = 0
    stack_bytes: int = 0
    instructions_per_step: int = 0
    state_sha256: str = ""
    problem: str = ""


def ablate(model: Graph, scheme: UpdateScheme, chip: Target) -> Iterator[Step]:
    """The steps from updating everything to all passes, for a model with a head. ``chip`` has room for all of them (the
    target lab)."""
    for name, everything, passes in STAGES:
        try:
            chosen = resolve("full", model, scheme.bits) if everything else scheme
            yield _measure(name, model, chosen, passes, chip)
        except UnsupportedError as e:
            yield Step(name, problem=str(e))


def _measure(name: str, model: Graph, scheme: UpdateScheme, passes: Passes, chip: Target) -> Step:
    compiled = compile_model(model, scheme, passes=passes)
    session = EmulatorSession(compiled, chip, seed=0)
    session.train_step(synthetic_image(model.image.shape, 0), 0, LR)
    facts = session.facts()
    return Step(
        name,
        facts["ram_bytes"],
        compiled.plan.arena_bytes,
        compiled.state_bytes,
        facts["ram_stack_bytes"],
        facts["instructions_per_step"],
        state_sha256(session.state()),
    )


def ablation_svg(title: str, steps: list[Step]) -> str:
    """Bars of measured SRAM, one for each step."""
    left, width, row = 130, 520, 30
    most = max((s.ram_bytes for s in steps), default=1) or 1
    parts = [f'<text x="12" y="22" font-size="14">{escape(title)}</text>']
    for i, s in enumerate(steps):
        y = 40 + i * row
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(s.name)}</text>')
        rest = s.ram_bytes - s.arena_bytes - s.state_bytes - s.stack_bytes
        x = float(left)
        for kind, nbytes in zip(_COLORS, (s.arena_bytes, s.state_bytes, s.stack_bytes, rest), strict=True):
            wide = round(width * nbytes / most, 2)
            parts.append(f'<rect x="{x}" y="{y}" width="{wide}" height="20" fill="{_COLORS[kind]}"/>')
            x = round(x + wide, 2)
        label = f"{s.ram_bytes / 1024:.1f} KiB" if s.ram_bytes else "cannot be built"
        parts.append(f'<text x="{x + 6}" y="{y + 15}">{label}</text>')
    for k, (kind, color) in enumerate(_COLORS.items()):
        y = 48 + len(steps) * row
        parts.append(f'<rect x="{left + 90 * k}" y="{y}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{left + 90 * k + 17}" y="{y + 10}">{kind}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 100} {80 + len(steps) * row}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def saved(steps: list[Step]) -> list[dict[str, Any]]:
    """For JSON: each step with the share of the full update's SRAM that it needs."""
    first = next((s.ram_bytes for s in steps if s.ram_bytes), 0)
    return [
        {"name": s.name, "problem": s.problem} if s.problem else {
            "name": s.name,
            "ram_bytes": s.ram_bytes,
            "arena_bytes": s.arena_bytes,
            "state_bytes": s.state_bytes,
            "stack_bytes": s.stack_bytes,
            "instructions_per_step": s.instructions_per_step,
            "state_sha256": s.state_sha256,
            "of_first": s.ram_bytes / first,
        }
        for s in steps
    ]  # fmt: skip
