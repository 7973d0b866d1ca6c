# SPDX-License-Identifier: Apache-2.0
"""The graph: what every room reads and writes. The order of its nodes is the schedule."""

from trainlet.ir.dtypes import DTYPES, DType, dtype_bits
from trainlet.ir.graph import (
    Array,
    Attrs,
    Bound,
    DepthFirst,
    Graph,
    GraphBuilder,
    Image,
    Kind,
    Node,
    Operands,
    QParams,
    Stage,
    Value,
)
from trainlet.ir.interface import Interface

__all__ = [
    "DTYPES",
    "Array",
    "Attrs",
    "Bound",
    "DType",
    "DepthFirst",
    "Graph",
    "GraphBuilder",
    "Image",
    "Interface",
    "Kind",
    "Node",
    "Operands",
    "QParams",
    "Stage",
    "Value",
    "dtype_bits",
]
