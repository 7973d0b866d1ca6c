# SPDX-License-Identifier: Apache-2.0
"""Where every byte of SRAM lies: the arena, the state, what a frozen prefix leaves behind."""

from trainlet.callable import make_callable
from trainlet.plan.arena import MemoryPlan, make_plan

__all__ = ["MemoryPlan", "make_plan"]

make_callable(__name__)
