# SPDX-License-Identifier: Apache-2.0
"""``trainlet select``: finds out what to train under a limit of memory, and shows what that is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainlet.cli.commands import Data, Json, Model, command
from trainlet.cli.output import Report, RichProgress, Table, grouped
from trainlet.errors import OverBudgetError, UsageError

if TYPE_CHECKING:
    from trainlet.autodiff.scheme import UpdateScheme
    from trainlet.ir.graph import Graph
    from trainlet.select.analyze import Effort
    from trainlet.select.choose import Chosen
    from trainlet.select.report import Point
    from trainlet.toolchain.targets import Target


@command("select")
def select(
    model: Model,
    data: Data,
    sram: Annotated[str, typer.Option(help="All the memory that training may take on the chip, such as 128K.")],
    out: Annotated[Path, typer.Option(help="Folder for the scheme, the report and finished runs; go on in the same.")],
    flash: Annotated[
        str | None, typer.Option(help="All the flash there is; what is chosen is checked.", show_default="the chip's")
    ] = None,
    instructions: Annotated[
        str | None, typer.Option(help="At most so many instructions in a training step, such as 130M.")
    ] = None,
    target: Annotated[str, typer.Option(help="The chip; `trainlet targets` lists them.")] = "stm32f746",
    method: Annotated[
        str, typer.Option(help="exact, evolution or freeze; last, bias or published for comparison.")
    ] = "exact",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images, runs and layers.")] = False,
    bits: Annotated[str, typer.Option(help="Width of a trained weight: 8, 12, 16, or several such as 8,16.")] = "8",
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="With freeze: go on freezing while accuracy is no more than this below its highest, such as 0.01.",
            show_default="freeze until it fits",
        ),
    ] = None,
    finalists: Annotated[
        int | None,
        typer.Option(
            help="With exact and evolution: the best choices of so many depths are trained, and the published schemes "
            "that fit, before one is taken; 1: the best sum as it is.",
            show_default="6; with --quick 4",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler, to run on its workers.")] = None,
    seed: Annotated[int, typer.Option(help="The first one of runs, and of evolution.")] = 0,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of all runs.", show_default="0.5/256; the head alone 1/256")
    ] = None,
    resize: Annotated[str, typer.Option(help="crop (shorter side, then the center) or squeeze.")] = "crop",
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Count arena and state alone: needs no compiler for the chip.")
    ] = False,
    json: Json = False,
) -> Report:
    """Choose what to train under a limit of memory, from short training runs."""
    import time

    from trainlet.cli.prepare import load_model, prepare_out
    from trainlet.select.analyze import QUICK, STANDARD, Runner
    from trainlet.select.choose import (
        SEARCHES,
        choose,
        compare,
        final_scheme,
        find_selector,
        long_rivals,
        short_rivals,
    )
    from trainlet.select.folder import locked
    from trainlet.select.jobs import Clock, open_executor
    from trainlet.select.limits import PlannedLimit
    from trainlet.select.runs import open_study
    from trainlet.select.store import FILE, JobStore
    from trainlet.toolchain.budget import Budget
    from trainlet.toolchain.targets import find_target, parse_count
    from trainlet.train.loop import TrainConfig

    began = time.perf_counter()
    widths, selector_of = _widths(bits), find_selector(method, max_drop)
    if not 0 <= seed < 1 << 31:
        raise UsageError(f"--seed {seed}: give a whole number from 0 to {(1 << 31) - 1}")
    if finalists is not None and finalists < 1:
        raise UsageError(f"--finalists {finalists}: give 1 or more; 1 takes the best sum of contributions as it is")
    if finalists is not None and finalists > 1 and method not in SEARCHES:
        raise UsageError(f"--finalists {finalists}: for --method {' and '.join(SEARCHES)}; leave it out of {method}")
    if lr is not None:
        TrainConfig(1, lr)  # refuses what is no rate
    budget = Budget.parse(sram, flash)
    chip = budget.cut(find_target(target))
    steps = parse_count(instructions, "--instructions") if instructions is not None else None
    if no_measure and (budget.flash or steps):
        raise UsageError("--flash and --instructions are measured; leave --no-measure out")
    graph = load_model(model)
    effort = QUICK if quick else STANDARD
    progress = RichProgress()
    with locked(prepare_out(out)), JobStore(out / FILE) as store, locked(prepare_out(out / "cache")):
        study = open_study(graph, data, resize, out / "cache")
        limit = PlannedLimit(study.graph, None if no_measure else chip, chip.sram_bytes, instructions=steps)
        executor = open_executor(jobs, scheduler)
        try:
            runner = Runner(study, store, executor, progress, Clock(executor.workers), lr)
            selector = selector_of(runner, effort, seed)
            chosen = choose(runner, effort, widths, limit, selector, seed, finalists)
            scheme = final_scheme(chosen)
            measured = {} if no_measure else _measured(study.graph, scheme, chip)
            rivals = short_rivals(chosen, limit)
            if not quick:
                rivals = long_rivals(runner, effort, chosen, limit, limit.narrowed, selector, seed, finalists)
            # other seeds than those that decided between finalists
            points = compare(runner, effort, rivals, limit, chosen.contributions.layers, seed + effort.final_seeds)
        except KeyboardInterrupt as e:
            kept = f"{len(store)} finished runs are kept in {out}, the same command goes on from there"
            raise KeyboardInterrupt(f"{str(e) or 'interrupted'}; {kept}") from None
        finally:
            executor.close()
        found = {
            "model": graph.name,
            "data": str(data),
            "target": chip.name,
            "limit_bytes": chip.sram_bytes,
            "limit_instructions": steps,
            "effort": effort.name,
            "jobs": len(store),
            **_frozen(chosen, max_drop, study.judges(effort.final)),
            "seconds": round(time.perf_counter() - began, 1),
            **measured,
        }
        return _report(out, scheme, chosen, points, found, effort)


def _widths(text: str) -> list[int]:
    """The bits of ``--bits``, each once."""
    from trainlet.autodiff.scheme import FRACTION_BITS

    words = [w.strip() for w in text.split(",")]
    known = {str(b): b for b in FRACTION_BITS}
    wrong = next((w for w in words if w not in known), None)
    if wrong is not None:
        raise UsageError(f"--bits {text!r}: {wrong!r} is no width; give {', '.join(known)}, or several with a comma")
    return list(dict.fromkeys(known[w] for w in words))


def _measured(graph: Graph, scheme: UpdateScheme, chip: Target) -> dict[str, Any]:
    """What the linked program takes on the emulated chip. OverBudgetError where that is above the limit."""
    from trainlet.compiler import compile_inference, compile_model
    from trainlet.measure.program import measure

    program = measure(compile_model(graph, scheme), compile_inference(graph), chip).train
    if program.ram_bytes > chip.sram_bytes:
        raise OverBudgetError(
            f"{graph.name}, the selected scheme: {program.ram_bytes} bytes of SRAM were measured, and the limit is "
            f"{chip.sram_bytes}; give a smaller --sram, and report this, the plan should have known"
        )
    return {
        "ram_bytes": program.ram_bytes,
        "flash_bytes": program.flash_bytes,
        "instructions_per_step": program.work.instructions,
    }


def _frozen(chosen: Chosen, max_drop: float | None, judges: int) -> dict[str, Any]:
    """What freezing came to; nothing of other methods."""
    from trainlet.select.freeze import drop

    course = chosen.selection.course
    if not course:
        return {}
    return {
        "max_drop": max_drop,
        "images_that_judge": judges,
        "parts_frozen": len(course) - 1,
        "first_accuracy": course[0].trained.accuracy,
        "accuracy": course[-1].trained.accuracy,
        "accuracy_spread": course[-1].trained.spread,
        "accuracy_drop": drop(course, course[-1].trained),
    }


def _report(
    out: Path, scheme: UpdateScheme, chosen: Chosen, points: list[Point], found: dict[str, Any], effort: Effort
) -> Report:
    """Writes the files, and says what is in them."""
    from trainlet.select.report import points_json, selection_json, write_report

    selection = {**selection_json(chosen.selection, chosen.steps), "noise": chosen.contributions.noise}
    best_sum = selection_json(chosen.best_sum, ())
    selection["best_sum"] = {k: best_sum[k] for k in ("depth", "weights", "value", "planned_bytes", "bound", "gap")}
    selection["finalists"] = points_json(chosen.finalists)
    files = write_report(out, scheme, chosen.analyses, selection, points, found)
    losses = {p.scheme: p.loss for p in points}
    biases = [p.loss for p in points if p.series == "biases" and p.ram_bytes <= found["limit_bytes"]]
    summary = {
        "held_out_loss": losses["selected"],
        "head_only_loss": losses.get("head", losses["selected"]),
        "bias_only_loss": min((v for v in biases if v is not None), default=None),
    }
    rows = [
        (p.scheme, p.series, grouped(p.ram_bytes), _number(p.loss), _number(p.accuracy), p.problem)
        for p in sorted(points, key=lambda p: p.ram_bytes)
    ]
    finals = [(p.scheme, grouped(p.ram_bytes), _number(p.loss), p.problem) for p in chosen.finalists]
    chosen_rows = [("biases", f"of the last {selection['depth']} layers")]
    chosen_rows += [(layer, f"{ratio:g} of its input channels") for layer, ratio in selection["weights"].items()]
    names = ("ram_bytes", "limit_bytes", "flash_bytes", "instructions_per_step", "limit_instructions")
    memory = [(k, grouped(found[k])) for k in names if found.get(k)]
    images = f"{effort.final.epochs} epochs over up to {effort.final.images} images"
    tables = [
        Table(f"{found['model']}: what trains, {selection['bits']} bits", (), chosen_rows, False),
        Table("measured on the emulated chip" if "ram_bytes" in found else "limit", (), memory),
        Table(f"trained the same way, {images}", ("scheme", "", "SRAM, planned bytes", "loss", "accuracy", ""), rows),
    ]
    if selection["course"]:
        tables.insert(1, _course(selection["course"], found["images_that_judge"]))
    lines = [f"scheme: {files['scheme']}", f"report: {files['report']}"]
    if finals:
        tables.insert(1, Table("finalists, the lowest loss is taken", ("", "SRAM, bytes", "loss", ""), finals))
    data = {**found, **summary, **selection, **files}
    del data["search"], data["course"]
    return Report({**data, "points": [{"scheme": p.scheme, "loss": p.loss} for p in points]}, tables, lines)


def _course(course: Sequence[Mapping[str, Any]], judges: int) -> Table:
    names = ("loss", "accuracy", "accuracy_spread")
    rows = [
        (step["frozen"] or "nothing", grouped(step["planned_bytes"]), *(_number(step[k]) for k in names))
        for step in course
    ]
    title = f"frozen in this order; {judges} images judge, one is {1 / judges:.4f} of accuracy; ± over seeds"
    return Table(title, ("", "SRAM, bytes", "loss", "accuracy", "±"), rows)


def _number(v: float | None) -> str:
    return "" if v is None else f"{v:.4f}"
