# SPDX-License-Identifier: Apache-2.0
"""The results of a selection as JSON and as pictures: contributions, the course of the search, loss against memory. The
pictures are drawn from the JSON alone, without a library; the same numbers give the same bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.select.analyze import Analysis
from trainlet.select.cuts import Step, gap
from trainlet.select.folder import writing
from trainlet.select.problem import RATIOS, Contributions, Frozen, Selection
from trainlet.train.statefile import write_atomic

COLORS: Final = {
    "selected": "#c0392b",
    "published": "#1f5f99",
    "last layers": "#7a6a00",
    "biases": "#3a7d44",
    "head": "#666666",
    "full": "#8e44ad",
}
_SHADES: Final = dict(zip(RATIOS, ("#cfe1f0", "#9cc3e0", "#5a97c4", "#1f5f99"), strict=True))
_TICKS: Final = 5


@dataclass(frozen=True)
class Point:
    """A scheme that was trained to be compared: its series, planned SRAM in bytes, and means over its seeds."""

    series: str
    scheme: str
    ram_bytes: int
    loss: float | None
    accuracy: float | None
    losses: tuple[float, ...]
    problem: str = ""


# --- JSON -------------------------------------------------------------------------------------------------------


def contributions_json(analysis: Analysis) -> dict[str, Any]:
    """What was measured, what lies between, and how well the cheap estimates rank."""
    c = analysis.contributions
    return {
        "model": c.model,
        "bits": c.bits,
        "layers": list(c.layers),
        "reference_depth": analysis.reference,
        "noise": c.noise,
        **_figures(c),
        "measured": [{**asdict(m), "gains": list(m.gains), "gain": m.gain} for m in analysis.measured],
        "cheap": {name: _figures(cheap) for name, cheap in analysis.cheap.items()},
        "rank_correlation": {name: dict(values) for name, values in analysis.agreement.items()},
    }


def _figures(c: Contributions) -> dict[str, Any]:
    weights: dict[str, dict[str, float]] = {}
    for (layer, ratio), gain in c.weights.items():
        weights.setdefault(layer, {})[str(ratio)] = gain
    return {"biases": {str(k): v for k, v in c.biases.items()}, "weights": weights}


def selection_json(selection: Selection, steps: Sequence[Step]) -> dict[str, Any]:
    """What was chosen, what it costs, how good it is known to be, and the course of the search or of freezing."""
    choice = selection.choice
    return {
        "method": selection.method,
        "depth": choice.depth,
        "weights": dict(choice.weights),
        "bits": choice.bits,
        "value": choice.value,
        "planned_bytes": selection.cost,
        "bound": selection.bound,
        "gap": gap(selection),
        "evaluations": selection.evaluations,
        "search": [_step(s) for s in steps],
        "course": [_frozen(f) for f in selection.course],
    }


def _frozen(f: Frozen) -> dict[str, Any]:
    return {
        "frozen": f.part,
        "depth": f.choice.depth,
        "weights": dict(f.choice.weights),
        "planned_bytes": f.cost,
        "loss": _number(f.trained.loss),
        "accuracy": f.trained.accuracy,
        "accuracy_spread": f.trained.spread,
    }


def _step(s: Step) -> dict[str, float | int | None]:
    return {"evaluations": s.evaluations, "best": _number(s.best), "bound": _number(s.bound)}


def _number(v: float | None) -> float | None:
    return v if v is not None and math.isfinite(v) else None


def points_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """All schemes that were compared."""
    return [{**asdict(p), "losses": list(p.losses)} for p in points]


# --- pictures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """A plot's rectangle in the picture and the ranges of its axes."""

    left: float
    top: float
    width: float
    height: float
    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, v: float) -> float:
        low, high = self.xs
        return round(self.left + self.width * (v - low) / (high - low), 1)

    def y(self, v: float) -> float:
        low, high = self.ys
        return round(self.top + self.height * (high - v) / (high - low), 1)

    def axes(self, title: str, x_name: str, x_ticks: Sequence[tuple[float, str]]) -> list[str]:
        bottom, right = self.top + self.height, self.left + self.width
        parts = [_text(self.left, self.top - 12, title, size=14)]
        for v in _round_ticks(*self.ys):
            y = self.y(v)
            parts.append(f'<line x1="{self.left}" x2="{right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            parts.append(_text(self.left - 6, y + 4, f"{v:g}", "end"))
        parts += [_text(self.x(v), bottom + 16, label, "middle") for v, label in x_ticks]
        parts.append(_text(self.left + self.width / 2, bottom + 34, x_name, "middle"))
        if self.ys[0] < 0 < self.ys[1]:
            parts.append(f'<line x1="{self.left}" x2="{right}" y1="{self.y(0)}" y2="{self.y(0)}" stroke="#888"/>')
        return parts

    def line(self, points: Sequence[tuple[float, float]], color: str, dash: str = "") -> str:
        path = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashed}/>'

    def dot(self, x: float, y: float, color: str, tip: str) -> str:
        where = f'cx="{self.x(x)}" cy="{self.y(y)}" r="4"'
        return f'<circle {where} fill="{color}"><title>{escape(tip)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str = "start", color: str = "#333", size: int = 12) -> str:
    place = f'x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}" fill="{color}" font-size="{size}"'
    return f"<text {place}>{escape(text)}</text>"


def _picture(width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A little more than what is there, and never empty."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (_TICKS - 1) for i in range(_TICKS)]


def _round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about as many as ``_TICKS``."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{i * step:.6g}") for i in range(first, last + 1)]


def contributions_svg(data: Mapping[str, Any]) -> str:
    """From ``contributions_json``: on the left biases by depth, measured ones as dots; on the right the weights of
    every layer that has any, a bar for each ratio, pale where it is interpolated."""
    biases = {int(k): float(v) for k, v in data["biases"].items()}
    weights: Mapping[str, Mapping[str, float]] = data["weights"]
    measured = {(m["layer"], m["ratio"]): m for m in data["measured"]}
    layers = [n for n in data["layers"] if n in weights]
    gains = [0.0, *biases.values()]
    left = _Frame(60, 36, 300, 260, (0, max(1, *biases)), _range(gains))
    depths = [(float(k), str(k)) for k in sorted(biases) if k % max(1, max(biases) // 6) == 0]
    parts = left.axes("loss taken away by biases", "biases of the last k layers", depths)
    parts.append(left.line(sorted(biases.items()), COLORS["biases"]))
    dots = [m for m in data["measured"] if not m["layer"]]
    parts += [left.dot(m["depth"], m["gain"], COLORS["biases"], f"last {m['depth']}: {m['gain']:.4f}") for m in dots]
    if not layers:
        return _picture(420, 360, parts)
    values = [0.0, *(float(g) for n in layers for g in weights[n].values())]
    width = max(320, 34 * len(layers))
    right = _Frame(430, 36, width, 260, (0, len(layers)), _range(values))
    parts += right.axes("loss taken away by a layer's weights, over the biases", "", [])
    for i, layer in enumerate(layers):
        parts += _bars(right, i, layer, weights[layer], measured)
        x, y = right.x(i + 0.6), right.top + right.height + 12
        parts.append(f'<g transform="rotate(-50 {x} {y})">{_text(x, y, layer, "end", size=10)}</g>')
    for i, (ratio, color) in enumerate(_SHADES.items()):
        parts.append(f'<rect x="{430 + 120 * i}" y="400" width="12" height="12" fill="{color}"/>')
        parts.append(_text(448 + 120 * i, 410, f"{ratio:g} of inputs"))
    return _picture(450 + width, 430, parts)


def _bars(
    frame: _Frame, i: int, layer: str, gains: Mapping[str, float], measured: Mapping[tuple[str, float], object]
) -> list[str]:
    made, width = [], 0.8 / len(RATIOS)
    for j, ratio in enumerate(RATIOS):
        gain = gains.get(str(ratio))
        if gain is None:
            continue
        x0, x1, y0, y1 = frame.x(i + 0.1 + j * width), frame.x(i + 0.1 + (j + 1) * width), frame.y(0), frame.y(gain)
        known = (layer, ratio) in measured
        tip = f"{layer} at {ratio:g}: {gain:.4f}{'' if known else ', interpolated'}"
        place = f'x="{x0}" y="{min(y0, y1)}" width="{round(x1 - x0, 1)}" height="{round(abs(y1 - y0), 1)}"'
        look = f'fill="{_SHADES[ratio]}"' + ("" if known else ' fill-opacity="0.35"')
        made.append(f"<rect {place} {look}><title>{escape(tip)}</title></rect>")
    return made


def search_svg(data: Mapping[str, Any]) -> str:
    """From ``selection_json``: the best value found and the bound, over the choices that were looked at; of freezing
    the accuracy over what was frozen."""
    if data["course"]:
        return _course_svg([f["accuracy"] for f in data["course"]])
    steps: Sequence[Mapping[str, Any]] = data["search"]
    best = [(s["evaluations"], s["best"]) for s in steps if s["best"] is not None]
    bound = [(s["evaluations"], s["bound"]) for s in steps if s["bound"] is not None]
    best = best or [(data["evaluations"], data["value"])]
    last = max(1, *(x for x, _ in (*best, *bound)))
    frame = _Frame(70, 36, 460, 240, (0, last), _range([y for _, y in (*best, *bound)]))
    parts = frame.axes(f"search: {data['method']}", "choices looked at", [(x, f"{x:.0f}") for x in _ticks(0, last)])
    parts.append(frame.line(best, COLORS["selected"]))
    parts.append(frame.dot(*best[-1], COLORS["selected"], f"{best[-1][1]:.4f}"))
    if bound:
        parts.append(frame.line(bound, "#666", "5 3"))
        parts.append(_text(540, frame.y(bound[-1][1]) - 6, "bound", color="#666"))
    parts.append(_text(540, frame.y(best[-1][1]) + 14, "best that fits", color=COLORS["selected"]))
    return _picture(640, 330, parts)


def _course_svg(accuracies: Sequence[float]) -> str:
    last = max(1, len(accuracies) - 1)
    frame = _Frame(70, 36, 460, 240, (0, last), _range(accuracies))
    ticks = [(float(i), str(i)) for i in range(0, last + 1, -(-last // 8))]
    parts = frame.axes("freezing: accuracy", "parts frozen", ticks)
    parts.append(frame.line(list(enumerate(map(float, accuracies))), COLORS["selected"]))
    parts += [frame.dot(i, a, COLORS["selected"], f"{i} frozen: {a:.4f}") for i, a in enumerate(accuracies)]
    return _picture(640, 330, parts)


def memory_loss_svg(points: Sequence[Mapping[str, Any]], limit: int, title: str) -> str:
    """From ``points_json``: held-out loss over planned SRAM in KiB, which doubles from tick to tick; a line for each
    series, the limit dashed."""
    shown = [p for p in points if p["loss"] is not None]
    doublings = [math.log2(p["ram_bytes"] / 1024) for p in shown] + [math.log2(limit / 1024)]
    low, high = _range(doublings)
    if math.floor(high) - math.ceil(low) < 1:  # room for two ticks
        low, high = math.floor(low), math.ceil(high)
    ticks = [(float(e), f"{2.0**e:g}") for e in range(math.ceil(low), math.floor(high) + 1)]
    losses = [p["loss"] for p in shown] or [0.0]
    frame = _Frame(70, 36, 480, 300, (low, high), _range(losses))
    parts = frame.axes(title, "SRAM of the plan, KiB", ticks)
    parts += [_vertical(frame, x, "#ddd") for x, _ in ticks]
    parts.append(_vertical(frame, doublings[-1], "#c00", "4 3"))
    for i, (series, color) in enumerate(COLORS.items()):
        mine = sorted(
            (math.log2(p["ram_bytes"] / 1024), p["loss"], p["scheme"]) for p in shown if p["series"] == series
        )
        if not mine:
            continue
        parts.append(frame.line([(x, loss) for x, loss, _ in mine], color))
        parts += [frame.dot(x, loss, color, f"{name}: {2.0**x:.1f} KiB, loss {loss:.4f}") for x, loss, name in mine]
        parts.append(_text(564, 60 + 18 * i, series, color=color))
    parts.append(_text(564, 60 + 18 * len(COLORS), "- - limit", color="#c00"))
    return _picture(680, 390, parts)


def _vertical(frame: _Frame, v: float, color: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    x, bottom = frame.x(v), frame.top + frame.height
    return f'<line x1="{x}" x2="{x}" y1="{frame.top}" y2="{bottom}" stroke="{color}"{dashed}/>'


# --- the folder -------------------------------------------------------------------------------------------------


def write_report(
    out: Path,
    scheme: UpdateScheme,
    analyses: Sequence[Analysis],
    selection: Mapping[str, Any],
    points: Sequence[Point],
    facts: Mapping[str, Any],
) -> dict[str, str]:
    """Writes scheme.json, which plan and train take, report.json with everything, and the pictures; ``selection`` as
    ``selection_json`` gives it. Returns the paths by what they are. UsageError naming a file that cannot be written."""
    analyzed = [contributions_json(a) for a in analyses]
    mine = next(a for a in analyzed if a["bits"] == scheme.bits)
    compared = points_json(points)
    everything = {**facts, "selection": dict(selection), "contributions": analyzed, "points": compared}
    title = f"{facts['model']}: held-out loss after training"
    texts = {
        "scheme": ("scheme.json", scheme.to_json()),
        "report": ("report.json", json.dumps(everything, indent=1, allow_nan=False) + "\n"),
        "contributions_picture": ("contributions.svg", contributions_svg(mine)),
        "search_picture": ("search.svg", search_svg(selection)),
        "memory_picture": ("memory.svg", memory_loss_svg(compared, facts["limit_bytes"], title)),
    }
    for name, text in texts.values():
        with writing(out / name):
            write_atomic(out / name, text.encode())
    return {what: str(out / name) for what, (name, _) in texts.items()}
