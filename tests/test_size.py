# SPDX-License-Identifier: Apache-2.0
"""A model for images of another size: the same weights, other shapes, and the bytes of the reference."""

from __future__ import annotations

import pytest
from graphs import int8_chain
from random_nets import Case
from test_exact import difference

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.errors import UsageError
from trainlet.frontends import at_size, attach_head
from trainlet.ops import AvgPool

SCHEME = UpdateScheme("chain", ("block.depthwise", "block.project"), {"block.project": 0.5}, 8)


def test_the_pool_pools_all_that_arrives() -> None:
    graph = at_size(int8_chain(), 13, 9)
    assert graph.values[graph.inputs[0]].shape == (13, 9, 3)
    (pool,) = graph.find("avg_pool")
    assert isinstance(pool.attrs, AvgPool)
    assert pool.attrs.kernel == graph.values[pool["x"]].shape[:2] == (6, 4)
    assert str(at_size(int8_chain(), 8, 8)) == str(int8_chain())


@pytest.mark.parametrize("size", [(3, 3), (5, 31), (16, 3)])
def test_it_trains_at_any_size(size: tuple[int, int]) -> None:
    model = attach_head(at_size(int8_chain(), *size), 3)
    assert difference(Case(model, SCHEME, 3, (0.02,)), steps=3) == ""


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="at least one pixel"):
        at_size(int8_chain(), 0, 8)
    with pytest.raises(UsageError, match="stem: the kernel fits into the padded input; give a larger size"):
        at_size(int8_chain(), 1, 1)
