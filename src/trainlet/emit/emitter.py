# SPDX-License-Identifier: Apache-2.0
"""What the rules of the emitter share: C names and literals, and the constant tables that they ask for."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from trainlet import numerics
from trainlet.attrs import Conv2d, MaskFrom, RoundGrad
from trainlet.ir.graph import Array, Graph, Kind, Node, Value
from trainlet.plan.arena import MemoryPlan, geometry, stream_counters
from trainlet.plan.state import StateLayout

CTYPE = {"s8": "int8_t", "s16": "int16_t", "u16": "uint16_t", "s32": "int32_t", "f32": "float", "b1": "uint8_t",
         "s4": "uint8_t"}  # fmt: skip
NUMPY_CTYPE = {"int8": "int8_t", "int16": "int16_t", "uint16": "uint16_t", "int32": "int32_t", "float32": "float"}
LANES = 16  # of the inner tile, csrc/kernels/tl_tile.h
RESERVED = ("model", "start", "prefix", "forward", "gradient", "head", "backward", "a", "s", "c", "y")
"""What NAME.c itself defines."""


def c_name(name: str) -> str:
    """``name`` as a C identifier; tl_ is the kernels' own."""
    ident = re.sub(r"\W", "_", name, flags=re.ASCII)
    return ident if ident[:1].isalpha() and not f"{ident}_".startswith("tl_") else f"m_{ident}"


def comment(text: str) -> str:
    """``text`` so that it neither ends nor opens a comment and stays on its line."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable.replace("*/", "* /").replace("/*", "/ *")


def c_float(v: float) -> str:
    """A float literal that reads back exactly."""
    return f"{float(np.float32(v)).hex()}f"


@dataclass
class Emitter:
    """What the rules read, and the constant tables they ask for. While ``stream`` is set, calls are for row y of it."""

    graph: Graph  # flat
    plan: MemoryPlan
    layout: StateLayout
    rings: Mapping[str, int]
    stream: Node | None = None
    tables: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)

    def symbol(self, name: str) -> str:
        """The C name of a table; two names never share one."""
        if name not in self.symbols:
            taken = {*self.symbols.values(), *RESERVED}
            first = c_name(name)
            tries = (first, *(f"{first}_{i}" for i in range(2, len(taken) + 3)))
            self.symbols[name] = next(t for t in tries if t not in taken)
        return self.symbols[name]

    def value(self, name: str) -> Value:
        """The value of that name."""
        return self.graph.values[name]

    def table(self, name: str, array: Array) -> str:
        """A constant array; returns its C name."""
        symbol = self.symbol(name)
        if symbol not in self.tables:
            ctype = NUMPY_CTYPE[array.dtype.name]
            flat = array.reshape(-1).tolist()
            items = [c_float(v) for v in flat] if ctype == "float" else map(str, flat)
            body = textwrap.fill(", ".join(items), 118, initial_indent="    ", subsequent_indent="    ")
            self.tables[symbol] = f"static const {ctype} {symbol}[{array.size}] = {{\n{body}\n}};\n"
        return symbol

    def struct(self, name: str, ctype: str, *fields: object) -> str:
        """A constant struct; returns its C name."""
        symbol = self.symbol(name)
        if symbol not in self.tables:
            self.tables[symbol] = f"static const {ctype} {symbol} = {{{', '.join(map(str, fields))}}};\n"
        return symbol

    def ptr(self, name: str) -> str:
        """A typed pointer to a value."""
        v = self.value(name)
        if v.kind is Kind.CONST:
            return self.table(name, self.graph.data[name])
        base, at = ("s", self.layout.offsets[name]) if v.kind is Kind.STATE else ("a", self.plan.offsets[name])
        return f"TL_AT({CTYPE[v.dtype]}, {base}, {at})"

    def view(self, name: str) -> str:
        """A view of an (H, W, C) tensor; a (1, 1, C) gradient stands for every pixel."""
        v = self.value(name)
        h, w, c = v.shape
        if v.exponent is not None and (h, w) == (1, 1):
            return f"TL_VECTOR({self.ptr(name)})"
        return f"TL_PLAIN({self.ptr(name)}, {self.rings.get(name, h)}, {w}, {c})"

    def rows(self, height: int) -> str:
        """The output rows of a call: all of them, or one in a stream."""
        return "y, y + 1" if self.stream else f"0, {height}"

    def begin(self, name: str) -> str:
        """A pointer to what a call reads or writes of a tensor: its begin, or row y in a stream."""
        if self.stream is None:
            return self.ptr(name)
        v = self.value(name)
        row = f"(y % {self.rings[name]})" if name in self.rings else "y"
        return f"{self.ptr(name)} + {row} * {v.nbytes // v.shape[0]}"

    def part(self, name: str) -> tuple[int, int]:
        """Rows and elements of a tensor that a call covers."""
        v = self.value(name)
        rows = 1 if self.stream else v.shape[0]
        return rows, v.size // v.shape[0] * rows

    def grad(self, name: str) -> str:
        """A gradient with its exponent."""
        return f"(tl_grad){{{self.view(name)}, c->exponent[{self.value(name).exponent}]}}"

    def scratch(self, node: Node) -> str:
        """The node's scratch."""
        if self.stream:
            return f"a + {self.plan.scratch_offsets[self.stream.name] + stream_counters(self.stream)}"
        at = self.plan.scratch_offsets.get(node.name)
        return "NULL" if at is None else f"a + {at}"

    def conv(self, node: Node, x_zero: int) -> str:
        """The geometry table of a convolution node."""
        a, x, y = geometry(self.graph, node)
        pads = (a.pads[0], a.pads[2])
        return "&" + self.struct(
            f"{node.name}.geometry", "tl_conv", *x, *y, *a.kernel, *a.stride, *a.dilation, *pads, a.groups, x_zero
        )

    def zero(self, name: str) -> int:
        """Zero point of an activation."""
        q = self.value(name).q
        return q.zero if q else 0

    def scale(self, name: str) -> float:
        """Scale of an activation."""
        q = self.value(name).q
        return q.scale if q else 1.0

    def scales(self, name: str) -> numerics.F32:
        """The weight scales held by a constant."""
        return self.graph.data[name].astype(np.float32)

    def ready_weights(self, conv: Conv2d, weight: str) -> str:
        """A tl_weights literal of weights in the order of the general forward kernel (tl.h, TL_READY)."""
        w = self.graph.data[weight].reshape(conv.groups, -1, math.prod(self.value(weight).shape[1:]))
        _, channels, terms = w.shape
        padded = np.pad(w, ((0, 0), (0, -channels % LANES), (0, terms % 2)))
        packed = padded.reshape(-1, LANES, (terms + 1) // 2, 2).transpose(0, 2, 1, 3)
        return f"(tl_weights){{{self.table(f'{weight}.ready', packed)}, NULL, NULL, TL_READY}}"

    def weights(self, conv: Conv2d, weight: str, trained: tuple[str, ...]) -> str:
        """A tl_weights literal. ``trained`` is () or (trained, channels)."""
        if not trained:
            return f"(tl_weights){{{self.ptr(weight)}, NULL, NULL, 0}}"
        channels = self.graph.data[trained[1]]
        w = self.graph.data[weight]
        axis = 0 if conv.depthwise else 3
        n = len(channels)
        if n == w.shape[axis]:
            return f"(tl_weights){{NULL, {self.ptr(trained[0])}, NULL, {n}}}"
        frozen = self.table(f"{weight}.frozen", np.delete(w, channels.astype(np.int64), axis))
        return f"(tl_weights){{{frozen}, {self.ptr(trained[0])}, {self.ptr(trained[1])}, {n}}}"

    def mask(self, source: MaskFrom, clamp: tuple[float, float] | None, name: str) -> str:
        """A tl_mask literal."""
        if source == "none" or clamp is None:
            return "(tl_mask){NULL, NULL, 0, 0}"
        both = (self.ptr(name), "NULL") if source == "bits" else ("NULL", self.ptr(name))
        return f"(tl_mask){{{both[0]}, {both[1]}, {int(clamp[0])}, {int(clamp[1])}}}"

    def site(self, node: Node, a: RoundGrad, rest: tuple[str, ...]) -> str:
        """A tl_site literal; ``rest`` is the mask source, if any, and the further gradients."""
        masked = a.mask != "none"
        mask = self.mask(a.mask, a.clamp, rest[0] if masked else "")
        further = [self.grad(g) for g in rest[masked:]]
        array = f"(const tl_grad[]){{{', '.join(further)}}}" if further else "NULL"
        slot = self.value(node.outputs[0]).exponent
        rho = self.ptr(node.writes[0])
        return f"&(const tl_site){{{a.site}u, {rho}, &c->exponent[{slot}], {array}, {len(further)}, {mask}}}"
