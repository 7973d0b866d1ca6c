# SPDX-License-Identifier: Apache-2.0
"""The kernels of head, loss, pool, addition, masks and biases, bit for bit against plain Python and the vectors; the
statuses; both sanitizers over these and the depthwise kernels."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable
from ctypes import c_float
from pathlib import Path

import misc_checks as checks
import numpy as np
import pytest
from conv_cases import COUNT, load_case
from kernel_library import BAD_ARGUMENT, BAD_LR, NOT_FINITE, OK, RUNNABLE, SANITIZED, find_compiler, library
from misc_checks import F, softmax

Check = Callable[[ctypes.CDLL], None]
SEEDS = range(60)


def over_seeds(check: Callable[[ctypes.CDLL, int], None]) -> Check:
    def run(lib: ctypes.CDLL) -> None:
        for seed in SEEDS:
            check(lib, seed)

    return run


CHECKS: dict[str, Check] = {
    "exp and log": checks.check_exp_and_log,
    "head": over_seeds(checks.check_head),
    "small probabilities": checks.check_small_probabilities,
    "small steps": checks.check_small_steps,
    "random head": checks.check_random_head,
    "entry": over_seeds(checks.check_entry),
    "entry truncates": checks.check_entry_truncates,
    "entry is clamped": checks.check_entry_is_clamped,
    "entry cut": checks.check_entry_cut,
    "add": over_seeds(checks.check_add),
    "pool": over_seeds(checks.check_pool),
    "masks": over_seeds(checks.check_masks),
    "select": over_seeds(checks.check_select),
    "bias": over_seeds(checks.check_bias),
    "tiny rate": checks.check_tiny_rate,
}


@pytest.fixture(params=RUNNABLE)
def lib(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library(request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_kernel(lib: ctypes.CDLL, check: str) -> None:
    CHECKS[check](lib)


def test_exp_and_log_vectors(assets: Path, lib: ctypes.CDLL) -> None:
    with np.load(assets / "vectors2" / "primitives.npz", allow_pickle=False) as p:
        checks.same_bits([lib.probe_exp(c_float(x)) for x in p["expf_x"]], p["expf"], "exp")
        checks.same_bits([lib.probe_log(c_float(z)) for z in p["logf_z"]], p["logf"], "log")


def test_exp_and_log_are_the_functions(lib: ctypes.CDLL) -> None:
    for x in np.linspace(-80, 0, 997, dtype=F):
        assert math.isclose(lib.probe_exp(c_float(x)), math.exp(x), rel_tol=1e-6)
    for z in np.geomspace(1.5, 1e6, 997, dtype=F):
        assert math.isclose(lib.probe_log(c_float(z)), math.log(z), rel_tol=1e-6)


@pytest.mark.parametrize("index", range(COUNT))
def test_bias_vectors(assets: Path, lib: ctypes.CDLL, index: int) -> None:
    checks.check_bias_vector(lib, load_case(assets, index))


# --- statuses -------------------------------------------------------------------------------------------------


def test_a_label_out_of_range_changes_nothing(lib: ctypes.CDLL) -> None:
    for label in (-1, 3, 2**31 - 1, -(2**31)):
        status, loss, g = softmax(lib, np.zeros(3, F), label)
        assert (status, loss, g.tolist()) == (BAD_ARGUMENT, 7, [7, 7, 7])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_a_logit_that_is_not_finite_changes_nothing(lib: ctypes.CDLL, bad: float) -> None:
    for at in range(3):
        z = np.zeros(3, F)
        z[at] = bad
        status, loss, g = softmax(lib, z, 0)
        assert (status, loss, g.tolist()) == (NOT_FINITE, 7, [7, 7, 7])


def test_learning_rates(lib: ctypes.CDLL) -> None:
    big = float(np.finfo(F).max)
    good = ((0.0, 1.0), (-0.0, 1.0), (0.1, 1e30), (1e-45, 1.0), (big, 1.0), (big, 0.0))
    bad = ((-1e-45, 1.0), (-0.1, 0.0), (np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (np.inf, 0.0), (big, 2.0))
    assert [lib.tl_check_lr(c_float(lr), c_float(v)) for lr, v in good] == [OK] * len(good)
    assert [lib.tl_check_lr(c_float(lr), c_float(v)) for lr, v in bad] == [BAD_LR] * len(bad)


# --- planted faults -------------------------------------------------------------------------------------------

FAULTS = {
    "exp ends at -79": ("exp and log", "head.c", "x < -80.0f", "x < -79.9f"),
    "exp ends with -80": ("exp and log", "head.c", "x < -80.0f", "x <= -80.0f"),
    "a constant of log": ("exp and log", "head.c", "0.28571429f", "0.29f"),
    "logits from the bias on": ("head", "head.c", "float a = 0.0f;", "float a = b[k];"),
    "sum of exps descending": ("head", "head.c", "sum = sum + g[k];", "sum = 0; for (int32_t i = k; i >= 0; i--) sum += g[i];"),
    "feature gradient descending": ("head", "head.c", "w[k * features + c] * g[k];", "w[(classes - 1 - k) * features + c] * g[classes - 1 - k];"),
    "no cut of p": ("small probabilities", "head.c", "power_of_two(-60)", "power_of_two(-61)"),
    "no cut of l": ("small steps", "head.c", "l = lr * g[k];\n        if (absolute(l) < power_of_two(-100))", "l = lr * g[k];\n        if (absolute(l) < power_of_two(-101))"),
    "a cut of l at 2^-100": ("small steps", "head.c", "if (absolute(l) < power", "if (absolute(l) <= power"),
    "floor at the entry": ("entry truncates", "head.c", "(u >> 31 ? -h : h)", "(u >> 31 ? -h - 1 : h)"),
    "the entry reaches -128": ("entry is clamped", "head.c", "tl_clamp(q, -127, 127)", "tl_clamp(q, -128, 127)"),
    "an anchor too high": ("entry", "head.c", "& 0xff) - 126;\n}", "& 0xff) - 125;\n}"),
    "no cut of v": ("entry cut", "head.c", "absolute(scaled) < power_of_two(-100)", "absolute(scaled) < power_of_two(-102)"),
    "a word of the neighbor": ("entry", "head.c", "20, tl_word(key, (uint32_t)i)", "20, tl_word(key, (uint32_t)i + 1)"),
    "another left shift": ("add", "add.c", "#define LEFT_SHIFT 20", "#define LEFT_SHIFT 19"),
    "the zero points change places": ("add", "add.c", "load(a, n, p->a_zero, va)", "load(a, n, p->b_zero, va)"),
    "the last run is whole": ("add", "add.c", "i < n; i++) y[i]", "i < n - 1; i++) y[i]"),
    "a pool that floors": ("pool", "pool.c", "(sum[ch] - n / 2) / n", "(sum[ch] + n / 2) / n"),
    "padding counts": ("pool", "pool.c", "(last - first) * (to - from)", "c->kh * c->kw"),
    "a mask with >=": ("masks", "mask.c", "(y[i + k] > lo)", "(y[i + k] >= lo)"),
    "old bits past the end": ("masks", "mask.c", "flag[k] = 0;", "flag[k] = 1;"),
    "the group is ignored": ("select", "mask.c", "g * per_group + channels[j]", "channels[j]"),
    "biases wrap": ("bias", "tl_math.h", "tl_clamp(tl_sat32((int64_t)x - step), -bound", "tl_clamp((int32_t)((uint32_t)x - (uint32_t)step), -bound"),
    "biases pass the limit": ("bias", "bias.c", "((int32_t)1 << 30)", "((int32_t)1 << 30) + 1"),
    "subnormal rates are lost": ("tiny rate", "tl_math.h", "m |= e ? 0x800000u : 0;", "if (!e) m = 0; m |= e ? 0x800000u : 0;"),
    "a bias takes the next word": ("bias", "bias.c", "tl_word(key, (uint32_t)c)", "tl_word(key, (uint32_t)c + 1)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    check, file, old, new = FAULTS[fault]
    broken = library(changes={file: (old, new)})
    with pytest.raises(AssertionError):
        CHECKS[check](broken)


# --- sanitizers -----------------------------------------------------------------------------------------------


def _sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the runtime of the address sanitizer loaded first, and plain malloc behind its objects."""
    cc = find_compiler()
    runtime = [
        subprocess.run([*cc, f"-print-file-name={n}"], capture_output=True, text=True, check=True).stdout.strip()
        for n in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "TRAINLET_TEST_SANITIZED": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
@pytest.mark.parametrize("kernels", ["misc", "depthwise", "conv2d", "math"])
def test_under_sanitizers(kernels: str) -> None:
    """All tests of kernels, but the planted faults, in sanitized builds."""
    file = str(Path(__file__).parent / f"test_kernels_{kernels}.py")
    done = _sanitized("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not caught and not sanitizer", file)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


OVERRUNS = {
    "a byte past a mask": ("mask.c", "k < count; k += 8", "k < count + 8; k += 8", "check_masks(lib, 0)"),
    "a lane past the channels": ("depthwise.c", "j < count; j++) acc[j] += (x[j] - zero)", "j < count + 1; j++) acc[j] += (x[j] - zero)",
                                 "[check_random(lib, s) for s in range(30)]"),
    "a shift of a negative": ("add.c", "* ((int32_t)1 << LEFT_SHIFT)", "<< LEFT_SHIFT", "check_add(lib, 1)"),
    "rows below the input": ("conv2d.c", "|| c->out_h != c->in_h", "", "__import__('conv2d_checks').check_pads_after(lib)"),
    "signed overflow": ("round.c", "h[j] = TL_MIN(h[j], TL_H_MAX - TL_MAX(add, 0));", "", "[check_random(lib, s) for s in range(150)]"),
}  # fmt: skip


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
@pytest.mark.parametrize("fault", OVERRUNS)
def test_the_sanitizers_are_on(fault: str) -> None:
    file, old, new, call = OVERRUNS[fault]
    program = (
        "from kernel_library import library; from misc_checks import *; from depthwise_checks import *\n"
        f"lib = library(changes={{{file!r}: ({old!r}, {new!r})}})\n{call}\n"
    )
    done = _sanitized("-c", program)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr, done.stderr[-2000:]
