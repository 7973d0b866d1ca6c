# SPDX-License-Identifier: Apache-2.0
"""Reads the published int8 checkpoints (``.pkl`` in the zip format of torch) without torch and without running code."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Final

import numpy as np

from trainlet.errors import UnsupportedError, UsageError
from trainlet.files import read_regular
from trainlet.frontends.limits import check_limits, printable
from trainlet.frontends.published.records import Block, Conv, Model, Residual, need, read_model
from trainlet.frontends.published.unpickle import PickleError, loads
from trainlet.ir import Array, Attrs, Graph, GraphBuilder, Kind, Node, Operands, QParams, Stage, Value
from trainlet.ops import Add, AvgPool, Conv2d, conv_out_hw, fan_in, is_depthwise
from trainlet.ops.quantization import canonicalize_dead, check_sums

MAX_FILE: Final = 32 << 20
MAX_ENTRIES: Final = 4096
MAX_WEIGHTS: Final = 32 << 20

_AGAIN: Final = "download the checkpoint again, or check that it is one of the published int8 checkpoints"

# whatever zipfile raises on damaged input
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError, OverflowError, struct.error,
    zlib.error, IndexError, KeyError,
)  # fmt: skip


def _pickle_of(path: Path) -> bytes:
    """The bytes of the archive's one ``*/data.pkl``."""
    try:
        data = read_regular(path, MAX_FILE)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}); give the path of a checkpoint") from None
    need(len(data) <= MAX_FILE, str(path), f"the file has more than {MAX_FILE >> 20} MiB; a checkpoint is smaller")
    if not data.startswith(b"PK\x03\x04"):
        raise UsageError(f"{path}: this is no zip archive, and published checkpoints are (torch.save); {_AGAIN}")
    # an entry of the directory costs 46 bytes in the file and ten times that in memory
    need(
        data.count(b"PK\x01\x02") <= MAX_ENTRIES,
        str(path),
        f"the archive has more than {MAX_ENTRIES} entries; {_AGAIN}",
    )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            return _record_of(z, path)
    except _ZIP_ERRORS as e:
        raise UsageError(f"{path}: the zip archive is damaged or truncated ({e}); {_AGAIN}") from None


def _record_of(z: zipfile.ZipFile, path: Path) -> bytes:
    found = [i for i in z.infolist() if i.filename.count("/") == 1 and i.filename.endswith("/data.pkl")]
    need(len(found) == 1, str(path), f"an archive of torch has one NAME/data.pkl, this one has {len(found)}; {_AGAIN}")
    info = found[0]
    # torch stores its records; without inflating there are no zip bombs
    need(info.compress_type == zipfile.ZIP_STORED, str(path), f"{info.filename} is compressed; save it with torch.save")
    need(info.file_size <= MAX_FILE, str(path), f"{info.filename} claims {info.file_size} bytes; {_AGAIN}")
    with z.open(info) as f:
        return f.read(MAX_FILE)


class _Import:
    """Walks the records in order and appends nodes; keeps the value, layer and scale that the next layer reads."""

    def __init__(self, name: str, model: Model) -> None:
        first = model.first_conv
        assert first.in_side is not None
        self.g = GraphBuilder(name)
        self.count = 0
        self.weights = 0
        self.layer = "input"
        self.value = self.g.add(Value("input", (first.in_side, first.in_side, first.in_c), "s8", Kind.INPUT, first.x))

    def _q(self) -> QParams:
        q = self.g.values[self.value].q
        assert q is not None
        return q

    def _follows(self, layer: str, channels: int, side: int | None, q: QParams) -> None:
        """A layer reads exactly what the one before it made."""
        h, _, c = self.g.values[self.value].shape
        need(channels == c, layer, f"it reads {channels} channels, but {self.layer} makes {c}")
        need(side is None or side == h, layer, f"it reads {side} x {side} pixels, but {self.layer} makes {h} x {h}")
        was = self._q()
        need(
            q == was,
            layer,
            f"x_scale and x_zero are ({q.scale}, {q.zero}), but {self.layer} makes ({was.scale}, {was.zero})",
        )

    def _const(self, name: str, data: Array, dtype: str) -> str:
        data = np.ascontiguousarray(data)
        data.flags.writeable = False
        return self.g.const(name, data, dtype)

    def conv(self, r: Conv, name: str, *, activation: bool) -> None:
        """One convolution; ``activation`` says whether its int8 clamp is a fused ReLU6."""
        self._follows(r.layer, r.in_c, r.in_side, r.x)
        if activation:
            need(
                r.y.zero == -128,
                r.layer,
                f"y_zero is {r.y.zero}; a layer with an activation has -128, where its ReLU cuts",
            )
        self.weights += r.weight.size
        need(self.weights <= MAX_WEIGHTS, r.layer, f"with it the model has more than {MAX_WEIGHTS} weights")
        w, b, scale, dead = canonicalize_dead(r.weight, r.bias, r.scales)
        attrs = _attrs(r, activation, dead)
        check_sums(r.layer, b, fan_in(attrs, r.in_c))
        _check_multipliers(r.layer, *(r.x.scale * float(s) / r.y.scale for s in (scale.min(), scale.max())))
        out = conv_out_hw(attrs, *self.g.values[self.value].shape[:2])
        need(min(out) > 0, r.layer, f"a kernel of {r.kernel} does not fit into its padded input")
        want = (r.out_side, r.out_side) if r.out_side else out
        need(
            out == want,
            r.layer,
            f"its output is {out[0]} x {out[1]} pixels, not {want[0]} x {want[1]} as out_shape says",
        )
        read = Operands(
            x=self.value,
            weight=self._const(f"{name}.weight", w.transpose(0, 2, 3, 1), "s8"),  # OIHW -> OHWI
            bias=self._const(f"{name}.bias", b, "s32"),
            scale=self._const(f"{name}.scale", scale, "f32"),
        )
        self._emit("conv2d", name, r.layer, read, attrs, (*out, r.out_c), r.y)

    def next_conv(self, r: Conv, *, activation: bool) -> None:
        """``conv`` with the next number of the published numbering."""
        self.conv(r, f"conv.{self.count}", activation=activation)
        self.count += 1

    def block(self, r: Block, index: int) -> None:
        """An inverted bottleneck and its residual addition."""
        entry, entry_layer = self.value, self.layer
        if r.pointwise1 is not None:
            self.next_conv(r.pointwise1, activation=True)
        self.next_conv(r.depthwise, activation=True)
        self.next_conv(r.pointwise2, activation=False)
        if r.residual is not None:
            self._add(r.residual, f"add.{index}", entry, entry_layer)

    def _add(self, r: Residual, name: str, entry: str, entry_layer: str) -> None:
        """Block input + pointwise2 output, in this order."""
        a, b = self.g.values[entry], self.g.values[self.value]
        need(
            a.shape == b.shape == (r.side, r.side, r.channels),
            r.layer,
            f"it adds {r.side} x {r.side} x {r.channels}, but {entry_layer} makes {a.shape} and {self.layer} {b.shape}",
        )
        assert a.q is not None
        assert b.q is not None
        was = (a.q.scale, a.q.zero)
        need(r.x == a.q, r.layer, f"x_scale and x_zero are ({r.x.scale}, {r.x.zero}), but {entry_layer} makes {was}")
        _check_multipliers(r.layer, max(a.q.scale, b.q.scale) / r.y.scale)
        self._emit("add", name, r.layer, Operands(a=entry, b=self.value), Add((-128, 127)), a.shape, r.y)

    def pool(self) -> None:
        """Global average pool; scale and zero point stay."""
        h, w, c = self.g.values[self.value].shape
        self._emit("avg_pool", "pool", "pool", Operands(x=self.value), AvgPool((h, w)), (1, 1, c), self._q())

    def _emit(
        self, op: str, name: str, layer: str, read: Operands, attrs: Attrs, shape: tuple[int, ...], q: QParams
    ) -> None:
        out = f"{name}.y"
        self.value = self.g.emit(Node(op, name, layer, read, (out,), attrs), Value(out, shape, "s8", q=q))
        self.layer = layer


def _attrs(r: Conv, activation: bool, dead: tuple[int, ...]) -> Conv2d:
    """The format pads symmetrically by (k - 1)//2; the int8 range is the clamp."""
    kh, kw = r.kernel
    ph, pw = (kh - 1) // 2, (kw - 1) // 2
    return Conv2d(
        kernel=r.kernel,
        stride=(r.stride, r.stride),
        pads=(ph, ph, pw, pw),
        groups=r.groups,
        clamp=(-128, 127),
        activation=activation,
        depthwise=is_depthwise(r.groups, r.in_c, r.out_c),
        dead=dead,
    )


def _check_multipliers(layer: str, *scales: float) -> None:
    """Requantization multiplies by 2^-31 .. 2^31; beyond, every output would saturate."""
    for s in scales:
        need(0 <= s < 2.0**30, layer, f"its scales ask for outputs {s:g} times its sums, which all saturate")


def load_checkpoint(path: str | Path) -> Graph:
    """Reads a published int8 checkpoint into an INT8 graph whose name is the file's stem.

    Convolutions are ``conv.0``, ``conv.1``, ... in the published numbering, then come ``pool`` and ``classifier``;
    additions are ``add.{block}``. The input is int8 (H, W, 3). Raises UsageError for a file that is damaged, foreign or
    inconsistent, and UnsupportedError for a sound one that cannot be compiled; both name the file and the layer."""
    path = Path(path)
    data = _pickle_of(path)
    try:
        return _graph(printable(path.stem), read_model(loads(data)))
    except PickleError as e:
        raise UsageError(f"{path}: the pickle inside cannot be read: {e}; {_AGAIN}") from None
    except UsageError as e:
        raise UsageError(f"{path}: {e}; {_AGAIN}") from None
    except UnsupportedError as e:
        raise UnsupportedError(f"{path}: {e}") from None


def _graph(name: str, model: Model) -> Graph:
    walk = _Import(name, model)
    walk.next_conv(model.first_conv, activation=True)
    for i, block in enumerate(model.blocks):
        walk.block(block, i)
    walk.pool()
    classifier = model.classifier
    plain = classifier.kernel == (1, 1) and classifier.stride == classifier.groups == 1
    need(plain, "classifier", "it is a plain 1x1 convolution")
    walk.conv(classifier, "classifier", activation=False)
    graph = walk.g.build(Stage.INT8, (walk.value,))
    check_limits(graph)
    return graph
