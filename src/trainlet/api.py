# SPDX-License-Identifier: Apache-2.0
"""What the command line does, as functions over graphs. Each is a few lines over what the commands call.

Paths are a ``str`` or a ``pathlib.Path``. A ``scheme`` is an ``UpdateScheme``, or what ``resolve`` reads: ``full``,
``head``, ``last:K``, ``bias:K``, a published name, or the path of a JSON file. Sizes of memory are bytes, or a text
such as ``"128K"``. What is wrong with an argument is a ``UsageError``; see ``trainlet.errors`` for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainlet import frontends
from trainlet.autodiff.scheme import UpdateScheme, check_scheme, extra_memory_bytes, from_json
from trainlet.compiler import ALL, Passes, Scheme, compile_inference, compile_model, need_model, need_scheme
from trainlet.errors import UsageError
from trainlet.frontends import graph_file, need_path
from trainlet.frontends.quantize import quantize as quantize
from trainlet.ir import Graph
from trainlet.measure.probe import first_difference
from trainlet.measure.program import Measurement
from trainlet.measure.program import measure as measure_program
from trainlet.measure.validate import Validation
from trainlet.measure.validate import validate as validate_sessions
from trainlet.plan.arena import largest_alive
from trainlet.select.analyze import QUICK, STANDARD, Runner
from trainlet.select.choose import choose, final_scheme, find_selector
from trainlet.select.folder import locked
from trainlet.select.jobs import Clock, open_executor
from trainlet.select.limits import PlannedLimit
from trainlet.select.runs import open_study
from trainlet.select.store import FILE, JobStore
from trainlet.session import Session
from trainlet.session.emulator import EmulatorSession
from trainlet.session.host import HostSession
from trainlet.session.mailbox import DeviceSession
from trainlet.session.mixed import MixedSession
from trainlet.session.qemu import QemuSession
from trainlet.toolchain.budget import Budget, Size
from trainlet.toolchain.targets import Target, find_target
from trainlet.train import data as datasets
from trainlet.train import loop, statefile
from trainlet.train.data import Dataset, Transform
from trainlet.train.loop import Evaluation, Progress, Silent, TrainConfig, default_lr
from trainlet.train.run import Run
from trainlet.train.statefile import StateMeta, TrainedState

T = TypeVar("T")

# --- files ------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Graph:
    """Reads a model file, whatever kind it is: a published checkpoint (.pkl), or a graph that ``save`` wrote (.json
    with .safetensors beside it). A checkpoint gives a graph of stage INT8 whose image is int8 (H, W, C), q = pixel -
    128; a graph file gives one of the stage that was saved.

    UsageError where the file is missing or damaged, UnsupportedError where nothing reads it, naming what is in it."""
    return frontends.load(path)


def save(graph: Graph, path: str | Path) -> Path:
    """Writes a graph as two files, ``path`` (which ends in .json) and its data as .safetensors beside it; returns the
    path. The same graph gives the same bytes.

    UsageError where the path cannot be written, UnsupportedError for a graph that has been compiled."""
    where = need_path(path)
    try:
        graph_file.save(_need(Graph, graph, "a graph, as trainlet.load gives it"), where)
    except OSError as e:
        raise UsageError(f"{where}: cannot be written ({e.strerror}); give a file in a folder that can") from None
    return where


def load_data(path: str | Path, graph: Graph, *, resize: str = "crop", augment: str | Iterable[str] = ()) -> Dataset:
    """Labelled images for the model ``graph``: a folder with {train,val}/CLASS/*.jpg, or an .npz with x_train (N, H, W,
    C) uint8 pixels or int8 (pixel - 128), y_train (N,) whole numbers from 0, x_val and y_val. Every image comes out as
    int8 (H, W, C) of the model's size.

    ``resize`` of image files: crop (shorter side, then the center) or squeeze. ``augment``: crop, flip, or both, drawn
    anew for each training image and epoch. UsageError names what is missing, empty or out of range; ToolMissingError
    without Pillow."""
    words = augment.split(",") if isinstance(augment, str) else augment
    chosen = tuple(w.strip() for w in words if w.strip())
    h, w, c = need_model(graph).image.shape
    return datasets.load_data(need_path(path), Transform((h, w, c), resize, chosen))


# --- training ---------------------------------------------------------------------------------------------------


def fit(
    graph: Graph,
    data: Dataset,
    scheme: Scheme,
    out: str | Path,
    *,
    epochs: int = 8,
    lr: float | None = None,
    seed: int = 0,
    bits: int | None = None,
    limit: int | None = None,
    target: str | Target | None = None,
    sram: Size | None = None,
    passes: Passes = ALL,
    resume: bool = False,
    overwrite: bool = False,
    on_divergence: str = "stop",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains ``graph``, which has a head for the classes of ``data`` (``attach_head``), in generated C at batch 1, and
    writes state.safetensors, metrics.jsonl and a checkpoint into the folder ``out``.

    ``lr`` is the peak rate per image (0.5/256 where None, 1/256 for the head alone); ``bits`` of a trained weight are
    8, 12 or 16; ``limit`` images an epoch, balanced over the classes. The steps run on this machine, or on the emulated
    chip ``target`` with its SRAM cut to ``sram``. ``resume`` goes on from the checkpoint in ``out``, ``overwrite``
    discards what is there.

    Returns the result as `trainlet train --json` prints it: val_accuracy, best_val_accuracy, train_loss, state (the
    path), state_sha256 and more. UsageError (data, settings, another run in ``out``), OverBudgetError (the chip),
    MismatchError (training has diverged; the last good state is in ``out``)."""
    if sram is not None and target is None:
        raise UsageError("sram: is the memory of a chip; give target too")
    chosen = need_scheme(scheme, need_model(graph), bits)
    images, folder = _need(Dataset, data, "what load_data gives"), need_path(out)
    augment, resize = (images.transform.augment, images.transform.resize) if images.transform else ((), "crop")
    rate = default_lr(chosen) if lr is None else lr
    config = TrainConfig(epochs, rate, seed, limit, augment, on_divergence=on_divergence)
    chip = None if target is None else Budget.parse(sram).cut(_target(target))
    compiled = compile_model(graph, chosen, passes=passes)
    session: Session = HostSession(compiled)
    facts = {"extra_memory_bytes": extra_memory_bytes(graph, chosen), "device": chip.core if chip else "host"}
    if chip is not None:
        session = MixedSession(EmulatorSession(compiled, chip), session)
        facts |= {"target": chip.name, "sram_bytes": chip.sram_bytes, "evaluated_on": "host"}
    meta = StateMeta(graph.name, session.model_hash, chosen.to_json(), images.classes, chosen.bits, resize)
    run = Run(session, images, config, folder, meta, facts=facts, progress=progress)
    return run.start(resume=resume, overwrite=overwrite)


def evaluate(graph: Graph, data: Dataset, state: str | Path | TrainedState) -> Evaluation:
    """Accuracy (0 .. 1), mean cross entropy and counts by class of a trained state over the validation images of
    ``data``, on this machine. ``graph`` has the head that it was trained with; what trained is in the state.

    UsageError where state, model and data do not belong together."""
    where = state if isinstance(state, TrainedState) else need_path(state)
    stored = where if isinstance(where, TrainedState) else statefile.load(where)
    name = Path("the state") if isinstance(where, TrainedState) else where
    if _need(Dataset, data, "what load_data gives").classes != stored.meta.classes:
        raise UsageError(f"{name}: the data has other classes than it was trained with; evaluate on data with the same")
    scheme = check_scheme(from_json(stored.meta.scheme), need_model(graph))
    session = HostSession(compile_model(graph, scheme))
    statefile.check_model(stored, session.model_hash, name)
    session.load_state(stored.arrays)
    return loop.evaluate(session, data.val)


# --- memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """The planned SRAM of a training step, in bytes: the ``arena`` (``lower_bound`` is what no plan can go below), the
    trained ``state``, and ``extra`` memory, the analytic figure behind published names. ``largest``: (buffer, layer,
    bytes) of the largest buffers where the arena is fullest. The stack and what else a program has come on top:
    ``measure`` has them."""

    arena: int
    lower_bound: int
    state: int
    extra: int
    largest: tuple[tuple[str, str, int], ...]

    @property
    def total(self) -> int:
        """Arena and state together."""
        return self.arena + self.state


def plan(graph: Graph, scheme: Scheme, *, bits: int | None = None, passes: Passes = ALL) -> Memory:
    """How much SRAM a training step of ``graph``, which has a head, takes as planned; nothing is built or run.

    UsageError for a scheme that the model does not have, UnsupportedError naming a layer that cannot be trained."""
    chosen = need_scheme(scheme, need_model(graph), bits)
    compiled = compile_model(graph, chosen, passes=passes)
    layers = {v: n.layer for n in compiled.graph.nodes for v in (*n.outputs, f"scratch of {n.name}")}
    found = largest_alive(compiled.graph, compiled.plan, 5)
    largest = tuple((name, layers.get(name, "input"), nbytes) for name, nbytes in found)
    arena, state = compiled.plan.arena_bytes, compiled.state_bytes
    return Memory(arena, compiled.plan.lower_bound, state, extra_memory_bytes(graph, chosen), largest)


def measure(
    graph: Graph,
    scheme: Scheme,
    target: str | Target = "stm32f746",
    *,
    bits: int | None = None,
    sram: Size | None = None,
    flash: Size | None = None,
    passes: Passes = ALL,
) -> Measurement:
    """Links ``graph``, which has a head, for the chip ``target`` and runs a training step there, in an emulator:
    ``.train.ram_bytes`` is all SRAM in use, the stack included, ``.train.flash_bytes`` all flash,
    ``.train.work.instructions`` those of the step; ``.infer`` is the program that only infers. ``sram`` and ``flash``
    cut the chip's memory.

    OverBudgetError where it does not fit, ToolMissingError without the Arm compiler or the emulator."""
    chip = Budget.parse(sram, flash).cut(_target(target))
    compiled = compile_model(graph, need_scheme(scheme, need_model(graph), bits), passes=passes)
    return measure_program(compiled, compile_inference(graph, passes=passes), chip)


def validate(
    graph: Graph,
    scheme: Scheme,
    target: str | Target = "stm32f746",
    *,
    steps: int = 5,
    bits: int | None = None,
    sram: Size | None = None,
    flash: Size | None = None,
    emulator: str = "unicorn",
    passes: Passes = ALL,
) -> Validation:
    """Runs ``steps`` training steps on synthetic images here and on the emulated chip ``target`` (``emulator``: unicorn
    or qemu), and compares every byte of loss, prediction, logits and state after each.

    MismatchError names the first array and node that differ; OverBudgetError where it does not fit the chip, cut to
    ``sram`` and ``flash``; ToolMissingError without compiler or emulator."""
    make, chip = find_emulator(emulator), Budget.parse(sram, flash).cut(_target(target))
    compiled = compile_model(graph, need_scheme(scheme, need_model(graph), bits), passes=passes)
    shape, host = graph.image.shape, HostSession(compiled)
    with closing(make(compiled, chip)) as device:
        return validate_sessions(host, device, shape, steps, lambda t: first_difference(compiled, make, chip, shape, t))


EMULATORS: dict[str, Callable[..., DeviceSession]] = {"unicorn": EmulatorSession, "qemu": QemuSession}
"""By name."""


def find_emulator(name: str) -> Callable[..., DeviceSession]:
    """The kind of session that runs in the emulator of that name; UsageError lists the names."""
    if name not in EMULATORS:
        raise UsageError(f"emulator {name!r}: unknown; give {' or '.join(EMULATORS)}")
    return EMULATORS[name]


def select(
    model: Graph,
    data: str | Path,
    sram: Size,
    out: str | Path,
    *,
    target: str | Target = "stm32f746",
    flash: Size | None = None,
    method: str = "exact",
    quick: bool = False,
    bits: int | Iterable[int] = 8,
    jobs: int = 2,
    seed: int = 0,
    lr: float | None = None,
    resize: str = "crop",
    measured: bool = True,
    progress: Progress | None = None,
) -> UpdateScheme:
    """Finds out by short training runs what to train of ``model`` (which needs no head) on the images in ``data`` (as
    in ``load_data``) under ``sram`` bytes, the stack included, on ``target``. Finished runs are kept in the folder
    ``out``: the same call goes on from there. ``method``: exact, evolution or freeze, last, bias or published;
    ``bits``: the width of a trained weight, or several to choose from; ``measured`` False counts arena and state alone
    and needs no compiler for the chip.

    OverBudgetError where not even the head alone fits."""
    chip = Budget.parse(sram, flash).cut(_target(target))
    widths = [bits] if isinstance(bits, int) else list(bits)
    effort, selector_of, folder = QUICK if quick else STANDARD, find_selector(method, None), need_path(out)
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    with (
        locked(folder),
        locked(folder / "cache"),
        JobStore(folder / FILE) as store,
        closing(open_executor(jobs, None)) as executor,
    ):
        study = open_study(need_model(model), need_path(data), resize, folder / "cache")
        limit = PlannedLimit(study.graph, chip if measured else None, chip.sram_bytes)
        runner = Runner(study, store, executor, progress or Silent(), Clock(executor.workers), lr)
        return final_scheme(choose(runner, effort, widths, limit, selector_of(runner, effort, seed), seed))


# --- arguments --------------------------------------------------------------------------------------------------


def _target(target: str | Target) -> Target:
    return find_target(target) if isinstance(target, str) else _need(Target, target, "the name of a chip")


def _need(kind: type[T], value: object, what: str) -> T:
    """The value; UsageError where it is of another kind."""
    if not isinstance(value, kind):
        raise UsageError(f"{what} is wanted here, not {type(value).__name__} {value!r:.60}")
    return value
