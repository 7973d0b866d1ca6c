# SPDX-License-Identifier: Apache-2.0
"""Contribution analysis: what training the last k biases takes from the held-out loss, and what each layer's weights
take at 1/8, 1/4, 1/2 and 1 of their input channels.

Every figure is a difference between two runs that share seed, images, order and rates, so that what they have in common
cancels. Depths are measured on a coarse grid first, weights whole first; where they promise most, depths between and
the smaller ratios follow. What lies between measured figures is interpolated and said to be.

A weight is measured beside the biases of a common depth, the reference, behind which most of what biases give is
reached; a layer before it, beside the biases of the first depth on the grid that reaches it. So nearly all runs have
one cut, and share what the frozen prefix makes of the images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np

from trainlet.autodiff.scheme import UpdateScheme, trainable_layers, weight_axis
from trainlet.errors import MismatchError
from trainlet.select.cheap import agreement, cheap_contributions, gradient_job
from trainlet.select.jobs import Clock, Executor, run_jobs
from trainlet.select.problem import RATIOS, Choice, Contributions
from trainlet.select.runs import Length, Study, train_job
from trainlet.select.store import JobStore, Result
from trainlet.train.loop import DEFAULT_LR, Progress

REFERENCE_SHARE: Final = 0.8
"""The reference is the smallest measured depth with this share of the best gain by biases."""
SCREEN: Final = "fisher"
"""The cheap estimator that decides which layers a quick analysis measures."""

Feasible = Callable[[Choice], bool]


@dataclass(frozen=True)
class Effort:
    """How much an analysis measures. ``depths``: of the coarse grid; ``screened``: layers whose weights are measured,
    by cheap score, or None for all; ``refined``: how many of them also at ``ratios``; ``final``: of the runs that
    compare finished schemes; ``finalists``: depths whose best choices are trained before one is taken."""

    name: str
    length: Length
    seeds: int
    depths: int
    screened: int | None
    refined: int
    ratios: tuple[float, ...]
    gradients: int
    final: Length
    final_seeds: int
    finalists: int


STANDARD: Final = Effort(
    "standard", Length(1200, 500, 3), 2, 10, None, 10, (0.125, 0.25, 0.5), 128, Length(1200, 500, 6), 2, 6
)
QUICK: Final = Effort("quick", Length(480, 300, 3), 1, 6, 14, 8, (0.25,), 64, Length(600, 300, 6), 3, 4)


@dataclass
class Runner:
    """Does runs of one study. ``lr``: the peak rate of all of them; None for what suits them."""

    study: Study
    store: JobStore
    executor: Executor
    progress: Progress
    clock: Clock
    lr: float | None = None

    def train(
        self, title: str, runs: Sequence[tuple[UpdateScheme, int]], length: Length, lr: float | None = None
    ) -> list[Result]:
        """Results of (scheme, seed), in order; see ``train_job``. ``lr`` is taken where the runner has none."""
        rate = lr if self.lr is None else self.lr
        specs = [self.study.train_spec(_plain(scheme), length, seed, rate) for scheme, seed in runs]
        return self._run(title, train_job, specs)

    def gradients(self, length: Length, seed: int, count: int) -> Result:
        """See ``gradient_job``."""
        return self._run("gradients", gradient_job, [self.study.gradient_spec(length, seed, count)])[0]

    def _run(self, title: str, work: Callable[..., Result], specs: list[Mapping[str, Any]]) -> list[Result]:
        bound = partial(work, self.study.place)
        return run_jobs(self.store, self.executor, bound, specs, title=title, progress=self.progress, clock=self.clock)


def _plain(scheme: UpdateScheme) -> UpdateScheme:
    """Without trained weights the bits of one are of no account: the run is the same job."""
    return scheme if scheme.weights else replace(scheme, bits=8)


@dataclass(frozen=True)
class Measured:
    """One figure: the ``gains`` of its seeds in held-out loss. ``layer`` is empty and ``ratio`` 0 for biases alone."""

    depth: int
    layer: str
    ratio: float
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Their mean."""
        return sum(self.gains) / len(self.gains)


@dataclass(frozen=True)
class Analysis:
    """``contributions`` with what was interpolated; ``measured``: what was not. ``cheap`` by estimator, and how far
    each ranks as the measurement does (see ``cheap.agreement``)."""

    contributions: Contributions
    measured: tuple[Measured, ...]
    reference: int
    cheap: Mapping[str, Contributions]
    agreement: Mapping[str, Mapping[str, float | None]]


class _Walk:
    """An analysis in progress."""

    def __init__(self, runner: Runner, effort: Effort, bits: int, seed: int, feasible: Feasible) -> None:
        self.runner, self.effort, self.bits = runner, effort, bits
        self.seeds = range(seed, seed + effort.seeds)
        self.feasible = feasible
        self.layers = tuple(trainable_layers(runner.study.graph))
        self.biases: dict[int, Measured] = {}
        self.weights: dict[tuple[str, float], Measured] = {}
        self._losses: dict[tuple[int, int], float] = {}  # of biases alone, by depth and seed

    def scheme(self, depth: int, layer: str = "", ratio: float = 0.0) -> UpdateScheme:
        return Choice(depth, {layer: ratio} if layer else {}, self.bits).scheme(self.layers, "run")

    def reaches(self, layer: str) -> int:
        """The depth that just reaches a layer."""
        return len(self.layers) - self.layers.index(layer)

    def _train(self, title: str, schemes: Sequence[UpdateScheme]) -> list[list[float]]:
        """Losses by scheme and seed; a run that diverged counts as infinitely bad. All at one rate, the head alone
        too: a gain is then by what trains, not by how fast."""
        runs = [(scheme, seed) for scheme in schemes for seed in self.seeds]
        results = self.runner.train(title, runs, self.effort.length, DEFAULT_LR)
        losses = [math.inf if r["loss"] is None else float(r["loss"]) for r in results]
        n = len(self.seeds)
        return [losses[i : i + n] for i in range(0, len(losses), n)]

    def measure_biases(self, title: str, depths: Iterable[int]) -> None:
        new = [k for k in dict.fromkeys(depths) if k not in self.biases and (k == 0 or self.feasible(Choice(k)))]
        for depth, losses in zip(new, self._train(title, [self.scheme(k) for k in new]), strict=True):
            self._losses |= {(depth, s): v for s, v in zip(self.seeds, losses, strict=True)}
            if depth == 0 and not all(map(math.isfinite, losses)):
                raise MismatchError("training the head alone diverges on this data; there is nothing to compare with")
            gains = tuple(self._losses[0, s] - v for s, v in zip(self.seeds, losses, strict=True))
            self.biases[depth] = Measured(depth, "", 0.0, gains)

    def measure_weights(self, title: str, wanted: Iterable[tuple[str, float]], reference: int) -> None:
        """Beside biases that were measured; layers that no such depth reaches are left out."""
        depths = sorted(k for k, m in self.biases.items() if math.isfinite(m.gain))
        new = []
        for layer, ratio in wanted:
            depth = next((k for k in depths if k >= max(reference, self.reaches(layer))), None)
            if depth is not None and (layer, ratio) not in self.weights:
                new.append((layer, ratio, depth))
        found = self._train(title, [self.scheme(depth, layer, ratio) for layer, ratio, depth in new])
        for (layer, ratio, depth), losses in zip(new, found, strict=True):
            gains = tuple(self._losses[depth, s] - v for s, v in zip(self.seeds, losses, strict=True))
            self.weights[layer, ratio] = Measured(depth, layer, ratio, gains)

    # --- which ones

    def grid(self) -> list[int]:
        n = len(self.layers)
        count = min(self.effort.depths, n)
        return sorted({max(1, round(i * n / count)) for i in range(1, count + 1)})

    def reference(self) -> int:
        gains = {k: m.gain for k, m in self.biases.items() if math.isfinite(m.gain)}
        best = max(gains.values())
        return min(k for k, g in gains.items() if g >= REFERENCE_SHARE * best)

    def beside(self, depth: int) -> list[int]:
        """Halfway to the measured neighbors of a depth."""
        pairs = [pair for pair in itertools.pairwise(sorted(self.biases)) if depth in pair]
        return [m for a, b in pairs if (m := (a + b) // 2) not in (0, a, b)]

    def usable_ratios(self, layer: str) -> list[float]:
        """Those that select a channel of the layer."""
        graph = self.runner.study.graph
        node = trainable_layers(graph)[layer]
        channels = graph.values[node["weight"]].shape[weight_axis(node)]
        return [r for r in RATIOS if int(r * channels) >= 1]


def analyze(
    runner: Runner,
    effort: Effort,
    bits: int = 8,
    seed: int = 0,
    feasible: Feasible = lambda choice: True,
) -> Analysis:
    """Measures the contributions of a model on its data. ``bits``: of a trained weight; ``feasible`` says whether
    biases to some depth can be had at all, so that nothing is measured that cannot. The runs take seeds from ``seed``
    on. Raises MismatchError where even the head alone cannot be trained."""
    walk = _Walk(runner, effort, bits, seed, feasible)
    refined = effort.refined * len(effort.ratios)
    screened = effort.screened or len(walk.layers)
    clock = runner.clock
    clock.later = effort.seeds * (len(walk.grid()) + 3 + screened + refined)
    gradients = runner.gradients(effort.length, seed, effort.gradients)
    cheap = {e: cheap_contributions(runner.study, gradients, bits, e) for e in ("fisher", "descent")}

    clock.later = effort.seeds * (2 + screened + refined)
    walk.measure_biases("biases", [0, *walk.grid()])
    walk.measure_biases("biases, finer", walk.beside(walk.reference()))
    reference = walk.reference()

    clock.later = effort.seeds * refined
    reachable = [n for n in walk.layers if walk.reaches(n) <= max(walk.biases)]
    ranked = sorted(reachable, key=lambda n: -cheap[SCREEN].weights[n, 1.0])
    walk.measure_weights("weights", [(n, 1.0) for n in ranked[: effort.screened]], reference)

    clock.later = 0
    whole = [m for m in walk.weights.values() if math.isfinite(m.gain) and m.gain > 0]
    best = [m.layer for m in sorted(whole, key=lambda m: -m.gain)[: effort.refined]]
    finer = [(n, r) for n in best for r in walk.usable_ratios(n) if r in effort.ratios]
    walk.measure_weights("weights, parts of them", finer, reference)
    return _finished(walk, reference, cheap)


def _finished(walk: _Walk, reference: int, cheap: Mapping[str, Contributions]) -> Analysis:
    measured = tuple(m for m in (*walk.biases.values(), *walk.weights.values()) if math.isfinite(m.gain))
    name = walk.runner.study.graph.name
    biases = {m.depth: m.gain for m in measured if not m.layer}
    weights = {(m.layer, m.ratio): m.gain for m in measured if m.layer}
    plain = Contributions(name, walk.bits, walk.layers, biases, weights, _noise(measured))
    filled = replace(plain, biases=_between(biases), weights=_parts(walk, weights))
    ranks = {e: agreement(plain, c) for e, c in cheap.items()}
    return Analysis(filled, measured, reference, dict(cheap), ranks)


def _noise(measured: Sequence[Measured]) -> float:
    """Standard deviation of a figure, pooled over those that were repeated; 0 where none was."""
    spreads = [float(np.var(m.gains, ddof=1)) / len(m.gains) for m in measured if len(m.gains) > 1 and any(m.gains)]
    return math.sqrt(sum(spreads) / len(spreads)) if spreads else 0.0


def _between(biases: Mapping[int, float]) -> dict[int, float]:
    """The measured depths and, on straight lines, those between them."""
    known = sorted(biases)
    depths = range(known[0], known[-1] + 1)
    values = np.interp(depths, known, [biases[k] for k in known])
    return {k: float(v) for k, v in zip(depths, values, strict=True)}


def _parts(walk: _Walk, weights: Mapping[tuple[str, float], float]) -> dict[tuple[str, float], float]:
    """The measured ratios and, on straight lines from nothing at 0, the others. Gains grow more slowly than the share
    of channels, so a line is below rather than above."""
    filled: dict[tuple[str, float], float] = {}
    for layer in dict.fromkeys(n for n, _ in weights):
        known = {0.0: 0.0, **{r: g for (n, r), g in weights.items() if n == layer}}
        xs = sorted(known)
        ratios = [r for r in walk.usable_ratios(layer) if r <= xs[-1]]
        filled |= {(layer, r): float(np.interp(r, xs, [known[x] for x in xs])) for r in ratios}
    return filled
