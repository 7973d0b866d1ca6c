# SPDX-License-Identifier: Apache-2.0
"""Short runs, contribution analysis and cheap estimates, over a small graph and small images."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import int8_chain
from hypothesis import given
from hypothesis import strategies as st
from select_cases import few_evolution
from separable import write_separable

from trainlet.autodiff.scheme import UpdateScheme, trainable_layers
from trainlet.compiler import compile_model
from trainlet.errors import MismatchError, OverBudgetError, UsageError
from trainlet.select import prefixes, runs
from trainlet.select.analyze import QUICK, STANDARD, Effort, Runner, analyze
from trainlet.select.baselines import BASELINES
from trainlet.select.cheap import LR, agreement, cheap_contributions, gradient_job, spearman
from trainlet.select.choose import choose, compare, find_selector, long_rivals, short_rivals
from trainlet.select.cuts import Selector
from trainlet.select.exact import exact
from trainlet.select.jobs import Clock
from trainlet.select.limits import PlannedLimit
from trainlet.select.problem import Choice, Contributions
from trainlet.select.report import contributions_json, contributions_svg, memory_loss_svg, points_json
from trainlet.select.runs import Length, Part, Study, load_place, open_job, open_study, split_indices, train_job
from trainlet.select.store import JobStore, job_key
from trainlet.session.host import HostSession
from trainlet.train.loop import Silent

SHORT = Length(60, 24, 2)
RATE = 0.03
STEM, DEPTHWISE, PROJECT = "stem", "block.depthwise", "block.project"
TINY = Effort("tiny", SHORT, 2, 3, None, 2, (0.25, 0.5), 12, Length(60, 24, 3), 1, 3)


class Inline:
    """Does jobs in this process."""

    workers = 1

    def run(self, work: Any, specs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Any, float]]:
        for i, spec in enumerate(specs):
            yield i, work(spec), 1.0

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    return open_study(int8_chain(), write_separable(root / "data.npz"), "crop", root / "cache")


@pytest.fixture
def runner(study: Study, tmp_path: Path) -> Iterator[Runner]:
    with JobStore(tmp_path / "jobs.sqlite") as store:
        yield Runner(study, store, Inline(), Silent(), Clock(1), RATE)


# --- which images -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 30), min_size=2, max_size=5), st.integers(4, 200), st.integers(2, 60))
def test_images_that_judge_never_train(counts: list[int], images: int, held: int) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    fit, judge = split_indices(labels, Length(images, held, 1))
    assert not set(fit) & set(judge)
    assert set(labels[fit]) == set(labels[judge]) == set(range(len(counts)))
    assert len(fit) <= images + len(counts)
    assert len(judge) <= held + len(counts)
    again = split_indices(labels, Length(1000, 1000, 1))
    assert set(fit) <= set(again[0]), "a smaller part is a part of the larger one"
    assert sum(map(len, again)) == len(labels)
    for k, n in enumerate(counts):
        assert abs(np.sum(labels[again[1]] == k) - n / 4) <= 1


def test_a_class_with_one_image_is_refused() -> None:
    with pytest.raises(UsageError, match="class 1 has 1 training image"):
        split_indices(np.array([0, 0, 1, 0]), SHORT)


def test_validation_images_are_never_opened(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, model_hash, dataset = load_place(study.place)

    class Closed:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"val.{name} was asked for")

    guarded = replace(dataset, val=Closed())  # type: ignore[arg-type]
    monkeypatch.setattr(runs, "load_place", lambda place: (graph, model_hash, guarded))
    spec = study.train_spec(UpdateScheme("x", (PROJECT,), {PROJECT: 0.5}), SHORT, 0)
    assert train_job(study.place, spec)["problem"] == ""
    gradient_job(study.place, study.gradient_spec(SHORT, 0, 4))


# --- runs ---------------------------------------------------------------------------------------------------


def test_all_that_determines_a_run_is_in_its_key(study: Study, tmp_path: Path) -> None:
    scheme = UpdateScheme("a", (PROJECT,), {PROJECT: 0.5})
    spec = study.train_spec(scheme, SHORT, 0)
    others = [
        study.train_spec(replace(scheme, biases=(DEPTHWISE, PROJECT)), SHORT, 0),
        study.train_spec(replace(scheme, weights={PROJECT: 1.0}), SHORT, 0),
        study.train_spec(replace(scheme, bits=16), SHORT, 0),
        study.train_spec(scheme, replace(SHORT, epochs=3), 0),
        study.train_spec(scheme, replace(SHORT, images=61), 0),
        study.train_spec(scheme, replace(SHORT, held=25), 0),
        study.train_spec(scheme, SHORT, 1),
        study.train_spec(scheme, SHORT, 0, 0.5),
        replace(study, model_hash="0" * 64).train_spec(scheme, SHORT, 0),
        replace(study, fingerprint="0" * 64).train_spec(scheme, SHORT, 0),
        study.gradient_spec(SHORT, 0, 4),
    ]
    assert len({job_key(s) for s in (spec, *others)}) == 12
    same = [
        study.train_spec(replace(scheme, name="b"), SHORT, 0),
        replace(study, place=replace(study.place, cache=str(tmp_path))).train_spec(scheme, SHORT, 0),
    ]
    assert {job_key(s) for s in same} == {job_key(spec)}


def test_runs_behind_one_cut_share_a_prefix_and_change_no_byte(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = replace(study.place, cache=str(tmp_path))
    schemes = [UpdateScheme("a", (DEPTHWISE, PROJECT), {PROJECT: r} if r else {}) for r in (0.0, 0.5, 1.0)]
    specs = [study.train_spec(s, SHORT, 0, RATE) for s in schemes]
    found = [train_job(place, s) for s in specs]
    assert len({r["loss"] for r in found}) == 3
    files = sorted(tmp_path.glob("prefix-*.bin"))
    assert len(files) == 2, "one of the images that train, one of those that judge"

    graph, fit, _ = open_job(place, specs[0])
    session = HostSession(compile_model(graph, schemes[2]))
    rows = [session.prefix(fit.image(i)) for i in range(len(fit.indices))]
    assert b"".join(rows) in [f.read_bytes()[32:] for f in files]

    monkeypatch.setattr(runs, "PREFIX_BYTES", 0)
    assert [train_job(place, s) for s in specs] == found, "without stored prefixes the results are the same"
    monkeypatch.undo()
    # a fault: what is stored is what is used
    monkeypatch.setattr(prefixes, "_is_whole", lambda path, key, shape: True)
    for f in files:
        f.write_bytes(bytes(f.stat().st_size))
    assert train_job(place, specs[0])["loss"] != found[0]["loss"]


def test_a_worker_with_other_data_or_version_refuses(study: Study) -> None:
    spec = study.train_spec(UpdateScheme("head"), SHORT, 0)
    for name in ("version", "revision", "model", "data"):
        with pytest.raises(UsageError, match=f"another {name}"):
            train_job(study.place, {**spec, name: "other"})


def test_a_run_that_diverges_has_no_loss_but_a_reason(study: Study) -> None:
    result = train_job(study.place, study.train_spec(UpdateScheme("head"), SHORT, 0, 1e38))
    assert result["loss"] is None
    assert "not a finite number" in result["problem"]


# --- the analysis -------------------------------------------------------------------------------------------


class Known(Runner):
    """Losses by a formula instead of by training."""

    def __init__(self, study: Study, diverges: frozenset[str] = frozenset()) -> None:
        self.study, self.diverges = study, diverges
        self.clock, self.progress = Clock(1), Silent()
        self.asked: list[UpdateScheme] = []
        result = gradient_job(study.place, study.gradient_spec(SHORT, 0, 4))
        self.gradients = lambda length, seed, count: result  # type: ignore[method-assign]

    GAINS: Mapping[str, float] = {STEM: 0.4, DEPTHWISE: -0.2, PROJECT: 0.3}

    def train(self, title: str, runs: Any, length: Length, lr: float | None = None) -> list[dict[str, Any]]:
        self.asked += [s for s, _ in runs]
        return [{"loss": self.loss(s, seed), "accuracy": 0.5, "problem": ""} for s, seed in runs]

    def loss(self, scheme: UpdateScheme, seed: int) -> float | None:
        if self.diverges & set(scheme.weights):
            return None
        gain = 0.1 * len(scheme.biases) + sum(self.GAINS[k] * math.sqrt(r) for k, r in scheme.weights.items())
        return 2 + 0.05 * seed - gain - (0.02 * seed if scheme.weights else 0)


def test_an_analysis_finds_what_is_there(study: Study) -> None:
    known = Known(study)
    found = analyze(known, TINY)
    c = found.contributions
    assert c.biases == pytest.approx({0: 0, 1: 0.1, 2: 0.2, 3: 0.3})
    assert found.reference == 3
    shift = 0.01  # half of what the formula gives to weights of the second seed
    exact_ones = {(n, r): known.GAINS[n] * math.sqrt(r) + shift for n in (STEM, PROJECT) for r in (0.25, 0.5, 1.0)}
    measured = {(m.layer, m.ratio): m.gain for m in found.measured if m.layer and m.gain > 0}
    # the stem has 3 inputs, of which a quarter is none
    assert measured == pytest.approx({k: v for k, v in exact_ones.items() if k != (STEM, 0.25)})
    assert c.weights[DEPTHWISE, 1.0] == pytest.approx(-0.2 + shift)
    spread = 0.02 / math.sqrt(2) / math.sqrt(2)  # of a weight's figure; those of 3 depths have none
    assert c.noise == pytest.approx(spread * math.sqrt(6 / 9))
    assert c.layers == tuple(trainable_layers(study.graph))
    # what lies between is on a line from nothing, here of a harmful layer that is not refined
    assert c.weights[DEPTHWISE, 0.5] == pytest.approx((-0.2 + shift) / 2)
    depths = {len(s.biases) for s in known.asked if s.weights}
    assert depths == {3}, "beside the biases of the reference"


def test_what_cannot_be_had_is_not_measured(study: Study) -> None:
    known = Known(study)
    found = analyze(known, TINY, feasible=lambda choice: choice.depth <= 2)
    assert {len(s.biases) for s in known.asked} == {0, 1, 2}
    assert not any(layer == STEM for layer, _ in found.contributions.weights)
    assert set(found.contributions.biases) == {0, 1, 2}


def test_a_weight_that_diverges_is_left_out_and_a_head_that_does_is_an_error(study: Study) -> None:
    found = analyze(Known(study, frozenset({STEM})), TINY)
    assert {layer for layer, _ in found.contributions.weights} == {DEPTHWISE, PROJECT}
    known = Known(study)
    known.loss = lambda scheme, seed: None  # type: ignore[method-assign]
    with pytest.raises(MismatchError, match="the head alone diverges"):
        analyze(known, TINY)


def test_an_analysis_is_done_once_and_ends_in_a_choice_that_is_worth_it(runner: Runner) -> None:
    limit = PlannedLimit(runner.study.graph, None, 4096)
    chosen = choose(runner, TINY, [8, 16], limit, exact, 0)
    jobs = len(runner.store)
    assert [a.contributions.bits for a in chosen.analyses] == [8, 16]
    biases = [a.contributions.biases for a in chosen.analyses]
    assert biases[0] == biases[1]
    assert chosen.selection.choice.weights
    assert limit.cost(chosen.selection.choice) <= 4096
    points = compare(runner, TINY, short_rivals(chosen, limit), limit, chosen.contributions.layers, 0)
    losses = {p.series: p.loss for p in points}
    assert losses["selected"] is not None
    assert losses["biases"] is not None
    assert losses["head"] is not None
    assert losses["selected"] < losses["biases"]
    assert losses["selected"] < losses["head"]
    compared = len(runner.store)
    assert compared > jobs

    rivals = long_rivals(runner, TINY, chosen, limit, limit.narrowed, exact, 0)
    assert [series for series, _, _ in rivals[:2]] == ["selected", "head"]
    assert {"full", "bias:1", "bias:2"} <= {name for _, name, _ in rivals} | {
        "full" for _, _, c in rivals if c.weights == dict.fromkeys(chosen.contributions.layers, 1.0)
    }
    kinds = {(c.depth, tuple(c.weights.items()), c.bits if c.weights else 8) for _, _, c in rivals}
    assert len(kinds) == len(rivals), "each scheme is trained once"
    svg = memory_loss_svg(points_json(points), 4096, "a < b")
    assert ET.fromstring(svg).tag.endswith("svg")
    assert all(f">{p.scheme}: " in svg for p in points)

    jobs = len(runner.store)
    again = choose(runner, TINY, [8, 16], limit, exact, 0)
    assert (again.selection, len(runner.store)) == (chosen.selection, jobs)
    data = contributions_json(chosen.analyses[0])
    assert contributions_svg(data) == contributions_svg(contributions_json(again.analyses[0]))
    assert data["rank_correlation"]["fisher"]["weights"] is not None


class InTheWay(Known):
    """Weights of two layers, each good alone, spoil each other's work: their gains do not add up."""

    def loss(self, scheme: UpdateScheme, seed: int) -> float | None:
        loss = super().loss(scheme, seed)
        return loss if loss is None or len(scheme.weights) < 2 else loss + 0.6


@pytest.mark.parametrize(("kind", "depth", "weights"), [(Known, 3, {STEM, PROJECT}), (InTheWay, 2, {PROJECT})])
@pytest.mark.parametrize("selector", [exact, few_evolution], ids=["exact", "evolution"])
def test_training_decides_between_the_best_sums(
    study: Study, kind: type[Known], depth: int, weights: set[str], selector: Selector
) -> None:
    limit = PlannedLimit(study.graph, None, 1 << 20)
    chosen = choose(kind(study), TINY, [8], limit, selector, 0)
    choice = chosen.selection.choice
    assert (choice.depth, set(choice.weights)) == (depth, weights)
    assert chosen.selection.cost == limit.cost(choice)
    assert [p.scheme for p in chosen.finalists] == ["depth 3", "depth 2", "depth 1", "head"]
    losses = [p.loss for p in chosen.finalists if p.loss is not None]
    assert chosen.finalists[3 - depth].loss == min(losses)

    as_summed = choose(kind(study), TINY, [8], limit, selector, 0, finalists=1)
    assert set(as_summed.selection.choice.weights) == {STEM, PROJECT}
    assert as_summed.finalists == ()
    for chose in (chosen, as_summed):
        assert chose.best_sum == as_summed.selection
        assert chose.best_sum.bound == exact(chose.contributions, limit).choice.value, "of evolution too"
    if chosen.selection.choice.key != chosen.best_sum.choice.key:
        assert chosen.selection.bound is None, "nothing is known of what training would find"


class InTheEnd(Known):
    """What the runs that decide end at: (the head alone, all others)."""

    ends: tuple[float | None, float | None] = (None, None)

    def train(self, title: str, runs: Any, length: Length, lr: float | None = None) -> list[dict[str, Any]]:
        found = super().train(title, runs, length, lr)
        if title == "comparing":
            found = [{**r, "loss": self.ends[bool(s.biases)]} for r, (s, _) in zip(found, runs, strict=True)]
        return [{**r, "problem": "diverged" if r["loss"] is None else ""} for r in found]


def test_where_the_head_alone_is_best_it_is_taken_and_nothing_that_diverges(study: Study) -> None:
    limit = PlannedLimit(study.graph, None, 1 << 20)
    runner = InTheEnd(study)
    for worse, bits in ((2.0, 8), (None, 8), (2.0, 16)):
        runner.ends = 1.0, worse
        chosen = choose(runner, TINY, [bits], limit, exact, 0)
        assert chosen.selection.choice.key == Choice(0).key
        assert chosen.contributions.bits == bits
    runner.ends = None, None
    with pytest.raises(MismatchError, match="diverges with every finalist"):
        choose(runner, TINY, [8], limit, exact, 0)


def test_what_does_not_fit_is_no_finalist_and_no_end(study: Study) -> None:
    class Flash(PlannedLimit):
        def confirm(self, choice: Choice) -> bool:
            if choice.depth in (1, 2):
                raise OverBudgetError("its flash is too large")
            return super().confirm(choice)

    chosen = choose(Known(study), TINY, [8], Flash(study.graph, None, 1 << 20), exact, 0)
    assert [p.scheme for p in chosen.finalists] == ["depth 3", "head"]


def test_methods_that_look_for_no_best_sum_have_no_finalists(study: Study) -> None:
    chosen = choose(Known(study), TINY, [8], PlannedLimit(study.graph, None, 1 << 20), BASELINES["last"], 0)
    assert (chosen.finalists, chosen.selection.choice.depth) == ((), 3)


class Judged(Known):
    """Accuracy falls with the loss; ``freezing``: what was asked for while freezing, and how sure the clock was."""

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self.freezing: list[tuple[UpdateScheme, int, Length, float | None, int, str]] = []

    def train(self, title: str, runs: Any, length: Length, lr: float | None = None) -> list[dict[str, Any]]:
        if title == "freezing":
            self.freezing += [(s, seed, length, lr, self.clock.later, self.clock.word) for s, seed in runs]
        return [{**r, "accuracy": 1 - r["loss"] / 4} for r in super().train(title, runs, length, lr)]


def test_freezing_trains_what_is_left_as_finished_schemes_are_trained(study: Study) -> None:
    """Gains: 0.1 by each bias, 0.4 and 0.3 by the weights of stem and project; those of the depthwise layer do harm."""
    limit, effort = PlannedLimit(study.graph, None, 1 << 20), replace(TINY, final_seeds=2)
    ends = {0.0: {STEM, PROJECT}, 0.08: {STEM}, 0.2: {PROJECT}, 0.9: set()}
    for most, weights in ends.items():
        known = Judged(study)
        chosen = choose(known, effort, [8], limit, find_selector("freeze", most)(known, effort, 5), 0)
        assert set(chosen.selection.choice.weights) == weights
        assert chosen.finalists == ()
        assert len(known.freezing) == 2 * chosen.selection.evaluations
        assert {f[1:4] for f in known.freezing} == {(s, TINY.final, None) for s in (5, 6)}
        assert [f[4:] for f in known.freezing[:2]] == [(3 * 2 * 6, "at most")] * 2
        course = chosen.selection.course
        start = course[0].trained
        assert start.loss == pytest.approx(2 + 0.05 * 5.5 - 0.3 - 0.5 - 0.02 * 5.5)
        assert (start.accuracy, start.spread) == pytest.approx((1 - start.loss / 4, 0.03 / 4 / math.sqrt(2)))
        assert course[1].part == f"weights of {DEPTHWISE}"
        rivals = short_rivals(chosen, limit)
        assert rivals[-1] == ("full", "nothing frozen", course[0].choice)
        compare(known, TINY, rivals, limit, chosen.contributions.layers, 0)
        assert (known.clock.later, known.clock.word) == (0, "about")


def test_where_nothing_fits_nothing_is_run(runner: Runner) -> None:
    with pytest.raises(OverBudgetError, match="Largest tensors"):
        choose(runner, TINY, [8], PlannedLimit(runner.study.graph, None, 100), exact, 0)
    assert len(runner.store) == 0


def test_efforts_are_what_they_are_called() -> None:
    assert QUICK.length.images < STANDARD.length.images
    assert QUICK.seeds < STANDARD.seeds


# --- cheap estimates ----------------------------------------------------------------------------------------


@given(st.permutations(range(8)))
def test_rank_correlation_is_that_of_the_textbook(order: list[int]) -> None:
    distance = sum((i - v) ** 2 for i, v in enumerate(order))
    assert spearman(range(8), order) == pytest.approx(1 - 6 * distance / (8 * 63))


def test_equal_values_share_their_rank() -> None:
    assert spearman([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(2 / math.sqrt(5))
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(ValueError, match="2 or more"):
        spearman([1], [1])


def test_agreement_compares_what_both_have() -> None:
    weights = {("a", 1.0): 3.0, ("b", 1.0): 2.0, ("c", 1.0): 1.0, ("d", 0.5): 9.0}
    measured = Contributions("m", 8, ("a",), {0: 0.0, 1: 1.0}, weights)
    cheap = replace(measured, weights={("a", 1.0): 1.0, ("b", 1.0): 2.0, ("c", 1.0): 3.0})
    assert agreement(measured, cheap) == {"biases": None, "weights": -1.0, "weights_whole": -1.0}
    assert agreement(measured, measured)["weights"] == 1.0


def test_a_small_step_takes_from_the_loss_what_the_scores_say(study: Study) -> None:
    spec = study.gradient_spec(SHORT, 0, 40)
    layers = gradient_job(study.place, spec)["layers"]
    scored = sum(s["bias"]["fisher"] + s["weight"]["1.0"]["fisher"] for s in layers.values())

    graph, fit, _ = open_job(study.place, spec)
    taken = _loss_taken(graph, Part(fit.whole, fit.indices), spec)
    assert 0.7 < taken / scored < 1.4, (taken, scored)


def _loss_taken(graph: Any, fit: Part, spec: Mapping[str, Any]) -> float:
    """Mean loss that one step on an image takes from the loss of that image, per unit of the rate; the head stays."""
    alone = HostSession(compile_model(graph, UpdateScheme("head")))
    runs.train(runs._Prefixed(alone, fit, None), spec)
    names = tuple(trainable_layers(graph))
    session = HostSession(compile_model(graph, UpdateScheme("full", names, dict.fromkeys(names, 1.0), 16)))
    session.reset(0)
    head = {k: v for k, v in alone.state().items() if k.startswith("head.")}
    start = {**session.state(), **head}
    rate, taken = 4 * LR, []  # large enough to show in 8-bit activations
    for i in range(len(fit.labels)):
        image, label = fit.image(i), int(fit.labels[i])
        session.load_state(start)
        for _ in range(3):  # until the exponents have settled
            session.train_step(image, label, 0.0)
        before = session.train_step(image, label, rate).loss
        session.load_state({**session.state(), **head})
        taken.append((before - session.train_step(image, label, 0.0).loss) / rate)
    return float(np.mean(taken))


def test_scores_rank_larger_parts_higher_and_reach_every_layer(study: Study) -> None:
    result = gradient_job(study.place, study.gradient_spec(SHORT, 0, 12))
    cheap = cheap_contributions(study, result, 8)
    assert set(cheap.biases) == {0, 1, 2, 3}
    assert all(cheap.biases[k] < cheap.biases[k + 1] for k in range(3))
    for layer in (DEPTHWISE, PROJECT):
        parts = [cheap.weights[layer, r] for r in (0.25, 0.5, 1.0)]
        assert parts == sorted(parts)
        assert parts[0] > 0
    assert Choice(3, {STEM: 1.0}).scheme(cheap.layers, "x").weights == {STEM: 1.0}
