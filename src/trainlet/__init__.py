# SPDX-License-Identifier: Apache-2.0
"""trainlet: train a neural network on a microcontroller.

What the command line does, in Python; every function's ``help`` has shapes, units, defaults and errors:

    model = trainlet.load("model.json")                             # int8; .pkl checkpoints and graph files
    data = trainlet.load_data("images.npz", model)                  # or a folder with {train,val}/CLASS/*.jpg
    graph = trainlet.attach_head(model, len(data.classes))
    scheme = trainlet.resolve("last:2", graph)                      # what trains
    print(trainlet.plan(graph, scheme).total, "bytes of arena and state")
    result = trainlet.fit(graph, data, scheme, "run", epochs=2)     # in generated C, on this machine
    print(trainlet.evaluate(graph, data, result["state"]).accuracy)
    compiled = trainlet.compile_model(graph, scheme)
    trainlet.write_package(compiled, "c", "my_script.py")           # C99, ready to build
    session = trainlet.HostSession(compiled)                        # .infer(image), .train_step(image, label, lr)

``select`` finds a scheme for a limit of memory; ``measure`` and ``validate`` run it on an emulated chip; ``quantize``
makes int8 of a float graph; ``save`` writes a graph. Errors are in ``trainlet.errors``.

Names are imported when they are first used, so that the command line starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainlet.api import (
        Memory,
        evaluate,
        fit,
        load,
        load_data,
        measure,
        plan,
        quantize,
        save,
        select,
        validate,
    )
    from trainlet.autodiff.scheme import UpdateScheme, resolve
    from trainlet.autodiff.walk import differentiate
    from trainlet.compiler import Passes, compile_inference, compile_model
    from trainlet.emit import Compiled
    from trainlet.errors import TrainletError, UsageError
    from trainlet.frontends import at_size, attach_head
    from trainlet.ir import Graph
    from trainlet.passes.fuse import fuse
    from trainlet.plan.arena import make_plan
    from trainlet.session.host import HostSession
    from trainlet.toolchain.package import write_package
    from trainlet.toolchain.targets import HOST, TARGETS

from trainlet._version import __version__ as __version__

_HOME = {
    "load": "trainlet.api",
    "save": "trainlet.api",
    "quantize": "trainlet.api",
    "load_data": "trainlet.api",
    "fit": "trainlet.api",
    "evaluate": "trainlet.api",
    "validate": "trainlet.api",
    "Memory": "trainlet.api",
    "attach_head": "trainlet.frontends",
    "at_size": "trainlet.frontends",
    "UpdateScheme": "trainlet.autodiff.scheme",
    "resolve": "trainlet.autodiff.scheme",
    "differentiate": "trainlet.autodiff.walk",
    "Graph": "trainlet.ir",
    "fuse": "trainlet.passes.fuse",
    "make_plan": "trainlet.plan.arena",
    "Compiled": "trainlet.emit",
    "Passes": "trainlet.compiler",
    "compile_model": "trainlet.compiler",
    "compile_inference": "trainlet.compiler",
    "HostSession": "trainlet.session.host",
    "write_package": "trainlet.toolchain.package",
    "HOST": "trainlet.toolchain.targets",
    "TARGETS": "trainlet.toolchain.targets",
    "TrainletError": "trainlet.errors",
    "UsageError": "trainlet.errors",
}
_PACKAGES = ("measure", "plan", "select")
"""Public functions that are packages of the same name too: ``trainlet.callable``."""

__all__ = [
    "HOST",
    "TARGETS",
    "Compiled",
    "Graph",
    "HostSession",
    "Memory",
    "Passes",
    "TrainletError",
    "UpdateScheme",
    "UsageError",
    "at_size",
    "attach_head",
    "compile_inference",
    "compile_model",
    "differentiate",
    "evaluate",
    "fit",
    "fuse",
    "load",
    "load_data",
    "make_plan",
    "measure",
    "plan",
    "quantize",
    "resolve",
    "save",
    "select",
    "validate",
    "write_package",
]


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"trainlet.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'trainlet' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
