# SPDX-License-Identifier: Apache-2.0
"""What every session refuses in the same words: images of another shape, and the statuses that C returns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainlet.emit import Compiled
from trainlet.errors import MismatchError, UsageError
from trainlet.session import Inputs, Targets

BAD_ARGUMENT = 2
_STATUS = {
    BAD_ARGUMENT: (UsageError, "label {label} is out of range: the head has classes 0 to {last}"),
    3: (UsageError, "the memory is smaller than the model's arena ({arena} bytes) or state ({state} bytes)"),
    4: (UsageError, "the arena or the state is not aligned to 4 bytes"),
    5: (UsageError, "the learning rate {lr} is negative, not a finite number, or too large for a layer's scale"),
    6: (MismatchError, "a logit or a feature gradient is not a finite number, and nothing has changed; lower the rate"),
    7: (UsageError, "the image was not fed row by row from the first to the last row"),
    8: (UsageError, "the saved state is damaged or belongs to another model or scheme"),
}  # fmt: skip


def class_count(compiled: Compiled) -> int:
    """Classes of the head."""
    return compiled.graph.values[compiled.graph.outputs[0]].size


def check_status(compiled: Compiled, status: int, label: int = 0, lr: float = 0.0) -> None:
    """Raises what a tl_status other than TL_OK (0) means."""
    if status == 0:
        return
    error, text = _STATUS[status]
    sizes = {"arena": compiled.plan.arena_bytes, "state": compiled.layout.nbytes}
    raise error(text.format(label=label, last=class_count(compiled) - 1, lr=lr, **sizes))


def need_compiled(compiled: object) -> Compiled:
    """The argument; UsageError where it is no compiled model."""
    if not isinstance(compiled, Compiled):
        raise UsageError(f"a session runs what compile_model gives, not {type(compiled).__name__} {compiled!r:.60}")
    return compiled


def check_rate(lr: object) -> None:
    """UsageError where it is no number; its range is the C's to check."""
    if isinstance(lr, bool) or not isinstance(lr, int | float | np.floating | np.integer):
        raise UsageError(f"the learning rate is a number, not {type(lr).__name__} {lr!r:.60}")


def check_seed(seed: object) -> None:
    """UsageError where the C would take another number for it."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:
        raise UsageError(f"seed {seed!r:.60}: give a whole number from 0 to {(1 << 32) - 1}")


def check_label(compiled: Compiled, label: int) -> None:
    """UsageError where the head has no such class."""
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        raise UsageError(f"the target is one whole number, the class, not {type(label).__name__} {label!r:.60}")
    if not 0 <= label < class_count(compiled):
        check_status(compiled, BAD_ARGUMENT, label)


def one_input(compiled: Compiled, inputs: Inputs) -> NDArray[np.generic]:
    """The array of a model's one input; UsageError where others are given."""
    found: object = _only("input", compiled.graph.inputs, inputs) if isinstance(inputs, Mapping) else inputs
    if not isinstance(found, np.ndarray):
        shape = "x".join(map(str, compiled.graph.image.shape))
        raise UsageError(f"the image is an array, int8 {shape}, or a mapping to one, not {type(found).__name__}")
    return found


def one_label(compiled: Compiled, targets: Targets) -> int:
    """The class that is the one target of a training step; UsageError where something else is given."""
    if not isinstance(targets, Mapping):
        check_label(compiled, targets)
        return int(targets)
    label = np.asarray(_only("target", compiled.graph.interface.targets, targets))
    if label.size != 1 or label.dtype.kind not in "iu":
        raise UsageError(f"the target is one whole number, the class, not {label.dtype} {label.shape}")
    return int(label.item())


def _only(role: str, names: tuple[str, ...], given: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    if set(given) != set(names) or len(names) != 1:
        raise UsageError(f"the {role}s are {', '.join(names) or 'none'}, not {', '.join(given) or 'none'}")
    return given[names[0]]


def check_image(image: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The image in C order; UsageError where it is not int8 of this shape."""
    if image.dtype != np.int8 or image.shape != shape:
        want = "x".join(map(str, shape))
        given = "x".join(map(str, image.shape))
        raise UsageError(f"the image is {image.dtype} {given}; the model reads int8 {want}")
    return np.ascontiguousarray(image, np.int8)


def check_prefix(prefix: bytes, want: int) -> None:
    """UsageError where a stored prefix is not one of this model."""
    if len(prefix) != want or not want:
        raise UsageError(f"a stored prefix of this model has {want} bytes, not {len(prefix)}")
