# SPDX-License-Identifier: Apache-2.0
"""The commands from end to end, over a small graph and small images: what they print, write and refuse."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import Run
from graphs import float_chain, int8_chain
from PIL import Image as PilImage

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.cli import main
from trainlet.cli import prepare as prepare_module
from trainlet.cli.output import RichProgress
from trainlet.errors import DeviceError, MismatchError, ToolMissingError
from trainlet.frontends import graph_file as irfile
from trainlet.toolchain.targets import parse_size
from trainlet.train import statefile
from trainlet.train.loop import DEFAULT_LR, default_lr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chain.json: the small model; set/: 24 + 8 images of 2 classes that differ in color; arrays.npz: 3 classes."""
    root = tmp_path_factory.mktemp("cli")
    irfile.save(int8_chain(), root / "chain.json")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for k, name in enumerate(("blue", "red")):
            folder = root / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (12, 12, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * k] += 120
                PilImage.fromarray(pixels).save(folder / f"{i}.png")
    x = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(root / "arrays.npz", x_train=x[:9], y_train=np.arange(9) % 3, x_val=x[9:], y_val=np.arange(3))
    return root


def train_args(files: Path, out: Path, *more: object) -> list[object]:
    return ["train", "--model", files / "chain.json", "--data", files / "set", "--scheme", "full", "--out", out, *more]


# --- what the commands give ---------------------------------------------------------------------------------


def test_help_needs_no_numpy() -> None:
    code = (
        "import sys; from trainlet.cli import main; code = main(['train', '--help']); "
        "sys.exit(code or sum(m in sys.modules for m in ('numpy', 'PIL', 'safetensors')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_the_default_rate_is_higher_where_only_the_head_trains() -> None:
    assert default_lr(UpdateScheme("head", (), {})) > default_lr(UpdateScheme("one", ("a",), {})) == DEFAULT_LR


def test_version_and_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("trainlet 0.")
    assert main([]) == 0
    assert "compile" in capsys.readouterr().out


def test_import_counts_and_writes(files: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = run("import", files / "chain.json", "--out", tmp_path / "new" / "folder")
    assert code == 0
    assert found["convolutions"] == 3
    assert found["depthwise"] == 1
    assert found["weights"] == 6 * 27 + 6 * 9 + 36 + 4 * 6
    assert found["macs"] == 16 * (6 * 27 + 6 * 9 + 36) + 4 * 6
    assert found["dead_channels"] == 0
    assert Path(found["graph"]).read_bytes() == (files / "chain.json").read_bytes()
    assert main(["import", str(files / "chain.json")]) == 0
    out = capsys.readouterr().out
    assert "convolutions" in out
    assert "4,056" in out


def test_plan(files: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--model", files / "chain.json", "--scheme", "last:2", "--classes", 5, "--bits", 12]
    code, found, _ = run(*args)
    assert code == 0
    assert found["bits"] == 12
    assert found["classes"] == 5
    assert found["arena_bytes"] >= found["lower_bound_bytes"] > 0
    assert found["state_bytes"] > 5 * 6 * 4
    assert found["extra_memory_bytes"] > 0
    assert all(t.keys() == {"tensor", "layer", "bytes"} for t in found["largest"])
    assert main(list(map(str, args))) == 0
    assert "lower bound" in capsys.readouterr().out


def test_passes_are_switched_off(files: Path, tmp_path: Path, run: Run) -> None:
    common = ["--model", files / "chain.json", "--scheme", "last:2", "--classes", 5]
    off = ["--without", "fuse", "--without", "depth_first"]
    (_, whole, _), (code, less, _) = run("plan", *common), run("plan", *common, *off)
    assert code == 0
    assert less["without"] == ["fuse", "depth_first", "by_rows"]
    assert less["input"] == "image"
    assert less["model_hash"] == whole["model_hash"]
    assert less["arena_bytes"] != whole["arena_bytes"]
    assert run("compile", *common, *off, "--out", tmp_path / "c")[0] == 0
    assert "--input image --without fuse --without depth_first" in (tmp_path / "c" / "README.md").read_text()
    for name in ("plan", "compile", "validate"):
        out = ["--out", tmp_path / "d"] if name == "compile" else []
        code, error, _ = run(name, *common, *out, "--without", "speed")
        assert code == 2
        assert "the passes are fuse, reorder, inplace, depth_first, by_rows" in error["error"]
    code, error, _ = run(*train_args(files, tmp_path / "t", "--without", "speed"))
    assert (code, (tmp_path / "t").exists()) == (2, False)


def test_sram_is_arena_and_state(files: Path, run: Run) -> None:
    args = ["plan", "--model", files / "chain.json", "--scheme", "full", "--classes", 5]
    _, found, _ = run(*args)
    need = found["arena_bytes"] + found["state_bytes"]
    code, found, _ = run(*args, "--sram", need)
    assert code == 0
    assert "arena and state alone were counted" in found["notes"][0]
    code, error, _ = run(*args, "--sram", need - 1)
    assert code == 4
    assert error["exit_code"] == 4
    assert f"= {need} bytes exceed the {need - 1} bytes of --sram by 1; largest at the peak: " in error["error"]
    assert found["largest"][0]["tensor"] in error["error"]


@pytest.mark.parametrize(
    ("text", "size"), [("320K", 327680), ("320kb", 327680), ("320 KiB", 327680), ("1M", 1 << 20), ("999", 999)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_train_then_eval(files: Path, tmp_path: Path, run: Run) -> None:
    code, found, err = run(*train_args(files, tmp_path, "--epochs", 6, "--lr", 0.01, "--seed", 3))
    assert code == 0
    assert found["val_accuracy"] >= 0.75
    assert found["steps"] == 6 * 24
    assert found["classes"] == ["blue", "red"]
    assert "epoch 6/6: loss" in err
    for key in ("images_per_second", "arena_bytes", "state_bytes", "state_sha256", "extra_memory_bytes", "seconds"):
        assert found[key]
    code, again, _ = run(
        "eval", "--model", files / "chain.json", "--data", files / "set", "--state", found["state"], "--scheme", "full"
    )
    assert code == 0
    assert again["val_accuracy"] == found["val_accuracy"]
    assert again["val_loss"] == found["val_loss"]
    assert again["state_sha256"] == found["state_sha256"]
    assert again["images"] == 8
    assert set(again["class_accuracy"]) == {"blue", "red"}


def test_people_get_tables(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(a) for a in train_args(files, tmp_path, "--epochs", 1)]) == 0
    out = capsys.readouterr().out
    assert "validation accuracy" in out
    assert f"trained state: {tmp_path / 'state.safetensors'}" in out
    args = ["eval", "--model", files / "chain.json", "--data", files / "set", "--state", tmp_path / "state.safetensors"]
    assert main(list(map(str, args))) == 0
    assert "over 8 images" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["head", "bias:2", "last:1", "last:2"])
def test_the_cache_changes_no_byte(files: Path, tmp_path: Path, run: Run, scheme: str) -> None:
    args = ["train", "--model", files / "chain.json", "--data", files / "set", "--scheme", scheme, "--epochs", 3]
    _, cached, _ = run(*args, "--out", tmp_path / "a")
    _, plain, _ = run(*args, "--out", tmp_path / "b", "--no-cache")
    assert cached["cache_bytes"] > plain["cache_bytes"] == 0
    assert cached["state_sha256"] == plain["state_sha256"]
    assert cached["val_loss"] == plain["val_loss"]


def test_options_of_training_reach_it(files: Path, tmp_path: Path, run: Run) -> None:
    more = ["--epochs", 2, "--limit", 10, "--bits", 16, "--resize", "squeeze", "--augment", "crop, flip"]
    _, found, _ = run(*train_args(files, tmp_path, *more))
    assert found["steps"] == 20
    assert found["bits"] == 16
    assert found["resize"] == "squeeze"
    assert found["augment"] == ["crop", "flip"]
    assert statefile.load(tmp_path / "state.safetensors").meta.resize == "squeeze"


def test_arrays_train(files: Path, tmp_path: Path, run: Run) -> None:
    args = ["train", "--model", files / "chain.json", "--data", files / "arrays.npz", "--scheme", "head"]
    code, found, _ = run(*args, "--out", tmp_path, "--epochs", 1)
    assert code == 0
    assert found["classes"] == ["0", "1", "2"]


def test_compile_writes_the_same_bytes_anywhere(files: Path, tmp_path: Path, run: Run) -> None:
    args = ["compile", "--model", files / "chain.json", "--scheme", "last:1", "--classes", 3, "--out"]
    code, found, _ = run(*args, tmp_path / "a")
    assert code == 0
    assert found["state_bytes"] > 0
    assert run(*args, tmp_path / "b")[0] == 0
    trees = [{f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()} for d in tmp_path.iterdir()]
    assert trees[0] == trees[1]
    command = json.loads(trees[0][Path("manifest.json")])["command"]
    assert command == "trainlet compile --model chain.json --scheme last:1 --classes 3 --bits 8 --input rows"


def test_progress_shows_bars_on_a_terminal_only() -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        progress = RichProgress(file=screen, force_terminal=terminal, width=100)
        with progress.bar("epoch [1/2]", 3, 1) as advance:
            advance("loss 0.5")
            advance("loss 0.4")
        progress.line("epoch [1/2]: done")
        shown = screen.getvalue()
        assert ("3/3" in shown) == terminal
        assert ("loss 0.4" in shown) == terminal
        assert "epoch [1/2]: done" in shown


# --- interruption -------------------------------------------------------------------------------------------


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_saves_and_resume_ends_in_the_same_bytes(files: Path, tmp_path: Path, run: Run) -> None:
    more = ["--epochs", 100, "--json"]
    args = [str(a) for a in train_args(files, tmp_path / "parts", *more)]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainlet", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "parts" / "state.safetensors", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    last = json.loads(out.splitlines()[-1])
    assert last["exit_code"] == 130
    assert "everything is saved in" in last["error"]
    assert "--resume goes on" in err
    assert "Traceback" not in err
    step = int(statefile.load(tmp_path / "parts" / "checkpoint.safetensors").arrays["step"][0])
    assert 0 < step < 100 * 24
    code, resumed, _ = run(*train_args(files, tmp_path / "parts", "--epochs", 100, "--resume"))
    assert code == 0
    _, whole, _ = run(*train_args(files, tmp_path / "whole", "--epochs", 100))
    assert resumed["state_sha256"] == whole["state_sha256"]
    assert resumed["steps"] == 100 * 24


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_every_command_alike(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(prepare_module, "load_model", lambda path: signal.raise_signal(number))
    code, error, err = run("import", files / "chain.json")
    assert (code, error["exit_code"]) == (130, 130)
    assert err == f"error: stopped by {number.name}\n"
    assert signal.getsignal(number) is before


def test_a_command_started_with_nohup_ignores_the_end_of_its_terminal(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = prepare_module.load_model

    def hang_up(path: Path) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return real(path)

    monkeypatch.setattr(prepare_module, "load_model", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("import", files / "chain.json")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_loses_nothing(files: Path, tmp_path: Path) -> None:
    """What a run prints then goes nowhere; what it has reached is saved."""
    args = [sys.executable, "-m", "trainlet", *map(str, train_args(files, tmp_path, "--epochs", 2000))]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(args[0], args)
    deadline = time.monotonic() + 60
    while not (tmp_path / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    steps = [statefile.load(tmp_path / f"{name}.safetensors").arrays["step"] for name in ("state", "checkpoint")]
    assert steps[0] == steps[1] > 0
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_output_that_is_full_is_an_error(files: Path, more: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        args = [sys.executable, "-m", "trainlet", "import", str(files / "chain.json"), *more]
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device; make room and start again\n"


# --- what is refused ----------------------------------------------------------------------------------------


def bad_npz(root: Path, name: str, **changes: Any) -> Path:
    with np.load(root / "arrays.npz") as npz:
        arrays = {k: npz[k] for k in npz.files} | changes
    np.savez(root / name, **arrays)
    return root / name


def broken_set(root: Path, content: bytes | None) -> Path:
    """A set whose class ``red`` has one damaged image, or none."""
    copy = root / ("empty" if content is None else "broken")
    for f in (root / "set").rglob("*.png"):
        place = copy / f.relative_to(root / "set")
        place.parent.mkdir(parents=True, exist_ok=True)
        if content is not None or "train/red" not in place.as_posix():
            place.write_bytes(f.read_bytes())
    if content is not None:
        (copy / "train" / "red" / "3.png").write_bytes(content)
    return copy


REFUSED: dict[str, tuple[Callable[[Path], list[object]], int, str]] = {
    "unknown scheme": (lambda r: ["--scheme", "99kg"], 2, "scheme '99kg'"),
    "rate below float32": (lambda r: ["--lr", "1e-60"], 2, "learning rate 1e-60: too small for float32; give at least"),
    "divergence": (lambda r: ["--on-divergence", "hope"], 2, "on divergence 'hope': give stop or warn"),
    "NaN rate": (lambda r: ["--lr", "nan"], 2, "learning rate nan: give a finite number above 0"),
    "rate that is none": (lambda r: ["--lr", "fast"], 2, "'--lr'"),
    "no epoch": (lambda r: ["--epochs", 0], 2, "epochs 0"),
    "bits": (lambda r: ["--bits", 7], 2, "7 bits; a trained weight has 8, 12 or 16 bits"),
    "no data": (lambda r: ["--data", r / "nothing"], 2, "nothing: does not exist"),
    "empty class": (lambda r: ["--data", broken_set(r, None)], 2, "train/red: this class has no image"),
    "bad image": (lambda r: ["--data", broken_set(r, b"x")], 2, "red/3.png: cannot be decoded"),
    "label": (
        lambda r: ["--data", bad_npz(r, "l.npz", y_val=np.array([0, 1, 9]))],
        2,
        "y_val: label 9 is out of range",
    ),
    "no model": (lambda r: ["--model", r / "m.pkl"], 2, "m.pkl: does not exist"),
    "foreign model": (lambda r: ["--model", r / "m.onnx"], 3, "this is an ONNX model, which no front end reads"),
    "float model": (lambda r: ["--model", r / "float.json"], 2, "a graph of stage float; give one of stage int8"),
    "resize": (lambda r: ["--resize", "stretch"], 2, "resize 'stretch': give one of crop, squeeze"),
    "augment": (lambda r: ["--augment", "rotate"], 2, "augment 'rotate'"),
    "device": (lambda r: ["--on", "moon"], 2, "--on 'moon'"),
    "sram": (lambda r: ["--sram", "lots"], 2, "--sram 'lots': give a size such as 320K"),
    "too small": (lambda r: ["--sram", "100"], 4, "exceed the 100 bytes of --sram"),
    "nothing to resume": (lambda r: ["--resume"], 2, "there is no checkpoint.safetensors to resume from"),
    "both": (lambda r: ["--resume", "--overwrite"], 2, "--resume and --overwrite: give one of them"),
    "out is a file": (lambda r: ["--out", r / "chain.json"], 2, "chain.json: cannot be written"),
    "out is below a file": (lambda r: ["--out", r / "chain.json" / "x"], 2, "cannot be written (Not a directory)"),
    "unknown option": (lambda r: ["--fast"], 2, "--fast"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_training_refuses(files: Path, tmp_path: Path, run: Run, case: str) -> None:
    irfile.save(float_chain(), files / "float.json")
    (files / "m.onnx").write_bytes(b"x")
    make, code, message = REFUSED[case]
    found, error, err = run(*train_args(files, tmp_path / "out"), *make(files))
    assert (found, error["exit_code"]) == (code, code)
    assert message in error["error"]
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "state.safetensors").exists()


def test_a_folder_without_permission_is_refused(
    files: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**where: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(where["dir"]))

    monkeypatch.setattr(prepare_module.tempfile, "TemporaryFile", refuse)  # root, who may run this, is never refused
    code, error, _ = run(*train_args(files, tmp_path / "locked"))
    assert code == 2
    assert "locked: cannot be written (Permission denied); give a folder that can" in error["error"]


def test_a_disk_that_fills_up_is_no_traceback(
    files: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(statefile, "write_atomic", full)
    code, error, _ = run(*train_args(files, tmp_path))
    assert code == 2
    assert "No space left on device" in error["error"]


@pytest.fixture(scope="module")
def trained(files: Path) -> Path:
    """The state of a short run with scheme full."""
    assert main([str(a) for a in train_args(files, files / "run", "--epochs", 1)]) == 0
    return files / "run" / "state.safetensors"


def test_eval_refuses_a_state_of_another_model(files: Path, trained: Path, tmp_path: Path, run: Run) -> None:
    irfile.save(int8_chain(seed=5), tmp_path / "other.json")
    code, error, _ = run("eval", "--model", tmp_path / "other.json", "--data", files / "set", "--state", trained)
    assert code == 2
    assert f"{trained}: this is the state of another model, int8_chain of hash" in error["error"]


def test_eval_refuses(files: Path, trained: Path, tmp_path: Path, run: Run) -> None:
    args = ["eval", "--model", files / "chain.json", "--data", files / "set"]
    code, error, _ = run(*args)
    assert code == 3
    assert "eval without --state" in error["error"]
    code, error, _ = run(*args, "--state", trained, "--scheme", "head")
    assert code == 2
    assert "was trained with scheme full; leave --scheme out" in error["error"]
    code, error, _ = run(*args[:-1], files / "arrays.npz", "--state", trained)
    assert code == 2
    assert "its classes 0, 1, 2 are not those of" in error["error"]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(trained.read_bytes()[:-3])
    code, error, _ = run(*args, "--state", cut)
    assert code == 2
    assert "damaged" in error["error"]


def test_resume_with_another_rate_is_refused(files: Path, tmp_path: Path, run: Run) -> None:
    assert run(*train_args(files, tmp_path, "--epochs", 1))[0] == 0
    code, error, _ = run(*train_args(files, tmp_path, "--epochs", 1, "--lr", 0.5, "--resume"))
    assert code == 2
    assert "the run has other settings: lr was 0.001953125, now 0.5" in error["error"]


def test_resume_on_changed_images_is_refused(files: Path, tmp_path: Path, run: Run) -> None:
    """Every pixel of one image changes, and neither its name nor its size."""
    copy = tmp_path / "set"
    for f in (files / "set").rglob("*.png"):
        place = (copy / f.relative_to(files / "set")).with_suffix(".bmp")
        place.parent.mkdir(parents=True, exist_ok=True)
        PilImage.open(f).save(place)
    args = [*train_args(files, tmp_path / "run", "--epochs", 1), "--data", copy]
    assert run(*args)[0] == 0
    image = copy / "train" / "red" / "0.bmp"
    PilImage.effect_noise((12, 12), 90).convert("RGB").save(image)
    for more in ([], ["--resume"]):
        code, error, _ = run(*args, *more)
        assert code == 2
        assert "data was" in error["error"]
        assert "(images, labels or names of classes have changed since)" in error["error"]


def test_a_rate_that_is_too_high_ends_a_run(files: Path, tmp_path: Path, run: Run) -> None:
    code, error, err = run(*train_args(files, tmp_path / "stop", "--lr", 1000, "--epochs", 5))
    assert (code, error["exit_code"]) == (5, 5)
    assert "of the trained weights sit at the clamp" in error["error"]
    assert "start again with a lower --lr than 1e+03" in error["error"]
    args = train_args(files, tmp_path / "warn", "--lr", 1000, "--epochs", 5, "--on-divergence", "warn")
    code, found, err = run(*args)
    assert code == 0
    assert found["diverged"]
    assert found["clamped"] > 0.5
    assert "lower --lr than 1e+03" in found["warnings"][0]
    assert "warning: epoch 1, step 24: training has diverged" in err
    assert main([*map(str, args)]) == 0


def test_a_finished_run_says_so(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(a) for a in train_args(files, tmp_path, "--epochs", 1)]
    assert main(args) == 0
    capsys.readouterr()
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "this run had finished before, with these settings: nothing was done" in out
    assert "has already finished with these settings" in err
    assert main([*args, "--lr", "0.01"]) == 2
    assert "holds a finished run with other settings: lr was" in capsys.readouterr().err


def test_training_here_for_a_chip_counts_all_of_its_memory(files: Path, tmp_path: Path, run: Run, tools: str) -> None:
    """Arena and state alone would fit into 2 KiB; the program with its stack does not."""
    args = train_args(files, tmp_path / "out", "--epochs", 1, "--target", "stm32f746")
    code, error, _ = run(*args, "--sram", "2K")
    assert code == 4
    assert "bytes of SRAM are needed, 2048 are there" in error["error"]
    assert run(*args, "--sram", "64K")[0] == 0


def test_sizes_that_no_chip_takes_are_refused(files: Path, run: Run) -> None:
    args = ["plan", "--model", files / "chain.json", "--scheme", "head", "--classes", 3, "--size"]
    for size in (4097, 32768, 10**30):
        code, error, _ = run(*args, size)
        assert code == 2
        assert f"--size {size}: no microcontroller takes such images; give at most 4096" in error["error"]
    assert run(*args, 64)[0] == 0


def test_paths_that_are_no_text_are_shown(files: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/caf\xe9"
    args = [sys.executable, "-m", "trainlet", *map(str, train_args(files, tmp_path, "--epochs", 1))]
    args = [a.encode() for a in args]
    args[args.index(os.fsencode(tmp_path))] = out
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(args, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9" in done.stdout
    assert os.path.exists(out + b"/state.safetensors")


@pytest.mark.parametrize(
    ("error", "code"), [(MismatchError, 5), (ToolMissingError, 6), (DeviceError, 7), (KeyboardInterrupt, 130)]
)
def test_exit_codes(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int
) -> None:
    def fail(path: Path) -> None:
        raise error("what went wrong")

    monkeypatch.setattr(prepare_module, "load_model", fail)
    found, data, err = run("import", files / "chain.json")
    assert found == code
    assert data == {"error": "what went wrong", "exit_code": code}
    assert err == "error: what went wrong\n"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(files: Path, more: list[str]) -> None:
    read, write = os.pipe()
    args = [sys.executable, "-m", "trainlet", "import", str(files / "chain.json"), *more]
    os.close(read)
    done = subprocess.run(args, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


# --- published models ---------------------------------------------------------------------------------------


def test_a_published_model_trains_on_photographs(assets: Path, tmp_path: Path, run: Run) -> None:
    """Three classes of real images through the 99kb scheme, resumed: the whole way in little time."""
    for split, count in (("train", 12), ("val", 4)):
        for name in "019":
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for f in sorted((assets / "data" / "sign_digits" / split / name).iterdir())[:count]:
                (tmp_path / "set" / split / name / f.name).symlink_to(f)
    model = assets / "models" / "mcunet-5fps.pkl"
    args = ["train", "--model", model, "--data", tmp_path / "set", "--scheme", "99kb", "--epochs", 2, "--lr", 0.002]
    code, whole, _ = run(*args, "--out", tmp_path / "whole")
    assert code == 0
    assert whole["extra_memory_bytes"] // 1024 == 99
    assert whole["train_loss"] < 1.2
    assert whole["val_accuracy"] > 0.5
    code, plain, _ = run(*args, "--out", tmp_path / "plain", "--no-cache")
    assert plain["state_sha256"] == whole["state_sha256"]


def test_a_published_model_is_counted(assets: Path, run: Run) -> None:
    _, found, _ = run("import", assets / "models" / "mcunet-5fps.pkl")
    assert (found["convolutions"], found["depthwise"], found["additions"]) == (43, 14, 7)
    assert found["dead_channels"] == 62
    assert found["macs"] == 22_613_504
