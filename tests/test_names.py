# SPDX-License-Identifier: Apache-2.0
"""What a model's name, which comes out of a file, becomes: never a place outside a folder, nor anybody else's name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from graphs import int8_chain
from hypothesis import example, given
from hypothesis import strategies as st

from trainlet.cli import main
from trainlet.emit.model import source_name
from trainlet.frontends import graph_file as irfile
from trainlet.names import MOST, file_name
from trainlet.toolchain.host import find_compiler, kernel_sources

NASTY = (
    "../x", "../../etc/passwd", "/tmp/x", "a/b", "a\\b", "..", ".", "", "~", ".hidden", "-rf", "con", "NUL.txt", "com1",
    "x" * 5000, "größe", "a\nb", "a\0b", "\x1b[31m", "a b", "$(x)", "*", "c:x", "x.", "\udc80", "名", "a:stream",
)  # fmt: skip


@given(st.text(st.characters(), max_size=200))
@example("mcunet-5fps")
@example("x" * MOST)
def test_any_text_becomes_a_plain_file_name(name: str) -> None:
    found = file_name(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", found)
    assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", found)
    assert file_name(found) == found
    kept = re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name)
    assert found == name or not kept or len(name) > MOST or re.match(r"(?i)con|prn|aux|nul|com\d|lpt\d", name)


def test_two_names_do_not_share_a_file() -> None:
    names = (*NASTY, "a_b", "x" * 5001, "con_", "model")
    assert len({file_name(n) for n in names}) == len(names)


@pytest.mark.parametrize("name", [n for n in NASTY if n.isprintable() and 0 < len(n) <= 200])
def test_an_import_stays_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source, out = tmp_path / "source", tmp_path / "deep" / "out"
    source.mkdir()
    irfile.save(replace(int8_chain(), name=name), source / "x.json")
    before = set(tmp_path.rglob("*"))
    assert main(["import", str(source / "x.json"), "--out", str(out), "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["graph"])
    assert path.parent == out
    assert set(tmp_path.rglob("*")) - before == {out.parent, out, path, path.with_suffix(".safetensors")}
    assert irfile.load(path).name == name


# --- names in C and in builds -----------------------------------------------------------------------------------


def said(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sources_have_short_names_that_differ() -> None:
    names = ["a" * 300, "a" * 301, *NASTY]
    assert all(re.fullmatch(rf"[a-zA-Z]\w{{0,{MOST + 2}}}", source_name(n), re.ASCII) for n in names)
    assert source_name(names[0]) != source_name(names[1])
    assert source_name("mcunet-5fps") == "mcunet_5fps"


def test_no_header_of_the_compiler_is_taken(tmp_path: Path) -> None:
    """Not one that the engine, or a program with the usual headers, reads."""
    for name, text in kernel_sources().items():
        (tmp_path / name).write_text(text)
    usual = "".join(f"#include <{n}.h>\n" for n in ("stdio", "stdlib", "string", "math", "time", "errno", "assert"))
    (tmp_path / "usual.c").write_text(usual)
    read = said(*find_compiler(), "-std=gnu99", "-M", "-I", str(tmp_path), *map(str, tmp_path.glob("*.c")))
    found = {p.stem for p in map(Path, re.findall(r"\S+\.h", read)) if p.parent.name == "include"}
    assert {"string", "stdint", "strings"} <= found
    assert {n for n in found if source_name(n) == n} == set()


MACROS = ("H", "HEIGHT", "WIDTH", "CHANNELS", "CLASSES", "ARENA_BYTES", "STATE_BYTES", "BLOB_BYTES", "MODEL_HASH")


def test_no_macro_of_c_is_taken() -> None:
    """C23 has a width for each integer type."""
    usual = "".join(f"#include <{n}.h>\n" for n in ("limits", "stdint", "wchar", "float", "stdio", "math", "string"))
    defined = set(re.findall(r"#define (\w+)", said(*find_compiler(), "-std=gnu2x", "-dM", "-E", "-", text=usual)))
    stems = {m.removesuffix(f"_{end}").lower() for m in defined for end in MACROS if m.endswith(f"_{end}")}
    assert {"int", "char", "uint_least8", "ptrdiff"} <= stems
    assert {s for s in stems if s[:1].isalpha() and source_name(s) == s} == set()


TARGETS = (
    "all", "ALL_BUILD", "clean", "cmake", "cmake_force", "debug", "default_target", "depend", "edit_cache", "example",
    "expected", "firmware", "gcc", "general", "help", "install", "interface", "list_install_components",
    "optimized", "package", "package_source", "preinstall", "private", "project", "public", "rebuild_cache",
    "RUN_TESTS", "test", "ZERO_CHECK",
)  # fmt: skip


def test_cmake_takes_every_name(tmp_path: Path) -> None:
    """Each as a library and in a program that is linked with it, and none as it is."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is missing: pip install cmake")
    names = [source_name(n) for n in TARGETS]
    assert not {n.lower() for n in TARGETS} & set(names)
    lines = ["cmake_minimum_required(VERSION 3.13)", "project(x C)", "include(CTest)", "include(CPack)"]
    for n in names:
        lines += [f"add_library({n} STATIC x.c)", f"add_executable(e_{n} x.c)", f"target_link_libraries(e_{n} {n})"]
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines))
    (tmp_path / "x.c").write_text("int main(void) { return 0; }\n")
    said(cmake, "-S", str(tmp_path), "-B", str(tmp_path / "build"))
    linked = said(cmake, "--build", str(tmp_path / "build"), "--target", "e_m_general", "--", "VERBOSE=1")
    assert "libm_general.a" in linked
