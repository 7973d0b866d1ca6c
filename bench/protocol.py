# SPDX-License-Identifier: Apache-2.0
"""What the benches share: where assets are, how images are read, how an engine is opened."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainlet import __version__
from trainlet.autodiff.scheme import resolve
from trainlet.compiler import compile_model
from trainlet.frontends import attach_head
from trainlet.ir.graph import Graph
from trainlet.session.host import HostSession
from trainlet.toolchain.host import FLAGS, NATIVE, compiler_version, find_compiler
from trainlet.train.data import Dataset, Transform, load_data

# how pictures become square: the person set is stored squeezed already, so a crop would cut people off
RESIZE = {"voc07_person": "squeeze"}


@dataclass(frozen=True)
class Images:
    """Images (N, H, W, 3) int8, q = pixel - 128, and their labels."""

    images: NDArray[np.int8]
    labels: NDArray[np.int64]


def assets() -> Path:
    """The folder with models/ and data/. Exits where TRAINLET_ASSETS is not set."""
    found = os.environ.get("TRAINLET_ASSETS")
    if not found:
        raise SystemExit("TRAINLET_ASSETS is not set; it names the folder that holds models/ and data/")
    return Path(found)


def resize_of(data: str) -> str:
    """How the pictures of a data set are brought to size."""
    return RESIZE.get(data, "crop")


def open_data(data: str, graph: Graph) -> Dataset:
    """A set in TRAINLET_ASSETS/data, no image decoded yet."""
    h, w, c = graph.values[graph.inputs[0]].shape
    return load_data(assets() / "data" / data, Transform((h, w, c), resize_of(data)))


def read_images(data: str, graph: Graph) -> tuple[Images, Images]:
    """Training and validation images of a set, as ``trainlet train`` reads them."""
    found = open_data(data, graph)
    train, val = (
        Images(np.stack([s.image(i) for i in range(len(s.labels))]), s.labels) for s in (found.train, found.val)
    )
    return train, val


def open_engine(graph: Graph, scheme: str, classes: int, bits: int) -> HostSession:
    """Compiles the model with a new head and loads the host library."""
    return HostSession(compile_model(attach_head(graph, classes), resolve(scheme, graph, bits)))


def describe_machine() -> dict[str, object]:
    """CPU, cores, compiler and its flags, versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [s.split(":", 1)[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "compiler": compiler_version(*find_compiler()),
        "flags": " ".join((*FLAGS, *NATIVE)),
        "python": platform.python_version(),
        "trainlet": __version__,
    }
