# SPDX-License-Identifier: Apache-2.0
"""Every subset of passes gives the same bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import NAMED, PLAIN, Case, cases, named_case
from test_exact import difference

from trainlet.autodiff.scheme import resolve
from trainlet.compiler import Passes, compile_model
from trainlet.frontends import attach_head, load
from trainlet.session.host import HostSession
from trainlet.toolchain.vectors import LR, synthetic_image
from trainlet.train.statefile import state_sha256

NONE = Passes(*(False,) * 5)
STEPS = 3
PUBLISHED = (("mcunet-5fps", "99kb"), ("mbv2-w0.35", "49kb"), ("proxyless-w0.3", "98kb"))


@given(case=cases(), switches=st.tuples(*(st.booleans(),) * 5))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_random_models_under_random_passes(case: Case, switches: tuple[bool, ...]) -> None:
    assert difference(case, compile_model(case.model, case.scheme, passes=Passes(*switches)), STEPS) == ""


@pytest.mark.parametrize("name", ["dilated_groups", "shared_later", "add_with_activation"])
def test_all_subsets(name: str) -> None:
    """One model, each of the 32 subsets; those that differ are different programs, or the switch would do nothing."""
    case = replace(named_case(name, 12), flags=PLAIN)
    programs = set()
    for switches in product((False, True), repeat=5):
        compiled = compile_model(case.model, case.scheme, passes=Passes(*switches))
        assert difference(case, compiled, STEPS) == "", switches
        programs.add(str(compiled.graph))
    assert len(programs) >= 8


@pytest.mark.parametrize("name", NAMED)
def test_no_pass_makes_memory_larger(name: str) -> None:
    case = named_case(name)
    most = compile_model(case.model, case.scheme, passes=replace(NONE, fuse=True)).plan.lower_bound
    assert compile_model(case.model, case.scheme).plan.lower_bound <= most


@pytest.mark.parametrize(("model", "scheme"), PUBLISHED)
def test_published_models_with_all_and_with_none(assets: Path, model: str, scheme: str) -> None:
    graph = load(assets / "models" / f"{model}.pkl")
    chosen = resolve(scheme, graph, 12)
    ends = []
    for passes in (Passes(), NONE, Passes(by_rows=False)):
        session = HostSession(compile_model(attach_head(graph, 10), chosen, passes=passes), seed=5)
        losses = [session.train_step(synthetic_image((128, 128, 3), t), t, LR).loss for t in range(3)]
        ends.append((state_sha256(session.state()), losses))
    assert ends[0] == ends[1] == ends[2]
