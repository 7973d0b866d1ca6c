# SPDX-License-Identifier: Apache-2.0
"""The text of the emitted C: a golden file, what it may not contain, and that it compiles and links as stated."""

from __future__ import annotations

import random
import re
import subprocess
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain
from random_nets import NAMED, PLAIN, named_case
from test_exact import difference

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import Compiled, compile_model
from trainlet.emit import c_float, c_name, emit, graph_hash
from trainlet.emit.code import wrapped
from trainlet.errors import UnsupportedError
from trainlet.frontends import attach_head
from trainlet.ir import Operands
from trainlet.ops import OPS, No
from trainlet.plan.arena import feeds
from trainlet.session.host import HostSession
from trainlet.toolchain import host as build

STRICT = ("-std=c99", "-pedantic", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
STEPS = 5


def chain() -> Compiled:
    """The chain of graphs.py: its last two layers train, half of the channels of the last, with 4 fraction bits."""
    weights = {"block.depthwise": 1.0, "block.project": 0.5}
    scheme = UpdateScheme("golden", tuple(weights), weights, 12)
    return compile_model(attach_head(int8_chain(), 4), scheme)


def _named(name: str, bits: int = 8) -> Compiled:
    case = named_case(name, bits)
    return compile_model(replace(case.model, name=name), case.scheme)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def _cc(*args: str | Path) -> None:
    done = subprocess.run([*build.find_compiler(), *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", [".c", ".h"])
def test_golden_text(suffix: str, golden: Callable[[str, str], None]) -> None:
    golden(f"int8_chain{suffix}", chain().sources.files[f"int8_chain{suffix}"])


def test_tables_break_as_textwrap_does() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        most = rng.choice((9, 127, 10**9))
        text = ", ".join(str(rng.randint(-most, most)) for _ in range(rng.randint(1, 300)))
        assert wrapped(text) == textwrap.fill(text, 118, initial_indent="    ", subsequent_indent="    ")


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = chain(), chain()
    assert first.sources == second.sources
    assert first.model_hash == second.model_hash
    assert set(first.sources.files) == {"int8_chain.h", "int8_chain.c", "int8_chain_data.h"}


def test_the_hash_tells_models_and_schemes_apart() -> None:
    model = attach_head(int8_chain(), 4)
    hashes = {compile_model(model, UpdateScheme("a", bits=bits)).model_hash for bits in (8, 12)}
    assert len(hashes) == 1  # nothing trains but the head, so the width of weights says nothing
    one = {"block.project": 1.0}
    schemes = [UpdateScheme("x", (), one, bits) for bits in (8, 12, 16)] + [UpdateScheme("x", ("block.project",), one)]
    hashes |= {compile_model(model, s).model_hash for s in schemes}
    hashes.add(compile_model(attach_head(int8_chain(seed=1), 4), schemes[0]).model_hash)
    hashes.add(compile_model(attach_head(int8_chain(), 5), schemes[0]).model_hash)
    assert len(hashes) == 7


def test_every_operator_of_a_lowered_graph_has_a_rule() -> None:
    lowered = {name for name, op in OPS.items() if "lowered" in op.stages}
    assert lowered == {name for name, op in OPS.items() if not isinstance(op.kernels, No)}


def _fed(compiled: Compiled) -> tuple[str, ...]:
    """The stream that runs as the image is delivered: nothing calls it."""
    feed = feeds(compiled.graph)
    return (feed.name,) if feed else ()


@pytest.mark.parametrize("name", NAMED)
def test_emitted_c_has_no_logic(name: str) -> None:
    """One call per node with the layer's name above it, and nothing that decides, loops, allocates or prints."""
    compiled = _named(name)
    text = compiled.sources.files[f"{name}.c"]
    functions = text[: text.index("static const tl_model model")]
    code = re.sub(r"/\*.*?\*/", "", functions, flags=re.DOTALL)
    assert re.findall(r"\b(if|for|while|switch|do|goto|malloc|printf)\b|\?", code) == []
    calls = re.findall(r"^    \{ (?:TL_TRY\()?(tl_\w+)\(", code, flags=re.MULTILINE)
    nodes = [n for n in (*compiled.graph.nodes, *compiled.graph.flat().nodes) if n.name not in _fed(compiled)]
    assert len(calls) == len({n.name for n in nodes})
    for node in nodes:
        assert f"    /* {node.layer}: {node.op} */\n" in functions


def test_only_a_lowered_graph_is_emitted() -> None:
    compiled = chain()
    with pytest.raises(UnsupportedError, match="lowered"):
        emit(compiled.train, compiled.plan, compiled.layout, graph_hash(compiled.train))


@pytest.mark.parametrize("name", NAMED)
def test_emitted_c_is_clean_and_has_no_globals(name: str, tmp_path: Path) -> None:
    """Compiles under -pedantic -Werror; every global name begins with the model's; all data is constant."""
    _write(tmp_path, {**build.kernel_sources(), **_named(name, 12).sources.files})
    _cc(*STRICT, "-fno-pic", "-c", tmp_path / f"{name}.c", "-o", tmp_path / "model.o")
    lines = subprocess.run(["nm", tmp_path / "model.o"], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split()[-2:] for line in lines]
    assert {n for kind, n in symbols if kind in "BbDdC"} == set()
    exported = {n for kind, n in symbols if kind.isupper() and kind != "U"}
    assert exported
    assert all(n.startswith(f"{name}_") for n in exported), exported
    assert all(n.startswith("tl_") for kind, n in symbols if kind == "U" and not n.startswith("_"))


def test_kernels_are_clean_and_have_no_globals(tmp_path: Path) -> None:
    _write(tmp_path, build.kernel_sources())
    for source in sorted(tmp_path.glob("*.c")):
        _cc(*STRICT, "-fno-pic", "-c", source, "-o", source.with_suffix(".o"))
        out = subprocess.run(["nm", source.with_suffix(".o")], capture_output=True, text=True, check=True).stdout
        symbols = [line.split()[-2:] for line in out.splitlines()]
        assert {n for kind, n in symbols if kind in "BbDdC"} == set(), source.name
        assert all(n.startswith("tl_") for kind, n in symbols if kind in "TR"), source.name


MAIN = """\
#include <stdio.h>
#include "a.h"
#include "b.h"

static uint32_t arena_a[A_ARENA_BYTES / 4 + 1], arena_b[B_ARENA_BYTES / 4 + 1];
static uint32_t state_a[A_STATE_BYTES / 4], state_b[B_STATE_BYTES / 4];
static int8_t image[4096];

int main(void)
{
    static a_context a;
    static b_context b;
    if (a_init(&a, arena_a, sizeof arena_a, state_a, sizeof state_a, 1u) != TL_OK) return 2;
    if (b_init(&b, arena_b, sizeof arena_b, state_b, sizeof state_b, 2u) != TL_OK) return 2;
    for (int t = 0; t < STEPS; t++) {
        for (int i = 0; i < (int)sizeof image; i++) image[i] = (int8_t)((7 * i + 31 * t) % 256 - 128);
        if (a_train(&a, image, t % A_CLASSES, 0.25f, NULL) != TL_OK) return 3;
        if (b_train(&b, image, t % B_CLASSES, 0.25f, NULL) != TL_OK) return 3;
    }
    fwrite(state_a, 1, sizeof state_a, stdout);
    fwrite(state_b, 1, sizeof state_b, stdout);
    return 0;
}
"""


def test_two_models_link_into_one_program(tmp_path: Path) -> None:
    """They train in turn in one program; each ends where it ends alone."""
    models = {}
    for name, of in (("a", "shared_later"), ("b", "dead_channels")):
        case = named_case(of, 12)
        models[name] = compile_model(replace(case.model, name=name), case.scheme)
    emitted = {**models["a"].sources.files, **models["b"].sources.files}
    _write(tmp_path, {**build.kernel_sources(), **emitted, "main.c": MAIN})
    _cc(*STRICT, f"-DSTEPS={STEPS}", *sorted(tmp_path.glob("*.c")), "-o", tmp_path / "both")
    got = subprocess.run([tmp_path / "both"], capture_output=True, check=True).stdout
    want = b"".join(_alone(compiled, seed) for seed, compiled in enumerate(models.values(), 1))
    assert got == want


def _alone(compiled: Compiled, seed: int) -> bytes:
    session = HostSession(compiled, flags=PLAIN, seed=seed)
    shape = compiled.graph.values["input"].shape
    i = np.arange(int(np.prod(shape)))
    for t in range(STEPS):
        x = ((7 * i + 31 * t) % 256 - 128).astype(np.int8).reshape(shape)
        session.train_step(x, t % session.classes, 0.25)
    return session._state.tobytes()


NAMES = {
    "mcunet-5fps": "mcunet_5fps", "3 layers": "m_3_layers", "_x": "m__x", "größe": "gr__e", "tl": "m_tl",
    "tl_model": "m_tl_model", "tlx": "tlx",
}  # fmt: skip


@pytest.mark.parametrize(("name", "want"), NAMES.items())
def test_c_names(name: str, want: str) -> None:
    assert c_name(name) == want


TAKEN = ("add", "Model", "string", "math", "main", "memory", "tl_requant", "device", "features", "expected")


@pytest.mark.parametrize("name", TAKEN)
def test_a_model_takes_the_place_of_no_other_file(name: str) -> None:
    graph = attach_head(replace(int8_chain(), name=name), 3)
    compiled = compile_model(graph, UpdateScheme("head"))
    assert compiled.sources.prefix == c_name(f"m_{name}")
    assert set(compiled.sources.files) == {f"m_{name}{end}" for end in (".h", ".c", "_data.h")}
    session = HostSession(compiled)
    session.reset(0)
    assert session.infer(np.zeros(graph.values[graph.inputs[0]].shape, np.int8)).shape == (3,)


@pytest.mark.parametrize("v", [0.1, 1e-30, 3.4e38, 1 / 3, 2.0**-126, 1e-45])
def test_float_literals_read_back_exactly(v: float) -> None:
    literal = c_float(v)
    assert literal.endswith("f")
    assert np.float32(float.fromhex(literal[:-1])) == np.float32(v)


def test_names_cannot_leave_their_comments(tmp_path: Path) -> None:
    """A hostile name of a model or layer stays text: the C compiles, warnings for nested comments included."""
    case = named_case("one_pixel")
    nasty = "x */ int y; /* \n int z;"
    nodes = [replace(n, layer=f"{n.layer} {nasty}") for n in case.model.nodes]
    model = replace(case.model.with_nodes(nodes), name=nasty)
    compiled = compile_model(model, UpdateScheme("one", (nodes[1].layer,)))
    text = compiled.sources.files[f"{compiled.sources.prefix}.c"]
    assert "x * / int y; / *" in text
    assert re.search(r"int [yz];", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)) is None
    _write(tmp_path, {**build.kernel_sources(), **compiled.sources.files})
    _cc(*STRICT, "-c", tmp_path / f"{compiled.sources.prefix}.c", "-o", tmp_path / "model.o")


def test_names_that_become_the_same_identifier_keep_their_own_tables() -> None:
    """conv.0 and conv_0 are one word in C."""
    case = named_case("add_with_activation")
    model = case.model

    def new(name: str) -> str:
        return name.replace("conv.1", "conv_0")

    def renamed(operands: Operands) -> Operands:
        return Operands(**{k: tuple(map(new, v)) for k, v in operands.items()})

    values = {new(k): replace(v, name=new(k)) for k, v in model.values.items()}
    nodes = tuple(
        replace(n, name=new(n.name), operands=renamed(n.operands), outputs=tuple(map(new, n.outputs)))
        for n in model.nodes
    )
    data = {new(k): v for k, v in model.data.items()}
    assert "conv_0.weight" in data
    assert "conv.0.weight" in data
    assert difference(replace(case, model=replace(model, values=values, nodes=nodes, data=data))) == ""
