# SPDX-License-Identifier: Apache-2.0
"""The inner loops on emulated cores: what the DSP instructions of a Cortex-M7 and the loops for smaller cores sum,
beside the plain form in the same program and beside the plain form on this machine. Nothing but the sums is written,
and nothing is read past the operands."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from graphs import int8_chain
from kernel_library import block, library
from numpy.typing import NDArray

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import Compiled, compile_model
from trainlet.errors import DeviceError, ToolMissingError
from trainlet.frontends import attach_head
from trainlet.session.emulator import Machine
from trainlet.toolchain import chip as device
from trainlet.toolchain.host import kernel_sources
from trainlet.toolchain.targets import KIB, TARGETS, with_limits

Ints = NDArray[np.signedinteger]

CORES = ("stm32f746", "nrf52840", "rp2040")
ROWS, LANES = 8, 16
TERMS = (2, 4, 6, 10, 30, 32, 34, 62, 66)
TILE, PLAIN_TILE, TAPS, PLAIN_TAPS, WIDEN, MULTIPLY = range(6)
GUARD = b"\xa7"
USED = ("tile.c", "model.c")  # the linker drops what calls any other kernel

# Beside the form that the core has, the plain one under other names.
DRIVER = """
#include "tl_tile.h"
typedef struct {
    int32_t function, n[5];
    void *p[3];
} job;
volatile job tl_port_job;
int main(void);
void tl_port_wait(void);
void plain_tile(const int16_t *restrict x, const int8_t *restrict w, int32_t n,
                int32_t acc[restrict TL_ROWS][TL_LANES]);
void plain_taps(const int8_t *const *rows, int32_t ny, int32_t nx, int32_t step, int32_t zero,
                const int32_t *restrict w, int32_t w_row, int32_t acc[restrict TL_LANES]);
__attribute__((naked, noinline, used)) void tl_port_wait(void)
{
    __asm__ volatile("bkpt #0\\nbx lr\\n");
}
int main(void)
{
    for (;;) {
        tl_port_wait();
        const job j = tl_port_job;
        switch (j.function) {
        case 0: tl_tile(j.p[0], j.p[1], j.n[0], j.p[2]); break;
        case 1: plain_tile(j.p[0], j.p[1], j.n[0], j.p[2]); break;
        case 2: tl_tile_taps(j.p[0], j.n[0], j.n[1], j.n[2], j.n[3], j.p[1], j.n[4], j.p[2]); break;
        case 3: plain_taps(j.p[0], j.n[0], j.n[1], j.n[2], j.n[3], j.p[1], j.n[4], j.p[2]); break;
        case 4: tl_widen(j.p[0], j.n[1], j.n[0], j.p[1]); break;
        default: tl_multiply(j.p[0], j.p[1], j.n[0], j.p[2]); break;
        }
    }
}
#define TL_PLAIN_TILE
#undef TL_DSP
#undef TL_SMALL_CORE
#define tl_tile plain_tile
#define tl_tile_taps plain_taps
"""


@cache
def _compiled() -> Compiled:
    """Any model: the program is linked beside it and uses none of it."""
    return compile_model(attach_head(int8_chain(), 4), UpdateScheme("head"))


@dataclass
class Operand:
    """Bytes of a call: an array at any address, or at one of a multiple of 4; ``end``: memory ends right behind it."""

    values: Ints
    shift: int = 0
    end: bool = False


class Rig:
    """A core with the driver in it."""

    def __init__(self, core: str, changes: Mapping[str, tuple[str, str]] | None = None) -> None:
        target = with_limits(TARGETS[core], 64 * KIB)
        texts = {k: v for k, v in kernel_sources().items() if k.endswith(".h") or k in USED}
        for name, (old, new) in (changes or {}).items():
            assert old in texts[name], f"{name} has no {old!r} any more; plant the fault anew"
            texts[name] = texts[name].replace(old, new)
        plain = kernel_sources()["tile.c"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "kernel_sources", lambda: texts)
            firmware = device.build_device(_compiled(), target, stack_bytes=2048, main=DRIVER + plain)
        self.machine = Machine(firmware)
        self._job = firmware.symbols["tl_port_job"].address
        self._end = target.sram_base + target.sram_bytes
        self._base = target.sram_base + firmware.stack_bytes + firmware.static_bytes

    def place(self, operands: Sequence[Operand]) -> list[int]:
        """Addresses; all memory that is not an operand holds GUARD."""
        self.machine.write(self._base, GUARD * (self._end - self._base))
        found, at = [], self._base
        for o in operands:
            at = (at + 11) // 8 * 8
            address = self._end - o.values.nbytes if o.end else at + o.shift
            at += 0 if o.end else o.shift + o.values.nbytes
            self.machine.write(address, o.values.tobytes())
            found.append(address)
        return found

    def run(self, function: int, numbers: Sequence[int], addresses: Sequence[int]) -> None:
        """One call."""
        padded = [*numbers, *[0] * (5 - len(numbers))], [*addresses, *[0] * (3 - len(addresses))]
        self.machine.write(self._job, struct.pack("<6i3I", function, *padded[0], *padded[1]))
        self.machine.resume()

    def call(self, function: int, numbers: Sequence[int], operands: Sequence[Operand]) -> Ints:
        """What the call leaves in the last operand; it must have written nothing else."""
        addresses = self.place(operands)
        last = operands[-1].values
        before = self.memory()
        self.run(function, numbers, addresses)
        after = self.memory()
        begin, size = addresses[-1] - self._base, last.nbytes
        assert after[:begin] == before[:begin]
        assert after[begin + size :] == before[begin + size :]
        return np.frombuffer(after[begin : begin + size], last.dtype).reshape(last.shape)

    def memory(self) -> bytes:
        """All that is neither stack nor the driver's."""
        return self.machine.read(self._base, self._end - self._base)


@pytest.fixture(scope="module", params=CORES)
def rig(request: pytest.FixtureRequest) -> Rig:
    return make_rig(request.param)


@cache
def make_rig(core: str) -> Rig:
    pytest.importorskip("unicorn", reason="the emulator is not installed: pip install 'trainlet[m7]'")
    pytest.importorskip("elftools", reason="pyelftools is not installed: pip install 'trainlet[m7]'")
    try:
        return Rig(core)
    except ToolMissingError as e:
        pytest.skip(str(e))


# --- tiles ------------------------------------------------------------------------------------------------------


def tiles(n: int) -> list[tuple[Ints, Ints, Ints]]:
    """x (ROWS, n), packed weights (n / 2, LANES, 2) and sums: random ones, and the ends of what contracts allow."""
    rng = np.random.default_rng(n)
    found = []
    for x_range, w_range in (((-255, 255), (-128, 127)), ((-16129, 16129), (-127, 127))):
        x = rng.integers(x_range[0], x_range[1] + 1, (ROWS, n))
        w = rng.integers(w_range[0], w_range[1] + 1, (n // 2, LANES, 2))
        ends = rng.choice(x_range, x.shape), rng.choice(w_range, w.shape)
        found += [(x, w), ends, (np.full_like(x, x_range[0]), np.full_like(w, w_range[0]))]
    sums = rng.integers(-(1 << 29), 1 << 29, (ROWS, LANES)).astype(np.int32)
    return [(x.astype(np.int16), w.astype(np.int8), sums) for x, w in found]


def host_tile(x: Ints, w: Ints, sums: Ints) -> Ints:
    """The plain form, on this machine."""
    x, w, acc = block(x), block(w), block(sums)
    library("plain").tl_tile(x.ctypes, w.ctypes, x.shape[1], acc.ctypes)
    return acc


@pytest.mark.parametrize("n", TERMS)
def test_tiles(rig: Rig, n: int) -> None:
    """Weights lie at any address; x, weights or sums end where memory does."""
    for i, (x, w, sums) in enumerate(tiles(n)):
        want = host_tile(x, w, sums)
        pairs = w.astype(np.int64).transpose(0, 2, 1).reshape(n, LANES)
        np.testing.assert_array_equal(want, sums + x.astype(np.int64) @ pairs)
        for function in (TILE, PLAIN_TILE):
            operands = [Operand(a, end=j == i % 3) for j, a in enumerate((x, w, sums))]
            operands[1].shift = i % 4
            np.testing.assert_array_equal(rig.call(function, [n], operands), want)


# --- taps -------------------------------------------------------------------------------------------------------


def host_taps(rows: Sequence[Ints], nx: int, step: int, zero: int, w: Ints, w_row: int, sums: Ints) -> Ints:
    """The plain form, on this machine; rows[ky] begins where the loop does."""
    kept, w, acc = [block(r) for r in rows], block(w), block(sums)
    at = np.array([r.at for r in kept], np.uintp)
    library("plain").tl_tile_taps(at.ctypes, len(kept), nx, step, zero, w.ctypes, w_row, acc.ctypes)
    return acc


@pytest.mark.parametrize("k", range(1, 8))
def test_taps(rig: Rig, k: int) -> None:
    """Windows of all sizes up to k x k, as at the rim of an image; rows at any address."""
    rng = np.random.default_rng(k)
    cases = [(ny, nx) for ny in {1, k} for nx in {1, (k + 1) // 2, k}]
    for i, (ny, nx) in enumerate(cases):
        step, zero = (16, 19, 40)[i % 3], (-128, 127, 3)[i % 3]
        values = [-128, 127] if i % 2 else range(-128, 128)
        x = rng.choice(values, (ny, (nx - 1) * step + LANES)).astype(np.int8)
        w = rng.choice([-128, 127] if i % 2 else range(-128, 128), (k, k, LANES)).astype(np.int32)
        sums = rng.integers(-(1 << 29), 1 << 29, LANES).astype(np.int32)
        want = host_taps(list(x), nx, step, zero, w, k * LANES, sums)
        for function in (TAPS, PLAIN_TAPS):
            rows = Operand(np.zeros(ny, np.int32))
            operands = [rows, Operand(w), Operand(x, shift=i % 4, end=i % 2 == 0), Operand(sums)]
            pointer = rig.place(operands)[2] + x.shape[1] * np.arange(ny)
            rows.values = pointer.astype(np.uint32).view(np.int32)
            at = rig.place(operands)
            rig.run(function, [ny, nx, step, zero, k * LANES], [at[0], at[1], at[3]])
            got = np.frombuffer(rig.machine.read(at[3], sums.nbytes), np.int32)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("ny", "nx"), [(0, 3), (3, 0), (2, -1)])
def test_a_window_outside_the_image_adds_nothing(rig: Rig, ny: int, nx: int) -> None:
    sums = np.arange(LANES, dtype=np.int32)
    operands = [Operand(np.zeros(4, np.int32)), Operand(np.ones((9, LANES), np.int32)), Operand(sums)]
    np.testing.assert_array_equal(rig.call(TAPS, [ny, nx, LANES, 0, 3 * LANES], operands), sums)


# --- widening and multiplying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 23])
def test_widen_and_multiply(rig: Rig, n: int) -> None:
    rng = np.random.default_rng(n)
    for zero in (-128, -1, 0, 127):
        x = rng.choice([-128, 127, *range(-9, 9)], n).astype(np.int8)
        by = rng.choice([-127, 127, 0, 1, 90], n).astype(np.int16)
        to = np.zeros(n, np.int16)
        shift = {"shift": 2 * (zero & 1)}
        for end in (0, 1):
            operands = [Operand(x, shift=zero & 3, end=not end), Operand(to, **shift, end=bool(end))]
            np.testing.assert_array_equal(rig.call(WIDEN, [n, zero], operands), x.astype(np.int16) - zero)
            operands = [Operand(x, shift=zero & 3), Operand(by, **shift, end=not end), Operand(to, end=bool(end))]
            np.testing.assert_array_equal(rig.call(MULTIPLY, [n], operands), x.astype(np.int16) * by)


# --- speed, and what the tests would miss -------------------------------------------------------------------------


@pytest.mark.parametrize(("core", "most"), [("stm32f746", 1.25), ("nrf52840", 1.25), ("rp2040", 5.5)])
def test_instructions_per_product(core: str, most: float) -> None:
    """The plain form takes 5.5 on a Cortex-M7 and 8.1 on a Cortex-M0+."""
    rig = make_rig(core)
    n = 66
    x, w, sums = tiles(n)[0]
    before = rig.machine.counter.total()
    rig.call(TILE, [n], [Operand(x), Operand(w), Operand(sums)])
    assert rig.machine.counter.total() - before < most * n * ROWS * LANES


FAULTS = {
    "a pair swapped": ("stm32f746", "pkhtb r12, lr, r3, asr #16", "pkhtb r12, r3, lr, asr #16"),
    "rows swapped": ("stm32f746", '"ldr   lr, [r0, r2, lsl #1]', '"ldr   lr, [r0, r2]'),
    "an even number of pairs": ("stm32f746", '"tst   lr, #32', '"tst   lr, #0'),
    "the wrong way up": ("stm32f746", "end, -acc_row, save", "end, acc_row, save"),
    "a lane taken twice": ("stm32f746", "smlatb %[a3], %[odd], %[v]", "smlatb %[a3], %[even], %[v]"),
    "zero added": ("stm32f746", "tl_lower(-zero, -zero)", "tl_lower(zero, -zero)"),
    "an odd term": ("rp2040", "a3 += odd * v[7]", "a3 += odd * v[6]"),
    "a lane without zero": ("rp2040", "a2 += (x[2] - zero) * w[2]", "a2 += x[2] * w[2]"),
}


def sums(rig: Rig) -> None:
    """Some of the tests above."""
    for n in TERMS[:3]:
        test_tiles(rig, n)
    for k in (2, 3):
        test_taps(rig, k)


def rows(rig: Rig) -> None:
    for n in (4, 7):
        test_widen_and_multiply(rig, n)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    core, old, new = FAULTS[fault]
    make_rig(core)  # skips where there is no compiler
    broken = Rig(core, {"tile.c": (old, new)})
    with pytest.raises((AssertionError, DeviceError)):
        sums(broken)


@pytest.mark.parametrize(
    ("old", "new"),
    [("tl_upper(even, odd)", "tl_upper(odd, even)"), ("i + 4 <= n; i += 4", "i + 3 <= n; i += 4"),
     ("(odd >> 16) * (next >> 16)", "(odd >> 16) * (int16_t)next")],
)  # fmt: skip
def test_a_fault_in_a_row_is_seen(old: str, new: str) -> None:
    make_rig("stm32f746")
    broken = Rig("stm32f746", {"tl_tile.h": (old, new)})
    with pytest.raises((AssertionError, DeviceError)):
        rows(broken)
