# SPDX-License-Identifier: Apache-2.0
"""Short training runs over a part of the training images, judged by the loss over the other part; the validation
images are never opened. What the frozen prefix makes of the images is computed once for each cut and shared, through
files, by all runs that train behind the same cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainlet._version import __version__
from trainlet.autodiff.scheme import UpdateScheme
from trainlet.compiler import compile_model
from trainlet.emit import graph_hash
from trainlet.errors import MismatchError, UsageError
from trainlet.frontends import attach_head
from trainlet.frontends import graph_file as irfile
from trainlet.ir import Image
from trainlet.ir.graph import Graph
from trainlet.plan.prefix import prefix_values
from trainlet.select.folder import writing
from trainlet.select.prefixes import shared
from trainlet.select.store import Result, Spec, job_key
from trainlet.session import StepInfo
from trainlet.session.host import HostSession
from trainlet.train.data import Dataset, Draw, Split, Transform, load_data
from trainlet.train.loop import default_lr, epoch_order, evaluate, learning_rate

HELD_SHARE: Final = 0.25
"""Of each class, held out of training to judge it."""
PREFIX_BYTES: Final = 2 << 30
"""A cut whose prefixes take more is computed at every step instead."""
_REVISION: Final = 1  # of what a job computes; counts up when the same spec would give another result

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Length:
    """How much work a run is: epochs over at most ``images`` training images; at most ``held`` others judge it."""

    images: int
    held: int
    epochs: int


@dataclass(frozen=True)
class Place:
    """Where a worker finds what jobs name by hash. ``graph``: a file of irfile.save, with its head; ``cache``: a folder
    for the prefixes. None of these is part of a job's key."""

    graph: str
    data: str
    resize: str
    cache: str


@dataclass(frozen=True)
class Study:
    """A model with its head, and the data that it is to learn: ``labels`` of the training images. Makes the specs of
    jobs."""

    graph: Graph
    model_hash: str
    fingerprint: str
    place: Place
    labels: tuple[int, ...]

    def judges(self, length: Length) -> int:
        """How many images judge a run."""
        return len(split_indices(np.array(self.labels), length)[1])

    def train_spec(self, scheme: UpdateScheme, length: Length, seed: int, lr: float | None = None) -> Spec:
        """A training run; its result is in ``train_job``."""
        return {
            **self._common("train", length, seed),
            "scheme": {"biases": list(scheme.biases), "weights": dict(scheme.weights), "bits": scheme.bits},
            "epochs": length.epochs,
            "lr": default_lr(scheme) if lr is None else lr,
        }

    def gradient_spec(self, length: Length, seed: int, count: int) -> Spec:
        """Squared gradients over ``count`` images, after the head alone was trained; see ``cheap.gradient_job``."""
        head = UpdateScheme("head")
        return {
            **self._common("gradients", length, seed),
            "epochs": length.epochs,
            "lr": default_lr(head),
            "count": count,
        }

    def _common(self, kind: str, length: Length, seed: int) -> dict[str, Any]:
        return {
            "kind": kind,
            "version": __version__,
            "revision": _REVISION,
            "model": self.model_hash,
            "data": self.fingerprint,
            "resize": self.place.resize,
            "images": length.images,
            "held": length.held,
            "held_share": HELD_SHARE,
            "seed": seed,
        }


def open_study(model: Graph, data: Path, resize: str, cache: Path) -> Study:
    """``model`` is of stage INT8, without the head; ``cache`` is made. Raises UsageError for data that cannot be used,
    UnsupportedError for a model that cannot get a head."""
    dataset = load_data(data, Transform(_shape(model), resize))
    graph = attach_head(model, len(dataset.classes))
    model_hash = graph_hash(graph)
    path = cache / f"model-{model_hash[:16]}.json"
    with writing(path):
        cache.mkdir(parents=True, exist_ok=True)
        irfile.save(graph, path)
    place = Place(str(path.resolve()), str(data.resolve()), resize, str(cache.resolve()))
    split_indices(dataset.train.labels, Length(1 << 62, 1 << 62, 1))
    return Study(graph, model_hash, dataset.fingerprint, place, tuple(dataset.train.labels.tolist()))


def _shape(graph: Graph) -> tuple[int, int, int]:
    h, w, c = graph.image.shape
    return h, w, c


# --- images -----------------------------------------------------------------------------------------------------


def split_indices(labels: NDArray[np.int64], length: Length) -> tuple[Indices, Indices]:
    """Which images train and which judge: disjoint, ascending, each class in about its share, one image of each at
    least; the same for every seed of a run, so that runs are compared over the same images. UsageError where a class
    has a single image."""
    words = np.random.PCG64([0x5E1EC7, len(labels)]).random_raw(len(labels))
    fit: list[Indices] = []
    held: list[Indices] = []
    for k in np.unique(labels):
        mine = np.flatnonzero(labels == k)
        if len(mine) < 2:
            raise UsageError(f"class {k} has {len(mine)} training image; selection needs 2, one of them to judge by")
        mine = mine[np.argsort(words[mine], kind="stable")]
        part = min(max(1, round(HELD_SHARE * len(mine))), len(mine) - 1)
        held.append(mine[:part])
        fit.append(mine[part:])
    return _at_most(fit, length.images), _at_most(held, length.held)


def _at_most(groups: Sequence[Indices], count: int) -> Indices:
    """About ``count`` of all, from each group its share, rounded up."""
    total = sum(map(len, groups))
    share = min(1.0, count / total)
    return np.sort(np.concatenate([g[: max(1, math.ceil(share * len(g)))] for g in groups]))


@dataclass(frozen=True)
class Part:
    """Some images of a split, as a split. ``split`` is the name of the whole."""

    whole: Split
    indices: Indices
    split: str = "train"

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.whole.labels[self.indices]

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def image(self, index: int, draw: Draw | None = None) -> Image:
        return self.whole.image(int(self.indices[index]), draw)

    def missing(self, indices: Iterable[int]) -> list[int]:
        return [i for i in indices if self.whole.missing([int(self.indices[i])])]


@dataclass(frozen=True)
class _Prefixed:
    """Trains and infers the images of a part, from their stored prefixes where there are any."""

    session: HostSession
    part: Part
    prefixes: NDArray[np.uint8] | None

    def step(self, index: int, lr: float) -> StepInfo:
        label = int(self.part.labels[index])
        if self.prefixes is None:
            return self.session.train_step(self.part.image(index), label, lr)
        return self.session.train_step_cached(self.prefixes[index].tobytes(), label, lr)

    def logits(self, index: int) -> NDArray[np.float32]:
        if self.prefixes is None:
            return self.session.infer(self.part.image(index))
        return self.session.infer_cached(self.prefixes[index].tobytes())


def feed(session: HostSession, part: Part, place: Place, spec: Spec) -> _Prefixed:
    """The images of ``part`` for ``session``."""
    return _Prefixed(session, part, _prefixes(session, part, place, spec))


def _prefixes(session: HostSession, part: Part, place: Place, spec: Spec) -> NDArray[np.uint8] | None:
    """(N, bytes): what the frozen prefix leaves of each image; None without one, or where it would be too large."""
    graph = session.compiled.graph
    values = [graph.values[v] for v in prefix_values(graph)]
    nbytes = sum(v.nbytes for v in values)
    if not nbytes or nbytes * len(part.indices) > PREFIX_BYTES:
        return None
    # The same values of the same model and images have the same bytes, whatever trains behind them.
    key = job_key(
        {
            **{k: spec[k] for k in ("version", "revision", "model", "data", "resize")},
            "values": [[v.name, list(v.shape), v.dtype] for v in values],
            "split": part.split,
            "images": hashlib.sha256(part.indices.astype("<i8").tobytes()).hexdigest(),
        }
    )
    return shared(Path(place.cache), key, (len(part.indices), nbytes), partial(_rows, session, part, place, spec))


def _rows(session: HostSession, part: Part, place: Place, spec: Spec) -> Iterator[bytes]:
    for i in range(len(part.indices)):
        yield session.prefix(part.image(i))
    check_data(place, spec)


# --- the work of a job ------------------------------------------------------------------------------------------


@lru_cache(2)
def load_place(place: Place) -> tuple[Graph, str, Dataset]:
    """Model, its hash, and data; kept by a worker from job to job."""
    graph = irfile.load(Path(place.graph))
    return graph, graph_hash(graph), load_data(Path(place.data), Transform(_shape(graph), place.resize))


def check_data(place: Place, spec: Spec) -> None:
    """UsageError where the images are no longer those that the job was made for."""
    graph, _, _ = load_place(place)
    if load_data(Path(place.data), Transform(_shape(graph), place.resize)).fingerprint != spec["data"]:
        raise UsageError(
            f"{place.data}: images have changed while runs were under way; start the same command again, and leave the "
            "images alone meanwhile"
        )


def open_job(place: Place, spec: Spec) -> tuple[Graph, Part, Part]:
    """Model, training and judging images of a job. UsageError where model, data or trainlet are not those that the job
    was made for."""
    graph, model_hash, dataset = load_place(place)
    mine = {"version": __version__, "revision": _REVISION, "model": model_hash, "data": dataset.fingerprint}
    for name, value in mine.items():
        if spec[name] != value:
            raise UsageError(
                f"a worker has another {name}, {str(value)[:16]} instead of {str(spec[name])[:16]}; let all workers "
                "use the same trainlet, model and data, and leave these alone while runs are under way"
            )
    length = Length(spec["images"], spec["held"], spec["epochs"])
    fit, held = split_indices(dataset.train.labels, length)
    return graph, Part(dataset.train, fit), Part(dataset.train, held)


def train(source: _Prefixed, spec: Spec) -> float:
    """Trains the session of ``source`` from factory weights; returns the mean loss of the last epoch. MismatchError
    where it diverges."""
    labels, epochs, seed = source.part.labels, spec["epochs"], spec["seed"]
    steps = len(labels)
    source.session.reset(seed)
    loss = 0.0
    for epoch in range(epochs):
        loss = 0.0
        for n, i in enumerate(epoch_order(labels, seed, epoch, None).tolist()):
            loss += source.step(i, learning_rate(epoch * steps + n, epochs * steps, spec["lr"])).loss
    return loss / steps


def train_job(place: Place, spec: Spec) -> Result:
    """A training run. Its result: ``loss`` and ``accuracy`` over the images that judge, ``train_loss`` of the last
    epoch, planned ``arena_bytes`` and ``state_bytes``; where it diverged, ``loss`` is null and ``problem`` says why."""
    graph, fit, held = open_job(place, spec)
    s = spec["scheme"]
    compiled = compile_model(graph, UpdateScheme("run", tuple(s["biases"]), s["weights"], s["bits"]))
    session = HostSession(compiled)
    planned = {"arena_bytes": session.arena_bytes, "state_bytes": session.state_bytes}
    sources = [feed(session, part, place, spec) for part in (fit, held)]
    try:
        last = train(sources[0], spec)
        found = evaluate(session, held, feed=sources[1])
    except MismatchError as e:
        return {"loss": None, "accuracy": None, "train_loss": None, "problem": str(e), **planned}
    if any(s.prefixes is None for s in sources):  # then images were read meanwhile
        check_data(place, spec)
    return {"loss": found.loss, "accuracy": found.accuracy, "train_loss": last, "problem": "", **planned}
