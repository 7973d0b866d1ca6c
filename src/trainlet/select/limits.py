# SPDX-License-Identifier: Apache-2.0
"""Limits: the analytic "extra memory", which is a sum over layers, and the RAM of the compiled plan on a chip."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from trainlet.autodiff.scheme import UpdateScheme, check_scheme, extra_memory_bits, extra_memory_bytes, trainable_layers
from trainlet.autodiff.walk import differentiate
from trainlet.compiler import ALL, Passes, compile_model, lower, plan_model
from trainlet.errors import OverBudgetError, UnsupportedError, UsageError
from trainlet.ir import Graph
from trainlet.ops import sums_biases
from trainlet.passes.reorder import node_bounds
from trainlet.plan.arena import largest_alive
from trainlet.plan.sections import sections
from trainlet.plan.state import HEADER_BYTES
from trainlet.select.cuts import Cut, Option
from trainlet.select.problem import Choice
from trainlet.select.work import StepWork
from trainlet.toolchain.chip import Firmware, build_device
from trainlet.toolchain.targets import MIB, Pool, Target

_NAME: Final = "selected"
_ROOM: Final = 16 * MIB
"""Programs are linked into this much, so that what does not fit has a size too."""


def _positive(most: int) -> int:
    if most <= 0:
        raise UsageError(f"a limit of {most} bytes: give at least 1")
    return most


class _Model:
    """What limits know about the model: ``graph`` has its head."""

    def __init__(self, graph: Graph, most: int) -> None:
        self.graph = graph
        self.layers = tuple(trainable_layers(graph))
        self.revision = 0
        self.sound = True
        self._most = _positive(most)
        self._selectable: dict[Option, bool] = {}

    @property
    def most(self) -> int:
        """Bytes that there are."""
        return self._most

    @cached_property
    def deepest(self) -> int:
        """How many last layers can train: all up to the first operator without a gradient."""
        return next(d for d in range(len(self.layers), -1, -1) if self._trains(d))

    def _trains(self, depth: int) -> bool:
        try:
            differentiate(self.graph, self.scheme(depth, {}, 8))
        except UnsupportedError:
            return False
        return True

    def scheme(self, depth: int, weights: dict[str, float], bits: int) -> UpdateScheme:
        """The biases of the last ``depth`` layers and these weights."""
        return Choice(depth, weights, bits).scheme(self.layers, _NAME)

    def selectable(self, layer: str, ratio: float) -> bool:
        """Whether the ratio is at least one input channel of the layer."""
        option = (layer, ratio)
        if option not in self._selectable:
            self._selectable[option] = self._check(layer, ratio)
        return self._selectable[option]

    def _check(self, layer: str, ratio: float) -> bool:
        try:
            check_scheme(UpdateScheme(_NAME, (), {layer: ratio}), self.graph)
        except UsageError:
            if layer not in self.layers:
                raise
            return False
        return True


# --- the formula ------------------------------------------------------------------------------------------------


class AnalyticLimit(_Model):
    """Extra memory (``scheme.extra_memory_bytes``) of at most ``most`` bytes. Exact integers, and a sum: of
    ``depth_bits`` and the ``option_bits`` of all weights that train."""

    def __init__(self, graph: Graph, most: int) -> None:
        super().__init__(graph, most)
        self._bits: dict[tuple[int, int, Option | None], int] = {}

    def depth_bits(self, depth: int) -> int:
        """Bits of extra memory where the biases of the last ``depth`` layers train, and the head."""
        return self._extra(depth, 8, None)

    def option_bits(self, layer: str, ratio: float, bits: int) -> int:
        """Bits that the weights of a layer add, whatever else trains behind the outermost bias."""
        whole = len(self.layers)
        return self._extra(whole, bits, (layer, ratio)) - self._extra(whole, bits, None)

    def _extra(self, depth: int, bits: int, option: Option | None) -> int:
        key = (depth, bits, option)
        if key not in self._bits:
            weights = dict([option]) if option else {}
            self._bits[key] = extra_memory_bits(self.graph, self.scheme(depth, weights, bits))
        return self._bits[key]

    def cost(self, choice: Choice) -> int:
        """Bytes of extra memory."""
        return extra_memory_bytes(self.graph, choice.scheme(self.layers, _NAME))

    def fits(self, choice: Choice) -> bool:
        """Whether that is at most ``most``."""
        return self.cost(choice) <= self.most

    confirm = fits

    def cuts(self, depth: int, bits: int, options: Iterable[Option]) -> tuple[Cut, ...]:
        """The one condition that is the limit itself, in bits."""
        return (Cut(self.depth_bits(depth), {o: self.option_bits(*o, bits) for o in options}, 8 * self.most),)

    def refusal(self, bits: int) -> OverBudgetError:
        """Not even the head's input fits."""
        need = self.cost(Choice(0, bits=bits))
        return OverBudgetError(
            f"{self.graph.name}: training the head alone takes {need} bytes of extra memory, and the limit is "
            f"{self.most}; give at least {need}"
        )


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linked:
    """A linked program: bytes of SRAM, the reserved stack included, and of flash."""

    ram: int
    flash: int


@dataclass(frozen=True)
class _Needs:
    """What a step needs: bytes of the trained state, and by node of the backward pass the bytes that every order of the
    nodes needs, with nodes that write over their inputs where they may, and ``apart``, where none does. ``shared``:
    how many layers' updates read what the node reads."""

    state: int
    nodes: dict[str, int]
    apart: dict[str, int]
    shared: dict[str, int]


class PlannedLimit(_Model):
    """All SRAM of the compiled plan: arena, trained state and what the program has beside them (row, context, mailbox,
    stack), which the linked program of ``target`` says. Without a target arena and state alone count.

    ``most`` is the SRAM of the target, or less. ``confirm`` links a choice: its static SRAM and the deepest stack that
    its calls can reach, never below the ``ram_bytes`` of a measurement. ``cost`` is that figure where the choice has
    been linked; otherwise its plan and ``overhead``, the largest difference between the two so far, first that of the
    head alone. With ``instructions`` a step executes no more than so many on the target's core (see ``StepWork``);
    then ``sound`` is false, since its cuts are estimates and may leave out a choice that fits."""

    def __init__(
        self,
        graph: Graph,
        target: Target | None = None,
        most: int | None = None,
        passes: Passes = ALL,
        instructions: int | None = None,
    ) -> None:
        if target is None and (most is None or instructions is not None):
            raise ValueError("a target is needed, or a number of bytes and no limit of instructions")
        super().__init__(graph, target.sram_bytes if target and most is None else most or 0)
        self.target = target
        self.passes = passes
        self.plans = 0
        self._overhead: int | None = None if target else 0
        self._planned: dict[object, tuple[int, int]] = {}
        self._linked: dict[object, Linked] = {}
        self._bases: dict[int, _Needs] = {}
        self._options: dict[tuple[int, Option], tuple[int, dict[str, int]]] = {}
        self._floors: dict[int, int] = {}
        self.work: StepWork | None = None
        if target and instructions:
            self.work = StepWork(graph, target, instructions, self.deepest, self.selectable, passes)
            self.sound = False

    def narrowed(self, most: int) -> PlannedLimit:
        """The same limit with so many bytes; what either has planned or linked, the other knows."""
        other = copy.copy(self)
        other._most = _positive(most)
        return other

    # -- figures of one choice -----------------------------------------------------------------------------------

    @property
    def overhead(self) -> int:
        """Bytes beside arena and state."""
        if self._overhead is None:
            self._overhead = self._beside(Choice(0))
        return self._overhead

    def planned(self, choice: Choice) -> tuple[int, int]:
        """(arena, trained state) of the choice's plan, in bytes."""
        key = choice.key
        if key not in self._planned:
            p = plan_model(self.graph, choice.scheme(self.layers, _NAME), passes=self.passes)
            self.plans += 1
            self._planned[key] = p.plan.arena_bytes, p.layout.nbytes
            self._learn_floor(choice.depth, p.plan.arena_bytes)
        return self._planned[key]

    def cost(self, choice: Choice) -> int:
        """Bytes of SRAM."""
        linked = self._linked.get(choice.key)
        return linked.ram if linked else sum(self.planned(choice)) + self.overhead

    def fits(self, choice: Choice) -> bool:
        """Whether the choice costs at most ``most``, and is not estimated to execute too much."""
        return self.cost(choice) <= self.most and (self.work is None or self.work.may_fit(choice))

    def link(self, choice: Choice) -> Linked:
        """Compiles and links the choice for the target's core. ToolMissingError without a compiler."""
        assert self.target is not None, "nothing is linked without a target"
        key = choice.key
        if key not in self._linked:
            compiled = compile_model(self.graph, choice.scheme(self.layers, _NAME), passes=self.passes)
            self._planned[key] = compiled.plan.arena_bytes, compiled.state_bytes
            room = replace(self.target, flash_bytes=_ROOM, pools=(Pool("SRAM", _ROOM),))
            firmware: Firmware = build_device(compiled, room)
            self._linked[key] = Linked(firmware.static_bytes + firmware.stack_bytes, firmware.flash_bytes)
        return self._linked[key]

    def _beside(self, choice: Choice) -> int:
        return self.link(choice).ram - sum(self._planned[choice.key])

    def confirm(self, choice: Choice) -> bool:
        """Whether the linked program fits, and executes few enough instructions; where it has more beside arena and
        state than was known, ``overhead`` rises. OverBudgetError where its flash is too large: what trains changes that
        by little."""
        if self.target is None:
            return self.fits(choice)
        linked, beside = self.link(choice), self._beside(choice)
        if linked.flash > self.target.flash_bytes:
            raise OverBudgetError(
                f"{self.graph.name}: {linked.flash} bytes of flash are needed, {self.target.flash_bytes} are there on "
                f"{self.target.name}; choose a target with more flash or a model with fewer weights"
            )
        if linked.ram > self.most and beside > self.overhead:
            self._overhead = beside
            self.revision += 1
        return linked.ram <= self.most and self._runs_in_time(choice)

    def _runs_in_time(self, choice: Choice) -> bool:
        if self.work is None or self.work.fits(choice):
            return True
        self.revision += 1
        return False

    def refusal(self, bits: int) -> OverBudgetError:
        """What stands in the way of training the head alone."""
        if self.work and not self.work.may_fit(Choice(0, bits=bits)):
            return self._too_slow(self.work)
        p = plan_model(self.graph, self.scheme(0, {}, bits), passes=self.passes)
        layer = {o: n.layer for n in p.graph.flat().nodes for o in n.outputs}
        largest = ", ".join(
            f"{name} of {layer[name]} ({size})" if name in layer else f"{name} ({size})"
            for name, size in largest_alive(p.graph, p.plan)
        )
        arena, state = p.plan.arena_bytes, p.layout.nbytes
        need = arena + state + self.overhead
        return OverBudgetError(
            f"{self.graph.name}: training the head alone takes {need} bytes of SRAM (arena {arena}, state {state}, "
            f"stack and the rest {self.overhead}), and the limit is {self.most}. Largest tensors at the peak: "
            f"{largest}. Choose a lower resolution, a model whose layers there are fewer or narrower, or a target with "
            f"at least {need} bytes"
        )

    def _too_slow(self, work: StepWork) -> OverBudgetError:
        need = work.measured(Choice(0))
        return OverBudgetError(
            f"{self.graph.name}: a step that trains the head alone executes {need} instructions, estimated as "
            f"{work.biases(0)}, and the limit is {work.most}. Choose a lower resolution, a smaller model, or more "
            "instructions than either"
        )

    # -- bounds on all choices -----------------------------------------------------------------------------------

    def cuts(self, depth: int, bits: int, options: Iterable[Option]) -> tuple[Cut, ...]:
        """Lower bounds of the cost. The state is a sum. Of the arena each node of the backward pass gives one: what has
        to exist while it runs, in any order of the nodes, and for every trained weight the inputs that are kept for a
        later update. One more is the arena of the biases alone, since keeping more takes no less; it falls where a plan
        shows less."""
        base = self._base(depth)
        adds = {o: self._option(bits, o) for o in options}
        fixed = base.state + self.overhead
        cuts = [
            Cut(fixed + need, {o: state + kept.get(node, 0) for o, (state, kept) in adds.items()}, self.most)
            for node, need in base.nodes.items()
        ]
        cuts.append(Cut(fixed + self._floor(depth), {o: state for o, (state, _) in adds.items()}, self.most))
        return (*cuts, self.work.cut(depth, bits, adds)) if self.work else tuple(cuts)

    def _floor(self, depth: int) -> int:
        """The smallest arena that is believed possible."""
        if depth not in self._floors:
            self._floors[depth] = self.planned(Choice(depth))[0]
        return self._floors[depth]

    def _learn_floor(self, depth: int, arena: int) -> None:
        if arena < self._floors.get(depth, arena):
            self._floors[depth] = arena
            self.revision += 1

    def _base(self, depth: int) -> _Needs:
        if depth not in self._bases:
            self._bases[depth] = self._analyze(self.scheme(depth, {}, 8))
        return self._bases[depth]

    def _option(self, bits: int, option: Option) -> tuple[int, dict[str, int]]:
        """(bytes of state, bytes by node) that the weights of a layer add wherever they train; the latter at least.

        As differences from training the biases of all layers, so that a mask which they make needless is taken off
        everywhere. What several layers cause together counts once: a tensor that all of them keep, a gradient that
        cannot be written over since their updates still read it. Each is charged its part of it."""
        key = (bits, option)
        if key not in self._options:
            base = self._base(self.deepest)
            found = self._analyze(self.scheme(self.deepest, dict([option]), bits))
            readers = self._readers(option[0])
            adds: dict[str, int] = {}
            for node in base.nodes.keys() & found.nodes.keys():
                kept = found.apart[node] - base.apart[node]
                apart = found.nodes[node] - base.nodes[node] - kept
                adds[node] = (kept // readers if kept > 0 else kept) + apart // max(1, base.shared[node])
            self._options[key] = found.state - base.state, {n: d for n, d in adds.items() if d}
        return self._options[key]

    def _readers(self, layer: str) -> int:
        layers = trainable_layers(self.graph)
        return sum(n["x"] == layers[layer]["x"] for n in layers.values())

    def _analyze(self, scheme: UpdateScheme) -> _Needs:
        _, step = lower(self.graph, scheme, passes=replace(self.passes, reorder=False))  # what is true in any order
        s = sections(step)
        backward = (*s.gradient, *s.head, *s.backward)
        state = HEADER_BYTES + sum(v.nbytes for v in step.states())
        apart = node_bounds(step, overwrites=False)
        over = node_bounds(step) if self.passes.inplace else apart
        updated = Counter(n["g"] for n in backward if sums_biases(n))
        shared = {n.name: sum(updated[v] for v in n.inputs) for n in backward}
        names = [n.name for n in backward]
        return _Needs(state, {n: over[n] for n in names}, {n: apart[n] for n in names}, shared)
