# SPDX-License-Identifier: Apache-2.0
"""The commands. What they need is imported when they run, so that ``--help`` answers at once."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from trainlet._version import __version__
from trainlet.cli.output import Report, RichProgress, Table, grouped, size
from trainlet.errors import OverBudgetError, ToolMissingError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from trainlet.cli.prepare import Prepared
    from trainlet.compiler import Passes
    from trainlet.session import Session
    from trainlet.toolchain.targets import Target
    from trainlet.train.data import Dataset

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Trains int8 neural networks on microcontrollers: compiles a training step to C, and runs that C here.",
)


MAX_SIDE: Final = 4096  # pixels: an image of that size alone has 48 MiB


class StoppedError(Exception):
    """Ctrl-C, kept from typer, which would swallow its text."""


def command(name: str) -> Callable[[Callable[..., Report]], Callable[..., Report]]:
    """Registers a command."""

    def register(body: Callable[..., Report]) -> Callable[..., Report]:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> Report:
            try:
                return body(*args, **kwargs)
            except KeyboardInterrupt as e:
                raise StoppedError(str(e)) from None

        app.command(name)(run)
        return run

    return register


def _version(asked: bool) -> None:
    if asked:
        print(f"trainlet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


Model = Annotated[Path, typer.Option(help="Model file: a published checkpoint (.pkl) or an imported graph (.json).")]
Scheme = Annotated[str, typer.Option(help="What trains: 99kb, head, bias:K, last:K, full, or a JSON file.")]
Classes = Annotated[int, typer.Option(help="Number of classes of the new head.")]
Bits = Annotated[int | None, typer.Option(help="Width of a trained weight: 8 (default), 12 or 16.")]
Sram = Annotated[
    str | None,
    typer.Option(help="All SRAM, such as 256K, stack included; arena and state alone without a chip."),
]
Input = Annotated[
    str,
    typer.Option("--input", help="How the image comes: by rows, and is never kept whole, or as an image in the arena."),
]
Without = Annotated[
    list[str] | None,
    typer.Option(
        "--without", help="Switch a pass off: fuse, reorder, inplace, depth_first or by_rows. Give it once for each."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Data = Annotated[Path, typer.Option(help="Folder with {train,val}/CLASS/*.jpg, or an .npz of arrays.")]
Device = Annotated[str, typer.Option("--on", help="Where the C runs: host.")]
Place = Annotated[str, typer.Option("--on", help="host, or an emulated chip: cortex-m7, cortex-m4, cortex-m0plus.")]
Chip = Annotated[str | None, typer.Option("--target", help="The chip of --on; `trainlet targets` lists them.")]
Flash = Annotated[str | None, typer.Option("--flash", help="Cut the chip's flash to this, such as 512K.")]


# --- models -------------------------------------------------------------------------------------------------


@command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Model file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the graph: NAME.json and NAME.safetensors.")] = None,
    json: Json = False,
) -> Report:
    """Read a model file and say what is in it."""
    from trainlet.cli.prepare import load_model, prepare_out, summary
    from trainlet.frontends import graph_file as irfile
    from trainlet.names import file_name

    graph = load_model(file)
    data = summary(graph)
    lines = []
    if out is not None:
        path = prepare_out(out) / f"{file_name(graph.name)}.json"
        irfile.save(graph, path)
        data["graph"] = str(path)
        lines.append(f"wrote {path} and {path.with_suffix('.safetensors').name} beside it")
    shown = {k: v for k, v in data.items() if k not in ("model", "graph", "input")}
    rows = [("input", " x ".join(map(str, data["input"]))), *((spaced(k), grouped(v)) for k, v in shown.items())]
    return Report(data, [Table(data["model"], (), rows)], lines)


@command("compile")
def compile_(
    model: Model,
    scheme: Scheme,
    classes: Classes,
    out: Annotated[Path, typer.Option(help="Folder for the C; it is made if need be.")],
    bits: Bits = None,
    input: Input = "rows",
    without: Without = None,
    target: Annotated[
        str | None, typer.Option("--target", help="A chip that it is to be built for; `trainlet targets` lists them.")
    ] = None,
    sram: Sram = None,
    flash: Flash = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Lose what was changed of the files of an earlier compile in --out.")
    ] = False,
    json: Json = False,
) -> Report:
    """Write the C of inference and training, ready to build here or for a chip.

    The folder of an earlier compile is written anew. What you changed of its README and examples is kept, as are files
    of yours; it refuses where others of its files were changed, and any folder that it did not write."""
    from trainlet.cli.prepare import check_sram, choose_target, find_passes, prepare_out
    from trainlet.toolchain.folder import check_folder
    from trainlet.toolchain.package import write_package
    from trainlet.toolchain.targets import find_target

    if target is None and flash is not None:
        raise UsageError("--flash: nothing is built for a chip; give --target too")
    chip = choose_target(find_target(target).core, target, sram, flash) if target else None
    check_folder(prepare_out(out))
    p = prepare_model(model, scheme, classes, bits, find_passes(input, without or ()))
    facts, tables, lines = _linked(p, chip) if chip else ({}, [], check_sram(p, sram))
    # without the folders, which must not change the bytes of what is written
    words = ["trainlet", "compile", "--model", model.name, "--scheme", Path(scheme).name, "--classes", str(classes)]
    words += ["--bits", str(p.scheme.bits), "--input", p.input]
    words += [word for name in p.passes.off if name != "by_rows" for word in ("--without", name)]
    if chip is not None:
        words += ["--target", chip.name, "--sram", str(chip.sram_bytes), "--flash", str(chip.flash_bytes)]
    kept = write_package(p.compiled, out, shlex.join(words), chip, overwrite=overwrite).kept
    lines += [f"kept as you changed it: {name}; --overwrite writes it anew" for name in kept]
    data = {**p.facts(), "classes": classes, "out": str(out), "kept": kept, **facts}
    return Report(data, [memory_table(p), *tables], [*lines, f"wrote {out}"])


def _linked(p: Prepared, chip: Target) -> tuple[dict[str, Any], list[Table], list[str]]:
    """JSON, tables and lines of the program for a chip, the same that `plan` measures; without the tools for that
    nothing is known. OverBudgetError where it does not fit."""
    from trainlet.toolchain.chip import build_device

    facts = {"target": chip.name, "sram_bytes": chip.sram_bytes, "flash_limit_bytes": chip.flash_bytes}
    try:
        found = build_device(p.compiled, chip)
    except ToolMissingError as e:
        return {**facts, "linked": False}, [], [f"whether it fits {chip.name} was not checked: {e}"]
    example, lines = _example(p, chip)
    sizes = {
        "static_bytes": found.static_bytes,
        "stack_reserved_bytes": found.stack_bytes,
        "sram_needed_bytes": found.sram_bytes,
        "flash_bytes": found.flash_bytes,
        **example,
    }
    table = Table(f"linked for {chip.name}", (), [(spaced(k), size(v)) for k, v in sizes.items()])
    return {**facts, "linked": True, **sizes}, [table], lines


def _example(p: Prepared, chip: Target) -> tuple[dict[str, int], list[str]]:
    """Flash of the example, whose test vectors come on top of the model, and what there is to say."""
    from trainlet.toolchain.package import link_example

    try:
        return {"example_flash_bytes": link_example(p.compiled, chip).flash_bytes}, []
    except OverBudgetError as e:
        return {}, [f"the model fits, its example with the test vectors in flash does not: {e}"]


def prepare_model(
    model: Path, scheme: str, classes: int, bits: int | None, passes: Passes | None = None, pixels: int | None = None
) -> Prepared:
    from trainlet.cli.prepare import load_model, prepare, resolve_scheme
    from trainlet.compiler import ALL
    from trainlet.frontends import at_size

    if pixels is not None and pixels > MAX_SIDE:
        raise UsageError(
            f"--size {pixels}: no microcontroller takes such images; give at most {MAX_SIDE} pixels a side"
        )
    graph = load_model(model)
    chosen = resolve_scheme(scheme, graph, bits)
    sized = graph if pixels is None else at_size(graph, pixels, pixels)
    return prepare(sized, chosen, classes, passes or ALL)


def memory_table(p: Prepared) -> Table:
    """The planned bytes of a training step."""
    facts = p.facts()
    keys = ("arena_bytes", "lower_bound_bytes", "state_bytes", "extra_memory_bytes")
    rows = [(spaced(k.removesuffix("_bytes")), size(facts[k])) for k in keys]
    rows.insert(3, ("arena and state", size(facts["arena_bytes"] + facts["state_bytes"])))
    return Table(f"{p.model.name}, scheme {p.scheme.name}, {p.scheme.bits} bits", (), rows)


def spaced(key: str) -> str:
    """A key of the JSON as words."""
    return key.replace("_", " ")


# --- training -----------------------------------------------------------------------------------------------


@command("train")
def train(
    model: Model,
    data: Data,
    scheme: Scheme,
    out: Annotated[Path, typer.Option(help="Folder for the trained state, the metrics and the checkpoint.")],
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 8,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate at batch 1, in float32 units.", show_default="0.5/256; the head alone 1/256"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of head, order, roundings and augmentation.")] = 0,
    bits: Bits = None,
    input: Input = "rows",
    without: Without = None,
    limit: Annotated[int | None, typer.Option(help="Images per epoch, balanced over the classes.")] = None,
    resize: Annotated[str, typer.Option(help="crop (shorter side, then the center) or squeeze.")] = "crop",
    augment: Annotated[str, typer.Option(help="crop, flip or crop,flip: drawn anew for each image and epoch.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard what is in --out, and begin again.")] = False,
    on_divergence: Annotated[
        str,
        typer.Option(
            help="Where the loss or the share of weights at the clamp explodes: stop at the last good state, "
            "or warn and go on."
        ),
    ] = "stop",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute the frozen prefix at every step.")] = False,
    sram: Sram = None,
    on: Place = "host",
    target: Chip = None,
    flash: Flash = None,
    json: Json = False,
) -> Report:
    """Train a model on labelled images, in generated C."""
    from trainlet.cli.prepare import (
        check_sram,
        choose_target,
        find_passes,
        load_model,
        prepare,
        prepare_out,
        resolve_scheme,
    )  # fmt: skip
    from trainlet.toolchain.budget import Budget
    from trainlet.toolchain.chip import build_device
    from trainlet.toolchain.targets import find_target
    from trainlet.train.data import Transform
    from trainlet.train.loop import TrainConfig, default_lr
    from trainlet.train.run import Run
    from trainlet.train.statefile import StateMeta

    words = tuple(w.strip() for w in augment.split(",") if w.strip())
    if resume and overwrite:
        raise UsageError("--resume and --overwrite: give one of them, the first goes on and the second begins again")
    passes = find_passes(input, without or ())
    planned = Budget.parse(sram, flash).cut(find_target(target)) if on == "host" and target else None
    chip = None if planned else choose_target(on, target, sram, flash)
    graph = load_model(model)
    chosen = resolve_scheme(scheme, graph, bits)
    rate = default_lr(chosen) if lr is None else lr
    config = TrainConfig(epochs, rate, seed, limit, words, cache=not no_cache, on_divergence=on_divergence)
    dataset = _dataset(data, Transform(_shape(graph), resize, words))
    prepare_out(out)
    p = prepare(graph, chosen, len(dataset.classes), passes)
    said = check_sram(p, sram) if chip is None and planned is None else []
    if planned is not None:
        build_device(p.compiled, planned)  # refuses what would not fit there
        said = [f"it fits {planned.name}: linked for it, the stack included; the steps ran here"]
    session, measured = _place(p, chip)
    meta = StateMeta(graph.name, session.model_hash, chosen.to_json(), dataset.classes, chosen.bits, resize)
    facts = {"extra_memory_bytes": p.extra_memory_bytes, "device": on}
    if chip is not None:
        facts |= {"target": chip.name, "sram_bytes": chip.sram_bytes, "evaluated_on": "host"}
    run = Run(session, dataset, config, out, meta, facts=facts, progress=RichProgress())
    result = {**run.start(resume=resume, overwrite=overwrite), **measured()}
    tables = [memory_table(p), _result_table(result), *measured_table(measured())]
    lines = [*said, *(f"warning: {text}" for text in result["warnings"])]
    if result["already_finished"]:
        lines.append("this run had finished before, with these settings: nothing was done, --overwrite begins it again")
    return Report(result, tables, [*lines, f"trained state: {result['state']}"])


def _result_table(r: dict[str, Any]) -> Table:
    rows = [
        ("validation accuracy", f"{r['val_accuracy']:.4f}"),
        ("best", f"{r['best_val_accuracy']:.4f} (epoch {r['best_epoch']})"),
        ("training loss", f"{r['train_loss']:.4f}"),
        ("loss of a guess, ln(classes)", f"{r['chance_loss']:.4f}"),
        ("saturated gradients", f"{r['saturated']:.3%}"),
        ("weights at the clamp", f"{r['clamped']:.3%}"),
        ("images per second", f"{r['images_per_second']:.1f}"),
        ("seconds", f"{r['seconds']:.1f}"),
        ("prefix cache", size(r["cache_bytes"])),
        ("state sha256", r["state_sha256"][:16]),
    ]
    return Table(f"{r['epochs']} epochs, {r['steps']} steps", (), rows)


@command("eval")
def evaluate(
    model: Model,
    data: Data,
    state: Annotated[Path | None, typer.Option(help="The trained state.safetensors of `trainlet train`.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Must name the scheme of the state, if it is given.")] = None,
    resize: Annotated[str | None, typer.Option(help="crop or squeeze; as in training if not given.")] = None,
    on: Device = "host",
    json: Json = False,
) -> Report:
    """Measure a trained state on the validation images."""
    import time

    from trainlet.cli.prepare import load_model
    from trainlet.train import statefile
    from trainlet.train.data import Transform
    from trainlet.train.loop import evaluate as run

    if state is None:
        raise UnsupportedError(
            "eval without --state: the classifier that comes with a model is not evaluated, only a trained head; "
            "give the state.safetensors of a `trainlet train`"
        )
    _check_device(on)
    stored = statefile.load(state)
    graph = load_model(model)
    p = _prepare_state(graph, state, stored, scheme)
    dataset = _dataset(data, Transform(_shape(graph), resize or stored.meta.resize))
    if dataset.classes != stored.meta.classes:
        raise UsageError(
            f"{data}: its classes {_few(dataset.classes)} are not those of {state}, {_few(stored.meta.classes)}; "
            "evaluate on data with the same classes"
        )
    session = _session(p)
    statefile.check_model(stored, session.model_hash, state)
    try:
        session.load_state(stored.arrays)
    except UsageError as e:
        raise UsageError(f"{state}: {e}") from None
    began = time.perf_counter()
    found = run(session, dataset.val, RichProgress())
    seconds = time.perf_counter() - began
    images = sum(found.images)
    by_class = {c: found.correct[k] / found.images[k] for k, c in enumerate(dataset.classes) if found.images[k]}
    result = {
        **p.facts(),
        "val_accuracy": found.accuracy,
        "val_loss": found.loss,
        "images": images,
        "class_accuracy": by_class,
        "images_per_second": round(images / seconds, 2),
        "state": str(state),
        "state_sha256": statefile.state_sha256(stored.arrays),
    }
    rows = [(c, f"{found.images[k]}", f"{by_class.get(c, 0):.4f}") for k, c in enumerate(dataset.classes)]
    lines = [f"validation accuracy {found.accuracy:.4f}, loss {found.loss:.4f} over {images} images"]
    return Report(result, [Table(f"{p.model.name}, {state}", ("class", "images", "accuracy"), rows)], lines)


def _prepare_state(graph: Any, path: Path, stored: Any, scheme: str | None) -> Prepared:
    """Compiles for the scheme that the state was trained with."""
    from trainlet.autodiff.scheme import check_scheme, from_json
    from trainlet.cli.prepare import prepare, resolve_scheme

    try:
        mine = check_scheme(from_json(stored.meta.scheme), graph)
    except UsageError as e:
        raise UsageError(
            f"{path}: trained from {stored.meta.model}, whose scheme does not fit {graph.name}: {e}"
        ) from None
    if scheme is not None and resolve_scheme(scheme, graph, mine.bits) != mine:
        raise UsageError(f"--scheme {scheme}: {path} was trained with scheme {mine.name}; leave --scheme out")
    return prepare(graph, mine, len(stored.meta.classes))


def _check_device(on: str) -> None:
    if on != "host":
        raise UsageError(f"--on {on!r}: training runs on host; give --on host or leave it out")


def _shape(graph: Any) -> tuple[int, int, int]:
    h, w, c = graph.image.shape
    return h, w, c


def _dataset(path: Path, transform: Any) -> Dataset:
    from trainlet.train.data import load_data

    return load_data(path, transform)


def _session(p: Prepared) -> Session:
    from trainlet.session.host import HostSession

    return HostSession(p.compiled)


def _place(p: Prepared, chip: Target | None) -> tuple[Session, Callable[[], dict[str, int]]]:
    """A session here or on an emulated chip, and what is measured there once it has run."""
    if chip is None:
        return _session(p), dict
    from trainlet.session.emulator import EmulatorSession
    from trainlet.session.mixed import MixedSession

    device = EmulatorSession(p.compiled, chip)
    return MixedSession(device, _session(p)), device.facts


def measured_table(facts: dict[str, int]) -> list[Table]:
    """What an emulated chip measured; nothing for the host."""
    rows = [(spaced(k), grouped(v)) for k, v in facts.items()]
    return [Table("measured on the emulated chip", (), rows)] if rows else []


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
