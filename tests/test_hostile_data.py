# SPDX-License-Identifier: Apache-2.0
"""Damaged arrays and image files, some thousands of them: nothing but a UsageError comes out, in bounded memory and
time. ``python tests/test_hostile_data.py SECONDS`` goes on for longer, from another seed each time."""

from __future__ import annotations

import io
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from trainlet.errors import UsageError
from trainlet.train.data import Transform, decode, load_data

SHAPE = (8, 8, 3)
SMALL = Transform(SHAPE)
IMAGES = Path("set/train/cat/0.png")


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (7, *SHAPE), dtype=np.uint8)
    names = np.array(["a", "b", "c"])
    return {"x_train": x[:4], "y_train": [0, 1, 2, 1], "x_val": x[4:], "y_val": [2, 0, 1], "classes": names}


def packed(method: int) -> bytes:
    """An .npz whose arrays are packed by a method of zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as z:
        for name, array in arrays().items():
            content = io.BytesIO()
            np.save(content, np.asarray(array))
            z.writestr(f"{name}.npy", content.getvalue())
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """An image in each format that is read, and some of odd modes."""
    source = PilImage.fromarray(np.random.default_rng(1).integers(0, 256, (10, 12, 3), dtype=np.uint8))
    gray = PilImage.fromarray(np.arange(120, dtype=np.uint16).reshape(10, 12) << 8)
    exif = PilImage.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[PilImage.Image, dict[str, Any]]] = {
        **{f: (source, {}) for f in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "PPM", "TIFF")},
        "PNG P": (source.convert("P"), {"transparency": 0}),
        "PNG 16": (gray, {}),
        "TIFF LZW": (source, {"compression": "tiff_lzw"}),
        "JPEG EXIF": (source, {"exif": exif}),
    }
    found = {}
    for name, (picture, options) in made.items():
        file = io.BytesIO()
        picture.save(file, name.split()[0], **options)
        found[name] = file.getvalue()
    return found


def mutants(good: bytes, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Copies with some bytes changed, cut out, doubled or moved, or cut short."""
    for _ in range(count):
        bad = bytearray(good)
        for _ in range(int(rng.integers(1, 5))):
            at, n = int(rng.integers(len(bad) + 1)), int(rng.integers(1, 9))
            what = int(rng.integers(6))
            if what < 3:
                bad[at : at + n] = rng.bytes(n)
            elif what == 3:
                del bad[at : at + n]
            elif what == 4:
                bad[at:at] = bad[at : at + n]
            else:
                bad[at : at + 4] = struct.pack("<I", (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)[int(rng.integers(4))])
        yield bytes(bad[: int(rng.integers(len(bad) + 1))] if rng.integers(8) == 0 else bad)


def outcome(work: Callable[[], object]) -> bool:
    """Whether it was refused; anything but UsageError is a fault and goes on up."""
    try:
        work()
    except UsageError as e:
        str(e).encode("utf-8", "backslashreplace")
        return True
    return False


def attack_arrays(path: Path, seed: int, count: int) -> int:
    """How many of ``count`` damaged .npz for each method of packing were refused."""
    rng = np.random.default_rng(seed)
    refused = 0
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        for bad in mutants(packed(method), rng, count):
            path.write_bytes(bad)
            refused += outcome(lambda: load_data(path, SMALL).train.image(0))
    return refused


def attack_pictures(seed: int, count: int) -> int:
    """How many of ``count`` damaged images of each kind were refused."""
    rng = np.random.default_rng(seed)
    refused = 0
    for good in pictures().values():
        for bad in mutants(good, rng, count):
            refused += outcome(lambda bad=bad: decode(IMAGES, bad, SMALL))  # type: ignore[misc]
    return refused


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        (tmp_path / "good.npz").write_bytes(packed(method))
        assert load_data(tmp_path / "good.npz", SMALL).classes == ("a", "b", "c")
    assert 700 < attack_arrays(tmp_path / "set.npz", 0, 250) <= 1000


def test_damaged_images_are_refused() -> None:
    for good in pictures().values():
        assert decode(IMAGES, good, SMALL).shape[2] == 3
    assert 500 < attack_pictures(0, 200) < 2200


# --- arrays that lie about themselves -----------------------------------------------------------------------


def npy(header: str, content: bytes, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") + b"\n"
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + content


def lying(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    """An .npz some of whose members are these bytes."""
    with zipfile.ZipFile(path, "w", method) as z:
        for name, array in arrays().items():
            content = io.BytesIO()
            np.save(content, np.asarray(array))
            z.writestr(f"{name}.npy", members.get(name, content.getvalue()))
    return path


def header(descr: str = "'|u1'", shape: str = "(4, 8, 8, 3)", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}"


PIXELS = bytes(4 * 192)
LIES: dict[str, dict[str, bytes]] = {
    "more images than bytes": {"x_train": npy(header(shape="(400000000, 8, 8, 3)"), PIXELS)},
    "fewer": {"x_train": npy(header(shape="(3, 8, 8, 3)"), PIXELS)},
    "a negative number of images": {"x_train": npy(header(shape="(-4, 8, 8, 3)"), PIXELS)},
    "a number of many digits": {"x_train": npy(header(shape=f"(1{'0' * 5000}, 8, 8, 3)"), PIXELS)},
    "a shape that is no tuple": {"x_train": npy(header(shape="'abcd'"), PIXELS)},
    "objects": {"x_train": npy(header("'|O'"), PIXELS)},
    "texts of no letters": {"classes": npy(header("'<U0'", "(1000000000000,)"), b"")},
    "elements of no bytes": {"x_train": npy(header("'|V0'", "(1000000000000, 8, 8, 3)"), b"")},
    "many names": {"classes": npy(header("'<U1'", "(1000000,)"), bytes(4000000))},
    "records": {"x_train": npy(header("[('a', '|u1')]"), PIXELS)},
    "another version": {"x_train": npy(header(), PIXELS, b"\x02\x00")},
    "a header that never ends": {"x_train": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(1 << 20)},
    "brackets without end": {"x_train": npy("(" * 2000, PIXELS)},
    "no dictionary": {"x_train": npy("[1, 2]", PIXELS)},
    "an odd token": {"x_train": npy("{'descr': \x00 '''", PIXELS)},
    "half a character": {"classes": npy(header("'<U1'", "(3,)"), struct.pack("<3I", 97, 98, 0xD800))},
    "no character": {"classes": npy(header("'<U1'", "(3,)"), struct.pack("<3I", 97, 98, 0x7FFFFFFF))},
    "a character that moves the cursor": {"classes": npy(header("'<U1'", "(3,)"), struct.pack("<3I", 97, 98, 27))},
    "one name twice": {"classes": npy(header("'<U1'", "(3,)"), struct.pack("<3I", 97, 98, 97))},
    "times for labels": {"y_train": npy(header("'<m8[s]'", "(4,)"), bytes(32))},
    "no header": {"x_train": b""},
    "half a header": {"x_train": npy(header(), b"")[:40]},
}


@pytest.mark.parametrize("case", LIES)
def test_arrays_that_lie_are_refused_in_little_memory(tmp_path: Path, case: str) -> None:
    path = lying(tmp_path / "set.npz", **LIES[case])
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(UsageError, match=r"set\.npz: "):
            load_data(path, SMALL)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        assert time.monotonic() - began < 10
    finally:
        tracemalloc.stop()


def test_arrays_in_the_order_of_columns_are_read_right(tmp_path: Path) -> None:
    x = arrays()["x_train"]
    content = io.BytesIO()
    np.save(content, np.asfortranarray(x))
    found = load_data(lying(tmp_path / "set.npz", x_train=content.getvalue()), SMALL).train
    assert np.array_equal(found.image(2), x[2].astype(np.int16) - 128)


def test_packers_that_allocate_what_a_file_says_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x_train: packed in a way that is not read; write it with numpy\.savez"):
        load_data(lying(tmp_path / "set.npz", zipfile.ZIP_BZIP2), SMALL)
    path = lying(tmp_path / "set.npz", zipfile.ZIP_LZMA)
    assert load_data(path, SMALL).classes == ("a", "b", "c")
    good = path.read_bytes()
    at = good.index(b"x_train.npy") + len(b"x_train.npy") + 5  # behind version, length and one byte of parameters
    assert int.from_bytes(good[at : at + 4], "little") == 8 << 20
    path.write_bytes(good[:at] + b"\xff\xff\xff\xff" + good[at + 4 :])
    with pytest.raises(UsageError, match="x_train: packed in a way that is not read"):
        load_data(path, SMALL)


if __name__ == "__main__":
    end, seed, done, refused = time.monotonic() + float(sys.argv[1]), int(time.time()), 0, 0
    while time.monotonic() < end:
        refused += attack_arrays(Path("hostile.npz"), seed, 200) + attack_pictures(seed, 200)
        done, seed = done + 200 * (4 + len(pictures())), seed + 1
    print(f"{done} damaged files, {refused} refused, the others read")
