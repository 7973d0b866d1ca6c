# SPDX-License-Identifier: Apache-2.0
"""The folder a user takes away: emitted C and kernels, a CMake project, an example, and test vectors; for a chip also
start-up code, linker script and an example that runs there.

The expected bytes come from the reference executor, not from the C they are compared with. The same input gives the
same folder, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Final

from trainlet._version import __version__
from trainlet.emit import Compiled
from trainlet.errors import UsageError
from trainlet.toolchain.chip import FLAGS, Firmware, build_device, link_script, port_sources
from trainlet.toolchain.find import ARM_HINT
from trainlet.toolchain.host import kernel_sources
from trainlet.toolchain.targets import Target
from trainlet.toolchain.vectors import expected, expected_header, expected_json

API_VERSION: Final = 1
STACK_BYTES: Final = 4096
"""Of the example on a chip: room for any compiler's version of the engine, and for what a user adds."""
_FOR_A_CHIP: Final = ("startup.c", "memory.c", "string.h")
_CHIP_NOTES: Final = {
    "rp2040": "The boot ROM of the RP2040 starts a loader in the first 256 bytes of flash, part of its maker's "
    "SDK and not in here: link the library and `examples/device/main.c` into a project of that SDK.",
    "lab": "There is no such chip: it stands for a Cortex-M7 with room for everything, to be emulated.",
}


def _template(name: str, compiled: Compiled, target: Target | None) -> str:
    prefix = compiled.sources.prefix
    values = {"NAME": prefix, "UPPER": prefix.upper(), "TARGET": target.name if target else ""}
    if target is not None:
        flags = " ".join(FLAGS)
        values |= {"CORE": target.core, "CORE_FLAGS": " ".join(target.flags), "FLAGS": flags, "HINT": ARM_HINT}
    text = (resources.files("trainlet") / "csrc" / "package" / name).read_text()
    return re.sub(r"@(\w+)@", lambda m: values[m[1]], text)


def _readme(compiled: Compiled, command: str, target: Target | None) -> str:
    name, upper = compiled.sources.prefix, compiled.sources.prefix.upper()
    build = _chip_text(target) if target else _HOST_TEXT
    return f"""# {compiled.graph.name}

C99 that runs and trains this model: `{command}`.

{build}
`src/{name}.h` is the interface. The caller gives two blocks of memory, aligned to 4 bytes:
{compiled.plan.arena_bytes} bytes to work in (`{upper}_ARENA_BYTES`) and
{compiled.layout.nbytes} bytes that hold what is trained (`{upper}_STATE_BYTES`).
Compile with `-ffp-contract=off` and without fast math: the bytes depend on it.

The code is under the Apache License 2.0. The weights in `src/{name}_data.h` stay under the model's own license.
"""


_HOST_TEXT: Final = """\
    cmake -B build && cmake --build build && build/example

trains on two synthetic images and compares every byte of the trained state with `test_vectors/`.
"""


def _chip_text(target: Target) -> str:
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
caches and pins stay as they are after reset. The stack has {STACK_BYTES} bytes (`port/link.ld`) at the bottom of SRAM,
so that an overflow is a fault at once. In a project with start-up code of its own, take `src/` alone.

    cmake -B build-host -DHOST=ON && cmake --build build-host && build-host/example

does the same on this machine.
"""


def _chip_files(compiled: Compiled, target: Target) -> dict[str, str]:
    """What a chip needs beside the model."""
    prefix = compiled.sources.prefix
    port = port_sources()
    script = link_script(target, STACK_BYTES, f"lib{prefix}.a:{prefix}.c.o*", f"lib{prefix}.a:model.c.o*")
    return {
        **{f"port/{k}": port[k] for k in _FOR_A_CHIP},
        "port/link.ld": script,
        "port/toolchain.cmake": _template("toolchain.cmake", compiled, target),
        "port/firmware.cmake": _template("firmware.cmake", compiled, target),
        "examples/device/main.c": _template("device.c", compiled, target),
    }


def link_example(compiled: Compiled, target: Target, stack_bytes: int | None = STACK_BYTES) -> Firmware:
    """Builds the example for a chip as the folder would; ``stack_bytes`` None: what its deepest calls need.
    OverBudgetError where it does not fit; ToolMissingError where that cannot be found out."""
    headers = {
        "expected.h": expected_header(expected(compiled)), "synthetic.h": _template("synthetic.h", compiled, target),
    }  # fmt: skip
    main = _template("device.c", compiled, target)
    for name, text in headers.items():  # as one file, since a new header would have all kernels compiled anew
        main = main.replace(f'#include "{name}"\n', text)
    return build_device(compiled, target, stack_bytes=stack_bytes, main=main)


def package_files(compiled: Compiled, command: str, target: Target | None = None) -> dict[str, bytes]:
    """All files of the folder by relative path, ``manifest.json`` included; with those for ``target`` if given."""
    e = expected(compiled)
    text: dict[str, str] = {
        **{f"src/{k}": v for k, v in kernel_sources().items()},
        **{f"src/{k}": v for k, v in compiled.sources.files.items()},
        **(_chip_files(compiled, target) if target else {}),
        "CMakeLists.txt": _template("CMakeLists.txt", compiled, target),
        "examples/host/main.c": _template("main.c", compiled, target),
        "test_vectors/synthetic.h": _template("synthetic.h", compiled, target),
        "test_vectors/expected.h": expected_header(e),
        "test_vectors/expected.json": expected_json(e),
        "scheme.json": compiled.scheme.to_json(),
        "README.md": _readme(compiled, command, target),
    }
    files = {k: v.encode() for k, v in text.items()}
    files["test_vectors/state.bin"] = e.state
    files["manifest.json"] = _manifest(compiled, command, target, files)
    return files


def _manifest(compiled: Compiled, command: str, target: Target | None, files: Mapping[str, bytes]) -> bytes:
    facts = {
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
        "sha256": {k: hashlib.sha256(v).hexdigest() for k, v in sorted(files.items())},
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


def write_package(compiled: Compiled, out: Path, command: str, target: Target | None = None) -> tuple[Path, ...]:
    """Writes the folder and returns the paths written; what an earlier call wrote and this one does not goes, unless it
    was changed since. UsageError where ``out`` holds files of something else."""
    manifest = out / "manifest.json"
    if out.exists() and any(out.iterdir()) and not manifest.exists():
        raise UsageError(f"{out}: the folder holds files that trainlet did not write; name an empty or a new folder")
    files = package_files(compiled, command, target)
    before = _written_before(manifest)
    for name in before.keys() - files.keys():
        path = out / name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == before[name]:
            path.unlink()
    for name, data in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tuple(out / name for name in files)


def _written_before(manifest: Path) -> dict[str, str]:
    """SHA-256 of the files of an earlier call by relative path."""
    try:
        found = json.loads(manifest.read_bytes())["sha256"]
        return {k: v for k, v in found.items() if ".." not in Path(k).parts and not Path(k).is_absolute()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
