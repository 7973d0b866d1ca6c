# SPDX-License-Identifier: Apache-2.0
"""Accuracy curves as an SVG: no library, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 640
HEIGHT: Final = 300
LEFT: Final = 56
TOP: Final = 16
RIGHT: Final = 190
BOTTOM: Final = 44


@dataclass(frozen=True, slots=True)
class Curve:
    """``points`` are (x, accuracy from 0 to 1), ascending in x; ``label`` stands behind the last one."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]


def accuracy_svg(curves: Sequence[Curve], axis: str, ticks: Sequence[int], low: float = 0.0) -> str:
    """The picture. ``axis`` names x, which goes from the first to the last of ``ticks``; accuracy goes from ``low``, a
    multiple of 0.1, to 1, and what lies below is drawn there."""
    first, last = ticks[0], ticks[-1]

    def place(x: float, accuracy: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / max(last - first, 1)
        down = TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - max(accuracy, low)) / (1.0 - low)
        return round(right, 1), round(down, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for percent in range(round(100 * low), 101, 10):
        x0, y = place(first, percent / 100)
        parts.append(f'<line x1="{x0}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y + 4}" text-anchor="end" fill="#555">{percent} %</text>')
    for tick in ticks:
        x, y = place(tick, low)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle" fill="#555">{tick}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">{axis}</text>')
    for c in curves:
        places = [place(x, a) for x, a in c.points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{c.color}" stroke-width="2.5"/>')
        x, y = places[-1]
        label = f"{100 * c.points[-1][1]:.1f} %  {c.label}"
        parts.append(f'<text x="{x + 8}" y="{y + 4}" fill="{c.color}">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])
