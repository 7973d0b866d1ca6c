# SPDX-License-Identifier: Apache-2.0
"""The trained state: where each value lies in its block of SRAM (seed and step, then every state value, widest type
first), and the way between that block and named arrays (docs/layout.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UsageError
from trainlet.ir import DTYPES, Array, Graph, Node, Value, dtype_bits
from trainlet.ops import FusedDw, FusedDx, RoundGrad, SgdWeight
from trainlet.ops.conv2d import MAX_BIAS
from trainlet.plan.place import Place, Pool, place_of

HEADER_BYTES = 8  # uint32 seed, uint32 step


@dataclass(frozen=True)
class StateLayout:
    """Byte offsets by state value, and the size of the whole block (a multiple of 4)."""

    offsets: Mapping[str, int]
    nbytes: int

    def places(self, graph: Graph) -> dict[str, Place]:
        """Where each state lies."""
        return {v: place_of(graph.values[v], Pool.STATE, v, at) for v, at in self.offsets.items()}


def state_layout(graph: Graph) -> StateLayout:
    """Lays out the states of a TRAIN or LOWERED graph; packed nibbles begin at a byte."""
    offsets: dict[str, int] = {}
    at = HEADER_BYTES
    for v in sorted(graph.states(), key=_width):
        offsets[v.name] = at
        at += v.nbytes
    return StateLayout(offsets, (at + 3) // 4 * 4)


def _width(v: Value) -> int:
    return -max(dtype_bits(v.dtype), 8)


# --- the block as named arrays ---------------------------------------------------------------------------------

MAX_RHO = 60


def _nibbles(raw: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    """Signed nibbles, low one first."""
    both = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[:count].astype(np.int8)
    return np.where(both > 7, both - 16, both).astype(np.int8)


def _packed(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    flat = (values.reshape(-1).astype(np.int16) & 15).astype(np.uint8)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


def _site(node: Node) -> int:
    a = node.attrs
    assert isinstance(a, FusedDx | RoundGrad)
    return a.round.site if isinstance(a, FusedDx) else a.site


def _fraction_bits(update: Node) -> int:
    a = update.attrs.sgd if isinstance(update.attrs, FusedDw) else update.attrs
    assert isinstance(a, SgdWeight)
    return a.fraction_bits


class StateCodec:
    """Packs and unpacks the state of one LOWERED graph."""

    def __init__(self, graph: Graph, layout: StateLayout) -> None:
        self.graph, self.layout = graph, layout
        self._updates = {n.stores["weight"][0]: n for n in graph.nodes if isinstance(n.attrs, FusedDw | SgdWeight)}
        roundings = sorted((n for n in graph.nodes if "rho" in n.stores), key=_site)
        self._rho = [n.stores["rho"][0] for n in roundings]
        fractions = {f for n in self._updates.values() if (f := n.updated("fraction"))}
        self._plain = [v.name for v in graph.states() if v.name not in {*self._updates, *fractions, *self._rho}]

    def _read(self, raw: bytes, name: str) -> Array:
        v = self.graph.values[name]
        at = self.layout.offsets[name]
        data = raw[at : at + v.nbytes]
        if v.dtype == "s4":
            return _nibbles(np.frombuffer(data, np.uint8), v.size).reshape(v.shape)
        return np.frombuffer(data, np.dtype(DTYPES[v.dtype].numpy)).reshape(v.shape)

    def unpack(self, raw: bytes) -> dict[str, Array]:
        """Named arrays: ``conv.21.weight`` is the full form F = w 2^L + l of the channels ``conv.21.channels``."""
        seed, step = np.frombuffer(raw[:HEADER_BYTES], np.uint32)
        arrays: dict[str, Array] = {"seed": np.array([seed], np.uint32), "step": np.array([step], np.uint32)}
        arrays["rho"] = np.array([self._read(raw, name)[0] for name in self._rho], np.int8)
        arrays |= {name: self._read(raw, name).copy() for name in self._plain}
        for name, node in self._updates.items():
            full = self._read(raw, name).astype(np.int32) * (1 << _fraction_bits(node))
            fraction = node.updated("fraction")
            if fraction:
                full += self._read(raw, fraction).astype(np.int32)
            arrays[_weight_name(name)] = full
            arrays[node["channels"]] = self.graph.data[node["channels"]]
        return arrays

    def pack(self, arrays: Mapping[str, Array]) -> bytes:
        """The block of bytes. UsageError where an array is missing, unknown, or of another shape, type or range."""
        want = self.unpack(bytes(self.layout.nbytes))
        _check_names(arrays, want)
        self._check_ranges(arrays)
        raw = np.zeros(self.layout.nbytes, np.uint8)
        raw[:HEADER_BYTES] = np.concatenate([arrays["seed"], arrays["step"]]).astype(np.uint32).view(np.uint8)
        for i, name in enumerate(self._rho):
            self._write(raw, name, arrays["rho"][i : i + 1])
        for name in self._plain:
            self._write(raw, name, arrays[name])
        for name, node in self._updates.items():
            self._write_weight(raw, name, node, arrays)
        return raw.tobytes()

    def _check_ranges(self, arrays: Mapping[str, Array]) -> None:
        """What no step leaves behind, and the kernels' 32-bit sums could not bear."""
        if np.abs(arrays["rho"].astype(np.int64)).max(initial=0) > MAX_RHO:
            raise UsageError(f"rho: a value lies outside +-{MAX_RHO}; the state is damaged")
        for name in self._plain:
            data = arrays[name].astype(np.int64) if arrays[name].dtype == np.int32 else np.zeros(1, np.int64)
            if np.abs(data).max() > MAX_BIAS:
                raise UsageError(f"{name}: a bias lies outside +-{MAX_BIAS}; the state is damaged")

    def pack_values(self, seed: int, step: int, values: Mapping[str, Array]) -> bytes:
        """The block of bytes from states by their names in the graph, as the reference executor keeps them."""
        raw = np.zeros(self.layout.nbytes, np.uint8)
        raw[:HEADER_BYTES] = np.array([seed, step], np.uint32).view(np.uint8)
        for v in self.graph.states():
            self._write(raw, v.name, values[v.name])
        return raw.tobytes()

    def _write(self, raw: NDArray[np.uint8], name: str, data: Array) -> None:
        v = self.graph.values[name]
        at = self.layout.offsets[name]
        plain = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        flat = _packed(data.astype(np.int8)) if v.dtype == "s4" else plain
        raw[at : at + v.nbytes] = flat

    def _write_weight(self, raw: NDArray[np.uint8], name: str, node: Node, arrays: Mapping[str, Array]) -> None:
        channels, fraction = node["channels"], node.updated("fraction")
        if not np.array_equal(arrays[channels], self.graph.data[channels]):
            raise UsageError(
                f"{channels}: the state was trained on other input channels; use the model and scheme it came from"
            )
        bits = _fraction_bits(node)
        full = arrays[_weight_name(name)].astype(np.int64)
        if np.abs(full).max() > 127 << bits:
            raise UsageError(f"{_weight_name(name)}: a weight lies outside +-127 x 2^{bits}; the state is damaged")
        w = (full + ((1 << bits) >> 1)) >> bits
        self._write(raw, name, w.astype(np.int8))
        if fraction:
            self._write(raw, fraction, (full - (w << bits)).astype(np.int8))


def _weight_name(trained: str) -> str:
    return f"{trained.removesuffix('.trained')}.weight"


def _check_names(arrays: Mapping[str, Array], want: Mapping[str, Array]) -> None:
    for name in want:
        if name not in arrays:
            raise UsageError(f"the state has no {name!r}; it belongs to another model or scheme")
    for name in arrays:
        if name not in want:
            raise UsageError(f"the state has {name!r}, which this model and scheme do not train")
    for name, data in arrays.items():
        if data.shape != want[name].shape or data.dtype != want[name].dtype:
            raise UsageError(
                f"{name}: the state holds {data.dtype} {data.shape}, this model {want[name].dtype} {want[name].shape}"
            )
