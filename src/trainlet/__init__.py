# SPDX-License-Identifier: Apache-2.0
"""trainlet: train a neural network on a microcontroller.

    graph = trainlet.attach_head(trainlet.load("mcunet-5fps.pkl"), classes=10)
    compiled = trainlet.compile_model(graph, trainlet.resolve("99kb", graph))
    session = trainlet.HostSession(compiled)

Names are imported when they are first used, so that the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainlet.autodiff.scheme import UpdateScheme, resolve
    from trainlet.autodiff.walk import differentiate
    from trainlet.compiler import compile_model
    from trainlet.emit import Compiled
    from trainlet.frontends import attach_head, load
    from trainlet.passes.fuse import fuse
    from trainlet.plan.arena import make_plan
    from trainlet.session.host import HostSession
    from trainlet.toolchain.package import write_package

from trainlet._version import __version__ as __version__

_HOME = {
    "load": "trainlet.frontends",
    "attach_head": "trainlet.frontends",
    "UpdateScheme": "trainlet.autodiff.scheme",
    "resolve": "trainlet.autodiff.scheme",
    "differentiate": "trainlet.autodiff.walk",
    "fuse": "trainlet.passes.fuse",
    "make_plan": "trainlet.plan.arena",
    "Compiled": "trainlet.emit",
    "compile_model": "trainlet.compiler",
    "HostSession": "trainlet.session.host",
    "write_package": "trainlet.toolchain.package",
}

__all__ = [
    "Compiled",
    "HostSession",
    "UpdateScheme",
    "attach_head",
    "compile_model",
    "differentiate",
    "fuse",
    "load",
    "make_plan",
    "resolve",
    "write_package",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'trainlet' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
