# SPDX-License-Identifier: Apache-2.0
"""Packages that are public functions too: ``trainlet.plan(graph, scheme)`` beside ``from trainlet.plan.arena import
make_plan``. Python binds a package to its name in ``trainlet`` as soon as anything of it is imported, so the package
itself is what can be called, whichever of both comes first."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, cast


class _Callable(ModuleType):
    """A package that calls the function of its last name in ``trainlet.api``, and has its signature and text."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Callable[..., Any]:
        return cast("Callable[..., Any]", getattr(import_module("trainlet.api"), self.__name__.rpartition(".")[2]))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return f"{inspect.getdoc(self._function)}\n\nThe package:\n\n{vars(self)['__doc__']}"


def make_callable(package: str) -> None:
    """Makes the package of that full name, which is being imported, the function of its last name too."""
    sys.modules[package].__class__ = _Callable
