# SPDX-License-Identifier: Apache-2.0
"""The folder a user takes away: emitted C and kernels, a CMake project, an example, and test vectors; for a chip also
start-up code, linker script and an example that runs there.

The expected bytes come from the reference executor, not from the C they are compared with. The same input gives the
same folder, byte for byte; one for a chip also depends on the compiler, which says how much stack it takes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from trainlet._version import __version__
from trainlet.emit import Compiled
from trainlet.errors import ToolMissingError
from trainlet.toolchain.armcc import find_arm_compiler
from trainlet.toolchain.chip import FLAGS, Firmware, build_device, link_script, port_sources
from trainlet.toolchain.find import ARM_HINT
from trainlet.toolchain.folder import Written, check_folder, write_folder
from trainlet.toolchain.host import STRICT, kernel_sources
from trainlet.toolchain.targets import Target
from trainlet.toolchain.vectors import expected, expected_header, expected_json

API_VERSION: Final = 1
UNMEASURED_STACK: Final = 4096
"""Of the example where no compiler is here that could say what it needs."""
_OWN: Final = ("README.md", "examples/")  # what the reader is meant to change
_FOR_A_CHIP: Final = ("startup.c", "memory.c", "string.h")
_CHIP_NOTES: Final = {
    "rp2040": "The boot ROM of the RP2040 starts a loader in the first 256 bytes of flash, part of its maker's "
    "SDK and not in here: link the library and `examples/device/main.c` into a project of that SDK.",
    "lab": "There is no such chip: it stands for a Cortex-M7 with room for everything, to be emulated.",
}


@dataclass(frozen=True, slots=True)
class _Chip:
    """A target, the bytes of stack that the example gets there, and where that figure comes from."""

    target: Target
    stack_bytes: int
    about: str


def _template(name: str, compiled: Compiled, target: Target | None) -> str:
    prefix = compiled.sources.prefix
    values = {
        "NAME": prefix,
        "UPPER": prefix.upper(),
        "TARGET": target.name if target else "",
        "STRICT": " ".join(STRICT),
    }
    if target is not None:
        flags = " ".join(FLAGS)
        values |= {"CORE": target.core, "CORE_FLAGS": " ".join(target.flags), "FLAGS": flags, "HINT": ARM_HINT}
    text = (resources.files("trainlet") / "csrc" / "package" / name).read_text()
    return re.sub(r"@(\w+)@", lambda m: values[m[1]], text)


def _readme(compiled: Compiled, command: str, build: str) -> str:
    name, upper = compiled.sources.prefix, compiled.sources.prefix.upper()
    return f"""# {compiled.graph.name}

C99 that runs and trains this model: `{command}`.

{build}
`src/{name}.h` is the interface. The caller gives two blocks of memory, aligned to 4 bytes:
{compiled.plan.arena_bytes} bytes to work in (`{upper}_ARENA_BYTES`) and
{compiled.layout.nbytes} bytes that hold what is trained (`{upper}_STATE_BYTES`).
Compile with `-ffp-contract=off` and without fast math: the bytes depend on it.

The command writes this folder anew. It keeps what you change of this file and of `examples/`, and your own files; it
refuses where another of its files was changed.

The code is under the Apache License 2.0. The weights in `src/{name}_data.h` stay under the model's own license.
"""


_HOST_TEXT: Final = """\
    cmake -B build && cmake --build build && build/example

trains on two synthetic images and compares every byte of the trained state with `test_vectors/`.
"""


def _chip_text(chip: _Chip) -> str:
    target = chip.target
    note = f"\n\n{_CHIP_NOTES[target.name]}" if target.name in _CHIP_NOTES else ""
    return f"""\
    cmake -B build && cmake --build build

makes `build/firmware.elf` for a bare {target.name} ({target.about}): {target.flash_bytes} bytes of flash from
{target.flash_base:#010x} on, {target.sram_bytes} bytes of SRAM from {target.sram_base:#010x} on. It needs
`arm-none-eabi-gcc` and nothing from the chip's maker.

`examples/device/main.c` trains on two synthetic images and compares every byte of the trained state with
`test_vectors/`. Load it with a debugger and stop at `tl_port_wait`: `verdict` is 1 where all is equal, 2 where
something differs, 3 where a call was refused (`status` says why). Put your camera into `camera_row` and your labels
into `label_of`.{note}

`port/` has the start-up code, the memory map and the few functions that a compiler expects of a C library. Clocks,
caches and pins stay as they are after reset. The stack lies at the bottom of SRAM, so that an overflow is a fault at
once, and has {chip.stack_bytes} bytes (`port/link.ld`): {chip.about}.
In a project with start-up code of its own, take `src/` alone.

    cmake -B build-host -DHOST=ON && cmake --build build-host && build-host/example

does the same on this machine.
"""


def _chip(compiled: Compiled, target: Target) -> _Chip:
    """The stack is that of ``build_device``: one figure, whatever is asked to fit. OverBudgetError where the model does
    not."""
    try:
        nbytes, compiler = build_device(compiled, target).stack_bytes, find_arm_compiler().version
    except ToolMissingError:
        return _Chip(target, UNMEASURED_STACK, "a guess, since there was no compiler to measure with")
    return _Chip(target, nbytes, f"what the deepest calls need as {compiler} makes them, and room for an interrupt")


def _chip_files(compiled: Compiled, chip: _Chip) -> dict[str, str]:
    """What a chip needs beside the model."""
    target = chip.target
    prefix = compiled.sources.prefix
    port = port_sources()
    script = link_script(target, chip.stack_bytes, f"lib{prefix}.a:{prefix}.c.o*", f"lib{prefix}.a:model.c.o*")
    return {
        **{f"port/{k}": port[k] for k in _FOR_A_CHIP},
        "port/link.ld": script,
        "port/toolchain.cmake": _template("toolchain.cmake", compiled, target),
        "port/firmware.cmake": _template("firmware.cmake", compiled, target),
        "examples/device/main.c": _template("device.c", compiled, target),
    }


def link_example(compiled: Compiled, target: Target) -> Firmware:
    """Builds the example for a chip as the folder would. OverBudgetError where it does not fit; ToolMissingError where
    that cannot be found out."""
    headers = {
        "expected.h": expected_header(expected(compiled)), "synthetic.h": _template("synthetic.h", compiled, target),
    }  # fmt: skip
    main = _template("device.c", compiled, target)
    for name, text in headers.items():  # as one file, since a new header would have all kernels compiled anew
        main = main.replace(f'#include "{name}"\n', text)
    return build_device(compiled, target, stack_bytes=build_device(compiled, target).stack_bytes, main=main)


def package_files(compiled: Compiled, command: str, target: Target | None = None) -> dict[str, bytes]:
    """All files of the folder by relative path, but for its manifest; with those for ``target`` if given."""
    e = expected(compiled)
    chip = _chip(compiled, target) if target else None
    text: dict[str, str] = {
        **{f"src/{k}": v for k, v in kernel_sources().items()},
        **{f"src/{k}": v for k, v in compiled.sources.files.items()},
        **(_chip_files(compiled, chip) if chip else {}),
        "CMakeLists.txt": _template("CMakeLists.txt", compiled, target),
        "examples/host/main.c": _template("main.c", compiled, target),
        "test_vectors/synthetic.h": _template("synthetic.h", compiled, target),
        "test_vectors/expected.h": expected_header(e),
        "test_vectors/expected.json": expected_json(e),
        "scheme.json": compiled.scheme.to_json(),
        "README.md": _readme(compiled, command, _chip_text(chip) if chip else _HOST_TEXT),
    }
    return {**{k: v.encode() for k, v in text.items()}, "test_vectors/state.bin": e.state}


def _facts(compiled: Compiled, command: str, target: Target | None) -> dict[str, object]:
    """What the manifest says beside the files."""
    return {
        "trainlet": __version__,
        "api_version": API_VERSION,
        "command": command,
        "target": target.name if target else None,
        "model": compiled.graph.name,
        "model_hash": compiled.model_hash,
        "scheme": compiled.scheme.name,
        "bits": compiled.scheme.bits,
        "arena_bytes": compiled.plan.arena_bytes,
        "state_bytes": compiled.layout.nbytes,
    }


def write_package(
    compiled: Compiled, out: str | Path, command: str, target: Target | None = None, *, overwrite: bool = False
) -> Written:
    """Writes the folder, anew where an earlier call wrote it. What the reader changed of the README and the examples is
    kept; UsageError where anything else was changed, unless to ``overwrite`` it, or where ``out`` holds files of
    something else. ``command`` is how it was made, for its README. OverBudgetError where the model does not fit
    ``target``."""
    out = Path(out)
    check_folder(out)
    files, facts = package_files(compiled, command, target), _facts(compiled, command, target)
    return write_folder(out, files, facts, _OWN, overwrite=overwrite)
