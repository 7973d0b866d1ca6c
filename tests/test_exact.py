# SPDX-License-Identifier: Apache-2.0
"""The generated C against the reference executor, byte for byte: what is simulated is what runs.

The reference runs the unfused TRAIN graph; the C comes from the fused, planned one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_nets import NAMED, NATIVE, PLAIN, Case, cases, named_case
from test_nets import BITS, LR, NETS, image

from trainlet.autodiff import scheme
from trainlet.compiler import Compiled, Passes, compile_model
from trainlet.emit import emit
from trainlet.errors import MismatchError, TrainletError, UsageError
from trainlet.frontends import attach_head, load_checkpoint
from trainlet.ir.graph import Array, Node
from trainlet.ops import OPS, FusedDw, FusedDx, RoundGrad, SgdWeight
from trainlet.reference import TrainState, infer, initial_state, train_step
from trainlet.session.host import HostSession
from trainlet.toolchain import host as build
from trainlet.verify import VerifyError, verify_plan

STEPS = 20
NO_PASSES = Passes(inplace=False, depth_first=False)
GUARD = 64  # bytes around arena and state that nothing may touch


# --- one run of both ----------------------------------------------------------------------------------------


def expected_state(compiled: Compiled, state: TrainState) -> dict[str, Array]:
    """The reference's states under the names and in the form of ``Session.state``."""
    a, graph = state.arrays, compiled.graph
    found: dict[str, Array] = {
        "seed": np.array([state.seed], np.uint32),
        "step": np.array([state.step], np.uint32),
    }
    rest = set(a)
    for n in (*graph.find("conv2d_dw_sgd"), *graph.find("sgd_weight")):
        sgd = n.attrs.sgd if isinstance(n.attrs, FusedDw) else n.attrs
        assert isinstance(sgd, SgdWeight)
        bits = sgd.fraction_bits
        parts = [a[w].astype(np.int32) for w in n.writes]
        found[n.stores["weight"][0].replace(".trained", ".weight")] = (parts[0] << bits) + (parts[1] if bits else 0)
        found[n["channels"]] = graph.data[n["channels"]]
        rest -= set(n.writes)
    sites = {_site(n): n.stores["rho"][0] for n in graph.nodes if isinstance(n.attrs, FusedDx | RoundGrad)}
    found["rho"] = np.array([a[sites[s]][0] for s in sorted(sites)], np.int8)
    return found | {name: a[name] for name in rest - set(sites.values())}


def _site(node: Node) -> int:
    attrs = node.attrs.round if isinstance(node.attrs, FusedDx) else node.attrs
    assert isinstance(attrs, RoundGrad)
    return attrs.site


def _equal(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class Guarded:
    """A session over memory of exactly the stated size with guard bytes on both sides, and junk in the arena."""

    def __init__(self, case: Case, compiled: Compiled) -> None:
        self.session = HostSession(compiled, flags=case.flags, seed=case.seed)
        self.rng = np.random.default_rng(case.seed)
        self.blocks = [self._block(n) for n in (self.session.arena_bytes, self.session.state_bytes)]
        arena, state = (b[GUARD : len(b) - GUARD] for b in self.blocks)
        self.session.init(arena, state, case.seed)
        self.before = [self._guards(b) for b in self.blocks]
        self.arena, self.state = arena, state

    def _block(self, n: int) -> np.ndarray:
        raw = np.frombuffer(self.rng.bytes(n + 2 * GUARD + 8), np.uint8).copy()
        at = -raw.ctypes.data % 4
        return raw[at : at + n + 2 * GUARD]

    def _guards(self, block: np.ndarray) -> bytes:
        return block[:GUARD].tobytes() + block[len(block) - GUARD :].tobytes()

    def scribble(self) -> None:
        """The arena holds nothing that a step may rely on."""
        self.arena[:] = np.frombuffer(self.rng.bytes(self.arena.size), np.uint8)

    def touched(self) -> bool:
        return [self._guards(b) for b in self.blocks] != self.before


def _attempt(step: Callable[[], object]) -> tuple[type[TrainletError] | None, object]:
    try:
        return None, step()
    except TrainletError as error:
        return type(error), None


def _begin(case: Case, reference: TrainState, guarded: Guarded) -> None:
    """Gives both the same unusual state to start from."""
    session = guarded.session
    start = session.state()
    rhos = iter(np.resize(np.array(case.rho, np.int8), len(reference.arrays)))
    graph = session.compiled.graph
    sites = sorted((n for n in graph.nodes if isinstance(n.attrs, FusedDx | RoundGrad)), key=_site)
    for n in sites:
        reference.arrays[n.stores["rho"][0]] = np.array([next(rhos)], np.int8)
    reference.arrays["head.bias"] = np.resize(np.array(case.head_bias, np.float32), case.classes)
    start["rho"] = np.array([reference.arrays[n.stores["rho"][0]][0] for n in sites], np.int8)
    start["head.bias"] = reference.arrays["head.bias"]
    session.load_state(start)


def difference(case: Case, compiled: Compiled | None = None, steps: int = STEPS) -> str:
    """Where the C first differs from the reference; "" where it nowhere does."""
    compiled = compiled or compile_model(case.model, case.scheme)
    graph, shape = compiled.train, compiled.train.values["input"].shape
    reference = initial_state(graph, case.seed)
    guarded = Guarded(case, compiled)
    session, rng = guarded.session, np.random.default_rng(case.seed ^ 1)
    _begin(case, reference, guarded)
    for t in range(steps):
        x = rng.integers(-128, 128, shape).astype(np.int8)
        label, lr = int(rng.integers(case.classes)), case.lrs[t % len(case.lrs)]
        guarded.scribble()
        logits, before = session.infer(x), guarded.state.tobytes()
        want_logits = infer(graph, reference, x[None])[0]
        guarded.scribble()
        refused, want = _attempt(lambda x=x, label=label, lr=lr: train_step(graph, reference, x, label, lr))
        refused_c, got = _attempt(lambda x=x, label=label, lr=lr: session.train_step(x, label, lr))
        if refused is not refused_c:
            return f"step {t}: refused by {refused} there, {refused_c} in C"
        if refused and guarded.state.tobytes() != before:
            return f"step {t}: refused, but the state has changed"
        if refused:
            if np.isfinite(want_logits).all() and not _equal(logits, want_logits):
                return f"step {t}: logits of a refused step"
            continue
        if not _equal(logits, want_logits) or not _equal(logits, want.logits):
            return f"step {t}: logits {logits} instead of {want_logits}"
        facts = (np.float32(got.loss), got.prediction, np.float32(got.saturated))
        wanted = (np.float32(want.loss), want.prediction, np.float32(want.saturated))
        if facts != wanted:
            return f"step {t}: loss, prediction, saturated {facts} instead of {wanted}"
        wrong = wrong_states(session.state(), expected_state(compiled, reference))
        if wrong:
            return f"step {t}: state {wrong}"
    return "bytes outside arena or state were written" if guarded.touched() else ""


def wrong_states(got: dict[str, Array], want: dict[str, Array]) -> list[str]:
    """The names of the arrays that differ in any bit, or that one side lacks."""
    names = sorted(got.keys() | want.keys())
    return [n for n in names if n not in got or n not in want or not _equal(got[n], want[n])]


# --- the models ---------------------------------------------------------------------------------------------


@given(case=cases())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_exact_random_models(case: Case) -> None:
    assert difference(case) == ""


@pytest.mark.parametrize("flags", [PLAIN, NATIVE], ids=["plain", "native"])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("name", NAMED)
def test_exact_named_models(name: str, bits: int, flags: tuple[str, ...]) -> None:
    assert difference(replace(named_case(name, bits), flags=flags)) == ""


@pytest.mark.parametrize("name", NAMED)
def test_exact_from_unusual_states(name: str) -> None:
    """rho at and near its ends, so that exponents of meeting gradients lie far apart; probabilities around 2^-60 and
    the end of expf; learning rates that the cut at 2^-100 sees."""
    case = named_case(name, lrs=(0.02, 1e-30, 0.5, 1e-38))
    for i, rho in enumerate(((-60, 60, 4), (60, -60, 12, 0), (-12, -4, 2, 6, -9), (5, 3, -2, 14))):
        bias = ((-41.5, 0.0, -35.0, -80.5), (-79.5, -42.0, -55.0, -69.0))[i % 2]
        assert difference(replace(case, rho=rho, head_bias=bias, seed=i)) == ""


def test_exact_refusal_of_a_feature_gradient_that_is_not_finite() -> None:
    """The logits are finite, but their gradient, 3e38 + 3e38, is not."""
    case = named_case("one_pixel")
    compiled = compile_model(case.model, case.scheme)
    graph, session = compiled.train, HostSession(compiled, flags=PLAIN)
    x = np.full((1, 1, 1), 100, np.int8)
    scale = float(session.infer(x)[0] / initial_head(session)[0, 0])
    assert 0 < abs(scale) < 1
    reference = initial_state(graph, 0)
    reference.arrays["head.weight"] = np.array([[3e38], [-3e38]], np.float32) * np.float32(np.sign(scale))
    session.load_state({**session.state(), "head.weight": reference.arrays["head.weight"]})
    before = session.state()
    assert np.isfinite(session.infer(x)).all()
    for step in (lambda: train_step(graph, reference, x, 1, 0.5), lambda: session.train_step(x, 1, 0.5)):
        with pytest.raises(MismatchError, match="not a finite number"):
            step()
    assert wrong_states(session.state(), before) == []
    assert wrong_states(expected_state(compiled, reference), before) == []


def initial_head(session: HostSession) -> Array:
    return session.state()["head.weight"]


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1e-3, 1e38])
def test_exact_refusal_of_a_learning_rate(lr: float) -> None:
    """Some steps go, the one in between is refused by both, and the steps after it go on from the same state."""
    case = named_case("add_with_activation", lrs=(0.02, lr))
    compiled = compile_model(case.model, case.scheme)
    assert difference(case, compiled) == ""
    session, x = HostSession(compiled, flags=PLAIN), np.zeros((5, 5, 3), np.int8)
    with pytest.raises(UsageError, match="learning rate"):
        session.train_step(x, 0, lr)


def test_exact_refusal_of_what_is_not_finite() -> None:
    """A learning rate that drives the head to infinity: both refuse from the same step on."""
    case = named_case("add_with_activation", lrs=(float(np.float32(3e38)),))
    case = replace(case, scheme=scheme.UpdateScheme("head"))
    compiled = compile_model(case.model, case.scheme)
    assert difference(case, compiled) == ""
    session = HostSession(compiled, flags=PLAIN)
    x = image((5, 5, 3), 1)
    session.train_step(x, 0, case.lrs[0])
    before = session.state()
    with pytest.raises(MismatchError, match="not a finite number"):
        session.train_step(x, 1, case.lrs[0])
    assert wrong_states(session.state(), before) == []


@pytest.mark.parametrize("index", range(NETS))
def test_exact_published_nets(assets: Path, index: int) -> None:
    """The C of the published checkpoints, optimized for this machine, against the vectors of another implementation."""
    info, compiled, want = published(assets, index)
    session = HostSession(compiled, seed=info["seed"])
    rho = {s: i for i, s in enumerate(sorted(_site(n) for n in compiled.graph.nodes if hasattr(n.attrs, "round")))}
    got: dict[str, list[Array]] = {"logits": [], "loss": []}
    for t in range(info["steps"]):
        x = image(compiled.graph.values["input"].shape, t)
        got["logits"].append(session.infer(x))
        got["loss"].append(np.float32(session.train_step(x, t % info["classes"], LR).loss))
        if t in (0, info["steps"] - 1):
            _check_rho(session, compiled, rho, want["rho" if t else "rho1"])
    for name, rows in got.items():
        assert _equal(np.stack(rows), want[name]), name
    state = session.state()
    assert _equal(state["head.weight"], want["head_w"])
    assert _equal(state["head.bias"], want["head_b"])
    _check_layers(compiled, state, want)


def published(assets: Path, index: int) -> tuple[dict[str, Any], Compiled, dict[str, Array]]:
    """One entry of nets.json, compiled, with its vectors."""
    info = json.loads((assets / "vectors2" / "nets.json").read_text())[index]
    model = attach_head(load_checkpoint(assets / "models" / f"{info['model']}.pkl"), info["classes"])
    compiled = compile_model(model, scheme.resolve(info["scheme"], model, bits=BITS[info["fraction_bits"]]))
    with np.load(assets / "vectors2" / info["file"], allow_pickle=False) as f:
        return info, compiled, dict(f)


def _check_rho(session: HostSession, compiled: Compiled, places: dict[int, int], want: Array) -> None:
    """rho of the input gradient of convolution i has the site 64 n, n its place; without such a gradient it is 4."""
    rho = session.state()["rho"]
    assert len(rho) == len(places)
    model = [n for n in compiled.train.nodes if "int8" in OPS[n.op].stages]
    sites = [64 * i for i, n in enumerate(model) if n.op == "conv2d"]
    for i, (site, value) in enumerate(zip(sites, want, strict=True)):
        assert (rho[places[site]] if site in places else 4) == value, f"rho of convolution {i}"


def _check_layers(compiled: Compiled, state: dict[str, Array], want: dict[str, Array]) -> None:
    convs = compiled.train.find("conv2d")
    trained = {i for i, n in enumerate(convs) if "trained" in n.operands}
    biased = {i for i, n in enumerate(convs) if n["bias"] in state}
    assert trained == {int(k[1:]) for k in want if k[0] == "w"}
    assert biased == {int(k[1:]) for k in want if k[0] == "b"}
    for i in biased:
        assert np.array_equal(state[convs[i]["bias"]], want[f"b{i}"]), f"bias of convolution {i}"
    for i in trained:
        n = convs[i]
        chosen = want[f"sel{i}"].astype(np.int64)
        assert np.array_equal(state[n["channels"]], chosen)
        full = want[f"w{i}"][chosen] if n.attrs.depthwise else want[f"w{i}"][..., chosen]
        assert np.array_equal(state[f"{n.name}.weight"], full), f"weights of convolution {i}"


# --- the sanitizers -----------------------------------------------------------------------------------------

SANITIZE = ("-std=c99", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all")  # fmt: skip

MAIN = """\
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "@name@.h"

int main(int argc, char **argv)
{
    enum { pixels = @NAME@_HEIGHT * @NAME@_WIDTH * @NAME@_CHANNELS };
    @name@_context c;
    void *arena = malloc(@NAME@_ARENA_BYTES), *state = malloc(@NAME@_STATE_BYTES);
    int8_t *image = malloc(pixels);
    uint8_t *blob = malloc(@NAME@_BLOB_BYTES);
    const float *logits = NULL;
    tl_step_info info;
    if (argc != 2 || @name@_init(&c, arena, @NAME@_ARENA_BYTES, state, @NAME@_STATE_BYTES, 17u) != TL_OK) return 2;
    for (int round = 0; round < 2; round++) {
        for (int t = 0; t < @steps@; t++) {
            for (int i = 0; i < pixels; i++) image[i] = (int8_t)((i * (2 * t + 1) + 31 * t + i / 7) % 256 - 128);
            if (@name@_train(&c, image, t % @NAME@_CLASSES, @lr@, &info) != TL_OK) return 3;
        }
        if (@name@_save(&c, blob, @NAME@_BLOB_BYTES) != TL_OK) return 4;
        @name@_reset(&c, 17u);
    }
    if (@name@_load(&c, blob, @NAME@_BLOB_BYTES) != TL_OK) return 5;
    if (@name@_infer(&c, image, &logits) != TL_OK) return 6;
    FILE *f = fopen(argv[1], "wb");
    if (!f || fwrite(state, 1, @NAME@_STATE_BYTES, f) != @NAME@_STATE_BYTES) return 7;
    if (fwrite(logits, sizeof *logits, @NAME@_CLASSES, f) != @NAME@_CLASSES || fclose(f)) return 7;
    free(arena);
    free(state);
    free(image);
    free(blob);
    return 0;
}
"""


def _cc(*args: str | Path) -> None:
    done = subprocess.run([*build.find_compiler(), *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def sanitized_kernels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The folder of kernel sources and their objects, made with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name, text in build.kernel_sources().items():
        (folder / name).write_text(text)
    objects = []
    for source in sorted(folder.glob("*.c")):
        objects.append(source.with_suffix(".o"))
        _cc(*SANITIZE, "-c", source, "-o", objects[-1])
    return folder, objects


def run_sanitized(compiled: Compiled, kernels: tuple[Path, list[Path]], folder: Path, steps: int, lr: float) -> bytes:
    """State and logits after ``steps`` steps on synthetic images, of a program that stops at the first wrong access."""
    name = compiled.sources.prefix
    text = MAIN
    for key, value in {"@name@": name, "@NAME@": name.upper(), "@steps@": steps, "@lr@": f"{lr!r}f"}.items():
        text = text.replace(key, str(value))
    for file, content in {**compiled.sources.files, "main.c": text}.items():
        (folder / file).write_text(content)
    program, out = folder / "program", folder / "out.bin"
    _cc(*SANITIZE, "-I", kernels[0], folder / f"{name}.c", folder / "main.c", *kernels[1], "-o", program)
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(program), str(out)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[:4000]}"
    return out.read_bytes()


def _synthetic(shape: tuple[int, ...], t: int) -> np.ndarray:
    i = np.arange(int(np.prod(shape)))
    return ((i * (2 * t + 1) + 31 * t + i // 7) % 256 - 128).astype(np.int8).reshape(shape)


def expected_bytes(compiled: Compiled, session: HostSession, steps: int, lr: float) -> bytes:
    """What the host session leaves after the steps of ``MAIN``."""
    shape, classes = compiled.graph.values["input"].shape, session.classes
    session.reset(17)
    for t in range(steps):
        session.train_step(_synthetic(shape, t), t % classes, lr)
    logits = session.infer(_synthetic(shape, steps - 1))
    return session._state.tobytes() + logits.tobytes()


@pytest.mark.parametrize("name", NAMED)
def test_exact_under_sanitizers(name: str, sanitized_kernels: tuple[Path, list[Path]], tmp_path: Path) -> None:
    case = named_case(name, bits=(8, 12, 16)[list(NAMED).index(name) % 3])
    compiled = compile_model(case.model, case.scheme)
    got = run_sanitized(compiled, sanitized_kernels, tmp_path, 6, 0.5)
    assert got == expected_bytes(compiled, HostSession(compiled, flags=PLAIN), 6, 0.5)


def test_exact_published_net_under_sanitizers(
    assets: Path, sanitized_kernels: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    _, compiled, _ = published(assets, 2)
    got = run_sanitized(compiled, sanitized_kernels, tmp_path, 2, 0.0009765625)
    assert got == expected_bytes(compiled, HostSession(compiled), 2, 0.0009765625)


def test_a_wrong_access_is_caught(sanitized_kernels: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """An arena stated four bytes smaller than it is; at its end lies a gradient that is written whole."""
    case = named_case("dead_channels")
    compiled = compile_model(case.model, case.scheme, passes=NO_PASSES)
    plan, values = compiled.plan, compiled.graph.values
    ends = {n: at + values[n].nbytes for n, at in plan.offsets.items() if values[n].exponent is not None}
    assert plan.arena_bytes in ends.values()
    files = {k: v.replace(f"{compiled.plan.arena_bytes}u", f"{compiled.plan.arena_bytes - 4}u")
             for k, v in compiled.sources.files.items()}  # fmt: skip
    small = replace(compiled, sources=replace(compiled.sources, files=files))
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run_sanitized(small, sanitized_kernels, tmp_path, 2, 0.5)


# --- planted faults -----------------------------------------------------------------------------------------

FAULTS = {
    "a tap too early": ("conv2d.c", "- c->pad_h + ky * c->dil_h", "- c->pad_h + ky * c->dil_h - 1", "shared_later"),
    "the next random word": ("conv2d_dw.c", "row->channel[j])", "row->channel[j] + 1)", "shared_later"),
    "a fan-out overwrites": ("round.c", "tl_clamp(h[j] + add,", "tl_clamp(add,", "shared_later"),
    "a mask with >=": ("mask.c", "(y[i + k] > lo)", "(y[i + k] >= lo)", "add_with_activation"),
    "rho sinks too fast": ("round.c", "rho - 1", "rho - 2", "shared_later"),
    "a bias takes no random word": ("bias.c", "tl_word(key, (uint32_t)c)", "0u", "shared_later"),
    "fractions are dropped": ("tl_math.h", "full - top * one", "0", "shared_later"),
    "the step is not counted": ("model.c", "header(c)[1]++;", "", "shared_later"),
    "weights stop at -126": ("tl_math.h", "step, 127 * one)", "step, 126 * one)", "shared_later"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_exact_comparison_catches(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with one fault is not equal, where the sound one is."""
    file, sound, faulty, model = FAULTS[fault]
    case = named_case(model, bits=12, lrs=(0.02, 0.5))
    sources = build.kernel_sources()
    assert sound in sources[file], f"{file} has no {sound!r} any more; plant the fault anew"
    assert difference(case) == ""
    changed = {**sources, file: sources[file].replace(sound, faulty)}
    monkeypatch.setattr(build, "kernel_sources", lambda: changed)
    assert difference(case) != ""


def test_exact_comparison_catches_an_overlap() -> None:
    """Two tensors that live at once share bytes: the plan's check says so, and so does the C."""
    case = named_case("add_with_activation")
    sound = compile_model(case.model, case.scheme, passes=NO_PASSES)
    first, second = (n.outputs[0] for n in sound.graph.find("conv2d"))
    offsets = {**sound.plan.offsets, first: sound.plan.offsets[second]}
    places = {v: replace(p, offset=offsets[v]) for v, p in sound.plan.places.items()}
    plan = replace(sound.plan, places=places)
    with pytest.raises(VerifyError, match="share"):
        verify_plan(sound.graph, plan)
    faulty = replace(sound, plan=plan, sources=emit(sound.graph, plan, sound.layout, sound.model_hash))
    assert difference(case, sound) == ""
    assert difference(case, faulty) != ""
