# SPDX-License-Identifier: Apache-2.0
"""The host session: the emitted C in a shared library, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainlet.emit import Compiled
from trainlet.ir import Image
from trainlet.plan.prefix import prefix_values
from trainlet.plan.state import StateCodec
from trainlet.session import Inputs, StepInfo, Targets
from trainlet.session.checks import (
    check_image,
    check_label,
    check_prefix,
    check_rate,
    check_seed,
    check_status,
    class_count,
    need_compiled,
    one_input,
    one_label,
)
from trainlet.toolchain.host import NATIVE, build_library


class _Context(ctypes.Structure):
    """tl_context of tl_model.h, with room for the exponents behind it."""

    _fields_ = (
        ("arena", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("exponent", ctypes.c_void_p),
        ("key", ctypes.c_uint32),
        ("anchor", ctypes.c_int32),
        ("saturated", ctypes.c_uint32),
        ("rounded", ctypes.c_uint32),
        ("lr", ctypes.c_float),
        ("loss", ctypes.c_float),
        ("target", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
    )


class _Info(ctypes.Structure):
    _fields_ = (("loss", ctypes.c_float), ("prediction", ctypes.c_int32), ("saturated", ctypes.c_float))


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """``nbytes`` zeroed bytes at an address that is a multiple of 64."""
    raw = np.zeros(nbytes + 64, np.uint8)
    at = -raw.ctypes.data % 64
    return raw[at : at + nbytes]


class HostSession:
    """Runs a compiled model on this machine; see ``Session``. ``flags`` are added to the compiler's."""

    def __init__(
        self, compiled: Compiled, cc: str | None = None, *, flags: Sequence[str] = NATIVE, seed: int = 0
    ) -> None:
        self.compiled = need_compiled(compiled)
        self.arena_bytes = compiled.plan.arena_bytes
        self.state_bytes = compiled.layout.nbytes
        self.model_hash = compiled.model_hash
        self.classes = class_count(compiled)
        self.library_path = build_library(compiled.sources.files, cc=cc, extra=flags)
        self._lib = ctypes.CDLL(str(self.library_path))
        self._shape = compiled.graph.image.shape
        self._codec = StateCodec(compiled.graph, compiled.layout)
        self._cut = [(compiled.plan.offsets[v], compiled.graph.values[v].nbytes) for v in prefix_values(compiled.graph)]
        slots = max((v.exponent for v in compiled.graph.values.values() if v.exponent is not None), default=0)
        self._exponents = np.zeros(slots + 1, np.int16)
        self._arena, self._state = _aligned(self.arena_bytes), _aligned(self.state_bytes)
        self._context = _Context()
        self._model = self._function(f"{compiled.sources.prefix}_model", ctypes.c_void_p)()
        self._infer = self._function("tl_model_infer", ctypes.c_int)
        self._train = self._function("tl_model_train", ctypes.c_int)
        self._infer_rest = self._function("tl_model_infer_rest", None)
        self._train_rest = self._function("tl_model_train_rest", ctypes.c_int)
        self._logits = ctypes.c_void_p()
        self._info = _Info()
        self.init(self._arena, self._state, seed)

    def _function(self, name: str, restype: type | None) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
        function = getattr(self._lib, name)
        function.restype = restype
        return function

    def init(self, arena: NDArray[np.uint8], state: NDArray[np.uint8], seed: int) -> None:
        """Begins anew over the given memory; UsageError where it is too small or misaligned."""
        check_seed(seed)
        init = self._function("tl_model_init", ctypes.c_int)
        status = init(
            ctypes.c_void_p(self._model),
            ctypes.byref(self._context),
            ctypes.c_void_p(self._exponents.ctypes.data),
            ctypes.c_void_p(arena.ctypes.data),
            ctypes.c_size_t(arena.nbytes),
            ctypes.c_void_p(state.ctypes.data),
            ctypes.c_size_t(state.nbytes),
            ctypes.c_uint32(seed),
        )
        self._check(status)
        self._arena, self._state = arena, state

    def _check(self, status: int, label: int = 0, lr: float = 0.0) -> None:
        check_status(self.compiled, status, label, lr)

    def _image(self, image: NDArray[np.generic]) -> ctypes.c_void_p:
        self._held = check_image(image, self._shape)
        return ctypes.c_void_p(self._held.ctypes.data)

    def _read_logits(self) -> NDArray[np.float32]:
        address = self._logits.value
        assert address is not None
        at = address - self._arena.ctypes.data
        return self._arena[at : at + 4 * self.classes].view(np.float32).copy()

    def _step(self, status: int, label: int, lr: float) -> StepInfo:
        self._check(status, label, lr)
        return StepInfo(self._info.loss, self._info.prediction, self._info.saturated)

    def _pair(self) -> tuple[ctypes.c_void_p, object]:
        return ctypes.c_void_p(self._model), ctypes.byref(self._context)

    def reset(self, seed: int) -> None:
        check_seed(seed)
        self._function("tl_model_reset", None)(*self._pair(), ctypes.c_uint32(seed))

    def infer(self, inputs: Inputs) -> NDArray[np.float32]:
        self._check(
            self._infer(*self._pair(), self._image(one_input(self.compiled, inputs)), ctypes.byref(self._logits))
        )
        return self._read_logits()

    def train_step(self, inputs: Inputs, targets: Targets, lr: float) -> StepInfo:
        image, label = one_input(self.compiled, inputs), one_label(self.compiled, targets)
        check_label(self.compiled, label)
        check_rate(lr)
        out = ctypes.byref(self._info)
        args = (*self._pair(), self._image(image), ctypes.c_int32(label), ctypes.c_float(lr), out)
        return self._step(self._train(*args), label, lr)

    def prefix(self, image: Image) -> bytes:
        if not self._cut:
            return b""
        pointer = self._image(image)
        feed = self._function("tl_model_feed_row", ctypes.c_int)
        self._check(self._function("tl_model_begin", ctypes.c_int)(*self._pair()))
        for y in range(self._shape[0]):
            assert pointer.value is not None
            self._check(feed(*self._pair(), ctypes.c_void_p(pointer.value + y * self._shape[1] * self._shape[2])))
        self._check(self._function("tl_model_prefix", ctypes.c_int)(*self._pair()))
        return b"".join(self._arena[at : at + n].tobytes() for at, n in self._cut)

    def _restore(self, prefix: bytes) -> None:
        check_prefix(prefix, sum(n for _, n in self._cut))
        data, begin = np.frombuffer(prefix, np.uint8), 0
        for at, n in self._cut:
            self._arena[at : at + n] = data[begin : begin + n]
            begin += n

    def infer_cached(self, prefix: bytes) -> NDArray[np.float32]:
        self._restore(prefix)
        self._infer_rest(*self._pair(), ctypes.byref(self._logits))
        return self._read_logits()

    def train_step_cached(self, prefix: bytes, label: int, lr: float) -> StepInfo:
        check_label(self.compiled, label)
        check_rate(lr)
        self._restore(prefix)
        out = ctypes.byref(self._info)
        status = self._train_rest(*self._pair(), ctypes.c_int32(label), ctypes.c_float(lr), out)
        return self._step(status, label, lr)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return self._codec.unpack(self._state.tobytes())

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        self._state[:] = np.frombuffer(self._codec.pack(state), np.uint8)
