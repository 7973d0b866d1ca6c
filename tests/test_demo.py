# SPDX-License-Identifier: Apache-2.0
"""The demo: what is shipped is what its record says, the story is true, and a chip of 64 KB gives the host's bytes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.cli import main
from trainlet.compiler import compile_model
from trainlet.demo import run as demo
from trainlet.demo.run import Demo, compile_demo, load_data, load_model, load_scheme, other_camera
from trainlet.errors import MismatchError, UnsupportedError, UsageError
from trainlet.frontends import attach_head
from trainlet.ir.graph import Graph, Stage
from trainlet.reference import initial_state, train_step
from trainlet.session.emulator import EmulatorSession
from trainlet.session.host import HostSession
from trainlet.svg import Curve, accuracy_svg
from trainlet.toolchain.find import ARM_GCC_VARIABLE
from trainlet.toolchain.targets import TARGETS, with_limits
from trainlet.train.folder import locked
from trainlet.train.loop import Silent, evaluate

ASSETS = Path(demo.__file__).parent / "assets"
SMALL = with_limits(TARGETS["stm32f746"], 64 << 10)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a few steps."""
    monkeypatch.setattr(demo, "EPOCHS", 2)
    monkeypatch.setattr(demo, "LIMIT", 10)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, object]]:
    """Exit code and the JSON object of a command."""
    code = main([*map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


# --- what is shipped --------------------------------------------------------------------------------------------


def test_the_record_is_of_these_files() -> None:
    record = json.loads((ASSETS / "fashion.provenance.json").read_text())
    for name, want in record["sha256"].items():
        raw = (ASSETS / name).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == want, f"{name} is not what examples/train_small.py wrote"
        assert len(raw) == record["bytes"][name]
    assert record["bytes"]["fashion.json"] + record["bytes"]["fashion.safetensors"] < 400_000
    assert record["float_accuracy"] - record["int8_accuracy"] < 0.01
    text = (ASSETS / "README.md").read_text()
    assert "MIT License" in text
    assert "Zalando" in text


def test_the_model_is_as_good_as_its_record_says() -> None:
    record = json.loads((ASSETS / "fashion.provenance.json").read_text())
    graph = load_model()
    assert graph.stage is Stage.INT8
    assert graph.find("add")
    found = evaluate(HostSession(compile_demo()), load_data().val)
    assert abs(found.accuracy - record["int8_accuracy"]) < 0.03  # 1,000 of the 10,000 test images
    assert set(found.images) == {100}


def test_another_camera_sees_the_same_in_every_numpy() -> None:
    ramp = (np.arange(2 * 28 * 28) % 256).astype(np.uint8).reshape(2, 28, 28, 1)
    seen = other_camera(ramp)
    assert seen.shape == ramp.shape
    assert seen.dtype == np.uint8
    assert hashlib.sha256(seen.tobytes()).hexdigest()[:16] == "0128faf83a62dfaa"


# --- the story --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The result of the whole demo on the host."""
    return Demo(tmp_path_factory.mktemp("demo"), None).run()


def test_the_camera_hurts_the_head_helps_and_sparse_update_helps_more(told: dict[str, float]) -> None:
    assert told["accuracy_usual_camera"] > 0.85
    assert told["accuracy_before"] < 0.5
    assert told["accuracy_head_only"] > told["accuracy_before"] + 0.1
    assert told["accuracy_after"] > told["accuracy_head_only"] + 0.05


def test_other_commands_read_what_the_demo_leaves(told: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(told["out"])
    files = ("--model", out / "fashion.json", "--data", out / "data.npz", "--state", told["state"])
    code, found = run(capsys, "eval", *files, "--scheme", out / "scheme.json")
    assert code == 0
    assert found["val_accuracy"] == told["accuracy_after"]
    assert found["state_sha256"] == told["state_sha256"]
    picture = ET.parse(told["picture"]).getroot()
    lines = [e for e in picture.iter() if e.tag.endswith("polyline")]
    assert [len(e.attrib["points"].split()) for e in lines] == [demo.EPOCHS + 1] * 2


def test_the_scheme_trains_weights() -> None:
    scheme = load_scheme(load_model())
    assert scheme.weights
    assert scheme.biases


# --- the chip ---------------------------------------------------------------------------------------------------


def test_reference_host_and_chip_agree_on_the_shipped_model(tools: str) -> None:
    compiled = compile_demo()
    images = load_data().train
    host, device = HostSession(compiled, seed=5), EmulatorSession(compiled, SMALL, seed=5)
    state = initial_state(compiled.graph, 5)
    start = host._state.tobytes()
    for i in range(5):
        image, label = images.image(7 * i), int(images.labels[7 * i])
        step = train_step(compiled.graph, state, image, label, demo.LR)
        info = host.train_step(image, label, demo.LR)
        assert (info.loss, info.prediction) == (step.loss, step.prediction)
        assert device.train_step(image, label, demo.LR) == info
        block = host._codec.pack_values(state.seed, state.step, state.arrays)
        assert host._state.tobytes() == device.state_block() == block
        assert host.infer(image).tobytes() == device.infer(image).tobytes()
    assert np.count_nonzero(np.frombuffer(start, np.uint8) != np.frombuffer(block, np.uint8)) > 1000
    assert device.ram_bytes <= SMALL.sram_bytes


def test_the_demo_on_a_chip(tools: str, short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys, "demo", "--out", tmp_path / "chip", "--seed", 3)
    assert code == 0
    assert found["on"] == "cortex-m7"
    assert found["sram_bytes"] == 65536
    assert isinstance(found["ram_bytes"], int)
    assert 16384 < found["ram_bytes"] <= 65536
    assert isinstance(found["flash_bytes"], int)
    assert 16384 < found["flash_bytes"] < 1 << 20
    assert isinstance(found["instructions_per_step"], int)
    assert found["instructions_per_step"] > 1_000_000
    assert found["steps"] == 20
    code, host = run(capsys, "demo", "--out", tmp_path / "host", "--seed", 3, "--on", "host")
    assert code == 0
    assert host["state_sha256"] == found["state_sha256"]
    assert "ram_bytes" not in host
    code, again = run(capsys, "demo", "--out", tmp_path / "chip", "--seed", 3, "--resume")
    assert code == 0
    same = ("state_sha256", "accuracy_after", "accuracy_head_only", "ram_bytes", "flash_bytes")
    assert {k: again[k] for k in same} == {k: found[k] for k in same}
    assert main(["demo", "--out", str(tmp_path / "chip"), "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"SRAM used, stack included +[\d,]+ B", text)
    assert "another camera, head retrained" in text


def test_a_chip_that_ends_elsewhere_is_noticed(short: None, tmp_path: Path) -> None:
    made = Demo(tmp_path, None)
    with pytest.raises(MismatchError, match="the chip ended in state 00ff"):
        made._compare(compile_demo(), load_data(), "00ff")


def test_what_is_missing_is_named_with_the_way_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ARM_GCC_VARIABLE, "/nowhere/gcc")
    code, found = run(capsys, "demo", "--out", tmp_path)
    assert code == 6
    assert re.search(r"apt-get install .*gcc-arm-none-eabi.*trainlet demo --on host", str(found["error"]))


def test_a_missing_emulator_is_named_too(
    tools: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)
    code, found = run(capsys, "demo", "--out", tmp_path)
    assert code == 6
    assert "trainlet[m7]" in str(found["error"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resume", "--overwrite"], "give one of them"),
        (["--on", "avr"], "--on 'avr'"),
        (["--on", "host", "--seed", "-1"], "seed -1"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    code, found = run(capsys, "demo", "--out", tmp_path, *args)
    assert code == 2
    assert message in str(found["error"])


def test_an_unfinished_demo_is_not_lost(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops in its second epoch; only --resume and --overwrite go on, and end in the bytes of an unbroken one."""
    options = ("demo", "--on", "host", "--out", tmp_path)
    whole = Demo(tmp_path / "whole", None).run()
    asked = _stops_at(monkeypatch, 1)
    code, found = run(capsys, *options)
    assert code == 130
    assert "--resume" in str(found["error"])
    assert next(asked) == "stopped"
    code, found = run(capsys, *options)
    assert code == 2
    assert "stopped after 1 of 2 epochs" in str(found["error"])
    code, found = run(capsys, *options, "--resume")
    assert code == 0
    assert found["state_sha256"] == whole["state_sha256"]
    state = Path(str(found["state"]))
    written = state.stat().st_mtime_ns
    code, again = run(capsys, *options)
    assert code == 0
    assert again["state_sha256"] == whole["state_sha256"]
    code, other = run(capsys, *options, "--seed", 5)
    assert code == 2
    assert "holds a finished run with other settings: seed was 0, now 5" in str(other["error"])
    assert state.stat().st_mtime_ns == written


def test_two_demos_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path, demo.LOCK_FILE):
        code, found = run(capsys, "demo", "--on", "host", "--out", tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == [demo.LOCK_FILE]
    assert code == 2
    assert "is at work there" in str(found["error"])


def _stops_at(monkeypatch: pytest.MonkeyPatch, epoch: int) -> Iterator[str]:
    """Has the sparse run stop as Ctrl-C would, once that many of its epochs are over."""
    from trainlet.train.run import Run

    stopped: list[str] = []
    finish = Run._finish_epoch

    def stop(self: Run, val: object) -> None:
        finish(self, val)  # type: ignore[arg-type]
        if self._out.name != demo.HEAD_FOLDER and self._at.epoch == epoch and not stopped:
            self._stop.asked = True
            stopped.append("stopped")

    monkeypatch.setattr(Run, "_finish_epoch", stop)
    return iter(stopped)


# --- a head of its own ------------------------------------------------------------------------------------------


def test_a_kept_head_is_where_training_begins() -> None:
    """The same first logits as the model itself has, in the reference and in C, and again after a reset."""
    graph = attach_head(int8_chain(), 4, keep=True)
    compiled = compile_model(graph, UpdateScheme("head"))
    host = HostSession(compiled, seed=1)
    image = np.full((8, 8, 3), 40, np.int8)
    first = host.infer(image)
    assert np.array_equal(host.state()["head.weight"], int8_chain().data["head.weight"])
    host.train_step(image, 2, 0.01)
    assert host.infer(image).tobytes() != first.tobytes()
    host.reset(9)
    assert host.infer(image).tobytes() == first.tobytes()
    new = compile_model(attach_head(int8_chain(), 4), UpdateScheme("head"))
    assert HostSession(new, seed=1).infer(image).tobytes() != first.tobytes()
    assert new.model_hash == compiled.model_hash, "a state holds the whole head, wherever it started"


def test_a_kept_head_of_zeros_stays_zero() -> None:
    graph = int8_chain()
    graph = replace(graph, data={**graph.data, "head.weight": np.zeros((4, 6), np.float32)})
    host = HostSession(compile_model(attach_head(graph, 4, keep=True), UpdateScheme("head")))
    assert not host.state()["head.weight"].any()


def test_a_head_that_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match="head: it knows 4 classes, and 5 are asked for"):
        attach_head(int8_chain(), 5, keep=True)
    with pytest.raises(UnsupportedError, match="no trained dense layer"):
        attach_head(_headless(), 4, keep=True)


def _headless() -> Graph:
    graph = int8_chain()
    return graph.with_interface(outputs=("pool.y",)).with_nodes(graph.nodes[:-1])


# --- the picture ------------------------------------------------------------------------------------------------


def test_a_picture_shows_points_where_they_are() -> None:
    text = accuracy_svg([Curve("b", "#000", [(0, 0.5), (4, 1.0)])], "steps", range(0, 5, 2), 0.5)
    root = ET.fromstring(text)
    line = next(e for e in root.iter() if e.tag.endswith("polyline"))
    assert line.attrib["points"] == "56.0,256.0 450.0,16.0"
    assert "100.0 %  b" in text
    assert [e.text for e in root.iter() if e.text and e.text.strip().isdigit()] == ["0", "2", "4"]


def test_silent_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent().bar("title", 3) as advance:
        advance("text")
    Silent().line("text")
    assert capsys.readouterr() == ("", "")
