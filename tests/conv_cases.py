# SPDX-License-Identifier: Apache-2.0
"""The single convolutions of the test vectors (TRAINLET_ASSETS/vectors2/conv.json) as small TRAIN and LOWERED graphs:
forward, input gradient with its rounding, one update of biases and weights. Gradients are inputs of the graph."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from graphs import named

from trainlet.ir import Attrs
from trainlet.ir.graph import Graph, GraphBuilder, Kind, Node, QParams, Stage, Value
from trainlet.ops import (
    Conv2d,
    Conv2dDb,
    Conv2dDw,
    Conv2dDx,
    FusedDb,
    FusedDw,
    FusedDx,
    RoundGrad,
    SelectChannels,
    SgdBias,
    SgdWeight,
)
from trainlet.ops.conv2d_dx import sums_of_dx

COUNT = 36


@dataclass(frozen=True)
class ConvCase:
    """One entry of conv.json and its arrays. ``dead``: which channels the import found without a usable scale."""

    info: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def dead(self) -> tuple[int, ...]:
        scale = self.arrays["file_sw"].astype(np.float64)
        return tuple(int(o) for o in np.flatnonzero(scale < 2.0**-16 * scale.max()))

    @property
    def conv(self) -> Conv2d:
        i = self.info
        return Conv2d(
            kernel=(i["kernel"], i["kernel"]),
            stride=(i["stride"], i["stride"]),
            pads=tuple(i["pads_tblr"]),
            dilation=(i["dilation"], i["dilation"]),
            groups=i["groups"],
            clamp=tuple(i["clamp"]),
            activation=i["activation"],
            depthwise=i["depthwise"],
            dead=self.dead,
        )

    @property
    def channels(self) -> np.ndarray:
        return np.array(self.info["selected"], np.uint16)

    @property
    def residuals(self) -> list[tuple[np.ndarray, int]]:
        return list(zip(self.arrays["ra"], self.info["residual_e"], strict=False))

    def kept(self, weight: np.ndarray) -> np.ndarray:
        """The selected channels of a full weight."""
        return weight[self.channels] if self.conv.depthwise else weight[..., self.channels]


def load_case(assets: Path, index: int) -> ConvCase:
    info = json.loads((assets / "vectors2" / "conv.json").read_text())[index]
    with np.load(assets / "vectors2" / info["file"], allow_pickle=False) as f:
        return ConvCase(info, dict(f))


def conv_graph(case: ConvCase, *, fused: bool = False) -> Graph:
    """inputs x, r, further.0.., mask, lr; values y and rx; states weight.trained, weight.fraction, bias, rho."""
    i, a, conv = case.info, case.arrays, case.conv
    g = GraphBuilder(i["file"].removesuffix(".npz"))
    x_q, y_q = QParams(i["x_scale"], i["x_zero"]), QParams(i["y_scale"], i["y_zero"])
    g.add(Value("x", a["x"].shape, "s8", Kind.INPUT, x_q))
    g.add(Value("lr", (1,), "f32", Kind.INPUT))
    g.add(Value("r", a["r"].shape, "s8", Kind.INPUT, exponent=1))
    further = [f"further.{n}" for n in range(len(case.residuals))]
    for n, name in enumerate(further):
        g.add(Value(name, a["x"].shape, "s8", Kind.INPUT, exponent=2 + n))
    if i["masked"]:
        g.add(Value("mask", a["x"].shape, "b1", Kind.INPUT))
    g.const("weight", a["w"], "s8")
    g.const("scale", a["sw"].astype(np.float32), "f32")
    g.const("channels", case.channels, "u16")
    trained = np.ascontiguousarray(case.kept(a["w"]))
    bits = i["fraction_bits"]
    weight = f"weight=weight.trained{' fraction=weight.fraction' if bits else ''}"
    g.add(Value("weight.trained", trained.shape, "s8", Kind.STATE), trained)
    if bits:
        g.add(Value("weight.fraction", trained.shape, f"s{bits}", Kind.STATE), np.zeros_like(trained))
    g.add(Value("bias", a["b"].shape, "s32", Kind.STATE), a["b"])
    g.add(Value("rho", (1,), "s8", Kind.STATE), np.array([i["rho"]], np.int8))

    def emit(op: str, read: str, attrs: Attrs, *outs: Value, stores: str = "") -> None:
        names = tuple(v.name for v in outs)
        g.emit(Node(op, op, g.name, named(read), names, attrs, named(stores)), *outs)

    s_dx, s_w, s_b = i["sites"]
    h, w, c = a["x"].shape
    pixels = math.prod(a["y"].shape[:2])
    keep_groups = 1 if conv.depthwise else conv.groups
    kept = len(case.channels)
    trains = "scale=scale trained=weight.trained channels=channels"
    dx, dw = Conv2dDx(conv, (h, w)), Conv2dDw(conv, kept, (h, w, c))
    rounding = RoundGrad(s_dx, "bits" if i["masked"] else "none", None, *sums_of_dx(conv, a["w"].shape[0]))
    sgd = SgdWeight(s_w, bits, i["x_scale"], pixels, conv, (h, w, c))
    sgd_b = SgdBias(s_b, i["x_scale"], pixels, conv)
    rest = f"{'mask=mask ' if i['masked'] else ''}{f'further={chr(44).join(further)}' if further else ''}"
    rx = Value("rx", a["x"].shape, "s8", exponent=0)

    emit("conv2d", f"x=x weight=weight bias=bias {trains}", conv, Value("y", a["y"].shape, "s8", q=y_q))
    kept_x = Value("x.kept", (h, w, kept * keep_groups), "s8")
    emit("select_channels", "x=x channels=channels", SelectChannels(keep_groups), kept_x)
    if fused:
        emit("conv2d_dx_round", f"g=r weight=weight {trains} {rest}", FusedDx(dx, rounding), rx, stores="rho=rho")
        emit("conv2d_dw_sgd", "g=r x=x.kept lr=lr scale=scale channels=channels", FusedDw(dw, sgd), stores=weight)
        emit("conv2d_db_sgd", "g=r lr=lr scale=scale", FusedDb(sgd_b), stores="bias=bias")
        return g.build(Stage.LOWERED, ["y", "rx"])
    emit("conv2d_dx", f"g=r weight=weight {trains}", dx, Value("acc", (h, w, c), "s32", exponent=1))
    emit("round_grad", f"acc=acc scale=scale {rest}", rounding, rx, stores="rho=rho")
    emit("conv2d_dw", "g=r x=x.kept channels=channels", dw, Value("dw", trained.shape, "s32", exponent=1))
    emit("sgd_weight", "dw=dw lr=lr scale=scale channels=channels", sgd, stores=weight)
    emit("conv2d_db", "g=r", Conv2dDb(pixels), Value("db", a["b"].shape, "s32", exponent=1))
    emit("sgd_bias", "db=db lr=lr scale=scale", sgd_b, stores="bias=bias")
    return g.build(Stage.TRAIN, ["y", "rx"])
