# SPDX-License-Identifier: Apache-2.0
"""The demonstration that needs no file: a shipped model meets another camera and learns to see with it, on a chip.

``assets`` holds a small int8 model of Fashion-MNIST with its trained head, 1,000 images to learn from and 1,000 to be
judged by (the model has seen neither), and the scheme that says what trains."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from trainlet.autodiff import scheme
from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import compile_model
from trainlet.emit import Compiled
from trainlet.errors import MismatchError, ToolMissingError
from trainlet.frontends import attach_head
from trainlet.frontends import graph_file as irfile
from trainlet.ir.graph import Graph
from trainlet.session import Session
from trainlet.session.emulator import EmulatorSession
from trainlet.session.host import HostSession
from trainlet.session.mixed import MixedSession
from trainlet.svg import Curve, accuracy_svg
from trainlet.toolchain.targets import Target
from trainlet.train import data
from trainlet.train.folder import locked, write_atomic
from trainlet.train.loop import Progress, Silent, TrainConfig, evaluate
from trainlet.train.run import CHECKPOINT_FILE, Run
from trainlet.train.statefile import StateMeta

NAME: Final = "fashion"
SRAM: Final = "64KB"
EPOCHS: Final = 8
LIMIT: Final = 250  # images per epoch
LR: Final = 0.1 / 24
HEAD_LR: Final = 1 / 4  # of 1/16 to 2 the best for the head alone

DATA_FILE: Final = "data.npz"
SCHEME_FILE: Final = "scheme.json"
LOCK_FILE: Final = ".demo.lock"  # beside that of the run in the same folder
PICTURE_FILE: Final = "accuracy.svg"
HEAD_FOLDER: Final = "head_only"
COLORS: Final = ("#b04a00", "#0b6e4f")
TRANSFORM: Final = data.Transform((28, 28, 1))

_ASSETS: Final = Path(__file__).parent / "assets"
_NOISE_SEED: Final = 20


# --- what is shipped --------------------------------------------------------------------------------------------


def load_model() -> Graph:
    """The INT8 graph: 28 x 28 x 1 pixels to 10 classes, with the dense head that it was trained with."""
    return irfile.load(_ASSETS / f"{NAME}.json")


def load_scheme(graph: Graph) -> UpdateScheme:
    """What the demo trains."""
    return scheme.load_scheme(_ASSETS / SCHEME_FILE, graph)


def load_data() -> data.Dataset:
    """The shipped images as the model was trained on them: 1,000 to train, 1,000 to validate."""
    return data.load_data(_ASSETS / f"{NAME}.npz", TRANSFORM)


def compile_demo(train: UpdateScheme | None = None) -> Compiled:
    """The shipped model with its own head, compiled for ``train``, else for the shipped scheme."""
    graph = attach_head(load_model(), 10, keep=True)
    return compile_model(graph, train or load_scheme(graph))


def other_camera(pixels: data.Pixels) -> data.Pixels:
    """The same scenes, uint8 (N, H, W, C), through a camera that the model never saw: haze on its lens leaves a third
    of the contrast and no black, and its sensor is noisy. The same pixels give the same picture in every numpy."""
    words = np.random.PCG64(_NOISE_SEED).random_raw(pixels.size).reshape(pixels.shape)
    noise = sum(((words >> np.uint64(s)) & np.uint64(15)).astype(np.int32) for s in (0, 4)) - 15  # -15 to 15
    seen: data.Pixels = np.clip(60 + pixels.astype(np.int32) * 90 // 255 + noise, 0, 255).astype(np.uint8)
    return seen


def write_inputs(out: Path) -> None:
    """The model, the scheme and the images of the other camera as files that the other commands read."""
    out.mkdir(parents=True, exist_ok=True)
    graph = load_model()
    irfile.save(graph, out / f"{NAME}.json")
    write_atomic(out / SCHEME_FILE, load_scheme(graph).to_json().encode())
    images = io.BytesIO()
    with np.load(_ASSETS / f"{NAME}.npz", allow_pickle=False) as shipped:
        np.savez_compressed(
            images,
            x_train=other_camera(shipped["x_train"]),
            y_train=shipped["y_train"],
            x_val=other_camera(shipped["x_val"]),
            y_val=shipped["y_val"],
            classes=shipped["classes"],
        )
    write_atomic(out / DATA_FILE, images.getvalue())


# --- the run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """One demonstration. ``chip`` None trains on the host, where no memory is measured."""

    out: Path
    chip: Target | None
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    progress: Progress = field(default_factory=Silent)

    def run(self) -> dict[str, Any]:
        """Trains and returns the result. Raises ToolMissingError, OverBudgetError, UsageError, MismatchError, and
        Interrupted once everything is saved."""
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out, LOCK_FILE):
            return self._run()

    def _run(self) -> dict[str, Any]:
        began = time.perf_counter()
        self._config(LR)  # refuses a bad seed before any work
        compiled = compile_demo()
        device = None if self.chip is None else _emulator(compiled, self.chip)
        host = HostSession(compiled, seed=self.seed)
        write_inputs(self.out)
        images = data.load_data(self.out / DATA_FILE, TRANSFORM)
        usual = evaluate(host, load_data().val, self.progress).accuracy
        before = evaluate(host, images.val, self.progress).accuracy
        self.progress.line(f"validation accuracy: {usual:.3f} with the camera it knows, {before:.3f} with another")
        head_only = compile_demo(UpdateScheme("head"))
        head = self._train(head_only, HostSession(head_only), images, HEAD_FOLDER, HEAD_LR, Silent())
        self.progress.line(f"its head retrained, and nothing else (on the host): {head['val_accuracy']:.3f}")
        session = host if device is None else MixedSession(device, host)
        run = self._train(compiled, session, images, "", LR, self.progress)
        if device is not None:
            self._compare(compiled, images, run["state_sha256"])
        picture = self.out / PICTURE_FILE
        write_atomic(picture, _picture(before, {"head only": head, "sparse update": run}).encode())
        return {
            "accuracy_before": before,
            "accuracy_after": run["val_accuracy"],
            "accuracy_head_only": head["val_accuracy"],
            "accuracy_usual_camera": usual,
            **{k: run[k] for k in ("scheme", "epochs", "steps", "arena_bytes", "state_bytes", "state_sha256")},
            **({} if device is None else _measured(device, images)),
            "out": str(self.out),
            "state": run["state"],
            "metrics": run["metrics"],
            "picture": str(picture),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _config(self, lr: float) -> TrainConfig:
        return TrainConfig(EPOCHS, lr, self.seed, LIMIT)

    def _train(
        self, compiled: Compiled, session: Session, images: data.Dataset, folder: str, lr: float, progress: Progress
    ) -> dict[str, Any]:
        out = self.out / folder
        s = compiled.scheme
        meta = StateMeta(NAME, compiled.model_hash, s.to_json(), images.classes, s.bits, TRANSFORM.resize)
        run = Run(session, images, self._config(lr), out, meta, progress=progress)
        resume = self.resume and (out / CHECKPOINT_FILE).exists()
        return run.start(resume=resume, overwrite=self.overwrite)

    def _compare(self, compiled: Compiled, images: data.Dataset, device: str) -> None:
        """The same steps on the host. MismatchError where they end in another state."""
        with tempfile.TemporaryDirectory() as folder:
            again = replace(self, out=Path(folder), resume=False)
            host = again._train(compiled, HostSession(compiled), images, "", LR, Silent())["state_sha256"]
        if host != device:
            raise MismatchError(
                f"{self.out}: the chip ended in state {device}, the host in {host}; `trainlet validate` finds the "
                "first step at which they differ"
            )
        self.progress.line(f"the same steps on the host: the same state, sha256 {host[:16]}")


def _emulator(compiled: Compiled, chip: Target) -> EmulatorSession:
    try:
        return EmulatorSession(compiled, chip)
    except ToolMissingError as e:
        raise ToolMissingError(f"{e}; or see the demo without a chip: trainlet demo --on host") from None


def _measured(device: EmulatorSession, images: data.Dataset) -> dict[str, int]:
    """What the chip measured; of one more step, which leaves no trace, where a resumed run had none left."""
    if not device.steps:
        state = device.state()
        device.train_step(images.train.image(0), int(images.train.labels[0]), LR)
        device.load_state(state)
    return device.facts()


def _picture(before: float, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy over training steps, from the metrics of ``runs``."""
    curves = []
    for (label, run), color in zip(runs.items(), COLORS, strict=True):
        lines = [json.loads(text) for text in Path(run["metrics"]).read_text(encoding="utf-8").splitlines()]
        epochs = [line for line in lines if line["type"] == "epoch"]
        points = [(LIMIT * e["epoch"], e["val_accuracy"]) for e in epochs]
        curves.append(Curve(label, color, [(0, before), *points]))
    return accuracy_svg(curves, "training steps", range(0, EPOCHS * LIMIT + 1, EPOCHS * LIMIT // 4))
