# SPDX-License-Identifier: Apache-2.0
"""A run over a small model of the tests' own: schedule, order, interruption and resume; state files."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import META, FakeSession, interrupt, make_dataset, run
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from trainlet.errors import MismatchError, UsageError
from trainlet.train import statefile
from trainlet.train.data import Dataset, Draw
from trainlet.train.loop import TrainConfig, epoch_order, evaluate, learning_rate
from trainlet.train.run import CHECKPOINT_FILE, METRICS_FILE, STATE_FILE, Run
from trainlet.train.statefile import TrainedState, state_sha256
from trainlet.train.stop import Interrupted


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


# --- schedule and order -------------------------------------------------------------------------------------


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate(t, 100, 0.5) for t in range(100)]
    assert rates[:10] == [float(np.float32(0.05 * (t + 0.5))) for t in range(10)]
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    assert rates[10] > 0.499
    assert sum(rates) == pytest.approx(0.5 * (5 + 45), rel=1e-3)


@given(st.integers(1, 300), st.floats(1e-6, 10))
def test_every_rate_is_fp32_above_0_and_at_most_the_peak(total: int, peak: float) -> None:
    for t in range(total):
        rate = learning_rate(t, total, peak)
        assert rate == float(np.float32(rate))
        assert 0 < rate <= float(np.float32(peak))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_an_epoch_is_a_permutation(labels: list[int], seed: int, epoch: int) -> None:
    order = epoch_order(np.array(labels), seed, epoch, None)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert np.array_equal(order, epoch_order(np.array(labels), seed, epoch, None))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70))
def test_a_limit_is_balanced(labels: list[int], limit: int) -> None:
    y = np.array(labels)
    order = epoch_order(y, 1, 2, limit)
    assert len(set(order.tolist())) == len(order) == min(limit, len(y))
    have = np.bincount(y, minlength=5)
    got = np.bincount(y[order], minlength=5)
    short = got < have  # classes that could have given more have as many as any other, but for one
    assert not short.any() or got.max() <= got[short].min() + 1


def test_order_depends_on_seed_and_epoch_and_mixes_the_classes() -> None:
    y = np.repeat(np.arange(2), 50)
    orders = [epoch_order(y, s, e, limit).tolist() for s, e, limit in ((0, 0, None), (0, 1, None), (1, 0, None))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    first = y[epoch_order(y, 0, 0, 60)][:30]
    assert 8 <= first.sum() <= 22


def test_the_order_is_that_of_all_releases() -> None:
    """A stored run goes on in this order; a change of it needs a new version of the checkpoint."""
    assert epoch_order(np.arange(10) % 2, 0, 0, None).tolist() == [1, 3, 5, 8, 9, 7, 4, 0, 2, 6]
    assert epoch_order(np.arange(10) % 2, 5, 3, 4).tolist() == [1, 4, 8, 5]


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_learns_and_reports(dataset: Dataset, tmp_path: Path) -> None:
    session = FakeSession()
    result = run(dataset, tmp_path / "out", session, epochs=8)
    assert result["val_accuracy"] >= 0.9
    assert result["epochs"] == 8
    assert result["steps"] == 240
    assert result["state_sha256"] == state_sha256(session.state())
    assert result["arena_bytes"] == 100
    assert result["state_bytes"] == 20
    assert result["extra"] == 1
    assert result["saturated"] == 0.25
    assert result["images_per_second"] > 0
    assert result["best_val_accuracy"] >= result["val_accuracy"]
    json.dumps(result, allow_nan=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS_FILE).read_text().splitlines()]
    assert [d["type"] for d in lines] == ["run", *["epoch"] * 8]
    assert lines[0]["seed"] == 7
    assert lines[0]["scheme"]["name"] == "head"
    assert set(lines[0]["versions"]) == {"trainlet", "numpy", "python"}
    assert [d["epoch"] for d in lines[1:]] == list(range(1, 9))
    assert lines[-1]["val_accuracy"] == result["val_accuracy"]
    assert lines[-1]["state_sha256"] == result["state_sha256"]
    stored = statefile.load(tmp_path / "out" / STATE_FILE)
    assert state_sha256(stored.arrays) == result["state_sha256"]
    assert stored.meta == META
    assert stored.progress is None
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [CHECKPOINT_FILE, METRICS_FILE, STATE_FILE]


def test_the_same_run_gives_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(dataset, tmp_path / name)
    assert (tmp_path / "a" / STATE_FILE).read_bytes() == (tmp_path / "b" / STATE_FILE).read_bytes()
    assert run(dataset, tmp_path / "c", seed=8)["state_sha256"] != run(dataset, tmp_path / "d")["state_sha256"]


def test_the_prefix_is_computed_once_an_image(dataset: Dataset, tmp_path: Path) -> None:
    cached, plain, small, none = FakeSession(), FakeSession(), FakeSession(), FakeSession(prefix=False)
    results = [
        run(dataset, tmp_path / "cached", cached),
        run(dataset, tmp_path / "plain", plain, cache=False),
        run(dataset, tmp_path / "small", small, cache_bytes=15 * 48),
        run(dataset, tmp_path / "none", none),
    ]
    assert len({r["state_sha256"] for r in results}) == 1
    assert [r["cache_bytes"] for r in results] == [42 * 48, 0, 15 * 48, 0]
    counts = [tuple(s.calls.count(c) for c in ("prefix", "train_cached", "infer_cached", "train", "infer"))
              for s in (cached, plain, small, none)]  # fmt: skip
    look = 30  # images before the first step
    assert counts[0] == (42, 90, 36 + look, 0, 0)
    assert counts[1] == (0, 0, 0, 90, 36 + look)
    assert counts[2] == (15, 45, 15, 45, 36 + look - 15)
    assert counts[3] == (1, 0, 0, 90, 36 + look)


def test_augmented_images_pass_by_the_cache(dataset: Dataset, tmp_path: Path) -> None:
    session = FakeSession()
    result = run(dataset, tmp_path / "a", session, augment=("flip",))
    assert session.calls.count("train") == 90
    assert session.calls.count("infer_cached") == 36
    assert result["state_sha256"] == run(dataset, tmp_path / "b", augment=("flip",), cache=False)["state_sha256"]
    assert result["state_sha256"] != run(dataset, tmp_path / "c")["state_sha256"]


@pytest.mark.parametrize("augment", [(), ("flip",)])
def test_every_step_has_its_image_label_and_rate(dataset: Dataset, tmp_path: Path, augment: tuple[str, ...]) -> None:
    session = FakeSession()
    run(dataset, tmp_path, session, augment=augment, limit=14)
    expected = []
    for epoch in range(3):
        for i in epoch_order(dataset.train.labels, 7, epoch, 14).tolist():
            image = dataset.train.image(i, Draw(7, epoch) if augment else None)
            rate = learning_rate(len(expected), 3 * 14, 0.05)
            expected.append((image.tobytes(), int(dataset.train.labels[i]), rate))
    assert session.steps == expected


def test_evaluation_counts_by_class_and_takes_the_lower_of_equals(dataset: Dataset) -> None:
    session = FakeSession()
    session.reset(0)
    session._w = np.zeros_like(session._w)
    found = evaluate(session, dataset.val)
    assert found.correct == (4, 0, 0)
    assert found.images == (4, 4, 4)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.loss == pytest.approx(math.log(3))


def test_a_logit_that_is_not_finite_is_an_error(dataset: Dataset) -> None:
    session = FakeSession()
    session.reset(0)
    session._w[0, 0] = np.nan
    with pytest.raises(MismatchError, match=r"x_val\[0\]: a logit is not finite; train with a lower learning rate"):
        evaluate(session, dataset.val)


def test_a_step_that_is_refused_names_image_and_step(dataset: Dataset, tmp_path: Path) -> None:
    def refuse(step: int) -> None:
        if step == 35:
            raise MismatchError("a logit is not finite")

    session = FakeSession()
    session.before_step = refuse
    with pytest.raises(
        MismatchError, match=r"epoch 2, step 6, .*x_train\[\d+\]: a logit is not .* lower --lr than 0\.05"
    ):
        run(dataset, tmp_path, session)


# --- interruption and resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 17, 29, 30, 58, 89])
def test_resume_after_an_interruption_gives_the_same_bytes(dataset: Dataset, tmp_path: Path, at: int) -> None:
    expected = run(dataset, tmp_path / "whole")
    session = FakeSession()
    interrupt(session, at)
    with pytest.raises(Interrupted, match=r"interrupted in epoch \d after \d+ of 30 steps; .* --resume goes on"):
        run(dataset, tmp_path / "parts", session)
    assert int(statefile.load(tmp_path / "parts" / STATE_FILE).arrays["step"]) == at + 1
    resumed = FakeSession()
    result = run(dataset, tmp_path / "parts", resumed, resume=True)
    assert resumed.calls.count("train_cached") == 90 - (at + 1)
    same = ("state_sha256", "val_accuracy", "val_loss", "train_loss", "train_accuracy", "saturated", "steps", "epochs")
    assert {k: result[k] for k in same} == {k: expected[k] for k in same}
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert (tmp_path / "parts" / STATE_FILE).read_bytes() == (tmp_path / "whole" / STATE_FILE).read_bytes()


def metrics(out: Path) -> list[dict[str, Any]]:
    """Without what a clock says."""
    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{k: v for k, v in d.items() if k not in ("seconds", "images_per_second")} for d in lines]


def test_several_interruptions_with_augmentation_and_limit(dataset: Dataset, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"augment": ("flip",), "limit": 11, "epochs": 4}
    expected = run(dataset, tmp_path / "whole", **settings)
    resume = False
    for at in (5, 11, 30):
        session = FakeSession()
        interrupt(session, at, signal.SIGTERM)
        with pytest.raises(Interrupted):
            run(dataset, tmp_path / "parts", session, resume=resume, **settings)
        resume = True
    result = run(dataset, tmp_path / "parts", resume=True, **settings)
    assert result["state_sha256"] == expected["state_sha256"]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


class CrashError(Exception):
    """As if the power failed."""


@pytest.mark.parametrize("at", [3, 8, 34, 60])
def test_resume_after_a_crash_goes_back_to_the_last_checkpoint(dataset: Dataset, tmp_path: Path, at: int) -> None:
    expected = run(dataset, tmp_path / "whole")

    def crash(step: int) -> None:
        if step == at:
            raise CrashError

    session = FakeSession()
    session.before_step = crash
    with pytest.raises(CrashError):
        run(dataset, tmp_path / "parts", session, checkpoint_steps=4)
    if at < 4:
        with pytest.raises(UsageError, match=r"there is no checkpoint\.safetensors to resume from"):
            run(dataset, tmp_path / "parts", resume=True)
        return
    result = run(dataset, tmp_path / "parts", resume=True)
    assert result["state_sha256"] == expected["state_sha256"]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_an_interruption_while_validating(dataset: Dataset, tmp_path: Path) -> None:
    class Signalling(FakeSession):
        def infer_cached(self, prefix: bytes) -> NDArray[np.float32]:
            if self.calls.count("infer_cached") == 30 + 15:
                signal.raise_signal(signal.SIGINT)
            return super().infer_cached(prefix)

    expected = run(dataset, tmp_path / "whole")
    with pytest.raises(Interrupted, match="in epoch 2 after 30 of 30 steps"):
        run(dataset, tmp_path / "parts", Signalling())
    result = run(dataset, tmp_path / "parts", resume=True)
    assert result["state_sha256"] == expected["state_sha256"]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_second_signal_stops_at_once_and_handlers_come_back(dataset: Dataset, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    session = FakeSession()

    def twice(step: int) -> None:
        if step == 40:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    session.before_step = twice
    with pytest.raises(KeyboardInterrupt) as e:
        run(dataset, tmp_path, session)
    assert not isinstance(e.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_a_thread_leaves_signals_alone(dataset: Dataset, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(run(dataset, tmp_path / "thread")))
    thread.start()
    thread.join()
    assert found[0]["state_sha256"] == run(dataset, tmp_path / "main")["state_sha256"]


def test_a_finished_run_resumes_to_its_result(dataset: Dataset, tmp_path: Path) -> None:
    first = run(dataset, tmp_path)
    session = FakeSession()
    again = run(dataset, tmp_path, session, resume=True)
    assert "train" not in "".join(session.calls)
    assert again["state_sha256"] == first["state_sha256"]
    assert again["val_accuracy"] == first["val_accuracy"]


OTHER = {
    "lr": ({"lr": 0.06}, "lr was 0.05, now 0.06"),
    "seed": ({"seed": 8}, "seed was 7, now 8"),
    "epochs": ({"epochs": 4}, "epochs was 3, now 4"),
    "limit": ({"limit": 5}, "limit was null, now 5"),
    "augment": ({"augment": ("flip",)}, r'augment was \[\], now \["flip"\]'),
    "model": ({"meta": replace(META, model_hash="cd" * 32)}, "model_hash was .abab.* now .cdcd"),
    "scheme": ({"meta": replace(META, scheme='{"name": "99kb"}')}, "scheme was .*head.* now .*99kb"),
    "two": ({"lr": 0.06, "seed": 8}, "lr was 0.05, now 0.06; seed was 7, now 8"),
}


@pytest.mark.parametrize("case", OTHER)
def test_resume_with_other_settings_is_refused(dataset: Dataset, tmp_path: Path, case: str) -> None:
    run(dataset, tmp_path)
    changes, message = OTHER[case]
    with pytest.raises(UsageError, match=f"other settings: {message}.*Resume with the same"):
        run(dataset, tmp_path, resume=True, **changes)


def test_resume_with_other_data_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path)
    with pytest.raises(UsageError, match="data was"):
        run(replace(dataset, fingerprint="other"), tmp_path, resume=True)


def test_what_changes_no_byte_may_change(dataset: Dataset, tmp_path: Path) -> None:
    session = FakeSession()
    interrupt(session, 20)
    with pytest.raises(Interrupted):
        run(dataset, tmp_path / "parts", session)
    result = run(dataset, tmp_path / "parts", resume=True, cache=False, checkpoint_steps=3)
    assert result["state_sha256"] == run(dataset, tmp_path / "whole")["state_sha256"]


def test_an_unfinished_run_is_not_lost_by_accident(dataset: Dataset, tmp_path: Path) -> None:
    session = FakeSession()
    interrupt(session, 40)
    with pytest.raises(Interrupted):
        run(dataset, tmp_path, session)
    with pytest.raises(
        UsageError, match=r"stopped after 1 of 3 epochs; go on with --resume, discard it with --overwrite"
    ):
        run(dataset, tmp_path)
    run(dataset, tmp_path, epochs=1, overwrite=True)
    assert len(metrics(tmp_path)) == 2


def test_a_state_is_no_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path)
    (tmp_path / STATE_FILE).replace(tmp_path / CHECKPOINT_FILE)
    with pytest.raises(UsageError, match="not the checkpoint of a run; leave out --resume"):
        run(dataset, tmp_path, resume=True)


def test_a_state_that_the_session_refuses_names_the_file(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    stored = statefile.load(path)
    arrays = {**stored.arrays, "head.weight": np.zeros((2, 2), np.float32)}
    statefile.save(replace(stored, arrays=arrays), path)
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors: head\.weight: another shape"):
        run(dataset, tmp_path, resume=True)


BAD_CONFIG: list[tuple[dict[str, Any], str]] = [
    ({"lr": math.nan}, "learning rate nan: give a finite number above 0"),
    ({"lr": math.inf}, "learning rate inf"),
    ({"lr": -0.1}, "learning rate -0.1"),
    ({"lr": 0.0}, "learning rate 0.0"),
    ({"epochs": 0}, "epochs 0: give 1 to"),
    ({"seed": -1}, "seed -1: give a whole number from 0 to 4294967295"),
    ({"seed": 1 << 32}, "seed 4294967296"),
    ({"limit": 0}, "limit 0: give at least 1 image"),
    ({"checkpoint_steps": 0}, "checkpoint every 0 steps"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIG)
def test_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**({"epochs": 1} | changes))


def test_data_of_another_number_of_classes_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the data has 2 classes, the compiled model 3"):
        Run(FakeSession(), replace(dataset, classes=("a", "b")), TrainConfig(1), tmp_path, META)


# --- state files --------------------------------------------------------------------------------------------

ARRAYS: dict[str, NDArray[np.generic]] = {
    "conv.21.weight": np.arange(24, dtype=np.int32).reshape(2, 3, 4),
    "conv.21.channels": np.array([1, 5], np.uint16),
    "head.weight": np.array([[1.5, -2.0]], np.float32),
    "rho": np.zeros(0, np.int8),
    "seed": np.array(7, np.uint32),
}


def test_a_state_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    statefile.save(TrainedState(META, ARRAYS, {"a": 1}), path)
    found = statefile.load(path)
    assert found.meta == META
    assert found.progress == {"a": 1}
    assert found.arrays.keys() == ARRAYS.keys()
    for name, a in ARRAYS.items():
        assert found.arrays[name].dtype == a.dtype
        assert found.arrays[name].shape == a.shape
        assert np.array_equal(found.arrays[name], a)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for i in range(4):
        items = list(ARRAYS.items())
        statefile.save(TrainedState(META, dict(items if i % 2 else items[::-1])), tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(4)}) == 1


def test_arrays_that_are_no_blocks_are_stored_right(tmp_path: Path) -> None:
    a = np.arange(12, dtype=np.int32).reshape(3, 4).T
    statefile.save(TrainedState(META, {"a": a, "b": a[::2]}), tmp_path / "s")
    found = statefile.load(tmp_path / "s").arrays
    assert np.array_equal(found["a"], a)
    assert np.array_equal(found["b"], a[::2])


def test_the_hash_sees_names_and_bytes_only() -> None:
    h = state_sha256(ARRAYS)
    assert h == state_sha256(dict(reversed(ARRAYS.items())))
    big: dict[str, NDArray[np.generic]] = {k: v.astype(v.dtype.newbyteorder(">")) for k, v in ARRAYS.items()}
    assert h == state_sha256(big)
    assert h != state_sha256({**ARRAYS, "seed": np.array(8, np.uint32)})
    assert h != state_sha256({("x" if k == "rho" else k): v for k, v in ARRAYS.items()})
    small: dict[str, NDArray[np.generic]] = {"b": np.array([1], np.int16), "a": np.array([258], np.int32)}
    assert state_sha256(small) == hashlib.sha256(b"a\0\x02\x01\0\0b\0\x01\0").hexdigest()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        statefile.write_atomic(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s"
    statefile.save(TrainedState(META, ARRAYS), path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in {*rng.integers(0, len(good), 150).tolist(), len(good) - 1}:
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << int(rng.integers(8)))]) + good[at + 1 :])
        with pytest.raises(UsageError, match=f"^{path}: .*; give a state"):
            statefile.load(path)
    for end in (0, 4, 8, 100, len(good) - 1):
        path.write_bytes(good[:end])
        with pytest.raises(UsageError, match="damaged, or no safetensors file"):
            statefile.load(path)


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(save_tensors({"a": np.zeros(3)}))
    with pytest.raises(UsageError, match="not a trained state of trainlet"):
        statefile.load(path)
    path.write_bytes(save_tensors({"a": np.zeros(3)}, {"trainlet": '{"format": "trainlet.state", "version": 2}'}))
    with pytest.raises(UsageError, match="version 2 is not read, version 1 is"):
        statefile.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        statefile.load(tmp_path / "missing")


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    state = TrainedState(META, ARRAYS)
    statefile.check_model(state, META.model_hash, tmp_path)
    with pytest.raises(UsageError, match=r"the state of another model, tiny of hash abababababab; .* has cdcd"):
        statefile.check_model(state, "cd" * 32, tmp_path)
