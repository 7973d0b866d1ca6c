# SPDX-License-Identifier: Apache-2.0
"""The commands around devices: what is installed, which chips there are, whether host and device agree."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from trainlet.cli.commands import (
    Bits,
    Chip,
    Classes,
    Flash,
    Json,
    Model,
    Place,
    Scheme,
    Sram,
    command,
    measured_table,
    prepare_model,
)
from trainlet.cli.output import Report, Table, grouped
from trainlet.errors import UsageError


@command("doctor")
def doctor(json: Json = False) -> Report:
    """Say which tools are found and how to install what is missing."""
    from trainlet.toolchain import doctor as look

    rows = look()
    tools = [{**asdict(r), "found": r.found} for r in rows]
    shown = [(r.tool, r.version or "missing", r.purpose) for r in rows]
    lines = [f"{r.tool} is missing; install it with: {r.install}" for r in rows if not r.found]
    table = Table("tools", ("tool", "version", "for"), shown, numbers=False)
    return Report({"tools": tools, "missing": [r.tool for r in rows if not r.found]}, [table], lines)


@command("targets")
def targets(json: Json = False) -> Report:
    """List the chips that code can be built for."""
    from trainlet.targets import TARGETS

    data = [
        {
            "name": t.name,
            "core": t.core,
            "mhz": t.mhz,
            "sram_bytes": t.sram_bytes,
            "flash_bytes": t.flash_bytes,
            "fpu": t.fpu,
            "pools": {p.name: p.nbytes for p in t.pools},
            "about": t.about,
        }
        for t in TARGETS.values()
    ]
    rows = [
        (t.name, t.core, f"{t.mhz} MHz", f"{t.sram_bytes // 1024} KiB", f"{t.flash_bytes // 1024} KiB", t.about)
        for t in TARGETS.values()
    ]
    return Report({"targets": data}, [Table("targets", ("name", "core", "clock", "SRAM", "flash", ""), rows, False)])


@command("validate")
def validate(
    model: Model,
    scheme: Scheme,
    classes: Classes,
    steps: Annotated[int, typer.Option(help="Training steps to compare.")] = 5,
    on: Place = "cortex-m7",
    target: Chip = None,
    bits: Bits = None,
    sram: Sram = None,
    flash: Flash = None,
    json: Json = False,
) -> Report:
    """Run the same steps here and on an emulated chip, and compare every byte."""
    from trainlet.cli.prepare import choose_target
    from trainlet.session.emulator import EmulatorSession
    from trainlet.session.host import HostSession
    from trainlet.validate import validate as compare

    chip = choose_target(on, target, sram, flash)
    if chip is None:
        raise UsageError("--on host: validate compares the host with a chip; give --on cortex-m7")
    p = prepare_model(model, scheme, classes, bits)
    device = EmulatorSession(p.compiled, chip)
    found = compare(HostSession(p.compiled), device, p.shape, steps)
    result = {**p.facts(), "classes": classes, "on": on, "target": chip.name, "sram_bytes": chip.sram_bytes}
    result |= {**asdict(found), **device.facts()}
    lines = [
        f"equal: {grouped(found.compared_bytes)} bytes compared over {steps} steps, "
        f"{grouped(found.changed_weights)} weights changed, state sha256 {found.state_sha256[:16]}"
    ]
    return Report(result, measured_table(device.facts()), lines)
