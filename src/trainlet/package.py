# SPDX-License-Identifier: Apache-2.0
"""The folder a user takes away: emitted C and kernels, a CMake project, a host example, and test vectors.

The expected bytes come from the reference executor, not from the C they are compared with. The same input gives the
same folder, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainlet import __version__
from trainlet.build import kernel_sources
from trainlet.compiler import Compiled
from trainlet.emit import c_float
from trainlet.errors import UsageError
from trainlet.reference import initial_state, train_step
from trainlet.session.state import StateCodec

STEPS = 2
SEED = 17
LR = float(np.float32(0.1 / 256))
API_VERSION = 1


@dataclass(frozen=True)
class Expected:
    """What the reference executor got on the synthetic images."""

    losses: tuple[float, ...]
    predictions: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]
    state: bytes


def synthetic_image(shape: tuple[int, ...], t: int) -> NDArray[np.int8]:
    """Image ``t`` of the test vectors, int8 (H, W, C), by a formula that C repeats."""
    h, w, c = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return ((7 * h + 13 * w + 29 * c + 31 * t + h * w * t // 64) % 256 - 128).astype(np.int8)


def expected(compiled: Compiled) -> Expected:
    """Runs the training steps of the test vectors in the reference executor."""
    graph = compiled.train
    shape = graph.values[graph.inputs[0]].shape
    classes = graph.values[graph.outputs[0]].size
    state = initial_state(graph, SEED)
    results = [train_step(graph, state, synthetic_image(shape, t), t % classes, LR) for t in range(STEPS)]
    raw = StateCodec(compiled.graph, compiled.layout).pack_values(SEED, STEPS, state.arrays)
    return Expected(
        tuple(float(r.loss) for r in results),
        tuple(int(r.prediction) for r in results),
        tuple(tuple(float(v) for v in r.logits) for r in results),
        raw,
    )


def _expected_header(e: Expected) -> str:
    rows = [e.state[i : i + 24] for i in range(0, len(e.state), 24)]
    body = "\n".join("    " + ", ".join(map(str, r)) + "," for r in rows)
    return (
        "/* SPDX-License-Identifier: Apache-2.0 */\n"
        "/* What the reference executor got: the same steps must leave these bytes. */\n"
        f"#define EXPECTED_STEPS {STEPS}\n#define EXPECTED_SEED {SEED}u\n#define EXPECTED_LR {c_float(LR)}\n\n"
        f"static const float expected_loss[] = {{{', '.join(map(c_float, e.losses))}}};\n"
        f"static const int expected_prediction[] = {{{', '.join(map(str, e.predictions))}}};\n"
        f"static const unsigned char expected_state[{len(e.state)}] = {{\n{body}\n}};\n"
    )


def _template(name: str, prefix: str) -> str:
    text = (resources.files("trainlet") / "csrc" / "package" / name).read_text()
    return text.replace("@NAME@", prefix).replace("@UPPER@", prefix.upper())


def _readme(compiled: Compiled, command: str) -> str:
    name, upper = compiled.sources.prefix, compiled.sources.prefix.upper()
    return f"""# {compiled.graph.name}

C99 that runs and trains this model: `{command}`.

    cmake -B build && cmake --build build && build/example

trains on two synthetic images and compares every byte of the trained state with `test_vectors/`.
`src/{name}.h` is the interface. The caller gives two blocks of memory, aligned to 4 bytes:
{compiled.plan.arena_bytes} bytes to work in (`{upper}_ARENA_BYTES`) and
{compiled.layout.nbytes} bytes that hold what is trained (`{upper}_STATE_BYTES`).
Compile with `-ffp-contract=off` and without fast math: the bytes depend on it.

The code is under the Apache License 2.0. The weights in `src/{name}_data.h` stay under the model's own license.
"""


def package_files(compiled: Compiled, command: str) -> dict[str, bytes]:
    """All files of the folder by relative path, ``manifest.json`` included."""
    e = expected(compiled)
    prefix = compiled.sources.prefix
    vectors = {"seed": SEED, "lr": LR, "steps": STEPS, "loss": e.losses}
    vectors |= {"prediction": e.predictions, "logits": e.logits}
    text: dict[str, str] = {
        **{f"src/{k}": v for k, v in kernel_sources().items()},
        **{f"src/{k}": v for k, v in compiled.sources.files.items()},
        "CMakeLists.txt": _template("CMakeLists.txt", prefix),
        "examples/host/main.c": _template("main.c", prefix),
        "test_vectors/expected.h": _expected_header(e),
        "test_vectors/expected.json": json.dumps(vectors, indent=2) + "\n",
        "scheme.json": compiled.scheme.to_json(),
        "README.md": _readme(compiled, command),
    }
    files = {k: v.encode() for k, v in text.items()}
    files["test_vectors/state.bin"] = e.state
    files["manifest.json"] = _manifest(compiled, command, files)
    return files


def _manifest(compiled: Compiled, command: str, files: Mapping[str, bytes]) -> bytes:
    facts = {
        "trainlet": __version__,
        "api_version": API_VERSION,
        "command": command,
        "model": compiled.graph.name,
        "model_hash": compiled.model_hash,
        "scheme": compiled.scheme.name,
        "bits": compiled.scheme.bits,
        "arena_bytes": compiled.plan.arena_bytes,
        "state_bytes": compiled.layout.nbytes,
        "sha256": {k: hashlib.sha256(v).hexdigest() for k, v in sorted(files.items())},
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


def write_package(compiled: Compiled, out: Path, command: str) -> tuple[Path, ...]:
    """Writes the folder; returns the paths written. UsageError where ``out`` holds files of something else."""
    manifest = out / "manifest.json"
    if out.exists() and any(out.iterdir()) and not manifest.exists():
        raise UsageError(f"{out}: the folder holds files that trainlet did not write; name an empty or a new folder")
    written = []
    for name, data in package_files(compiled, command).items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        written.append(path)
    return tuple(written)
