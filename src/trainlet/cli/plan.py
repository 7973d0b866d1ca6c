# SPDX-License-Identifier: Apache-2.0
"""How much memory training takes: as planned, and as measured in a linked program that ran on an emulated chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from trainlet.cli.commands import (
    Bits,
    Chip,
    Classes,
    Flash,
    Input,
    Json,
    Model,
    Scheme,
    Sram,
    Without,
    command,
    memory_table,
    prepare_model,
    spaced,
)
from trainlet.cli.output import Report, RichProgress, Table, grouped, size
from trainlet.errors import UsageError

if TYPE_CHECKING:
    from trainlet.cli.prepare import Prepared
    from trainlet.measure.cycles import CycleEstimate
    from trainlet.measure.program import Measurement, Program, Work
    from trainlet.toolchain.targets import Target

_COSTLIEST: Final = 15
_OUTSIDE: Final = "(between the nodes)"


@command("plan")
def plan(
    model: Model,
    scheme: Scheme,
    classes: Classes,
    bits: Bits = None,
    input: Input = "rows",
    without: Without = None,
    pixels: Annotated[
        int | None, typer.Option("--size", help="Height and width of the image, if not those of the model file.")
    ] = None,
    sram: Sram = None,
    measure: Annotated[bool, typer.Option("--measure", help="Link it for a chip and run it there.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Measure, and say where the instructions go.")] = False,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Measure what each pass saves, from updating everything on (chip: lab).")
    ] = False,
    on: Annotated[
        str | None, typer.Option("--on", help="The emulated chip: cortex-m7 (default), cortex-m4, cortex-m0plus.")
    ] = None,
    target: Chip = None,
    flash: Flash = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the arena over the nodes of a step, or what --ablate finds, as an SVG.")
    ] = None,
    json: Json = False,
) -> Report:
    """Say how much memory training takes."""
    from trainlet.cli.prepare import check_sram, find_passes, write_picture
    from trainlet.measure.memory_map import memory_svg

    if ablate:
        return _ablation(model, scheme, classes, bits, picture)

    chip = _chip(measure or profile, on, target, sram, flash)
    p = prepare_model(model, scheme, classes, bits, find_passes(input, without or ()), pixels)
    said = check_sram(p, sram) if chip is None else []
    largest = p.largest()
    data = {**p.facts(), "classes": classes, "largest": largest}
    rows = [(t["tensor"], t["layer"], grouped(t["bytes"])) for t in largest]
    if picture is not None:
        write_picture(picture, memory_svg(p.compiled))
        data["picture"] = str(picture)
    tables = [memory_table(p), Table("largest buffers at the peak", ("buffer", "layer", "bytes"), rows)]
    if chip is None:
        return Report({**data, "notes": said}, tables, said)
    facts, measured, lines = _measure(p, classes, chip, profile)
    return Report({**data, **facts}, [*tables, *measured], lines)


def _ablation(model: Path, scheme: str, classes: int, bits: int | None, picture: Path | None) -> Report:
    """The SRAM of one program for each pass more, all on the chip that has room for everything."""
    from trainlet.cli.prepare import load_model, resolve_scheme, write_picture
    from trainlet.frontends import attach_head
    from trainlet.measure.ablate import STAGES, ablate, ablation_svg, saved
    from trainlet.toolchain.targets import TARGETS

    graph, chip = load_model(model), TARGETS["lab"]
    chosen = resolve_scheme(scheme, graph, bits)
    steps = []
    with RichProgress().bar("passes", len(STAGES)) as advance:
        for step in ablate(attach_head(graph, classes), chosen, chip):
            steps.append(step)
            advance(step.name)
    title = f"{graph.name}, scheme {chosen.name}, {classes} classes: SRAM of a training step, measured on {chip.name}"
    if picture is not None:
        write_picture(picture, ablation_svg(title, steps))
    rows = [
        (s.name, grouped(s.ram_bytes), grouped(s.arena_bytes), grouped(s.state_bytes), grouped(s.instructions_per_step))
        for s in steps
    ]
    data = {"model": graph.name, "scheme": chosen.name, "bits": chosen.bits, "target": chip.name, "steps": saved(steps)}
    headers = ("", "SRAM, all", "arena", "state", "instructions")
    return Report(data, [Table(title, headers, rows)], [s.problem for s in steps if s.problem])


def _chip(measured: bool, on: str | None, name: str | None, sram: str | None, flash: str | None) -> Target | None:
    """The chip to measure on; None where nothing is measured. UsageError for a chip that nothing would run on."""
    from trainlet.cli.prepare import choose_target
    from trainlet.measure.cycles import CORE
    from trainlet.toolchain.targets import find_target

    if not measured:
        given = {"--on": on, "--target": name, "--flash": flash}
        unused = next((option for option, value in given.items() if value is not None), None)
        if unused:
            raise UsageError(f"{unused}: a plan needs no chip, only a measurement does; add --measure or leave it out")
        return None
    if on == "host":
        raise UsageError("--on host: memory is measured on an emulated chip; give --on cortex-m7")
    return choose_target(on or (find_target(name).core if name else CORE), name, sram, flash)


def _measure(p: Prepared, classes: int, chip: Target, profile: bool) -> tuple[dict[str, Any], list[Table], list[str]]:
    """JSON, tables and lines of a measurement."""
    from trainlet.compiler import compile_inference
    from trainlet.frontends import attach_head
    from trainlet.measure.program import estimate_cycles, measure

    found = measure(p.compiled, compile_inference(attach_head(p.model, classes), passes=p.passes), chip)
    estimates = [estimate_cycles(program) for program in (found.train, found.infer)]
    (step, note), (inference, _) = estimates
    facts = {
        "on": chip.core,
        "target": chip.name,
        "sram_bytes": chip.sram_bytes,
        **found.train.facts(),
        "instructions_per_step": found.train.work.instructions,
        "instructions_per_inference": found.train_infers,
        **_estimate_facts(step, "step", chip),
        "estimate": note,
        "inference": {
            **found.infer.facts(),
            "instructions_per_inference": found.infer.work.instructions,
            **_estimate_facts(inference, "inference", chip),
        },
    }
    tables = [_inference_table(found.infer), *_measured_tables(found, chip)]
    if profile:
        facts |= _profile_facts(found.train.work, step)
        facts["inference"] |= _profile_facts(found.infer.work, inference)
        tables += _profile_tables(found.train.work)
    tables += _estimate_tables(step, inference, chip, note, profile)
    return facts, tables, [] if step else [note]


# --- bytes ------------------------------------------------------------------------------------------------------


def _inference_table(program: Program) -> Table:
    """The planned bytes of inference alone."""
    plan = program.compiled.plan
    rows = [
        ("arena", size(plan.arena_bytes)),
        ("lower bound", size(plan.lower_bound)),
        ("state (the head)", size(program.compiled.state_bytes)),
    ]
    return Table("planned for inference alone", (), rows)


def _measured_tables(found: Measurement, chip: Target) -> list[Table]:
    """What was measured, training beside inference alone."""
    train, infer = found.train, found.infer
    where = f"{chip.name}, an emulated {chip.core}"
    headers = ("bytes", "training", "inference alone")
    sections = _pairs(train.firmware.sections, infer.firmware.sections)
    needed = ("needed, with the whole stack", *(grouped(p.firmware.sram_bytes) for p in (train, infer)))
    work = [
        ("a training step", grouped(train.work.instructions), ""),
        ("an inference", grouped(found.train_infers), grouped(infer.work.instructions)),
    ]
    return [
        Table(f"SRAM, measured on {where}", headers, [*_pairs(train.ram, infer.ram, "all"), needed]),
        Table("flash, measured", headers, _pairs(train.flash, infer.flash, "all")),
        Table("sections of the ELF (.stack: what is reserved)", headers, sections),
        Table("instructions, measured", ("", *headers[1:]), work),
    ]


def _pairs(train: Mapping[str, int], infer: Mapping[str, int], total: str = "") -> list[tuple[str, str, str]]:
    """A row for each key that one of the two has something for, and where ``total`` names it one for the sums."""
    keys = [k for k in {**train, **infer} if train.get(k, 0) or infer.get(k, 0)]
    rows = [(spaced(k), grouped(train.get(k, 0)), grouped(infer.get(k, 0))) for k in keys]
    return [*rows, (total, grouped(sum(train.values())), grouped(sum(infer.values())))] if total else rows


# --- instructions -----------------------------------------------------------------------------------------------


def _ranked(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """Name, instructions and share of all, the costliest first."""
    whole = sum(counts.values())
    return [(k, n, n / whole) for k, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _profile_facts(work: Work, estimate: CycleEstimate | None) -> dict[str, Any]:
    """All nodes and functions; "" is the layer of what belongs to no node."""
    nodes = []
    for name, n, share in _ranked(work.nodes):
        layer, _, op = name.rpartition(": ")
        nodes.append({"layer": layer, "op": op, "instructions": n, "share": share})
    functions = [{"function": k, "instructions": n, "share": share} for k, n, share in _ranked(work.functions)]
    guessed = [{"function": k, "estimated_cycles": n} for k, n, _ in _ranked(estimate.functions)] if estimate else None
    return {"nodes": nodes, "functions": functions, "estimated_functions": guessed}


def _profile_tables(work: Work) -> list[Table]:
    kinds = (("node", work.nodes), ("function", work.functions))
    return [
        Table(
            f"instructions of a training step by {kind}, measured",
            (kind, "instructions", "share"),
            _top([(name or _OUTSIDE, grouped(n), f"{share:.1%}") for name, n, share in _ranked(counts)]),
        )
        for kind, counts in kinds
    ]


def _top(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The first rows, and how many are left out."""
    left = len(rows) - _COSTLIEST
    return [*rows[:_COSTLIEST], (f"{left} more in --json", "", "")] if left > 0 else list(rows)


# --- estimates --------------------------------------------------------------------------------------------------


def _estimate_facts(found: CycleEstimate | None, what: str, chip: Target) -> dict[str, Any]:
    return {
        f"estimated_cycles_per_{what}": found.cycles if found else None,
        f"estimated_seconds_per_{what}": _seconds(found, chip) if found else None,
    }


def _seconds(found: CycleEstimate, chip: Target) -> float:
    return found.cycles / (chip.mhz * 1e6)


def _estimate_tables(
    step: CycleEstimate | None, inference: CycleEstimate | None, chip: Target, note: str, profile: bool
) -> list[Table]:
    """Never in one table with what was measured."""
    if step is None or inference is None:
        return []
    rows = [
        (name, grouped(e.cycles), f"{_seconds(e, chip):.4f} s", f"{e.instructions / e.cycles:.2f}")
        for name, e in (("training step", step), ("inference alone", inference))
    ]
    headers = ("", "estimated cycles", "estimated time", "instructions per cycle")
    tables = [Table(f"at {chip.mhz} MHz, {note}", headers, rows)]
    if profile:
        top = _top([(k, grouped(n), f"{share:.1%}") for k, n, share in _ranked(step.functions)])
        title = "cycles of a training step by function, estimated"
        tables.append(Table(title, ("function", "estimated cycles", "estimated share"), top))
    return tables
