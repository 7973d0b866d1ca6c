# SPDX-License-Identifier: Apache-2.0
"""A pickle reader that cannot run code.

``pickle.Unpickler`` with a filter on ``find_class`` would still allocate whatever the file asks for (one 5-byte
opcode can claim gigabytes of memo), so this is a small machine of its own: it knows the opcodes that plain Python
data and numpy arrays need, resolves six globals to functions written here, and counts everything it makes.
Published checkpoints are pickles from the internet; this module is the border.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

MAX_OPCODES: Final = 500_000
MAX_BYTES: Final = 64 << 20  # strings, bytes and arrays together, as stored in memory
MAX_DIMS: Final = 8
MAX_DIM: Final = 1 << 24

# dtype codes a file may name; the last character is the item size
DTYPES: Final = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "f4", "f8")


class PickleError(ValueError):
    """The stream is truncated, malformed, too large or asks for something that is not plain data."""


def _need(ok: bool, rule: str) -> None:
    if not ok:
        raise PickleError(rule)


@dataclass(slots=True)
class _DType:
    """A numpy dtype being rebuilt: ``code`` without byte order, ``order`` from its state."""

    code: str
    order: str = "|"

    def numpy(self) -> np.dtype[np.generic]:
        return np.dtype((self.order if self.order in "<>" else "=") + self.code)


@dataclass(slots=True)
class _Array:
    """An array between its creation and its BUILD; ``value`` is None until then."""

    value: np.ndarray | None = None


class _NdArray:
    """Stands for the global ``numpy.ndarray``, which is only ever an argument."""


# --- globals: what the stream may call ---------------------------------------------------------------------


def _reconstruct(vm: _Machine, args: tuple[object, ...]) -> object:
    _need(len(args) == 3 and args[0] is _NdArray, "an array starts as _reconstruct(ndarray, (0,), b'b')")
    return _Array()


def _dtype(vm: _Machine, args: tuple[object, ...]) -> object:
    code = args[0] if args else None
    _need(isinstance(code, str) and code in DTYPES, f"array element types are {', '.join(DTYPES)}")
    return _DType(str(code))


def _encode(vm: _Machine, args: tuple[object, ...]) -> object:
    if len(args) != 2 or not isinstance(args[0], str) or not isinstance(args[1], str) or args[1] != "latin1":
        raise PickleError("bytes are stored as encode(text, 'latin1')")
    text = args[0]
    vm.charge(len(text))
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise PickleError("bytes stored as text hold a character above 255") from None


def _scalar(vm: _Machine, args: tuple[object, ...]) -> object:
    _need(len(args) == 2, "a numpy scalar is scalar(dtype, bytes)")
    dtype, raw = args
    if not isinstance(dtype, _DType) or not isinstance(raw, bytes):
        raise PickleError("a numpy scalar is scalar(dtype, bytes)")
    _need(len(raw) == dtype.numpy().itemsize, "a numpy scalar has as many bytes as its type")
    return np.frombuffer(raw, dtype.numpy())[0].item()


@dataclass(frozen=True, slots=True, eq=False)
class _Function:
    """A global that REDUCE may call. A class of its own, so that nothing from the stream is ever compared to it."""

    call: Callable[[_Machine, tuple[object, ...]], object]


_GLOBALS: Final[dict[str, object]] = {
    "numpy.ndarray": _NdArray,
    "numpy.core.multiarray._reconstruct": _Function(_reconstruct),
    "numpy._core.multiarray._reconstruct": _Function(_reconstruct),
    "numpy.core.multiarray.scalar": _Function(_scalar),
    "numpy._core.multiarray.scalar": _Function(_scalar),
    "numpy.dtype": _Function(_dtype),
    "_codecs.encode": _Function(_encode),
}


# --- BUILD: states of dtypes and arrays -----------------------------------------------------------------------


def _build_dtype(dtype: _DType, state: object) -> None:
    if not isinstance(state, tuple) or len(state) < 5 or not isinstance(state[1], str):
        raise PickleError("the state of a dtype is (version, byte order, ...)")
    _need(state[1] in ("<", ">", "|", "="), "byte order is one of < > | =")
    _need(all(s is None for s in state[2:5]), "arrays have plain elements, no fields and no sub-arrays")
    dtype.order = state[1]


def _build_array(vm: _Machine, array: _Array, state: object) -> None:
    if not isinstance(state, tuple) or len(state) != 5:
        raise PickleError("the state of an array is (version, shape, dtype, order, bytes)")
    _, shape, dtype, fortran, raw = state
    if not isinstance(shape, tuple) or not isinstance(dtype, _DType) or not isinstance(raw, bytes):
        raise PickleError("the state of an array is (version, shape, dtype, order, bytes)")
    _need(array.value is None, "an array is built once")
    _need(isinstance(fortran, bool), "the order of an array is a bool")
    _need(len(shape) <= MAX_DIMS, f"an array has at most {MAX_DIMS} axes")
    _need(all(type(n) is int and 0 < n <= MAX_DIM for n in shape), f"an axis of an array has 1 to {MAX_DIM} elements")
    kind = dtype.numpy()
    size = math.prod(shape)
    _need(
        size * kind.itemsize == len(raw),
        f"an array of {size} elements has {size * kind.itemsize} bytes, not {len(raw)}",
    )
    vm.charge(len(raw))
    flat = np.frombuffer(raw, kind)
    value = np.ascontiguousarray(flat.reshape(shape, order="F" if fortran else "C"), kind.newbyteorder("="))
    value.flags.writeable = False
    array.value = value


# --- the machine ----------------------------------------------------------------------------------------------


@dataclass
class _Machine:
    """Stack, marks and memo over ``data``; every step checks what it takes."""

    data: bytes
    pos: int = 0
    ops: int = 0
    spent: int = 0
    stack: list[object] = field(default_factory=list)
    marks: list[list[object]] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)

    def charge(self, nbytes: int) -> None:
        """Accounts for memory about to be used."""
        self.spent += nbytes
        _need(self.spent <= MAX_BYTES, f"it holds more than {MAX_BYTES >> 20} MiB of data")

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes; never allocates more than is there."""
        _need(n <= len(self.data) - self.pos, "it ends in the middle of an object")
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def number(self, fmt: str) -> int:
        """The next little-endian integer of struct format ``fmt``."""
        return int(struct.unpack("<" + fmt, self.take(struct.calcsize(fmt)))[0])

    def line(self) -> str:
        """The next text line of at most 80 characters (a module or a name)."""
        end = self.data.find(b"\n", self.pos, self.pos + 81)
        _need(end >= 0, "a name is longer than 80 characters")
        text = self.take(end + 1 - self.pos)[:-1]
        return text.decode("ascii", "replace")

    def text(self, n: int) -> None:
        """Pushes a string of ``n`` bytes of UTF-8."""
        raw = self.take(n)
        self.charge(n if raw.isascii() else 4 * n)  # CPython stores up to 4 bytes per character
        try:
            self.stack.append(raw.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise PickleError("a string is not UTF-8") from None

    def raw(self, n: int) -> None:
        """Pushes ``n`` bytes."""
        raw = self.take(n)
        self.charge(n)
        self.stack.append(raw)

    def pop(self) -> object:
        """The top of the stack, not past a mark."""
        _need(bool(self.stack), "an opcode finds too little on the stack")
        return self.stack.pop()

    def top(self) -> object:
        _need(bool(self.stack), "an opcode finds too little on the stack")
        return self.stack[-1]

    def pop_mark(self) -> list[object]:
        """Everything above the last mark."""
        _need(bool(self.marks), "an opcode finds no mark")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_to_mark(self) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def tuple_of(self, n: int) -> None:
        items = [self.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(items)))

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        _need(index in self.memo, "it refers to an object that it never stored")
        value = self.memo[index]
        if isinstance(value, _Array) and value.value is not None:
            value = value.value
        self.stack.append(value)

    def find(self, module: str, name: str) -> None:
        """Pushes an allowed global."""
        full = f"{module}.{name}"
        _need(full in _GLOBALS, f"it asks for {full!r}, which is code or a foreign type; only data is read")
        self.stack.append(_GLOBALS[full])

    def set_items(self, items: list[object]) -> None:
        target = self.top()
        if not isinstance(target, dict):
            raise PickleError("items are set on something that is no dict")
        _need(len(items) % 2 == 0, "a dict has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _need(type(key) is str, "dict keys are strings")
            target[key] = value

    def append(self, items: list[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise PickleError("items are appended to something that is no list")
        target.extend(items)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(args, tuple) or not isinstance(function, _Function):
            raise PickleError("it calls something that is not one of the known functions")
        self.stack.append(function.call(self, args))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, _DType):
            _build_dtype(target, state)
            return
        if not isinstance(target, _Array):
            raise PickleError("it sets the state of something that is neither an array nor a dtype")
        _build_array(self, target, state)
        self.stack[-1] = target.value

    def run(self) -> object:
        """Executes to STOP; the object left on the stack."""
        while True:
            op = self.take(1)
            if op == b".":
                break
            self.ops += 1
            _need(self.ops <= MAX_OPCODES, f"it has more than {MAX_OPCODES} opcodes")
            step = _OPCODES.get(op)
            if step is None:
                raise PickleError(_REFUSED.get(op, f"opcode 0x{op.hex()} is not one of plain data"))
            step(self)
        _need(len(self.stack) == 1 and not self.marks, "it ends with objects left over")
        return self.stack[0]


def _proto(vm: _Machine) -> None:
    _need(vm.number("B") in (2, 3, 4), "pickle protocols 2 to 4 are read (torch.save writes 2)")


def _long1(vm: _Machine) -> None:
    n = vm.number("B")
    _need(n <= 8, "integers have at most 64 bits")
    vm.stack.append(int.from_bytes(vm.take(n), "little", signed=True))


def _mark(vm: _Machine) -> None:
    vm.marks.append(vm.stack)
    vm.stack = []


def _one(vm: _Machine) -> list[object]:
    return [vm.pop()]


def _pair(vm: _Machine) -> list[object]:
    value, key = vm.pop(), vm.pop()
    return [key, value]


def _stack_global(vm: _Machine) -> None:
    name, module = vm.pop(), vm.pop()
    if not isinstance(name, str) or not isinstance(module, str) or max(len(name), len(module)) > 80:
        raise PickleError("a global is named by two short strings")
    vm.find(module, name)


Step = Callable[[_Machine], None]

_OPCODES: Final[dict[bytes, Step]] = {
    b"\x80": _proto,
    b"\x95": lambda vm: _need(vm.number("Q") <= len(vm.data), "a frame is longer than the file"),
    b"N": lambda vm: vm.stack.append(None),
    b"\x88": lambda vm: vm.stack.append(True),
    b"\x89": lambda vm: vm.stack.append(False),
    b"J": lambda vm: vm.stack.append(vm.number("i")),
    b"K": lambda vm: vm.stack.append(vm.number("B")),
    b"M": lambda vm: vm.stack.append(vm.number("H")),
    b"\x8a": _long1,
    b"G": lambda vm: vm.stack.append(struct.unpack(">d", vm.take(8))[0]),
    b"X": lambda vm: vm.text(vm.number("I")),
    b"\x8c": lambda vm: vm.text(vm.number("B")),
    b"C": lambda vm: vm.raw(vm.number("B")),
    b"B": lambda vm: vm.raw(vm.number("I")),
    b"\x8e": lambda vm: vm.raw(vm.number("Q")),
    b"}": lambda vm: vm.stack.append({}),
    b"]": lambda vm: vm.stack.append([]),
    b")": lambda vm: vm.stack.append(()),
    b"(": _mark,
    b"t": _Machine.tuple_to_mark,
    b"\x85": lambda vm: vm.tuple_of(1),
    b"\x86": lambda vm: vm.tuple_of(2),
    b"\x87": lambda vm: vm.tuple_of(3),
    b"s": lambda vm: vm.set_items(_pair(vm)),
    b"u": lambda vm: vm.set_items(vm.pop_mark()),
    b"a": lambda vm: vm.append(_one(vm)),
    b"e": lambda vm: vm.append(vm.pop_mark()),
    b"q": lambda vm: vm.put(vm.number("B")),
    b"r": lambda vm: vm.put(vm.number("I")),
    b"\x94": lambda vm: vm.put(len(vm.memo)),
    b"h": lambda vm: vm.get(vm.number("B")),
    b"j": lambda vm: vm.get(vm.number("I")),
    b"c": lambda vm: vm.find(vm.line(), vm.line()),
    b"\x93": _stack_global,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}

_REFUSED: Final[dict[bytes, str]] = {
    b"P": "it holds torch tensors (persistent ids); the published format has numpy arrays",
    b"Q": "it holds torch tensors (persistent ids); the published format has numpy arrays",
    b"i": "it creates objects of a class (INST), and nothing but data is read",
    b"o": "it creates objects of a class (OBJ), and nothing but data is read",
    b"\x81": "it creates objects of a class (NEWOBJ), and nothing but data is read",
    b"\x92": "it creates objects of a class (NEWOBJ_EX), and nothing but data is read",
}


def loads(data: bytes) -> object:
    """Reads one pickle of None, bool, int (64 bit), float, str, bytes, tuple, list, dict (str keys) and numpy arrays.

    Arrays are read-only, C-contiguous and in native byte order; numpy scalars become Python numbers. Objects that the
    stream refers to twice are shared, so a caller must not assume that walking the result is linear in its size.
    Raises PickleError, and nothing else, for anything else; memory stays within a small multiple of
    ``len(data)`` + ``MAX_BYTES``."""
    vm = _Machine(data)
    try:
        return vm.run()
    except PickleError as e:
        raise PickleError(f"{e} (at byte {vm.pos})") from None
