# SPDX-License-Identifier: Apache-2.0
"""What is built is kept, and what is kept is run: only from folders that nobody else can write to, only undamaged, only
on the processor that it was built for."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainlet.compiler import Compiled
from trainlet.errors import ToolMissingError, UsageError
from trainlet.toolchain import cache, chip
from trainlet.toolchain import host as build
from trainlet.toolchain.armcc import find_arm_compiler
from trainlet.toolchain.targets import TARGETS

SOURCES = {"answer.c": '#include "kernel.h"\nint answer(void);\nint answer(void) { return OF_KERNEL; }\n'}
KERNELS = {"kernel.h": "#define OF_KERNEL 42\n", "kernel.c": "extern int of_kernel;\n"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, and an engine that compiles at once."""
    monkeypatch.setenv("TRAINLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "kernel_sources", lambda: KERNELS)
    build.compiler_identity.cache_clear()
    return tmp_path / "cache"


def library() -> Path:
    return build.build_library(SOURCES, extra=("-march=native",))


def answer(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def script(path: Path, text: str) -> Path:
    """A program in sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- whose folder it is -----------------------------------------------------------------------------------------

RUNS = '#include <stdio.h>\n__attribute__((constructor)) static void run(void) {{ fclose(fopen("{}", "w")); }}\n'


def plant(folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in ``folder`` that is as it must be, but for the code in it."""
    monkeypatch.setenv("TRAINLET_CACHE", str(folder))
    made = library()
    (mark.parent / "evil.c").write_text(RUNS.format(mark) + SOURCES["answer.c"])
    (mark.parent / "kernel.h").write_text(KERNELS["kernel.h"])
    subprocess.run(["cc", "-shared", "-fPIC", str(mark.parent / "evil.c"), "-o", str(made)], check=True)
    cache._seal(made.parent)
    monkeypatch.delenv("TRAINLET_CACHE")


@pytest.fixture
def homeless(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache folder cannot be made; returns the one among the temporary files."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    cache._private.cache_clear()
    return tmp_path / "tmp" / f"trainlet-{os.geteuid()}"


@pytest.mark.parametrize("how", ["rights", "group", "owner", "link"])
def test_code_in_a_folder_of_somebody_else_does_not_run(
    homeless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    mark = tmp_path / "it_ran"
    plant(homeless, mark, monkeypatch)
    if how == "link":
        homeless.rename(tmp_path / "elsewhere")
        homeless.symlink_to(tmp_path / "elsewhere")
    elif how == "owner":
        other = os.geteuid() + 1
        homeless.rename(homeless.with_name(f"trainlet-{other}"))
        for name in ("getuid", "geteuid"):
            monkeypatch.setattr(os, name, lambda: other)
    else:
        homeless.chmod(0o777 if how == "rights" else 0o770)
    made = library()
    assert answer(made) == 42
    assert not mark.exists()
    assert made.parents[1].name.startswith("trainlet-"), "a folder that goes with this process"
    assert made.parents[1].stat().st_mode & 0o777 == 0o700


def test_a_folder_of_ones_own_among_the_temporary_files_is_used(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRAINLET_CACHE")
    assert library().parents[1] == homeless
    assert homeless.stat().st_mode & 0o777 == 0o700


def test_the_users_folder_is_used_unless_others_may_write_there(
    homeless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRAINLET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / "trainlet"
    (tmp_path / "home" / "trainlet").chmod(0o755)
    assert cache.cache_dir() == tmp_path / "home" / "trainlet"
    (tmp_path / "home" / "trainlet").chmod(0o775)
    assert cache.cache_dir() == homeless
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: exec("raise RuntimeError('no home directory')"))
    assert cache.cache_dir() == homeless


def test_a_named_folder_that_others_may_write_to_is_refused(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(UsageError, match=r"TRAINLET_CACHE=.*chmod go-w"):
        library()


# --- damage -----------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "bit": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again(place: Path, damage: str) -> None:
    """The linked library, its checksum, an object."""
    for name in ("library.so", "sha256"):
        made = library()
        DAMAGES[damage](made.with_name(name))
        assert library() == made
        assert answer(made) == 42
    objects = list(place.glob("*/made.o"))
    assert len(objects) == 2
    for file in objects:
        DAMAGES[damage](file)
    shutil.rmtree(library().parent)
    assert answer(library()) == 42
    assert {cache._is_whole(e) for e in place.iterdir()} == {True}, "and nothing else is left"


def test_what_stands_in_the_way_of_an_entry_makes_room(place: Path) -> None:
    made = library()
    shutil.rmtree(made.parent)
    made.parent.write_text("a file where the folder should be")
    assert answer(library()) == 42


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_program_is_built_again(place: Path, tools: str, chain: Compiled, damage: str) -> None:
    """The ELF, and an object whose call graph is lost."""
    made = chip.build_device(chain, TARGETS["nrf52840"])
    before = made.path.read_bytes()
    key = re.findall(r"(\w{32})\.o", (made.path.parent / "link.ld").read_text())[0]
    for file in (made.path, made.path.parents[1] / key / f"{key}.o", made.path.parents[1] / key / f"{key}.graph"):
        DAMAGES[damage](file)
        again = chip.build_device(chain, TARGETS["nrf52840"])
        assert (again.path, again.path.read_bytes()) == (made.path, before)
        assert file.exists()


BUILD = """
from trainlet.toolchain import host
host.kernel_sources = lambda: {}
host.build_library({"a.c": "int a;"}, cc=%r)
"""


def test_what_a_killed_build_leaves_goes_with_the_next(place: Path, tmp_path: Path) -> None:
    """What a build that is still under way has, stays."""
    wait = f'case "$*" in *" -c "*) touch {tmp_path}/begun; while test ! -e {tmp_path}/go; do sleep 0.01; done;; esac'
    slow = script(tmp_path / "slow", f'{wait}\nexec cc "$@"')

    def begin() -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", BUILD % str(slow)])
        until = time.monotonic() + 20
        while not (tmp_path / "begun").exists() and time.monotonic() < until:
            time.sleep(0.01)
        (tmp_path / "begun").unlink()
        return child

    killed = begin()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = set(place.iterdir())
    alive = begin()
    under_way = set(place.iterdir())
    assert left, "nothing was under way"
    assert not left & under_way
    cache._sweep.cache_clear()
    library()
    assert under_way <= set(place.iterdir())
    (tmp_path / "go").touch()
    assert alive.wait() == 0
    assert {cache._is_whole(e) for e in place.iterdir()} == {True}


# --- which compiler, and for which processor --------------------------------------------------------------------


def test_a_library_is_of_one_processor(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler says what `native` is; one that does not say it is asked in vain, and the system answers."""
    text = 'case " $* " in *" -### "*) test "$CPU" && echo "$CPU" >&2; exit;; esac\nexec cc "$@"'
    monkeypatch.setenv("CC", str(script(tmp_path / "mycc", text)))
    monkeypatch.setattr(build, "_CPU_FILE", tmp_path / "cpuinfo")

    def built(cpu: str, flags: str, *extra: str) -> Path:
        monkeypatch.setenv("CPU", cpu)
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : x\nflags : {flags}\ncpu MHz : {time.time()}\n")
        build.compiler_identity.cache_clear()
        return build.build_library(SOURCES, extra=extra)

    native = ("-march=native",)
    different = [("znver1", "sse", *native), ("znver4", "sse", *native), ("", "sse", *native), ("", "avx", *native)]
    assert len({built(*d) for d in different}) == 4
    assert built("", "avx", *native) == built("", "avx", *native)
    assert built("", "sse") == built("", "avx"), "a plain build is of no processor of its own"


def test_a_compiler_of_several_words(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin" / "ccache", f'echo "$1" >> {tmp_path}/called\nexec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CC", "ccache cc -DOTHER='a b'")
    assert answer(library()) == 42
    assert set((tmp_path / "called").read_text().split()) == {"cc"}
    spaced = script(tmp_path / "my tools" / "my cc", 'exec cc "$@"')
    assert build.find_compiler(str(spaced)) == (str(spaced),)
    for nothing in ("ccash cc", "'", " "):
        with pytest.raises(ToolMissingError, match="was not found"):
            build.find_compiler(nothing)


FAULTS = {
    "incompatible-pointer-types": "int f(char *p);\nint f(char *p) { int *q = p; return *q; }\n",
    "int-conversion": "char *f(int i);\nchar *f(int i) { return i; }\n",
    "implicit-function-declaration": "int f(void);\nint f(void) { return g(); }\n",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_c_does_not_allow_is_an_error(place: Path, tools: str, fault: str) -> None:
    """On this machine and for a chip."""
    with pytest.raises(ToolMissingError, match=fault):
        build.build_library({"a.c": FAULTS[fault]}, extra=())
    with pytest.raises(ToolMissingError, match=fault):
        chip._compile(find_arm_compiler(), TARGETS["rp2040"].flags, {"a.c": FAULTS[fault]})
