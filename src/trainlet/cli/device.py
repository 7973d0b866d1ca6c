# SPDX-License-Identifier: Apache-2.0
"""The commands around devices: what is installed, which chips there are, whether host and device agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

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
    Without,
    command,
    prepare_model,
    spaced,
)
from trainlet.cli.output import Report, Table, grouped
from trainlet.errors import UsageError

if TYPE_CHECKING:
    from trainlet.cli.prepare import Prepared
    from trainlet.measure.validate import Validation
    from trainlet.session import Session
    from trainlet.session.mailbox import DeviceSession
    from trainlet.toolchain.targets import Target


@command("doctor")
def doctor(json: Json = False) -> Report:
    """Say which tools are found and how to install what is missing."""
    from trainlet.toolchain.find import doctor as look

    rows = look()
    tools = [{**asdict(r), "found": r.found} for r in rows]
    shown = [(r.tool, r.version or "missing", r.purpose) for r in rows]
    lines = [f"{r.tool} is missing; install it with: {r.install}" for r in rows if not r.found]
    table = Table("tools", ("tool", "version", "for"), shown, numbers=False)
    return Report({"tools": tools, "missing": [r.tool for r in rows if not r.found]}, [table], lines)


@command("targets")
def targets(json: Json = False) -> Report:
    """List the chips that code can be built for."""
    from trainlet.toolchain.targets import TARGETS

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
    without: Without = None,
    sram: Sram = None,
    flash: Flash = None,
    emulator: Annotated[str, typer.Option(help="What emulates the chip: unicorn, qemu or both.")] = "unicorn",
    json: Json = False,
) -> Report:
    """Run the same steps here and on an emulated chip, and compare every byte."""
    from trainlet.cli.prepare import choose_target, find_passes
    from trainlet.session.host import HostSession

    chip = choose_target(on, target, sram, flash)
    if chip is None:
        raise UsageError("--on host: validate compares the host with a chip; give --on cortex-m7")
    kinds = _emulators(emulator)
    p = prepare_model(model, scheme, classes, bits, find_passes("rows", without or ()))
    result = {**p.facts(), "classes": classes, "on": on, "target": chip.name, "sram_bytes": chip.sram_bytes}
    host = HostSession(p.compiled)
    runs = {name: _validated(p, host, make, chip, steps) for name, make in kinds.items()}
    lines = [
        f"equal on {name}: {grouped(found.compared_bytes)} bytes compared over {steps} steps, "
        f"{grouped(found.changed_weights)} weights changed, state sha256 {found.state_sha256[:16]}"
        for name, (found, _) in runs.items()
    ]
    data = [{"emulator": name, **asdict(found), **facts} for name, (found, facts) in runs.items()]
    table = _measured({name: facts for name, (_, facts) in runs.items()})
    return Report({**result, **data[0], "emulator": emulator, "runs": data}, [table], lines)


def _measured(facts: dict[str, dict[str, int]]) -> Table:
    """What each emulator measured, side by side; one may measure what another cannot."""
    keys = dict.fromkeys(k for measured in facts.values() for k in measured)
    rows = [(spaced(k), *(grouped(m[k]) if k in m else "" for m in facts.values())) for k in keys]
    return Table("measured on the emulated chip", ("", *facts), rows)


def _emulators(name: str) -> dict[str, Callable[..., DeviceSession]]:
    """The kinds of session that ``--emulator`` names."""
    from trainlet.session.emulator import EmulatorSession
    from trainlet.session.qemu import QemuSession

    kinds: dict[str, Callable[..., DeviceSession]] = {"unicorn": EmulatorSession, "qemu": QemuSession}
    if name != "both" and name not in kinds:
        raise UsageError(f"--emulator {name!r}: unknown; give {', '.join(kinds)} or both")
    return kinds if name == "both" else {name: kinds[name]}


def _validated(
    p: Prepared, host: Session, make: Callable[..., DeviceSession], chip: Target, steps: int
) -> tuple[Validation, dict[str, int]]:
    """What one emulator has compared and measured."""
    from trainlet.measure.probe import first_difference
    from trainlet.measure.validate import validate as compare

    device = make(p.compiled, chip)
    try:
        found = compare(host, device, p.shape, steps, lambda t: first_difference(p.compiled, make, chip, p.shape, t))
        return found, device.facts()
    finally:
        device.close()
