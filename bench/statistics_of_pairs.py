# SPDX-License-Identifier: Apache-2.0
"""Paired comparison of classifiers over several runs, with two 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Pairs = Mapping[tuple[str, int], tuple[NDArray[np.bool_], NDArray[np.bool_]]]

# two-sided 95 % points of Student's t for 1..30 degrees of freedom
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def compare(pairs: Pairs, draws: int = 10_000, seed: int = 0) -> dict[str, object]:
    """``pairs`` maps (data set, seed) to (correct, correct of the reference) over that set's validation images.

    ``difference`` is in points, pooled over all images and runs. ``images_interval`` is a bootstrap over validation
    images, stratified by set; an image keeps its runs together, because its outcomes under several seeds are alike.
    ``runs_interval`` is a paired t over runs, weighted equally, and None where there is only one: it knows that a run
    as a whole can be lucky, and is centered on ``mean_of_runs``."""
    sets: dict[str, list[NDArray[np.float64]]] = {}
    for (data, _), (mine, reference) in pairs.items():
        if mine.shape != reference.shape:
            raise ValueError(f"{data}: {mine.size} and {reference.size} images cannot be paired")
        sets.setdefault(data, []).append(mine.astype(float) - reference)
    runs = [100 * float(d.mean()) for group in sets.values() for d in group]
    images = sum(d.size for group in sets.values() for d in group)
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for group in sets.values():
        per_image = np.stack(group).sum(0)
        values, counts = np.unique(per_image, return_counts=True)
        # a bootstrap sample of values that take few levels is a multinomial draw
        total += rng.multinomial(per_image.size, counts / per_image.size, draws) @ values
    low, high = np.quantile(100 * total / images, [0.025, 0.975])
    mean = float(np.mean(runs))
    half = None
    if len(runs) > 1:
        t = T95[min(len(runs) - 1, len(T95)) - 1]
        half = t * float(np.std(runs, ddof=1)) / math.sqrt(len(runs))
    return {
        "difference": 100 * float(sum(d.sum() for group in sets.values() for d in group)) / images,
        "images_interval": [float(low), float(high)],
        "mean_of_runs": mean,
        "runs_interval": None if half is None else [mean - half, mean + half],
        "pairs": len(runs),
        "images": images,
    }
