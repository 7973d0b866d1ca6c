# SPDX-License-Identifier: Apache-2.0
"""What every operator of the table is held to, from its row and a strategy of instances (tests/ops) alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import registry_checks as checks
from graphs import int8_chain, same
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ops.family import graph_with, in_reals
from random_nets import Case
from test_exact import NO_PASSES, difference

from trainlet.autodiff.scheme import resolve
from trainlet.autodiff.walk import differentiate
from trainlet.compiler import ALL, compile_model, plan_model
from trainlet.errors import UsageError
from trainlet.frontends import graph_file
from trainlet.ir import Stage
from trainlet.ops import OPS, No

FAMILIES = checks.families()
DRAWN = sorted(FAMILIES)
MODEL_OPS = [op for op in DRAWN if Stage.INT8 in OPS[op].stages]
BY_ROWS = [op for op in DRAWN if not isinstance(OPS[op].rows, No)]


def few(examples: int) -> settings:
    """So many examples, none of them shrunk: a case is small, and each may cost a compiler's start."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, suppress_health_check=slow, phases=[Phase.generate])


@pytest.mark.parametrize("op", sorted(OPS))
def test_is_drawn(op: str) -> None:
    """An operator without a strategy is an operator without tests."""
    assert op in FAMILIES, f"{op}: no file of tests/ops draws it"

    @given(FAMILIES[op].models)
    @few(3)
    def drawn(case: Case) -> None:
        assert graph_with(case, op).find(op), f"{op} is not in what its family draws"

    drawn()


@pytest.mark.parametrize("op", DRAWN)
def test_refuses_what_it_has_no_meaning_for(op: str) -> None:
    @given(FAMILIES[op].models)
    @few(4)
    def refused(case: Case) -> None:
        graph = graph_with(case, op)
        assert [f for node in graph.find(op) for f in checks.unrefused(graph, node)] == []

    refused()


@pytest.mark.parametrize("op", BY_ROWS)
def test_rows_depend_on_what_the_window_says(op: str) -> None:
    @given(FAMILIES[op].models)
    @few(6)
    def rows(case: Case) -> None:
        graph = graph_with(case, op)
        assert [f for node in graph.find(op) for f in checks.wrong_rows(graph, node)] == []

    rows()


@pytest.mark.parametrize("op", MODEL_OPS)
def test_gradients_are_central_differences(op: str) -> None:
    @given(FAMILIES[op].models)
    @few(6)
    def gradients(case: Case) -> None:
        assert checks.wrong_gradients(case) == []

    gradients()


@pytest.mark.parametrize("op", MODEL_OPS)
def test_c_is_the_reference_with_all_passes_and_with_none(op: str) -> None:
    @given(FAMILIES[op].models, st.sampled_from((ALL, NO_PASSES)))
    @few(3)
    def exact(case: Case, passes: object) -> None:
        compiled = compile_model(case.model, case.scheme, passes=passes)
        assert difference(case, compiled, steps=4) == ""

    exact()


@pytest.mark.parametrize("passes", [ALL, NO_PASSES], ids=["all", "none"])
def test_c_of_depth_first_runs_is_the_reference(passes: object) -> None:
    @given(FAMILIES["depth_first"].models)
    @few(2)
    def exact(case: Case) -> None:
        assert difference(case, compile_model(case.model, case.scheme, passes=passes), steps=2) == ""

    exact()


@pytest.mark.parametrize("op", ["conv2d", "max_pool", "depth_first"])
def test_scratch_is_what_the_kernel_takes(op: str) -> None:
    @given(FAMILIES[op].models)
    @few(4)
    def enough(case: Case) -> None:
        graph = plan_model(case.model, case.scheme).graph.flat()
        assert [f for node in graph.nodes for f in checks.wrong_scratch(graph, node)] == []

    enough()


@pytest.mark.parametrize("op", DRAWN)
def test_files_and_text_keep_it(op: str) -> None:
    @given(FAMILIES[op].models)
    @few(3)
    def kept(case: Case) -> None:
        for graph in (case.model, in_reals(case.model)):
            assert not checks.lost_in_a_file(graph)
        assert all(node.op in str(case.model) and node.name in str(case.model) for node in case.model.nodes)

    kept()


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    checks.write_version_1(int8_chain(), path)
    assert json.loads(path.read_text())["nodes"][0]["inputs"] == [
        "input", "conv.0.weight", "conv.0.bias", "conv.0.scale",
    ]  # fmt: skip
    assert same(graph_file.load(path), int8_chain())


def test_files_of_version_1_hold_models_only(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    model = int8_chain()
    checks.write_version_1(differentiate(model, resolve("full", model)), path)
    with pytest.raises(UsageError, match="reads models of version 1"):
        graph_file.load(path)
