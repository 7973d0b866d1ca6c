# SPDX-License-Identifier: Apache-2.0
"""The host session and the C calls behind it: what is refused, that a refusal changes nothing, saving and loading."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain
from hypothesis import given
from hypothesis import strategies as st
from random_nets import NATIVE, PLAIN, named_case

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import Compiled, compile_model
from trainlet.errors import ToolMissingError, UsageError
from trainlet.frontends import attach_head
from trainlet.ir.graph import Array
from trainlet.plan.state import StateCodec
from trainlet.session.host import HostSession
from trainlet.toolchain import host as build

OK, BAD_ARGUMENT, BAD_SIZE, BAD_ALIGNMENT, BAD_LR, NOT_FINITE, BAD_ORDER, BAD_BLOB = 0, 2, 3, 4, 5, 6, 7, 8
HEADER = 20  # bytes of a saved state before its payload
LAYERS = ("block.depthwise", "block.project")


@cache
def chain(bits: int = 8, layers: tuple[str, ...] = LAYERS, ratio: float = 0.5, name: str = "host") -> Compiled:
    """The chain of graphs.py; of its depthwise layer all channels train, of the others the share ``ratio``."""
    weights = {layer: 1.0 if layer == "block.depthwise" else ratio for layer in layers}
    model = replace(attach_head(int8_chain(), 4), name=name)
    return compile_model(model, UpdateScheme("host", layers, weights, bits))


def session(bits: int = 8, **chosen: object) -> HostSession:
    """A session that has trained for three steps."""
    s = HostSession(chain(bits, **chosen), flags=PLAIN, seed=5)  # type: ignore[arg-type]
    for t in range(3):
        s.train_step(image(t), t, 0.5)
    return s


def image(t: int) -> np.ndarray:
    return np.random.default_rng(t).integers(-128, 128, (8, 8, 3)).astype(np.int8)


def raw(s: HostSession) -> bytes:
    return s._state.tobytes()


def same_states(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() and a[k].dtype == b[k].dtype for k in a)


# --- memory -------------------------------------------------------------------------------------------------


def _memory(nbytes: int, shift: int = 0) -> np.ndarray:
    block = np.zeros(nbytes + 16, np.uint8)
    at = -block.ctypes.data % 8 + shift
    return block[at : at + nbytes]


@pytest.mark.parametrize("which", ["arena", "state"])
def test_one_byte_too_little_is_refused(which: str) -> None:
    s = session()
    before = raw(s)
    sizes = {"arena": s.arena_bytes, "state": s.state_bytes}
    sizes[which] -= 1
    with pytest.raises(UsageError, match=rf"smaller than the model's arena \({s.arena_bytes} bytes\)"):
        s.init(_memory(sizes["arena"]), _memory(sizes["state"]), 0)
    assert raw(s) == before
    s.train_step(image(9), 1, 0.5)  # over the memory it had
    assert raw(s) != before


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("which", ["arena", "state"])
def test_misaligned_memory_is_refused(which: str, shift: int) -> None:
    s = session()
    sizes = {"arena": s.arena_bytes, "state": s.state_bytes}
    blocks = {k: _memory(n, shift if k == which else 0) for k, n in sizes.items()}
    with pytest.raises(UsageError, match="not aligned to 4 bytes"):
        s.init(blocks["arena"], blocks["state"], 0)


def test_memory_aligned_to_four_bytes_is_enough() -> None:
    s, other = session(), session()
    s.init(_memory(s.arena_bytes, 4), _memory(s.state_bytes, 4), 5)
    other.reset(5)
    for t in range(3):
        assert s.train_step(image(t), t, 0.5) == other.train_step(image(t), t, 0.5)
    assert raw(s) == raw(other)


# --- a step that is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -float("inf"), -1e-9, 1e39, 3e38])
def test_a_wrong_learning_rate_changes_nothing(lr: float) -> None:
    s = session()
    before = raw(s)
    with pytest.raises(UsageError, match="learning rate"):
        s.train_step(image(0), 0, lr)
    assert raw(s) == before


@pytest.mark.parametrize("label", [-1, 4, 2**31, -(2**40), 2**32])
def test_a_wrong_label_changes_nothing(label: int) -> None:
    s = session()
    before = raw(s)
    with pytest.raises(UsageError, match=rf"label {label} is out of range: the head has classes 0 to 3"):
        s.train_step(image(0), label, 0.5)
    prefix = s.prefix(image(0))
    with pytest.raises(UsageError, match="out of range"):
        s.train_step_cached(prefix, label, 0.5)
    assert raw(s) == before


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8, 8), "i1"), ((8, 8, 1), "i1"), ((1, 8, 8, 3), "i1"), ((9, 8, 3), "i1"), ((8, 8, 3), "u1"), ((8, 8, 3), "f4")],
)
def test_a_wrong_image_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    s, wrong = session(), np.zeros(shape, dtype)
    before = raw(s)
    calls: tuple[Callable[[], object], ...] = (
        lambda: s.infer(wrong),
        lambda: s.train_step(wrong, 0, 0.5),
        lambda: s.prefix(wrong),
    )
    for call in calls:
        with pytest.raises(UsageError, match="the model reads int8 8x8x3"):
            call()
    assert raw(s) == before


def test_images_need_not_be_contiguous() -> None:
    s = session()
    wide = np.random.default_rng(0).integers(-128, 128, (8, 16, 3)).astype(np.int8)
    assert s.infer(wide[:, ::2]).tobytes() == s.infer(np.ascontiguousarray(wide[:, ::2])).tobytes()
    assert s.infer(wide[:, ::2]).tobytes() != s.infer(wide[:, :8]).tobytes()


def test_inference_changes_no_state() -> None:
    s = session()
    before = raw(s)
    s.infer(image(3))
    s.infer_cached(s.prefix(image(4)))
    assert raw(s) == before


# --- the compiler -------------------------------------------------------------------------------------------


def test_a_missing_compiler_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolMissingError, match=r"'no-such-cc' was not found; .*: apt-get install"):
        HostSession(chain(), cc="no-such-cc")
    monkeypatch.setenv("CC", "no-such-cc-either")
    with pytest.raises(ToolMissingError, match="no-such-cc-either"):
        HostSession(chain())
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolMissingError, match=r"no C compiler was found \(looked for cc, gcc, clang\)"):
        HostSession(chain())


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINLET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ToolMissingError, match=r"(?s)the C compiler failed: .*--no-such-option"):
        HostSession(chain(), flags=("--no-such-option",))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRAINLET_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="TRAINLET_CACHE="):
        HostSession(chain(), flags=PLAIN)


def test_libraries_are_cached_by_all_that_determines_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first = HostSession(chain(), flags=PLAIN).library_path
    assert HostSession(chain(), flags=PLAIN).library_path == first
    paths = {first, HostSession(chain(), flags=NATIVE).library_path, HostSession(chain(12), flags=PLAIN).library_path}
    sources = build.kernel_sources()
    monkeypatch.setattr(build, "kernel_sources", lambda: {**sources, "tl_math.h": sources["tl_math.h"] + "/* new */\n"})
    paths.add(HostSession(chain(), flags=PLAIN).library_path)
    assert len(paths) == 4


# --- the state as arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_state_goes_on_where_it_was_taken(bits: int) -> None:
    first = session(bits)
    taken = first.state()
    fresh = HostSession(chain(bits), flags=PLAIN, seed=99)
    assert raw(fresh) != raw(first)
    fresh.load_state(taken)
    assert raw(fresh) == raw(first)
    assert same_states(fresh.state(), taken)
    for t in range(3):
        assert fresh.train_step(image(t), t, 0.5) == first.train_step(image(t), t, 0.5)
    assert raw(fresh) == raw(first)


def test_a_state_is_a_copy() -> None:
    s = session()
    taken = s.state()
    before = {k: v.copy() for k, v in taken.items()}
    s.train_step(image(7), 1, 0.5)
    assert same_states(taken, before)
    assert not same_states(s.state(), before)


@given(bits=st.sampled_from((8, 12, 16)), seed=st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverse(bits: int, seed: int) -> None:
    """Full forms over the whole range +-127 x 2^L, both ends included."""
    compiled, rng = chain(bits), np.random.default_rng(seed)
    codec = StateCodec(compiled.graph, compiled.layout)
    arrays = codec.unpack(bytes(compiled.layout.nbytes))
    top = 127 << (bits - 8)
    for name in ("conv.1.weight", "conv.2.weight"):
        arrays[name] = rng.choice([-top, top, *rng.integers(-top, top + 1, 50)], arrays[name].shape).astype(np.int32)
    arrays["conv.2.bias"] = rng.integers(-(2**30), 2**30 + 1, arrays["conv.2.bias"].shape).astype(np.int32)
    arrays["head.weight"] = rng.standard_normal(arrays["head.weight"].shape).astype(np.float32)
    arrays["rho"] = rng.integers(-60, 61, arrays["rho"].shape).astype(np.int8)
    arrays["seed"], arrays["step"] = (rng.integers(0, 2**32, 1).astype(np.uint32) for _ in range(2))
    packed = codec.pack(arrays)
    assert len(packed) == compiled.layout.nbytes
    assert same_states(codec.unpack(packed), arrays)
    assert codec.pack(codec.unpack(packed)) == packed


def _without(name: str) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda s: {k: v for k, v in s.items() if k != name}


def _with(name: str, change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda s: {**s, name: change(s[name])}


WRONG = {
    "missing": (_without("conv.2.bias"), r"no 'conv\.2\.bias'"),
    "unknown": (lambda s: {**s, "conv.7.bias": s["conv.2.bias"]}, r"'conv\.7\.bias', which .* not train"),
    "shape": (_with("head.bias", lambda a: a[:2]), r"head\.bias: .*\(2,\).*\(4,\)"),
    "dtype": (_with("conv.1.weight", lambda a: a.astype(np.int64)), r"conv\.1\.weight: .*int64"),
    "channels": (_with("conv.2.channels", lambda a: a[::-1].copy()), r"conv\.2\.channels: .*other input channels"),
    "range": (_with("conv.1.weight", lambda a: a * 0 + (127 << 4) + 1), r"conv\.1\.weight: .*damaged"),
    "lowest": (_with("conv.1.weight", lambda a: np.full_like(a, -(2**31))), r"conv\.1\.weight: .*damaged"),
    "rho": (_with("rho", lambda a: a[:-1]), r"rho: "),
    "rho's range": (_with("rho", lambda a: np.full_like(a, -128)), r"rho: .*damaged"),
    "bias": (_with("conv.2.bias", lambda a: np.full_like(a, -(2**31))), r"conv\.2\.bias: .*damaged"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_state_is_refused_by_name(what: str) -> None:
    s = session(12)
    before = raw(s)
    change, text = WRONG[what]
    with pytest.raises(UsageError, match=text):
        s.load_state(change(s.state()))
    assert raw(s) == before


OTHERS = {
    "more layers": ({"layers": ("stem", *LAYERS), "ratio": 1.0}, r"conv\.0"),
    "fewer layers": ({"layers": LAYERS[1:]}, r"conv\.1"),
    "more channels": ({"ratio": 1.0}, r"conv\.2"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_the_state_of_another_scheme_is_refused_by_name(which: str) -> None:
    chosen, name = OTHERS[which]
    s = session()
    before = raw(s)
    with pytest.raises(UsageError, match=name):
        s.load_state(session(**chosen).state())
    assert raw(s) == before


def test_the_state_of_another_model_is_refused_by_name() -> None:
    case = named_case("add_is_first")
    other = HostSession(compile_model(case.model, case.scheme), flags=PLAIN)
    with pytest.raises(UsageError, match=r"conv\.|head"):
        session().load_state(other.state())


# --- the frozen prefix ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), LAYERS[1:], LAYERS])
def test_a_stored_prefix_gives_the_same_bytes(layers: tuple[str, ...]) -> None:
    whole, cached = session(layers=layers), session(layers=layers)
    stored = [cached.prefix(image(t)) for t in range(4)]
    for t in (2, 0, 3, 1, 1, 0):
        rng = np.random.default_rng(t)
        for s in (whole, cached):
            s._arena[:] = rng.integers(0, 256, s._arena.size).astype(np.uint8)
        assert cached.infer_cached(stored[t]).tobytes() == whole.infer(image(t)).tobytes()
        cached._arena[:] = 255
        assert cached.train_step_cached(stored[t], t, 0.5) == whole.train_step(image(t), t, 0.5)
        assert raw(cached) == raw(whole)
    assert [cached.prefix(image(t)) for t in range(4)] == stored  # training does not touch it


def test_a_model_without_a_frozen_prefix_says_so() -> None:
    s = session(layers=("stem",), ratio=1.0)
    assert s.prefix(image(0)) == b""
    with pytest.raises(UsageError, match="stored prefix"):
        s.infer_cached(b"")


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b""])
def test_a_prefix_of_another_size_is_refused(change: Callable[[bytes], bytes]) -> None:
    s = session()
    stored, before = s.prefix(image(0)), raw(s)
    for call in (s.infer_cached, lambda p: s.train_step_cached(p, 0, 0.5)):
        with pytest.raises(UsageError, match=f"has {len(stored)} bytes, not {len(change(stored))}"):
            call(change(stored))
    assert raw(s) == before


# --- C calls that the session does not make -------------------------------------------------------------------


def _call(s: HostSession, name: str, *args: object) -> int:
    status = s._function(name, ctypes.c_int)(*s._pair(), *args)
    assert isinstance(status, int)
    return status


def _save(s: HostSession) -> bytes:
    n = HEADER + s.state_bytes
    blob = np.full(n + 8, 0xEE, np.uint8)
    assert _call(s, "tl_model_save", ctypes.c_void_p(blob.ctypes.data), ctypes.c_size_t(n)) == OK
    assert (blob[n:] == 0xEE).all()
    return blob[:n].tobytes()


def _load(s: HostSession, blob: bytes) -> int:
    held = np.frombuffer(blob, np.uint8).copy() if blob else np.zeros(1, np.uint8)
    return _call(s, "tl_model_load", ctypes.c_void_p(held.ctypes.data), ctypes.c_size_t(len(blob)))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_saved_state_loads(bits: int) -> None:
    s = session(bits)
    blob, before = _save(s), raw(s)
    assert blob[HEADER:] == before
    s.reset(3)
    assert raw(s) != before
    assert _load(s, blob) == OK
    assert raw(s) == before
    fresh = HostSession(chain(bits), flags=PLAIN)
    assert _load(fresh, blob) == OK
    assert fresh.train_step(image(1), 1, 0.5) == s.train_step(image(1), 1, 0.5)
    assert raw(fresh) == raw(s)


def test_a_saved_state_with_any_byte_changed_is_refused() -> None:
    s = session(12)
    blob = _save(s)
    s.reset(3)
    before = raw(s)
    for i in range(len(blob)):
        for bit in (1, 128):
            damaged = bytearray(blob)
            damaged[i] ^= bit
            assert _load(s, bytes(damaged)) == BAD_BLOB, f"byte {i}"
    assert raw(s) == before


def test_a_truncated_saved_state_is_refused() -> None:
    s = session()
    blob = _save(s)
    s.reset(3)
    before = raw(s)
    for n in (0, 1, 4, HEADER - 1, HEADER, len(blob) - 1):
        assert _load(s, blob[:n]) == BAD_SIZE
    short = ctypes.c_size_t(len(blob) - 1)
    into = np.zeros(len(blob), np.uint8)
    assert _call(s, "tl_model_save", ctypes.c_void_p(into.ctypes.data), short) == BAD_SIZE
    assert not into.any()
    assert raw(s) == before


def test_the_saved_state_of_another_scheme_is_refused() -> None:
    """Of the same size, too: all bytes but the hash could be right."""
    s, other = session(), session(name="other")
    assert s.state_bytes == other.state_bytes
    assert s.model_hash != other.model_hash
    before = raw(s)
    assert _load(s, _save(other)) == BAD_BLOB
    assert raw(s) == before


def _feed(s: HostSession, t: int, rows: range) -> list[int]:
    x = image(t)
    return [_call(s, "tl_model_feed_row", ctypes.c_void_p(x[y].ctypes.data)) for y in rows]


def test_rows_out_of_order_are_refused() -> None:
    s, other = session(), session()
    before = raw(s)
    finish = ("tl_model_finish", ctypes.c_void_p())
    train = ("tl_model_finish_train", ctypes.c_int32(1), ctypes.c_float(0.5), ctypes.c_void_p())
    s.init(s._arena, s._state, 5)
    s.load_state(other.state())
    assert _feed(s, 0, range(1)) == [BAD_ORDER]  # no begin
    assert _call(s, *finish) == BAD_ORDER
    assert _call(s, "tl_model_begin") == OK
    assert _call(s, *train) == BAD_ORDER  # no row
    assert _feed(s, 0, range(7)) == [OK] * 7
    assert _call(s, *finish) == BAD_ORDER  # one too few
    assert _call(s, *train) == BAD_ORDER
    assert _feed(s, 0, range(7, 8)) == [OK]
    assert _feed(s, 0, range(1)) == [BAD_ORDER]  # one too many
    assert raw(s) == before
    assert _call(s, *train) == OK
    other.train_step(image(0), 1, 0.5)
    assert raw(s) == raw(other)
    assert _call(s, *train) == BAD_ORDER  # the image is used up
    assert _feed(s, 0, range(1)) == [BAD_ORDER]
    assert raw(s) == raw(other)


def test_begin_starts_the_image_anew() -> None:
    s, other = session(), session()
    assert _call(s, "tl_model_begin") == OK
    assert _feed(s, 1, range(5)) == [OK] * 5
    assert _call(s, "tl_model_begin") == OK
    assert _feed(s, 0, range(8)) == [OK] * 8
    assert _call(s, "tl_model_finish_train", ctypes.c_int32(1), ctypes.c_float(0.5), ctypes.c_void_p()) == OK
    other.train_step(image(0), 1, 0.5)
    assert raw(s) == raw(other)


def test_c_refuses_null_pointers_and_wrong_labels_itself() -> None:
    s = session()
    before = raw(s)
    null = ctypes.c_void_p()
    rate, size = ctypes.c_float(0.5), ctypes.c_size_t(1 << 20)
    held = image(0)
    x = ctypes.c_void_p(held.ctypes.data)
    assert _call(s, "tl_model_train", null, ctypes.c_int32(0), rate, null) == BAD_ARGUMENT
    assert _call(s, "tl_model_infer", null, null) == BAD_ARGUMENT
    assert _call(s, "tl_model_save", null, size) == BAD_ARGUMENT
    assert _call(s, "tl_model_load", null, size) == BAD_ARGUMENT
    assert _call(s, "tl_model_begin") == OK
    assert _call(s, "tl_model_feed_row", null) == BAD_ARGUMENT
    for label in (-1, 4, -(2**31), 2**31 - 1):
        assert _call(s, "tl_model_train", x, ctypes.c_int32(label), rate, null) == BAD_ARGUMENT
    for lr in (float("nan"), -1.0, float("inf")):
        assert _call(s, "tl_model_train", x, ctypes.c_int32(0), ctypes.c_float(lr), null) == BAD_LR
    assert raw(s) == before


def test_reset_is_the_start() -> None:
    s = session()
    first = HostSession(chain(), flags=PLAIN, seed=11)
    s.reset(11)
    assert raw(s) == raw(first)
    s.reset(12)
    assert raw(s) != raw(first)
