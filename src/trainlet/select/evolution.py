# SPDX-License-Identifier: Apache-2.0
"""Evolutionary selection, after the published method: genomes of a bias depth and a ratio for each layer, changed by
mutation and crossover, that maximize the sum of contributions under the limit. Its settings were not published; these
are ours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainlet.select.cuts import (
    Cut,
    Progress,
    SearchLimit,
    Step,
    check,
    confirmed,
    depths,
    make_choice,
    options,
    overrun,
    silent,
    strongest,
)
from trainlet.select.problem import Choice, Contributions, Selection


@dataclass(frozen=True)
class Settings:
    """Of the search. The ``parents`` best of each ``population`` go on unchanged; of the others a share ``crossover``
    mixes two of them, and each gene changes with probability ``mutation``. ``tries``: how many of a generation's best
    genomes are tried with the limit itself at most."""

    population: int = 128
    generations: int = 120
    parents: int = 32
    crossover: float = 0.5
    mutation: float = 0.2
    tries: int = 3


DEFAULT = Settings()


@dataclass(frozen=True, slots=True)
class _Genome:
    """An index into the depths; for each layer 0, or 1 + an index into its options. Genes of layers that lie outside
    the depth are kept but do nothing."""

    depth: int
    genes: tuple[int, ...]


class _Population:
    """The search in progress. ``spare``: bytes by which genomes stay below the cuts, as plans were above them."""

    def __init__(
        self, contributions: Contributions, limit: SearchLimit, settings: Settings, rng: random.Random
    ) -> None:
        self.contributions, self.limit, self.settings, self.rng = contributions, limit, settings, rng
        self.depths = depths(contributions)
        self.options = options(contributions, limit, self.depths[-1])
        self.layers = tuple(self.options)
        at = {layer: len(contributions.layers) - i for i, layer in enumerate(contributions.layers)}
        self.needs = [at[layer] for layer in self.layers]  # the depth from which on a layer may train
        self.spare = 0
        self.evaluations = 0
        self._cuts: dict[int, tuple[Cut, ...]] = {}
        self._choices: dict[_Genome, Choice] = {}

    # -- genomes -------------------------------------------------------------------------------------------------

    def active(self, genome: _Genome) -> list[int]:
        """The layers whose weights train."""
        depth = self.depths[genome.depth]
        return [i for i, g in enumerate(genome.genes) if g and self.needs[i] <= depth]

    def weights(self, genome: _Genome) -> dict[str, float]:
        """Layer -> ratio."""
        return {self.layers[i]: self.options[self.layers[i]][genome.genes[i] - 1][0] for i in self.active(genome)}

    def choice(self, genome: _Genome) -> Choice:
        """What the genome stands for, with its value."""
        if genome not in self._choices:
            self.evaluations += 1
            depth = self.depths[genome.depth]
            self._choices[genome] = make_choice(self.contributions, depth, self.weights(genome))
        return self._choices[genome]

    def value(self, genome: _Genome) -> float:
        """The sum of its contributions."""
        return self.choice(genome).value

    def _over(self, genome: _Genome) -> int:
        depth = self.depths[genome.depth]
        if depth not in self._cuts:
            found = options(self.contributions, self.limit, depth)
            every = [(layer, ratio) for layer, rows in found.items() for ratio, _ in rows]
            cuts = self.limit.cuts(depth, self.contributions.bits, every)
            self._cuts[depth] = strongest(cuts, every)
        return overrun(self._cuts[depth], self.weights(genome)) + self.spare

    def repaired(self, genome: _Genome) -> _Genome | None:
        """The genome with parts frozen at random until the cuts let it fit; None where nothing is left to freeze."""
        while self._over(genome) > 0:
            active = self.active(genome)
            if active:
                genome = _with(genome, self.rng.choice(active), -1)
            elif genome.depth:
                genome = replace(genome, depth=self.rng.randrange(genome.depth))
            else:
                return None
        return genome

    # -- generations ---------------------------------------------------------------------------------------------

    def random(self) -> _Genome:
        """Every gene drawn anew."""
        genes = tuple(self.rng.randint(0, len(self.options[layer])) for layer in self.layers)
        return _Genome(self.rng.randrange(len(self.depths)), genes)

    def child(self, parents: Sequence[_Genome]) -> _Genome:
        """One or two parents, mixed and mutated."""
        genome = self.rng.choice(parents)
        if self.rng.random() < self.settings.crossover:
            other = self.rng.choice(parents)
            pairs = zip(genome.genes, other.genes, strict=True)
            depth = self.rng.choice((genome.depth, other.depth))
            genome = _Genome(depth, tuple(self.rng.choice(pair) for pair in pairs))
        return self._mutated(genome)

    def _mutated(self, genome: _Genome) -> _Genome:
        rate = self.settings.mutation
        genes = tuple(
            self.rng.randint(0, len(self.options[layer])) if self.rng.random() < rate else g
            for layer, g in zip(self.layers, genome.genes, strict=True)
        )
        step = self.rng.choice((-1, 1)) if self.rng.random() < rate else 0
        return _Genome(min(max(genome.depth + step, 0), len(self.depths) - 1), genes)

    def grown(self, parents: Sequence[_Genome]) -> list[_Genome]:
        """The next generation; ``parents`` come first. It stays small where a whole population in a row brings nothing
        new: then there are few choices in all."""
        found = dict.fromkeys(parents)
        idle = 0
        while len(found) < self.settings.population and idle < self.settings.population:
            genome = self.repaired(self.child(parents) if parents else self.random())
            idle = idle + 1 if genome is None or genome in found else 0
            if genome is not None:
                found[genome] = None
        return list(found)


def _with(genome: _Genome, layer: int, step: int) -> _Genome:
    genes = list(genome.genes)
    genes[layer] += step
    return replace(genome, genes=tuple(genes))


def evolution(
    contributions: Contributions,
    limit: SearchLimit,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    settings: Settings = DEFAULT,
    bound: float | None = None,
) -> Selection:
    """A choice of high value that fits; only what adds something trains. ``bound`` is what no choice can exceed, where
    ``exact`` has found it; ``cuts.gap`` then tells how far this one is from it. The same seed gives the same choice.
    OverBudgetError where not even the head alone fits."""
    check(contributions, limit.graph)
    found = confirmed(limit, lambda: _search(contributions, limit, random.Random(seed), progress or silent, settings))
    return replace(found, bound=bound)


def _search(
    contributions: Contributions, limit: SearchLimit, rng: random.Random, progress: Progress, settings: Settings
) -> Selection:
    p = _Population(contributions, limit, settings, rng)
    best = make_choice(contributions, 0, {})
    if not limit.fits(best):
        raise limit.refusal(contributions.bits)
    too_large: set[_Genome] = set()
    parents: list[_Genome] = []
    for _ in range(settings.generations):
        alive = [g for g in p.grown(parents) if g not in too_large]
        alive.sort(key=lambda g: (-p.value(g), g.depth, g.genes))
        for genome in [g for g in alive if p.value(g) > best.value][: settings.tries]:
            choice = p.choice(genome)
            if limit.fits(choice):
                best = choice
                break
            too_large.add(genome)
            p.spare = max(p.spare, min(limit.cost(choice) - limit.most, limit.most // 8))
        parents = [g for g in alive if g not in too_large][: settings.parents]
        progress(Step(p.evaluations, best.value))
    return Selection(best, limit.cost(best), "evolution", p.evaluations)
