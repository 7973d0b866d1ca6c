# SPDX-License-Identifier: Apache-2.0
"""A float32 PyTorch network of the shapes of an INT8 graph, for timing only: its weights are random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.frontends import features, trunk
from trainlet.ir.graph import Graph
from trainlet.ops import Conv2d


class FloatModel(nn.Module):
    """What a user of PyTorch would write. PyTorch cannot train part of a weight, so where ``scheme`` trains some input
    channels of a layer its whole weight trains here."""

    def __init__(self, graph: Graph, scheme: UpdateScheme, classes: int) -> None:
        super().__init__()
        self.nodes = trunk(graph)
        self.source = graph.inputs[0]
        self.convs = nn.ModuleDict()
        for n in self.nodes:
            if not isinstance(n.attrs, Conv2d):
                continue
            a, c, o = n.attrs, graph.values[n.inputs[0]].shape[-1], graph.values[n.outputs[0]].shape[-1]
            if a.pads[0] != a.pads[1] or a.pads[2] != a.pads[3]:
                raise ValueError(f"{n.layer}: this float model knows symmetric padding only")
            conv = nn.Conv2d(c, o, a.kernel, a.stride, (a.pads[0], a.pads[2]), a.dilation, a.groups)
            conv.weight.requires_grad_(n.layer in scheme.weights)
            assert conv.bias is not None
            conv.bias.requires_grad_(n.layer in scheme.biases)
            self.convs[n.name.replace(".", "_")] = conv
        self.head = nn.Linear(graph.values[features(graph)].size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, H, W) -> logits (1, classes)."""
        values = {self.source: x}
        for n in self.nodes:
            data = values[n.inputs[0]]
            if isinstance(n.attrs, Conv2d):
                y = self.convs[n.name.replace(".", "_")](data)
                y = functional.relu6(y, inplace=True) if n.attrs.activation else y
            else:
                y = data + values[n.inputs[1]] if n.op == "add" else data.mean((2, 3), keepdim=True)
            values[n.outputs[0]] = y
        logits: Tensor = self.head(values[self.nodes[-1].outputs[0]].flatten(1))
        return logits


def make_steps(
    graph: Graph, scheme: UpdateScheme, classes: int, layout: torch.memory_format
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(training step, forward pass) of a new model in ``layout``; each call does one image."""
    torch.manual_seed(0)
    model = FloatModel(graph, scheme, classes).to(memory_format=layout)  # type: ignore[call-overload]
    h, w, c = graph.values[graph.inputs[0]].shape
    x = torch.randn(1, c, h, w).to(memory_format=layout)
    label = torch.zeros(1, dtype=torch.int64)
    # foreach and fused updates were tried: no faster here
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(x), label)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    def forward() -> object:
        with torch.inference_mode():
            return model(x).numpy()

    return step, forward
