# SPDX-License-Identifier: Apache-2.0
"""What the calls of all operators share (``ops.op.Emitter``): C names and literals, where tensors lie, and the constant
tables that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from trainlet.emit.code import c_name, wrapped
from trainlet.ir import DTYPES, Array, Graph, Kind, Node, Value
from trainlet.ops.depth_first import counter_bytes
from trainlet.ops.numerics import F32
from trainlet.ops.op import c_float
from trainlet.plan.arena import MemoryPlan
from trainlet.plan.place import Place, Pool

_NUMPY_CTYPE: Final = {np.dtype(t.numpy): t.ctype for t in DTYPES.values() if t.bits >= 8}
_BASE: Final = {Pool.ARENA: "a", Pool.STATE: "s"}
RESERVED: Final = (
    *("model", "start", "prefix", "forward", "gradient", "head", "backward"),
    *("inputs", "outputs", "targets", "a", "s", "c", "y"),
)
"""What NAME.c itself defines."""


@dataclass
class Emitter:
    """See ``ops.op.Emitter``. While ``run`` is set, calls are for row y of that depth-first run. ``used`` are the
    locals that the calls of the function in progress read."""

    graph: Graph  # flat
    plan: MemoryPlan
    places: Mapping[str, Place]
    weights: frozenset[str]
    run: Node | None = None
    tables: dict[str, str] = field(default_factory=dict)
    purposes: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    offsets: dict[str, str] = field(default_factory=dict)  # by value: the constant that says where it lies
    used: set[str] = field(default_factory=set)

    # -- names and tables ----------------------------------------------------------------------------------------

    def symbol(self, name: str) -> str:
        if name not in self.symbols:
            taken = {*self.symbols.values(), *RESERVED}
            first = c_name(name)
            tries = (first, *(f"{first}_{i}" for i in range(2, len(taken) + 3)))
            self.symbols[name] = next(t for t in tries if t not in taken)
        return self.symbols[name]

    def value(self, name: str) -> Value:
        return self.graph.values[name]

    def table(self, name: str, array: Array, purpose: str = "tables") -> str:
        symbol = self.symbol(name)
        if symbol not in self.tables:
            ctype = _NUMPY_CTYPE[array.dtype.newbyteorder("=")]
            flat = array.reshape(-1).tolist()
            items = [c_float(v) for v in flat] if ctype == "float" else map(str, flat)
            body = wrapped(", ".join(items))
            self.tables[symbol] = f"static const {ctype} {symbol}[{array.size}] = {{\n{body}\n}};\n"
            self.purposes[symbol] = purpose
        return symbol

    def struct(self, name: str, ctype: str, *fields: object) -> str:
        symbol = self.symbol(name)
        if symbol not in self.tables:
            self.tables[symbol] = f"static const {ctype} {symbol} = {{{', '.join(map(str, fields))}}};\n"
            self.purposes[symbol] = "constants"
        return symbol

    # -- places --------------------------------------------------------------------------------------------------

    def address(self, name: str) -> tuple[str, str]:
        """The base of a value's pool and its offset there, by name."""
        place = self.places[name]
        base = _BASE[place.pool]
        self.used.add(base)
        if name not in self.offsets:
            first = f"{base.upper()}_{c_name(name).upper()}"
            tries = (first, *(f"{first}_{i}" for i in range(2, len(self.offsets) + 3)))
            self.offsets[name] = next(t for t in tries if t not in self.offsets.values())
        return base, self.offsets[name]

    def offset_table(self) -> str:
        """The constants that say where tensors lie, in the order of their places."""
        rows = sorted((self.places[v].pool, self.places[v].offset, c) for v, c in self.offsets.items())
        body = "".join(f"    {constant} = {at},\n" for _, at, constant in rows)
        return f"/* Where tensors lie: A_ in the arena, S_ in the state. */\nenum {{\n{body}}};\n\n" if rows else ""

    def _at(self, ctype: str, name: str) -> str:
        base, constant = self.address(name)
        return f"TL_AT({ctype}, {base}, {constant})"

    def ptr(self, name: str) -> str:
        v = self.value(name)
        if v.kind is Kind.CONST:
            return self.table(name, self.graph.data[name], "weights" if name in self.weights else "tables")
        return self._at(DTYPES[v.dtype].ctype, name)

    def bits(self, name: str) -> str:
        return self._at("uint8_t", name)

    def view(self, name: str) -> str:
        place = self.places[name]
        if not place.pixel:
            return f"TL_VECTOR({self.ptr(name)})"
        return f"TL_PLAIN({self.ptr(name)}, {place.ring}, {place.row // place.pixel}, {place.pixel})"

    def rows(self, height: int) -> str:
        return "y, y + 1" if self.run else f"0, {height}"

    def begin(self, name: str) -> str:
        if self.run is None:
            return self.ptr(name)
        v, ring = self.value(name), self.places[name].ring
        row = f"(y % {ring})" if ring != v.shape[0] else "y"
        return f"{self.ptr(name)} + {row} * {v.nbytes // v.shape[0]}"

    def part(self, name: str) -> tuple[int, int]:
        v = self.value(name)
        rows = 1 if self.run else v.shape[0]
        return rows, v.size // v.shape[0] * rows

    def grad(self, name: str) -> str:
        return f"(tl_grad){{{self.view(name)}, {self.exponent(name)}}}"

    def exponent(self, name: str) -> str:
        return f"c->exponent[{self.value(name).exponent}]"

    def scratch(self, node: Node) -> str:
        if self.run:
            self.used.add("a")
            return f"a + {self.plan.scratch_offsets[self.run.name] + counter_bytes(self.run)}"
        at = self.plan.scratch_offsets.get(node.name)
        if at is None:
            return "NULL"
        self.used.add("a")
        return f"a + {at}"

    # -- scales --------------------------------------------------------------------------------------------------

    def zero(self, name: str) -> int:
        q = self.value(name).q
        return q.zero if q else 0

    def scale(self, name: str) -> float:
        q = self.value(name).q
        return q.scale if q else 1.0

    def scales(self, name: str) -> F32:
        return self.graph.data[name].astype(np.float32)
