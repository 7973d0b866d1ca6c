# SPDX-License-Identifier: Apache-2.0
"""Training that does not train: what tells it, when, and what is left in the folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import FakeSession, interrupt, make_dataset, run
from numpy.typing import NDArray

from trainlet.errors import MismatchError, UsageError
from trainlet.ir import Image
from trainlet.session import StepInfo
from trainlet.train import statefile, watch
from trainlet.train.checkpoint import load
from trainlet.train.data import Dataset
from trainlet.train.loop import TrainConfig
from trainlet.train.run import CHECKPOINT_FILE, METRICS_FILE, STATE_FILE
from trainlet.train.statefile import state_sha256
from trainlet.train.stop import Interrupted
from trainlet.train.watch import Start


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that fit into runs of 90 steps."""
    monkeypatch.setattr(watch, "WINDOW", 10)


class Explodes(FakeSession):
    """Reports a loss of ``loss`` from step ``at`` on."""

    def __init__(self, at: int, loss: float = 1e6) -> None:
        super().__init__()
        self._from, self._loss = at, loss

    def _train(self, image: Image, label: int, lr: float) -> StepInfo:
        info = super()._train(image, label, lr)
        return StepInfo(self._loss, 0, 0.0) if self._step > self._from else info


def warnings(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [d for d in lines if d["type"] == "warning"]


def state_after(dataset: Dataset, out: Path, step: int) -> dict[str, NDArray[np.generic]]:
    """The state of an unbroken run after so many steps."""
    session = FakeSession()
    interrupt(session, step - 1)
    with pytest.raises(Interrupted):
        run(dataset, out, session)
    return dict(statefile.load(out / STATE_FILE).arrays)


# --- a run that diverges --------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_at_the_last_good_state(dataset: Dataset, tmp_path: Path) -> None:
    message = (
        r"epoch 2, step 20: training has diverged: the mean loss is 5e\+05, 4\.55e\+05 times ln\(classes\); start "
        r"again with a lower --lr than 0\.05\. .*state\.safetensors is the last good state, of step 40; --resume --on-"
    )
    out = tmp_path / "run"
    with pytest.raises(MismatchError, match=message) as e:
        run(dataset, out, Explodes(45))
    assert e.value.exit_code == 5
    good = state_sha256(state_after(dataset, tmp_path / "good", 40))
    for name in (STATE_FILE, CHECKPOINT_FILE):
        assert state_sha256(statefile.load(out / name).arrays) == good
    assert load(out / CHECKPOINT_FILE).position.steps == 40
    assert [(w["kind"], w["epoch"], w["steps"]) for w in warnings(out)] == [("stopped", 2, 50)]
    assert "diverged" in warnings(out)[0]["text"]


def test_a_diverged_run_goes_on_where_it_is_told_to(dataset: Dataset, tmp_path: Path) -> None:
    whole = run(dataset, tmp_path / "whole", Explodes(45), on_divergence="warn")
    assert whole["diverged"]
    assert whole["epochs"] == 3
    assert whole["chance_loss"] == pytest.approx(math.log(3))
    assert len(whole["warnings"]) == 1
    assert "lower --lr than 0.05" in whole["warnings"][0]
    with pytest.raises(MismatchError):
        run(dataset, tmp_path / "parts", Explodes(45))
    parts = run(dataset, tmp_path / "parts", Explodes(45), resume=True, on_divergence="warn")
    assert parts["state_sha256"] == whole["state_sha256"]
    assert parts["warnings"] == whole["warnings"]
    assert warnings(tmp_path / "parts") == warnings(tmp_path / "whole")


def test_nothing_is_kept_where_nothing_was_good(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="No state was good enough to be kept"):
        run(dataset, tmp_path, Explodes(2))
    assert [f.name for f in tmp_path.iterdir()] == [METRICS_FILE]
    assert run(dataset, tmp_path, lr=0.01)["epochs"] == 3


@pytest.mark.parametrize("mode", ["stop", "warn"])
@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_any_run(dataset: Dataset, tmp_path: Path, loss: float, mode: str) -> None:
    with pytest.raises(
        MismatchError, match=r"epoch 2, step 16, .*the loss is not a finite number; .*good state, of step"
    ):
        run(dataset, tmp_path, Explodes(45, loss), on_divergence=mode)
    assert load(tmp_path / CHECKPOINT_FILE).position.steps == 40


def test_windows_go_on_where_a_run_was_interrupted(dataset: Dataset, tmp_path: Path) -> None:
    """A window that an interruption cuts in two is judged like a whole one."""
    out = tmp_path / "run"
    session = Explodes(45)
    interrupt(session, 46)
    with pytest.raises(Interrupted):
        run(dataset, out, session)
    with pytest.raises(MismatchError, match=r"the mean loss is 5e\+05, .* lower --lr than 0\.05"):
        run(dataset, out, Explodes(45), resume=True)


def test_a_real_rate_that_is_too_high_is_told(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"training has diverged: the mean loss is .* lower --lr than 1e\+06"):
        run(dataset, tmp_path, lr=1e6)
    calm = run(dataset, tmp_path)
    assert calm["warnings"] == []
    assert not calm["diverged"]


LIMITS: list[tuple[Start, float, float, str]] = [
    (Start(1.2, 0.02, None), 4.7, 0.11, ""),
    (Start(1.2, 0.02, None), 4.9, 0.0, r"the mean loss is 4\.9, 4\.46 times ln\(classes\)$"),
    (Start(5.0, 0.02, None), 19.0, 0.0, ""),  # a model's own head may begin far off
    (Start(1.2, 0.02, None), 0.3, 0.13, r"^13% of the trained weights sit at the clamp, 2% at the start$"),
    (Start(1.2, 0.0, None), 1e33, 0.9, r"9\.1e\+32 times ln\(classes\) and 90% of the trained"),
]


@pytest.mark.parametrize(("start", "loss", "clamped", "message"), LIMITS)
def test_the_limits_of_divergence(start: Start, loss: float, clamped: float, message: str) -> None:
    found = watch.divergence(start, math.log(3), loss, clamped)
    assert bool(found) == bool(message)
    if message:
        assert re.search(message, found), found


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (12, 127 << 4), (16, 127 << 8)])
def test_the_share_at_the_clamp(bits: int, limit: int) -> None:
    arrays = {
        "conv.1.weight": np.array([[limit, -limit, limit - 1, 0]], np.int32),
        "conv.1.channels": np.arange(4, dtype=np.uint16),
        "conv.2.weight": np.zeros((2, 2), np.int32),
        "conv.2.channels": np.arange(2, dtype=np.uint16),
        "conv.2.bias": np.full(9, 1 << 30, np.int32),
        "head.weight": np.full((3, 3), 1e9, np.float32),
    }
    assert watch.clamped_share(arrays, bits) == 2 / 8
    assert watch.clamped_share({"head.weight": arrays["head.weight"]}, bits) == 0


# --- a run that stands still ----------------------------------------------------------------------------------


def test_the_mean_square_of_features_is_seen_through_a_random_head() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-6, 0.02, 3.0):
        features = np.abs(rng.standard_normal((32, 100))) * scale
        weight, bias = rng.standard_normal((10, 100)) * 0.05, rng.standard_normal(10)
        found = watch.mean_square({"head.weight": weight, "head.bias": bias}, features @ weight.T + bias)
        assert found == pytest.approx(np.square(features).mean(), rel=0.5)
    assert watch.mean_square({"head.weight": np.zeros((10, 100))}, np.zeros((32, 10))) is None
    assert watch.mean_square({}, np.zeros((32, 10))) is None


def test_features_near_zero_are_told_before_the_first_step(dataset: Dataset, tmp_path: Path) -> None:
    class Weak(FakeSession):
        factor = 1e-6

        def _logits(self, image: Image) -> NDArray[np.float32]:
            return super()._logits(image) * np.float32(self.factor)

    result = run(dataset, tmp_path / "weak", Weak())
    assert result["feature_mean_square"] < 1e-9
    assert "features before the head are zero" in result["warnings"][0]
    assert warnings(tmp_path / "weak")[0]["steps"] == 0
    Weak.factor = 1e-2
    assert "features with a mean square of" in run(dataset, tmp_path / "small", Weak())["warnings"][0]


@pytest.mark.parametrize(
    ("square", "lr", "steps", "message"),
    [
        (2.8, 0.002, 1000, ""),
        (2.8, 1e-8, 1000, "at a rate of 1e-08; give a higher --lr, about 0.00056"),
        (2.8, 0.002, 1, "in 1 steps at a rate of 0.002; give more --epochs"),
        (1e-5, 0.002, 1000, "give a higher --lr, about 1.6e\\+02"),
        (0.0, 0.002, 1000, "take another model"),
        (None, 0.002, 1, ""),
    ],
)
def test_what_is_too_weak(square: float | None, lr: float, steps: int, message: str) -> None:
    found = watch.weakness(Start(2.0, 0.0, square), 160, lr, steps)
    assert bool(found) == bool(message)
    assert re.search(message, found)


def test_a_loss_that_does_not_move_is_told(dataset: Dataset, tmp_path: Path) -> None:
    class Still(FakeSession):
        def _train(self, image: Image, label: int, lr: float) -> StepInfo:
            return super()._train(image, label, 0.0)

    result = run(dataset, tmp_path, Still())
    told = [w for w in warnings(tmp_path) if w["kind"] == "standstill"]
    assert [w["epoch"] for w in told] == [2]  # the first epoch has nothing to be compared with
    assert "the loss stands still" in told[0]["text"]
    assert told[0]["text"] in result["warnings"]
    assert run(dataset, tmp_path, overwrite=True)["warnings"] == []


def test_features_that_died_are_told_from_a_low_rate() -> None:
    dead = watch.standstill(2.31, 2.30, 2.303, 1e-9, 0.5)
    assert "all images give the same logits: the features are dead; start again with a lower --lr" in dead
    assert "give another --lr than 1e-06" in watch.standstill(2.31, 2.30, 2.303, 0.5, 1e-6)
    assert not watch.standstill(2.31, 2.1, 2.303, 0.5, 0.01)
    assert not watch.standstill(3.8, 3.2, 2.303, 0.5, 0.01)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UsageError, match="on divergence 'ignore': give stop or warn"):
        TrainConfig(1, on_divergence="ignore")
