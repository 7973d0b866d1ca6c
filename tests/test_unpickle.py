# SPDX-License-Identifier: Apache-2.0
"""The pickle reader: what it reads, and streams that want to run code or eat memory."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainlet.frontends.published.unpickle import MAX_BYTES, PickleError, loads


class Evil:
    """Would run code in an ordinary unpickler."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def amplified(times: int) -> bytes:
    """One stored text, encoded to bytes again and again."""
    text = b"a" * (1 << 20)
    head = b"\x80\x02c_codecs\nencode\nq\x00X" + struct.pack("<I", len(text)) + text + b"q\x01X\x06\0\0\0latin1q\x02"
    return head + b"h\x00h\x01h\x02\x86R" * times + b"."


MALICIOUS: list[tuple[bytes, str]] = [
    (pickle.dumps(Evil(os.system, "true"), 2), "asks for 'posix.system'"),
    (pickle.dumps(Evil(eval, "1"), 4), "asks for 'builtins.eval'"),
    (pickle.dumps(Evil(eval, "1"), 2), r"asks for '__builtin__\.eval'"),
    (pickle.dumps(Path("x"), 2), "asks for 'pathlib"),
    (b"\x80\x02cnumpy\nload\n.", "asks for 'numpy.load'"),
    (b"\x80\x02cnumpy.core.multiarray\n" + b"x" * 100 + b"\n.", "longer than 80 characters"),
    (b"\x80\x02Nr\xff\xff\xff\xff.", ""),  # a memo index of 2^32 - 1 costs one dict entry
    (b"\x80\x02X\xff\xff\xff\xffabc", "ends in the middle"),
    (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc", "ends in the middle"),
    (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.", "a frame is longer"),
    (b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", "at most 64 bits"),
    (b"\x80\x09N.", "protocols 2 to 4"),
    (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
    (b"\x80\x02h\x05.", "never stored"),
    (b"\x80\x02t.", "no mark"),
    (b"\x80\x02(N.", "objects left over"),
    (b"\x80\x02NN.", "objects left over"),
    (b"\x80\x02.", "objects left over"),
    (b"\x80\x02R.", "too little"),
    (b"\x80\x02NNR.", "not one of the known functions"),
    (b"\x80\x02NNb.", "sets the state of something"),
    (b"\x80\x02NNa.", "no list"),
    (b"\x80\x02NNNs.", "no dict"),
    (b"\x80\x02}(Nu.", "a key without a value"),
    (b"\x80\x02}NNs.", "dict keys are strings"),
    (b"\x80\x02}])s.", "dict keys are strings"),
    (b"\x80\x02X\x01\0\0\0aQ.", "torch tensors"),
    (b"\x80\x02\xf0.", "opcode 0xf0"),
    (pickle.dumps(Evil, 2), "asks for"),
    (pickle.dumps(np.array([None]), 2), "array element types"),
    (pickle.dumps(np.zeros(2, [("a", "i4")]), 2), "array element types"),
    (pickle.dumps(np.zeros((0, 3), np.int8), 3), "an axis of an array has 1 to"),
    (b"\x80\x02N" + b"N" * 500_000 + b".", "more than 500000 opcodes"),
    (amplified(65), f"more than {MAX_BYTES >> 20} MiB of data"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), MALICIOUS)
def test_malicious(data: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        if message:
            with pytest.raises(PickleError, match=message):
                loads(data)
        else:
            assert loads(data) is None
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_BYTES
    finally:
        tracemalloc.stop()


def test_array_state_is_checked() -> None:
    good = pickle.dumps(np.arange(6, dtype=np.int32).reshape(2, 3), 2)
    np.testing.assert_array_equal(loads(good), np.arange(6).reshape(2, 3))  # type: ignore[arg-type]
    with pytest.raises(PickleError, match="an array of 8 elements has 32 bytes, not 24"):
        loads(good.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86"))
    fortran = loads(pickle.dumps(np.asfortranarray(np.arange(6).reshape(2, 3)), 2))
    np.testing.assert_array_equal(fortran, np.arange(6).reshape(2, 3))  # type: ignore[arg-type]
    swapped = loads(pickle.dumps(np.arange(3, dtype=">i4"), 2))
    assert isinstance(swapped, np.ndarray)
    assert swapped.dtype == np.int32
    assert swapped.tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_data(protocol: int) -> None:
    data = {
        "a": [1, -1, 1 << 40, 300, 70_000, 0.5, None, True, False, "\u00e9", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    }
    assert loads(pickle.dumps(data, protocol)) == data
    assert loads(pickle.dumps(np.float64(0.25), protocol)) == 0.25
    shared = [np.ones(2, np.float32)] * 2
    first, second = loads(pickle.dumps(shared, protocol))  # type: ignore[misc]
    assert first is second


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_opcodes_raise_nothing_else(data: bytes) -> None:
    try:
        loads(b"\x80\x02" + data)
    except PickleError:
        return
