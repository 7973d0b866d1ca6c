# SPDX-License-Identifier: Apache-2.0
"""Whole kernels against the numpy reference, byte for byte: on emulated chips small random models with odd sizes, all
or some of whose layers train; here models whose numbers somebody has changed to what no quantizer writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hostile.case import Attack, Kind, Limits, MismatchFound, Place
from hostile.models import prepare_graphs, write_numbers
from trainlet.errors import DeviceError, TrainletError

CHIPS: Final = ("stm32f746", "stm32f746", "stm32f746", "nrf52840", "rp2040")
STEPS: Final = 2


@dataclass(frozen=True)
class Outcome:
    """Of one step: everything that a caller can see; an error stands for a step that was refused."""

    error: str = ""
    logits: bytes = b""
    facts: tuple[Any, ...] = ()
    wrong: tuple[str, ...] = ()


def _attempt(step: Callable[[], Outcome]) -> Outcome:
    try:
        return step()
    except DeviceError:
        raise
    except TrainletError as e:
        return Outcome(type(e).__name__)


def difference(case: Any, chip: str, steps: int = STEPS) -> str:
    """Where the chip first differs from the reference; "" where it nowhere does. ``case``: of random_nets.py."""
    from test_exact import expected_state, wrong_states

    from trainlet.compiler import compile_model
    from trainlet.reference import initial_state, train_step
    from trainlet.session.emulator import EmulatorSession
    from trainlet.toolchain.targets import TARGETS

    compiled = compile_model(case.model, case.scheme, TARGETS[chip])
    session = EmulatorSession(compiled, TARGETS[chip], seed=case.seed)
    reference = initial_state(compiled.train, case.seed)
    rng = np.random.default_rng(case.seed ^ 1)
    for t in range(steps):
        x = rng.integers(-128, 128, compiled.train.values["input"].shape).astype(np.int8)
        label, lr = int(rng.integers(case.classes)), case.lrs[t % len(case.lrs)]

        def wanted(x: Any = x, label: int = label, lr: float = lr) -> Outcome:
            r = train_step(compiled.train, reference, x, label, lr)
            return Outcome(facts=(np.float32(r.loss), r.prediction, np.float32(r.saturated)))

        def found(x: Any = x, label: int = label, lr: float = lr) -> Outcome:
            i = session.train_step(x, label, lr)
            return Outcome(facts=(np.float32(i.loss), i.prediction, np.float32(i.saturated)))

        want, got = _attempt(wanted), _attempt(found)
        if got != want:
            return f"step {t}: {got} instead of {want}"
        wrong = wrong_states(session.state(), expected_state(compiled, reference))
        if wrong:
            return f"step {t}: state {wrong}"
    return ""


def random_cases(seed: int, count: int, visit: Callable[[Any], None]) -> None:
    """Calls ``visit`` with ``count`` random models; the same ones for the same seed."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from random_nets import cases

    @seeded(seed)
    @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None, print_blob=False,
              derandomize=False, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=cases())
    def run(case: Any) -> None:
        visit(case)

    run()


def _nothing(base: Path) -> None:
    """Models are drawn."""


def _make(rng: random.Random, place: Place) -> Attack:
    seed, chip = rng.getrandbits(32), rng.choice(CHIPS)

    def visit(case: Any) -> None:
        found = difference(case, chip)
        if found:
            raise MismatchFound(f"{chip}: {found}\n{case!r}")

    def attack() -> str:
        from hypothesis.configuration import set_hypothesis_home_dir

        set_hypothesis_home_dir(place.out / "hypothesis")
        random_cases(seed, 2, visit)  # the first one is always the smallest there is
        return f"{chip} agrees"

    return attack


# --- numbers that no quantizer writes -----------------------------------------------------------------------------


def _make_numbers(rng: random.Random, place: Place) -> Attack:
    """A graph that is loaded all the same runs as the reference says, or is refused."""
    model = write_numbers(rng, place)
    bits, lr, seed = rng.choice((8, 12, 16)), rng.choice((1e-30, 1e-3, 0.02, 0.5, 30.0)), rng.getrandbits(32)
    which = rng.choice(("full", "last:1", "bias:2"))

    def attack() -> str:
        from random_nets import Case
        from test_exact import difference as host_difference

        from trainlet.autodiff.scheme import resolve
        from trainlet.frontends import attach_head, graph_file

        try:
            graph = attach_head(graph_file.load(model), 3)
            case = Case(graph, resolve(which, graph, bits), seed, (float(np.float32(lr)),))
            found = host_difference(case, steps=STEPS)
        except TrainletError as e:
            return type(e).__name__
        if found:
            raise MismatchFound(f"{found}\n{case!r}")
        return "agrees"

    return attack


KINDS: Final = (
    Kind("chip", _nothing, _make, compiles=True, limits=Limits(300.0, resident=True), batch=1),
    Kind("numbers", prepare_graphs, _make_numbers, compiles=True, limits=Limits(120.0), batch=5),
)
