# SPDX-License-Identifier: Apache-2.0
"""Small images that the small graphs of ``graphs.py`` can learn to tell apart, but not with their head alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_separable(path: Path, count: int = 160, classes: int = 4, seed: int = 0) -> Path:
    """An .npz of (8, 8, 3) images: a class is a direction of a wave and its color, over noise. Returns the path."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", count), ("val", 4 * classes)):
        labels = np.arange(n) % classes
        h, w = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
        phase = rng.uniform(0, 2 * np.pi, n)[:, None, None]
        along = np.where((labels % 2 == 0)[:, None, None], h, w)
        wave = 70 * np.sin(along * 1.6 + phase)
        pixels = rng.normal(128, 25, (n, 8, 8, 3))
        pixels[..., 0] += wave
        pixels[..., 2] += np.where((labels < classes // 2)[:, None, None], wave, -wave)
        arrays |= {f"x_{split}": np.clip(pixels, 0, 255).astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **arrays)
    return path
