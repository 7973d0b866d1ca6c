# SPDX-License-Identifier: Apache-2.0
"""`trainlet demo`: a shipped model learns to see with another camera, on an emulated chip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trainlet.cli.commands import Json, Place, command
from trainlet.cli.output import Report, RichProgress, Table, grouped, size


@command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the trained state, metrics, picture and inputs.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the order of the images, and of the roundings.")] = 0,
    on: Place = "cortex-m7",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard what is in --out, and begin again.")] = False,
    json: Json = False,
) -> Report:
    """Show on-device training with a shipped model, on an emulated chip with 64 KB of SRAM; needs no file."""
    from trainlet.cli.prepare import choose_target, prepare_out
    from trainlet.demo.run import SRAM, Demo
    from trainlet.errors import UsageError

    if resume and overwrite:
        raise UsageError("--resume and --overwrite: give one of them, the first goes on and the second begins again")
    chip = choose_target(on, None, None if on == "host" else SRAM, None)
    found = Demo(prepare_out(out), chip, seed, resume, overwrite, RichProgress()).run()
    place = {} if chip is None else {"target": chip.name, "sram_bytes": chip.sram_bytes}
    result = {**found, "on": on, **place, "seed": seed}
    tables = [_accuracies(result), *([_measured(result, chip.name)] if chip else [])]
    return Report(result, tables, _lines(result))


def _accuracies(r: dict[str, Any]) -> Table:
    rows = [
        ("the camera of its training", r["accuracy_usual_camera"]),
        ("another camera, before training", r["accuracy_before"]),
        ("another camera, head retrained", r["accuracy_head_only"]),
        ("another camera, sparse update", r["accuracy_after"]),
    ]
    title = f"validation accuracy; {grouped(r['steps'])} training steps, scheme {r['scheme']}"
    return Table(title, (), [(name, f"{accuracy:.3f}") for name, accuracy in rows])


def _measured(r: dict[str, Any], chip: str) -> Table:
    rows = [
        ("SRAM there is", size(r["sram_bytes"])),
        ("SRAM used, stack included", size(r["ram_bytes"])),
        ("flash used", size(r["flash_bytes"])),
        ("instructions per training step", grouped(r["instructions_per_step"])),
    ]
    return Table(f"measured on the emulated {chip}", (), rows)


def _lines(r: dict[str, Any]) -> list[str]:
    unmeasured = "trained on the host, where neither SRAM nor flash is measured; leave out --on host for the chip"
    return [
        *([unmeasured] if r["on"] == "host" else []),
        f"{r['seconds']:.0f} seconds; trained state {r['state']}, curve {r['picture']}, metrics {r['metrics']}",
    ]
