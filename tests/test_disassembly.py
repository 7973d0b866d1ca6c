# SPDX-License-Identifier: Apache-2.0
"""The machine code of a chip: no double, no soft float where there is an FPU, no call for memory within a loop."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from disassembly import (
    DIVISION,
    DOUBLE,
    MEMORY,
    SOFT_FLOAT,
    Function,
    LoopCall,
    build,
    calls_in_loops,
    disassembly,
    parse,
)
from graphs import int8_chain

from trainlet.cli.prepare import resolve_scheme
from trainlet.compiler import compile_model
from trainlet.errors import ToolMissingError
from trainlet.frontends import attach_head
from trainlet.toolchain.chip import build_device
from trainlet.toolchain.host import kernel_sources
from trainlet.toolchain.targets import TARGETS

M7 = TARGETS["stm32f746"]
CORES = ("stm32f746", "nrf52840", "rp2040")
KERNEL = re.compile(r"^(?:void|tl_status|int32_t) (tl_\w+)\(", re.MULTILINE)


# --- the program ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CORES)
def real(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A chip and the disassembly of a program that trains all layers there, 12 bits, as a session builds it."""
    pytest.importorskip("elftools", reason="pyelftools is not installed: pip install 'trainlet[m7]'")
    graph = attach_head(int8_chain(), 4)
    try:
        firmware = build_device(compile_model(graph, resolve_scheme("full", graph, 12)), TARGETS[request.param])
    except ToolMissingError as e:
        pytest.skip(str(e))
    return request.param, disassembly(firmware.path)


@pytest.fixture(scope="module", params=CORES)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Function]:
    """All kernels, used by a model or not."""
    path = build(tmp_path_factory.mktemp("kernels"), TARGETS[request.param], kernel_sources())
    return parse(disassembly(path))


def named(program: Mapping[int, Function], name: str) -> int:
    """Address of the one function of that name."""
    (address,) = [a for a, f in program.items() if f.name == name]
    return address


def test_no_double_and_no_soft_float(real: tuple[str, str]) -> None:
    target, text = real
    assert DOUBLE.findall(text) == []
    if TARGETS[target].fpu:
        assert ".f32" in text
        assert SOFT_FLOAT.findall(text) == []
    else:
        assert SOFT_FLOAT.findall(text), "an FPU that the chip does not have"


def test_the_program_calls_nothing_for_memory_in_a_loop(real: tuple[str, str]) -> None:
    """From the emitted functions on, each of which calls kernels one after the other."""
    program = parse(real[1])
    emitted = [a for a, f in program.items() if re.fullmatch(r"prefix|forward|gradient|head|backward|row_\w+", f.name)]
    called = {program[c.target].name for a in emitted for c in program[a].calls if c.target is not None}
    assert called >= {"tl_conv2d_s8", "tl_depthwise_s8", "tl_conv2d_dw_s8", "tl_depthwise_dw_s8", "tl_bias_sgd_s8"}
    assert calls_in_loops(program, emitted, MEMORY) == []


def test_no_kernel_calls_anything_for_memory_in_a_loop(kernels: dict[int, Function]) -> None:
    names = KERNEL.findall(kernel_sources()["tl.h"])
    assert len(names) > 25
    assert calls_in_loops(kernels, [named(kernels, n) for n in names], MEMORY) == []


def test_the_loops_that_multiply_call_nothing(kernels: dict[int, Function]) -> None:
    """With DSP instructions those of tl_tile are in a function of their own."""
    own = any(f.name == "tile_block" for f in kernels.values())
    for name in ("tile_block" if own else "tl_tile", "tl_tile_taps"):
        f = kernels[named(kernels, name)]
        assert f.loops
        assert f.calls == []


# --- planted faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "flags", "target", "pattern"),
    [
        ("double f(double a) { return a * a; }", "-mfpu=fpv5-d16", "stm32f746", DOUBLE),
        ("float f(float a) { return (float)(a * 0.1); }", "-mfpu=fpv5-d16", "stm32f746", DOUBLE),
        ("float f(double a) { return (float)a; }", "-mfloat-abi=hard", "stm32f746", DOUBLE),
        ("float f(double a) { return (float)a; }", "-mfloat-abi=soft", "rp2040", DOUBLE),
        ("float f(float a) { return a * a; }", "-mfloat-abi=soft", "rp2040", SOFT_FLOAT),
        ("float f(unsigned a) { return (float)a; }", "-mfloat-abi=soft", "rp2040", SOFT_FLOAT),
    ],
)
def test_a_planted_double_or_helper_is_seen(
    tmp_path: Path, code: str, flags: str, target: str, pattern: re.Pattern[str]
) -> None:
    assert pattern.findall(disassembly(build(tmp_path, TARGETS[target], {"a.c": code}, flags)))


FAULTS = """\
#include <string.h>
#include <stdint.h>
void plain(int8_t *a, int8_t *b, int n);
void before(int8_t *a, int8_t *b, int n);
void within(int8_t *a, int8_t *b, int n);
void nested(int8_t *a, int8_t *b, int n);
void rarely(int8_t *a, int8_t *b, int n);
void through(int8_t *a, int8_t *b, int n);
void tail(int8_t *a, int8_t *b, int n);
void table(int8_t *a, int8_t *b, int n);
void plain(int8_t *a, int8_t *b, int n) { memcpy(a, b, (size_t)n); }
void before(int8_t *a, int8_t *b, int n)
{
    memset(a, 1, (size_t)n);
    for (int i = 0; i < n; i++) a[i] += b[i];
}
void within(int8_t *a, int8_t *b, int n)
{
    for (int i = 0; i < n; i++) memcpy(a + i, b, (size_t)(n - i));
}
void nested(int8_t *a, int8_t *b, int n)
{
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) a[j] += b[j];
        memset(b, i, (size_t)n);
    }
}
void rarely(int8_t *a, int8_t *b, int n)
{
    for (int i = 0; i < n; i++) {
        if (__builtin_expect(a[i] == 77, 0)) memset(b, 0, (size_t)n);
        a[i] += b[i];
    }
}
__attribute__((noinline)) static void step(int8_t *a, int8_t *b, int n) { memcpy(a, b, (size_t)n); a[0]++; }
void through(int8_t *a, int8_t *b, int n)
{
    for (int i = 0; i < n; i++) step(a + i, b, n - i);
}
void tail(int8_t *a, int8_t *b, int n)
{
    for (int i = 0; i < n; i++) a[i]++;
    step(a, b, n);
}
void table(int8_t *a, int8_t *b, int n)
{
    switch (n) {
    case 0: plain(a, b, 1); break;
    case 1: before(a, b, 2); break;
    case 2: within(a, b, 3); break;
    case 3: nested(a, b, 5); break;
    case 4: tail(a, b, 7); break;
    case 5: rarely(a, b, 9); break;
    case 6: through(b, a, 9); break;
    case 7: through(a, b, 4); break;
    }
}
"""


@pytest.fixture(scope="module", params=("stm32f746", "rp2040"))
def faults(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Function]:
    return parse(disassembly(build(tmp_path_factory.mktemp("faults"), TARGETS[request.param], {"a.c": FAULTS})))


def test_planted_calls_in_loops_are_seen(faults: dict[int, Function]) -> None:
    def found(name: str) -> list[LoopCall]:
        return calls_in_loops(faults, [named(faults, name)], MEMORY)

    assert [found(n) for n in ("plain", "before", "tail")] == [[], [], []]
    assert found("within") == [LoopCall(("within", "memcpy"), True)]
    assert found("nested") == [LoopCall(("nested", "memset"), False)]
    assert found("rarely") == [LoopCall(("rarely", "memset"), True)]
    assert [c.path for c in found("through")] == [("through", "step", "memcpy")]
    with pytest.raises(AssertionError, match="table: cannot follow"):
        found("table")


def test_a_division_in_an_inner_loop_is_seen(tmp_path: Path) -> None:
    code = """\
    void f(int *a, int n);
    void f(int *a, int n)
    {
        for (int i = 1; i < n; i++) {
            a[i] = n / i;
            for (int j = 1; j < n; j++) a[i] += a[j] % i;
        }
    }
    """
    program = parse(disassembly(build(tmp_path, TARGETS["rp2040"], {"a.c": code})))
    assert {c.innermost for c in calls_in_loops(program, [named(program, "f")], DIVISION)} == {True, False}


def test_a_memset_in_a_kernel_is_seen(tmp_path: Path) -> None:
    texts = kernel_sources()
    before = "            tl_zero16(to, row_terms);\n"
    assert before in texts["conv2d.c"]
    texts["conv2d.c"] = texts["conv2d.c"].replace(before, "            memset(to, 0, 2 * (size_t)row_terms);\n")
    some = {k: v for k, v in texts.items() if k.endswith(".h") or k in ("conv2d.c", "tile.c")}
    program = parse(disassembly(build(tmp_path, M7, some)))
    paths = {c.path[-1] for c in calls_in_loops(program, [named(program, "tl_conv2d_s8")], MEMORY)}
    assert paths == {"memset"}


# --- the checker ------------------------------------------------------------------------------------------------

LISTING = """\
08000000 <f>:
 8000000:\tpush\t{r4, lr}
 8000002:\tcbz\tr0, 800000e <f+0xe>
 8000004:\tadds\tr1, #1
 8000006:\tldr\tr2, [r3, #0]
 8000008:\tbne.n\t8000006 <f+0x6>
 800000a:\tblt.w\t8000004 <f+0x4>
 800000e:\tpop\t{r4, pc}
 8000010:\tbl\t8000020 <g>
 8000014:\tb.n\t8000006 <f+0x6>
 8000016:\t.word\t0x08000020

08000020 <g>:
 8000020:\tbl\t8000026 <g+0x6>
 8000024:\tb.n\t8000020 <g>
 8000026:\tbx\tlr
"""


def test_loops_are_found_in_a_listing() -> None:
    f, g = parse(LISTING).values()
    assert [sorted(a & 0xFF for a in loop) for loop in f.loops] == [[4, 6, 8, 10], [6, 8]]
    assert [c.target for c in f.calls] == [0x8000020]
    assert 0x8000016 not in f.code
    assert g.loops == [], "a bl to within the function jumps, it does not come back"
    assert g.calls == []
