# SPDX-License-Identifier: Apache-2.0
"""The attributes of every operator: what of a node is neither an input nor an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trainlet.ir.graph import Node, Value


GradType = Literal["s8", "f32"]


@dataclass(frozen=True, slots=True)
class Attrs:
    """Base of all attributes, and the attributes of an operator that has none."""


@dataclass(frozen=True, slots=True)
class Conv2d(Attrs):
    """``pads`` is (top, bottom, left, right). ``clamp`` bounds the output (INT8: integers, always given; FLOAT: reals,
    or None); it is an activation, and masks gradients, only where ``activation`` says so. ``depthwise`` is true where
    groups = C_in = C_out > 1; then weights are (C, kh, kw, 1). ``dead`` lists output channels with no usable scale: all
    their weights are 0 and no update touches them."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    clamp: tuple[float, float] | None = None
    activation: bool = False
    depthwise: bool = False
    dead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Add(Attrs):
    """Residual addition; clamp and activation as in ``Conv2d``."""

    clamp: tuple[float, float] | None = None
    activation: bool = False


@dataclass(frozen=True, slots=True)
class AvgPool(Attrs):
    """Average over windows; padding is left out of the mean."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class EnterGrad(Attrs):
    """Where a gradient in reals becomes that of a tensor of ``shape`` (H, W, C), as s8 at the rounding ``site``, or as
    f32 in a graph of reals. Its numbers, times ``factor``, are one for each element, or one for each channel, which
    stands for all pixels."""

    shape: tuple[int, int, int]
    factor: float
    site: int
    dtype: GradType


@dataclass(frozen=True, slots=True)
class CheckLr(Attrs):
    """``largest`` is the largest constant that lr is multiplied by anywhere in the step."""

    largest: float


@dataclass(frozen=True, slots=True)
class SelectChannels(Attrs):
    """Keeps the channels named by the index table, the same ones in every group."""

    groups: int


MaskFrom = Literal["none", "bits", "value"]


@dataclass(frozen=True, slots=True)
class Mask(Attrs):
    """A gradient passes where clamp[0] < y < clamp[1]. ``source``: packed bits, or the stored output itself."""

    clamp: tuple[float, float]
    source: MaskFrom = "value"


@dataclass(frozen=True, slots=True)
class Conv2dDx(Attrs):
    """Input gradient of ``conv``, whose input had ``in_hw`` pixels: int32 sums, not yet rounded."""

    conv: Conv2d
    in_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class RoundGrad(Attrs):
    """The one rounding of a gradient tensor: [sums + their weight scales] + further gradients, masked, to int8.

    ``computes`` says whether the first inputs are (acc, w_scale) of a convolution with ``conv`` attributes; then comes
    the mask source, if any; then the further gradients in the order of their consumers."""

    site: int
    computes: bool
    conv: Conv2d | None = None
    mask: MaskFrom = "none"
    clamp: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Conv2dDw(Attrs):
    """Weight gradient of the kept input channels, ``kept`` of them in each group (depthwise: in all)."""

    conv: Conv2d
    kept: int


@dataclass(frozen=True, slots=True)
class Conv2dDb(Attrs):
    """Bias gradient; ``pixels`` is the size of the layer's output, of which one vector may stand for all."""

    pixels: int


@dataclass(frozen=True, slots=True)
class SgdWeight(Attrs):
    """``x_scale`` is the scale of the layer's input, ``pixels`` the size of its output, ``fraction_bits`` 0, 4 or 8."""

    site: int
    fraction_bits: int
    x_scale: float
    pixels: int
    conv: Conv2d


@dataclass(frozen=True, slots=True)
class SgdBias(Attrs):
    """As ``SgdWeight``."""

    site: int
    x_scale: float
    pixels: int
    conv: Conv2d


@dataclass(frozen=True, slots=True)
class FusedDx(Attrs):
    """conv2d_dx and round_grad in one node; the sums never exist as a tensor."""

    dx: Conv2dDx
    round: RoundGrad


@dataclass(frozen=True, slots=True)
class FusedDw(Attrs):
    """conv2d_dw and sgd_weight in one node; the gradient never exists as a tensor."""

    dw: Conv2dDw
    sgd: SgdWeight


@dataclass(frozen=True, slots=True)
class FusedDb(Attrs):
    """conv2d_db and sgd_bias in one node."""

    sgd: SgdBias


@dataclass(frozen=True, slots=True)
class Stream(Attrs):
    """Consecutive forward nodes that run depth first, by output rows. ``values`` are what they make; ``rings`` says how
    many rows there are of each value that never exists whole: of what no other node reads, and of the model's image
    where that is delivered by rows. Where the node overwrites an input, its last output begins ``lead`` bytes before it
    and follows its reader through it."""

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    rings: tuple[tuple[str, int], ...]
    lead: int = 0
