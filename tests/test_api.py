# SPDX-License-Identifier: Apache-2.0
"""The public names: each is found, and the list has no hole."""

from __future__ import annotations

import pytest

import trainlet


def test_every_public_name_is_found() -> None:
    assert sorted(trainlet.__all__) == sorted(trainlet._HOME)
    for name in trainlet.__all__:
        assert callable(getattr(trainlet, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trainlet.nothing  # noqa: B018
