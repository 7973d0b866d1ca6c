# SPDX-License-Identifier: Apache-2.0
"""``python -m hostile.quantise FLOAT.json DATA.npz OUT``: the import of a float graph, as a command to kill."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from trainlet.frontends import graph_file
from trainlet.frontends.quantize import quantize


def main(model: Path, data: Path, out: Path) -> None:
    """Calibrates with the training images and writes the integer graph into ``out``."""
    with np.load(data) as arrays:
        images = (arrays["x_train"] ^ np.uint8(0x80)).view(np.int8)
    out.mkdir(exist_ok=True)
    graph_file.save(quantize(graph_file.load(model), images), out / "quantized.json")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
