# SPDX-License-Identifier: Apache-2.0
"""Prefixes that runs share: what is damaged or of other images is not used, and images that change are noticed."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain
from PIL import Image as PilImage
from separable import write_separable

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.errors import UsageError
from trainlet.select import prefixes
from trainlet.select.cheap import gradient_job
from trainlet.select.runs import Length, load_place, open_study, train_job
from trainlet.select.store import job_key

SHORT = Length(60, 24, 2)
STEM, DEPTHWISE, PROJECT = "stem", "block.depthwise", "block.project"

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "a bit of the checksum": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    "zeros": lambda raw: bytes(len(raw)),
    "zeros with their own checksum": lambda raw: hashlib.sha256(bytes(len(raw) - 32)).digest() + bytes(len(raw) - 32),
    "an end cut off": lambda raw: raw[:-7],
    "an end added": lambda raw: raw + b"more",
    "nothing": lambda raw: b"",
}


@pytest.mark.parametrize("damage", [*DAMAGE, "one of other images"])
def test_a_damaged_or_foreign_prefix_is_made_again(tmp_path: Path, damage: str) -> None:
    rows = [bytes([i, i + 1, i + 2]) for i in range(5)]
    made: list[str] = []

    def make(key: str) -> Callable[[], list[bytes]]:
        return lambda: made.append(key) or rows  # type: ignore[func-returns-value]

    def read(key: str) -> bytes:
        return prefixes.shared(tmp_path, key, (5, 3), make(key)).tobytes()

    keys = "a" * 64, "b" * 64
    assert read(keys[0]) == read(keys[0]) == b"".join(rows)
    assert made == [keys[0]]
    path = next(tmp_path.glob("*.bin"))
    raw = path.read_bytes()
    if damage in DAMAGE:
        path.write_bytes(DAMAGE[damage](raw))
    else:
        read(keys[1])
        path.write_bytes((tmp_path / f"prefix-{keys[1][:32]}.bin").read_bytes())
    made.clear()
    assert read(keys[0]) == b"".join(rows)
    assert made == [keys[0]]
    assert path.read_bytes() == raw
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_names_the_prefix_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(f: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefixes.os, "fsync", full)
    with pytest.raises(UsageError, match=r"prefix-kkk\.bin: cannot be written \(No space left .* kept: make room"):
        prefixes.shared(tmp_path, "kkk", (1, 3), lambda: [b"abc"])
    assert [f.name for f in tmp_path.iterdir()] == ["prefix-kkk.lock"]


def test_images_that_change_while_runs_are_under_way_are_noticed(tmp_path: Path) -> None:
    data = write_separable(tmp_path / "data.npz")
    study = open_study(int8_chain(), data, "crop", tmp_path / "cache")
    specs = [
        study.train_spec(UpdateScheme("behind a prefix", (PROJECT,), {PROJECT: 0.5}), SHORT, 0),
        study.train_spec(UpdateScheme("without one", (STEM, DEPTHWISE, PROJECT), {STEM: 1.0}), SHORT, 0),
        study.gradient_spec(SHORT, 0, 4),
    ]
    load_place(study.place)
    write_separable(data, seed=1)
    for spec, job in zip(specs, (train_job, train_job, gradient_job), strict=True):
        with pytest.raises(UsageError, match=r"data\.npz: images have changed while runs were under way"):
            job(study.place, spec)
    assert not list((tmp_path / "cache").glob("*.bin")), "nothing is kept of it"


def test_changed_images_are_other_jobs_and_other_prefixes(tmp_path: Path) -> None:
    data = write_separable(tmp_path / "data.npz")
    scheme = UpdateScheme("x", (PROJECT,), {PROJECT: 0.5})
    keys = []
    for seed in (0, 1):
        write_separable(data, seed=seed)
        study = open_study(int8_chain(), data, "crop", tmp_path / "cache")
        keys.append(job_key(study.train_spec(scheme, SHORT, 0)))
        load_place.cache_clear()
        train_job(study.place, study.train_spec(scheme, SHORT, 0))
    assert keys[0] != keys[1]
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 4


def test_pixels_that_change_within_files_of_one_size_are_other_jobs(tmp_path: Path) -> None:
    """BMP, as a microcontroller's camera writes it: every image has the same size."""
    keys = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        for i in range(16):
            folder = tmp_path / "set" / ("val" if i >= 12 else "train") / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            PilImage.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.bmp")
        study = open_study(int8_chain(), tmp_path / "set", "crop", tmp_path / "cache")
        keys.append(job_key(study.train_spec(UpdateScheme("head"), SHORT, 0)))
    assert keys[0] != keys[1]
