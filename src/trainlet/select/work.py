# SPDX-License-Identifier: Apache-2.0
"""Instructions of a training step as a limit of a selection.

Programs are profiled on the emulated core, node by node: one trains the head alone, one the biases of all layers that
can train, and for each width and ratio one trains that share of all weights. A choice is estimated from the figures of
its nodes, those that run row by row from the first program. What is chosen is run itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Final

from trainlet.autodiff.scheme import UpdateScheme, trainable_layers
from trainlet.compiler import ALL, Passes, compile_model, plan_model
from trainlet.emit.statement import label
from trainlet.ir import DepthFirst, Graph, Node
from trainlet.select.cuts import Cut, Option
from trainlet.select.problem import Choice
from trainlet.session.emulator import EmulatorSession
from trainlet.toolchain.targets import MIB, Pool, Target
from trainlet.toolchain.vectors import LR, synthetic_image

_ROOM: Final = 16 * MIB
"""The profiled programs run in this much of either memory, since they need not fit."""


class StepWork:
    """What steps of ``graph``, which has its head, execute on ``target``'s core; at most ``most`` instructions are
    wanted, of a step on the synthetic image. ``deepest``: how many last layers can train; ``selectable``: whether a
    ratio is a channel of a layer. ``short``: by how much estimates for a width of weights were seen to fall short, so
    that a choice which was refused for what it executes is not proposed again."""

    def __init__(
        self,
        graph: Graph,
        target: Target,
        most: int,
        deepest: int,
        selectable: Callable[[str, float], bool],
        passes: Passes = ALL,
    ) -> None:
        self.graph, self.most, self.deepest, self.selectable, self.passes = graph, most, deepest, selectable, passes
        self.room = replace(target, flash_bytes=_ROOM, pools=(Pool("SRAM", _ROOM),))
        self.layers = tuple(trainable_layers(graph))
        self.short: dict[int, int] = {}
        self._updates: dict[tuple[int, float], Mapping[str, int]] = {}
        self._bases: dict[int, int] = {}
        self._measured: dict[object, int] = {}

    def cut(self, depth: int, bits: int, options: Iterable[Option]) -> Cut:
        """The condition on choices of a depth, in instructions; an estimate, which may leave out one that fits."""
        costs = {option: self._update(bits, *option) for option in options}
        return Cut(self.biases(depth) + self.short.get(bits, 0), costs, self.most)

    def may_fit(self, choice: Choice) -> bool:
        """Whether the estimate, with what it was seen to fall short by, is at most ``most``."""
        return self.estimate(choice) + self.short.get(choice.bits, 0) <= self.most

    def fits(self, choice: Choice) -> bool:
        """Whether the choice, run on the emulated core, executes at most ``most``; learns from one that does not."""
        found = self.measured(choice)
        if found > self.most:
            short = found - self.estimate(choice)
            self.short[choice.bits] = max(self.short.get(choice.bits, 0), short)
        return found <= self.most

    def estimate(self, choice: Choice) -> int:
        """Instructions of a step, as the nodes of the profiled programs add up."""
        return self.biases(choice.depth) + sum(self._update(choice.bits, *o) for o in choice.weights.items())

    def biases(self, depth: int) -> int:
        """The estimate where the biases of the last ``depth`` layers train, and the head."""
        if depth not in self._bases:
            program = plan_model(self.graph, self._scheme(depth), passes=self.passes).graph
            self._bases[depth] = self._profile.get("", 0) + sum(map(self._node, program.nodes))
        return self._bases[depth]

    def _node(self, node: Node) -> int:
        """Of one node; of those that run row by row in a stream, as they do where the head alone trains."""
        inner = node.attrs.nodes if isinstance(node.attrs, DepthFirst) else ()
        names = [label(n) for n in inner]
        streamed = sum(self._head.get(n, self._profile.get(n, 0)) for n in names)
        return streamed if inner else self._profile.get(label(node), 0)

    def measured(self, choice: Choice) -> int:
        """Instructions of a step of the choice's program."""
        if choice.key not in self._measured:
            self._measured[choice.key] = sum(self._run(choice.scheme(self.layers, "work")).values())
        return self._measured[choice.key]

    def _update(self, bits: int, layer: str, ratio: float) -> int:
        """What training a layer's weights adds at the nodes of the layer."""
        key = bits, ratio
        if key not in self._updates:
            every = self._scheme(self.deepest)
            weights = {n: ratio for n in every.biases if self.selectable(n, ratio)}
            self._updates[key] = self._run(replace(every, weights=weights, bits=bits))
        found, before = (_of_layer(p, layer) for p in (self._updates[key], self._profile))
        return max(0, found - before)

    @cached_property
    def _profile(self) -> Mapping[str, int]:
        """Instructions by "layer: operator" of the program that trains the biases of all layers."""
        return self._run(self._scheme(self.deepest))

    @cached_property
    def _head(self) -> Mapping[str, int]:
        """The same of the program that trains the head alone."""
        return self._run(self._scheme(0))

    def _scheme(self, depth: int) -> UpdateScheme:
        return Choice(depth).scheme(self.layers, "work")

    def _run(self, scheme: UpdateScheme) -> Counter[str]:
        session = EmulatorSession(compile_model(self.graph, scheme, passes=self.passes), self.room)
        before = Counter(session.profile())
        session.train_step(synthetic_image(self.graph.image.shape, 0), 0, LR)
        return Counter(session.profile()) - before


def _of_layer(profile: Mapping[str, int], layer: str) -> int:
    return sum(v for name, v in profile.items() if name.startswith(f"{layer}: "))
