# SPDX-License-Identifier: Apache-2.0
"""Channels that are kept for the update of the weights that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trainlet.ir import Attrs, Bound, Graph, Node, Value
from trainlet.ops.geometry import need_channels
from trainlet.ops.op import (
    NO_WEIGHTS,
    STEP,
    Emitter,
    Kernel,
    No,
    Type,
    anywhere,
    call,
    need,
    no_macs,
    no_scratch,
    operands,
    same_row,
    step_op,
)


@dataclass(frozen=True, slots=True)
class SelectChannels(Attrs):
    """Keeps the channels named by the index table, the same ones in every group."""

    groups: int


def _select_of(node: Node) -> SelectChannels:
    assert isinstance(node.attrs, SelectChannels)
    return node.attrs


def _rule_select_channels(node: Node, ins: Bound[Value]) -> tuple[Type, ...]:
    x, channels = ins["x"], ins["channels"]
    need(channels.dtype == "u16" and len(x.shape) == 3, "x is (H, W, C), channels a table of u16")
    h, w, _ = x.shape
    return (((h, w, channels.size * _select_of(node).groups), x.dtype),)


def _data_select_channels(graph: Graph, node: Node) -> None:
    groups, channels = _select_of(node).groups, graph.values[node["x"]].shape[2]
    need(groups > 0 and channels % groups == 0, "groups divides the channels")
    need_channels(graph, node["channels"], channels // groups)


def emit_select_channels(e: Emitter, node: Node) -> str:
    x, channels = node["x"], node["channels"]
    _, w, c = e.value(x).shape
    pixels = e.part(x)[0] * w
    table = (e.ptr(channels), e.value(channels).size)
    return call(
        "tl_select_channels_s8", e.begin(x), pixels, c, _select_of(node).groups, *table, e.begin(node.output)
    )  # fmt: skip


_FEWER: Final = No("what it makes has fewer channels than what it reads")

ROWS: Final = (
    step_op(
        name="select_channels",
        attrs=SelectChannels,
        operands=operands("x", "channels"),
        stores=(),
        stages=STEP,
        rule=_rule_select_channels,
        data=_data_select_channels,
        macs=no_macs,
        rows=same_row,
        overwrites=_FEWER,
        exponent=No("it is made of activations"),
        refuses=False,
        loss=No("it makes none"),
        fusions=(),
        kernels=(Kernel("tl_select_channels_s8", anywhere, NO_WEIGHTS, no_scratch, _FEWER, emit_select_channels),),
    ),
)
