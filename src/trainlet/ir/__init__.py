# SPDX-License-Identifier: Apache-2.0
"""The graph: what every room reads and writes. The order of its nodes is the schedule."""

from trainlet.ir.graph import Array, Graph, GraphBuilder, Image, Kind, Node, QParams, Stage, Value

__all__ = ["Array", "Graph", "GraphBuilder", "Image", "Kind", "Node", "QParams", "Stage", "Value"]
