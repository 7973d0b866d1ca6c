# SPDX-License-Identifier: Apache-2.0
"""Folders and arrays of images: what comes out, and what is refused with which words."""

from __future__ import annotations

import builtins
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from trainlet.errors import ToolMissingError, UsageError
from trainlet.train import arrays as arrays_module
from trainlet.train import data as data_module
from trainlet.train import digests as digests_module
from trainlet.train.data import Dataset, Draw, Transform, load_data, to_int8

SHAPE = (8, 8, 3)
SMALL = Transform(SHAPE)


def picture(seed: int, width: int = 12, height: int = 10) -> PilImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PilImage.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; 3 and 2 training images, 1 and 1 validation images, and files that are no images."""
    root = tmp_path / "set"
    seed = 0
    for split, counts in (("train", {"dog": 2, "cat": 3}), ("val", {"dog": 1, "cat": 1})):
        for name, count in counts.items():
            place = root / split / name
            place.mkdir(parents=True)
            for i in range(count):
                picture(seed).save(place / f"{i}.png")
                seed += 1
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / "cat" / "._0.png").write_bytes(b"x")
    (root / "train" / ".hidden").mkdir()
    return root


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (7, *SHAPE), dtype=np.uint8)
    found = {"x_train": x[:4], "y_train": np.array([0, 1, 2, 1]), "x_val": x[4:], "y_val": np.array([2, 0, 1])}
    return {k: v for k, v in (found | changes).items() if v is not None}


def save(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays(**changes))
    return path


def all_images(dataset: Dataset, draw: Draw | None = None) -> list[bytes]:
    return [dataset.train.image(i, draw).tobytes() for i in range(len(dataset.train.labels))]


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_gives_sorted_classes_and_files(folder: Path) -> None:
    found = load_data(folder, SMALL)
    assert found.classes == ("cat", "dog")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert [Path(found.train.name(i)).relative_to(folder / "train").as_posix() for i in range(5)] == [
        "cat/0.png",
        "cat/1.png",
        "cat/2.png",
        "dog/0.png",
        "dog/1.png",
    ]
    image = found.train.image(3)
    assert image.dtype == np.int8
    assert image.shape == SHAPE


def test_pixels_are_shifted_by_128() -> None:
    assert to_int8(np.array([0, 127, 128, 255], np.uint8)).tolist() == [-128, -1, 0, 127]


def test_crop_resizes_the_shorter_side_and_takes_the_center(tmp_path: Path) -> None:
    t = Transform((128, 128, 3))
    assert t.resized(200, 160) == (183, 147)
    assert t.resized(160, 200) == (147, 183)
    assert t.resized(64, 64) == (147, 147)
    pixels = np.arange(10 * 14 * 3, dtype=np.uint16).reshape(10, 14, 3).astype(np.uint8)
    assert np.array_equal(SMALL.cut(pixels, None), pixels[1:9, 3:11])


def test_the_image_is_what_pillow_resizes_and_crops(folder: Path) -> None:
    path = folder / "train" / "cat" / "0.png"  # 12 x 10 -> 12 x 10: ceil(8 / 0.875) = 10
    expected = np.asarray(PilImage.open(path))[1:9, 2:10].astype(np.int16) - 128
    assert np.array_equal(load_data(folder, SMALL).train.image(0), expected)


def test_squeeze_resizes_both_sides(folder: Path) -> None:
    path = folder / "train" / "cat" / "0.png"
    expected = np.asarray(PilImage.open(path).resize((8, 8), PilImage.Resampling.BILINEAR)).astype(np.int16) - 128
    assert np.array_equal(load_data(folder, Transform(SHAPE, "squeeze")).train.image(0), expected)
    assert Transform(SHAPE, "squeeze", ("crop",)).resized(100, 50) == (10, 10)


def test_augmented_images_do_not_depend_on_the_order_of_asking(folder: Path) -> None:
    t = Transform(SHAPE, "crop", ("crop", "flip"))
    forward = load_data(folder, t)
    backward = load_data(folder, t)
    draw = Draw(3, 1)
    found = {i: backward.train.image(i, draw).tobytes() for i in (4, 2, 0, 3, 1)}
    assert all_images(forward, draw) == [found[i] for i in range(5)]
    assert all_images(forward, draw) != all_images(forward, Draw(3, 2))
    assert all_images(forward, draw) != all_images(forward, Draw(4, 1))
    assert all_images(forward) == all_images(load_data(folder, SMALL))


def test_a_flip_happens_in_about_half_of_the_draws(folder: Path) -> None:
    found = load_data(folder, Transform(SHAPE, "crop", ("flip",)))
    plain = found.train.image(0)
    flips = 0
    for epoch in range(100):
        image = found.train.image(0, Draw(0, epoch))
        flipped = not np.array_equal(image, plain)
        assert not flipped or np.array_equal(image, plain[:, ::-1])
        flips += flipped
    assert 35 <= flips <= 65


def test_random_crops_reach_all_corners(folder: Path) -> None:
    found = load_data(folder, Transform(SHAPE, "crop", ("crop",)))
    seen = {found.train.image(0, Draw(0, e)).tobytes() for e in range(300)}
    assert len(seen) == (12 - 8 + 1) * (10 - 8 + 1)


def test_validation_images_are_never_augmented(folder: Path) -> None:
    augmented = load_data(folder, Transform(SHAPE, "crop", ("crop", "flip"))).val
    assert np.array_equal(augmented.image(0, Draw(0, 0)), load_data(folder, SMALL).val.image(0))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_other_modes_become_rgb(folder: Path, mode: str) -> None:
    source = picture(1)
    gray = PilImage.fromarray(np.asarray(source.convert("L")).astype(np.uint16) << 8)
    other = gray if mode == "I;16" else source.convert(mode)
    path = folder / "train" / "cat" / "0.png"
    path.unlink()
    other.save(path.with_suffix(".tiff"))
    image = load_data(folder, SMALL).train.image(0)
    assert image.shape == SHAPE
    if mode == "I;16":
        expected = np.asarray(source.convert("L"))[1:9, 2:10].astype(np.int16) - 128
        assert np.array_equal(image, np.repeat(expected[:, :, None], 3, axis=2))


def test_a_model_of_one_channel_gets_gray(folder: Path) -> None:
    assert load_data(folder, Transform((8, 8, 1))).train.image(0).shape == (8, 8, 1)
    with pytest.raises(UsageError, match="images have 1 or 3 channels, this model takes 4; give arrays"):
        load_data(folder, Transform((8, 8, 4)))


def test_exif_turns_an_image_upright(folder: Path) -> None:
    source = picture(5, 10, 12)
    exif = PilImage.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    path = folder / "train" / "cat" / "0.png"
    source.save(path, exif=exif)
    upright = np.asarray(source.transpose(PilImage.Transpose.ROTATE_270))
    assert np.array_equal(load_data(folder, SMALL).train.image(0), upright[1:9, 2:10].astype(np.int16) - 128)


def test_missing_lists_what_is_not_decoded_yet(folder: Path) -> None:
    split = load_data(folder, SMALL).train
    split.image(1)
    assert split.missing([0, 1, 2]) == [0, 2]


def test_a_full_cache_changes_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_images(load_data(folder, SMALL))
    monkeypatch.setattr(data_module, "CACHE_BYTES", 2 * 8 * 8 * 3)
    found = load_data(folder, SMALL)
    assert found.train.missing(range(5)) == [0, 1]
    assert all_images(found) == expected == all_images(found)
    assert found.train.missing(range(5)) == []


def test_the_fingerprint_changes_with_the_files(folder: Path) -> None:
    before = load_data(folder, SMALL).fingerprint
    assert load_data(folder, Transform(SHAPE, "squeeze")).fingerprint == before
    picture(9).save(folder / "train" / "cat" / "9.png")
    assert load_data(folder, SMALL).fingerprint != before


def bitmap(path: Path, seed: int) -> None:
    """An image of a fixed size in bytes, whatever its pixels."""
    picture(seed).save(path)


@pytest.fixture
def bitmaps(folder: Path) -> Path:
    """The same folder with bitmaps."""
    for n, file in enumerate(sorted(folder.rglob("?.png"))):
        bitmap(file.with_suffix(".bmp"), n)
        file.unlink()
    return folder


def test_the_fingerprint_changes_with_the_pixels_alone(bitmaps: Path) -> None:
    before = load_data(bitmaps, SMALL).fingerprint
    path = bitmaps / "val" / "dog" / "0.bmp"
    size, content = path.stat().st_size, path.read_bytes()
    bitmap(path, 99)
    assert path.stat().st_size == size
    assert load_data(bitmaps, SMALL).fingerprint != before
    path.write_bytes(content)
    assert load_data(bitmaps, SMALL).fingerprint == before


def test_the_fingerprint_changes_with_classes_and_labels(bitmaps: Path) -> None:
    found = {load_data(bitmaps, SMALL).fingerprint}
    for split in ("train", "val"):
        (bitmaps / split / "dog").rename(bitmaps / split / "elk")
    found.add(load_data(bitmaps, SMALL).fingerprint)
    (bitmaps / "train" / "elk" / "1.bmp").rename(bitmaps / "train" / "cat" / "3.bmp")
    found.add(load_data(bitmaps, SMALL).fingerprint)
    assert len(found) == 3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which even small and new files are remembered."""
    monkeypatch.setenv("TRAINLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests_module, "CACHED_FROM", 0)
    monkeypatch.setattr(digests_module, "FRESH", 0)
    return tmp_path / "cache"


def test_files_are_read_once_until_they_change(bitmaps: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = digests_module.read_file

    def reading(path: Path) -> bytes:
        read.append(path)
        return real(path)

    monkeypatch.setattr(digests_module, "read_file", reading)
    first = load_data(bitmaps, SMALL).fingerprint
    assert len(read) == 7
    assert load_data(bitmaps, SMALL).fingerprint == first
    assert len(read) == 7
    path = bitmaps / "train" / "cat" / "1.bmp"
    times = path.stat()
    bitmap(path, 99)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and tar set it
    second = load_data(bitmaps, SMALL).fingerprint
    assert second != first
    assert read[7:] == [path]
    for file in cache.glob("digests-*"):
        file.write_text('{"cat/0.bmp": [[1, 2, 3], "ab"]}')
    assert load_data(bitmaps, SMALL).fingerprint == second
    assert len(read) == 8 + 7


def test_a_file_that_may_still_change_is_not_remembered(
    bitmaps: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "FRESH", 10**12)
    load_data(bitmaps, SMALL)
    assert not list(cache.glob("digests-*"))


def test_as_many_folders_are_remembered_as_are_used(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests_module, "MAX_CACHES", 2)
    for n in range(3):
        folder = folder.rename(folder.with_name(f"set{n}"))
        load_data(folder, SMALL)
    assert len(list(cache.glob("digests-*"))) == 2


def test_an_image_that_changes_under_way_is_noticed(bitmaps: Path) -> None:
    found = load_data(bitmaps, SMALL).train
    bitmap(bitmaps / "train" / "cat" / "0.bmp", 99)
    with pytest.raises(UsageError, match=r"cat/0\.bmp: has changed while this command ran; leave the images alone"):
        found.image(0)


# --- folders that are refused -------------------------------------------------------------------------------


def remove_class(folder: Path, split: str) -> None:
    for f in (folder / split / "dog").iterdir():
        f.unlink()
    (folder / split / "dog").rmdir()


def empty_class(folder: Path) -> None:
    for f in (folder / "train" / "dog").iterdir():
        f.unlink()


def one_class(folder: Path) -> None:
    remove_class(folder, "train")
    remove_class(folder, "val")


def no_class(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    (folder / "train").mkdir()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no val": (
        lambda f: (f / "val").rename(f / "test"),
        r"there is no folder val/; images lie in set/\{train,val\}/CLASS",
    ),
    "no train": (lambda f: (f / "train").rename(f / "x"), "there is no folder train/"),
    "no class": (no_class, "train: there is no class folder"),
    "one class": (one_class, "'cat' is the only class; training needs at least 2"),
    "empty class": (empty_class, r"train/dog: this class has no image \(.*add some, or remove the folder"),
    "class only in train": (lambda f: remove_class(f, "val"), "val: class 'dog' of train is missing"),
    "class only in val": (lambda f: remove_class(f, "train"), "train: class 'dog' of val is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused(folder: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(folder)
    with pytest.raises(UsageError, match=message):
        load_data(folder, SMALL)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def webp_header(kind: bytes, content: bytes) -> bytes:
    """A WebP that claims a size and holds nothing."""
    chunk = kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk + bytes(20)


BAD_FILES = {
    "no image": (b"this is no image", "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    "no pixels": (png_header(9, 9), "cannot be decoded"),
    "large": (png_header(8000, 8000), "8000 x 8000 is more than 50000000 pixels"),
    "larger": (png_header(12000, 12000), "more than 50000000 pixels; make it smaller or remove it"),
    "bomb": (png_header(60000, 60000), "more than 50000000 pixels; make it smaller or remove it"),
    "webp": (
        webp_header(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 10826, 16336)),
        "10826 x 16336 is more than 50000000 pixels",
    ),
    "webp without loss": (
        webp_header(b"VP8L", b"\x2f" + struct.pack("<I", 9999 | 8888 << 14)),
        "10000 x 8889 is more than 50000000 pixels",
    ),
    "webp of parts": (
        webp_header(b"VP8X", bytes(4) + (65535).to_bytes(3, "little") + (16383).to_bytes(3, "little")),
        "65536 x 16384 is more than 50000000 pixels",
    ),
    "thread": (png_header(1, 2_000_000), "1 x 2000000 would become 10 x 20000000; crop it"),
}


def test_a_thread_to_be_squeezed_is_refused(folder: Path) -> None:
    """It has few enough pixels, and becomes small; but each of its rows has a pointer."""
    (folder / "train" / "dog" / "x.png").write_bytes(png_header(1, 65_536))
    split = load_data(folder, Transform(SHAPE, "squeeze")).train
    with pytest.raises(UsageError, match=r"x\.png: 1 x 65536 has a side above 65535; crop it"):
        split.image(len(split.labels) - 1)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(folder: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    path = folder / "train" / "dog" / "1.png"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as e:
        load_data(folder, SMALL).train.image(4)
    assert str(path) in str(e.value)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(f"/proc/self/fd/{os.open(path.parent, os.O_RDONLY)}/{path.name}")  # the name of a socket is short


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "this is no regular file; remove it"),
    "folder": (Path.mkdir, "this is no regular file; remove it"),
    "socket": (a_socket, "this is no regular file; remove it"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "this is no regular file; remove it"),
    "link to nothing": (lambda p: p.symlink_to("nothing"), "cannot be read .*; mend or remove this file"),
    "link to itself": (lambda p: p.symlink_to(p), "cannot be read .*; mend or remove this file"),
    "large": (lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_WRONLY), 1 << 20), "more than 0 MiB"),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_image_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, message = NO_FILES[case]
    monkeypatch.setattr(digests_module, "MAX_FILE", 1 << 16)
    make(folder / "train" / "dog" / "x.png")
    with pytest.raises(UsageError, match=rf"dog/x\.png: .*{message}"):
        load_data(folder, SMALL)


def test_a_fifo_of_arrays_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.npz")
    with pytest.raises(UsageError, match=r"set\.npz: this is no regular file"):
        load_data(tmp_path / "set.npz", SMALL)


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"\x1b[2J"])
def test_a_class_whose_name_is_no_text_is_refused(folder: Path, name: bytes) -> None:
    for split in ("train", "val"):
        (folder / split / "dog").rename(folder / split / os.fsdecode(name))
    with pytest.raises(
        UsageError, match=r"train: the class name .* has a character that is no text; rename this class"
    ):
        load_data(folder, SMALL)


def test_a_file_whose_name_is_no_text_is_an_image_as_any(folder: Path) -> None:
    (folder / "train" / "dog" / "1.png").rename(folder / "train" / "dog" / os.fsdecode(b"caf\xe9.png"))
    assert len(all_images(load_data(folder, SMALL))) == 5


def test_a_truncated_jpeg_is_named(folder: Path) -> None:
    path = folder / "train" / "dog" / "1.jpg"
    picture(0, 64, 64).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UsageError, match=r"dog/1\.jpg: cannot be decoded .*truncated.*mend or remove"):
        load_data(folder, SMALL).train.image(4)


def test_without_pillow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ToolMissingError, match=r"pip install 'trainlet\[data\]'"):
        load_data(folder, SMALL)


@pytest.mark.parametrize(("name", "message"), [("nothing", "does not exist"), ("set.csv", "neither a folder")])
def test_other_paths_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "set.csv").write_text("x")
    with pytest.raises(UsageError, match=message):
        load_data(tmp_path / name, SMALL)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UsageError, match="resize 'stretch': give one of crop, squeeze"):
        Transform(SHAPE, "stretch")
    with pytest.raises(UsageError, match="augment 'rotate': give crop, flip or both"):
        Transform(SHAPE, "crop", ("rotate",))


# --- arrays -------------------------------------------------------------------------------------------------


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    found = load_data(save(tmp_path), SMALL)
    assert found.classes == ("0", "1", "2")
    assert found.train.labels.tolist() == [0, 1, 2, 1]
    assert np.array_equal(found.train.image(1), arrays()["x_train"][1].astype(np.int16) - 128)
    assert found.val.name(2).endswith("set.npz: x_val[2]")


def test_int8_arrays_and_class_names(tmp_path: Path) -> None:
    x = to_int8(arrays()["x_train"])
    found = load_data(save(tmp_path, x_train=x, classes=np.array(["a", "b", "c"])), SMALL)
    assert found.classes == ("a", "b", "c")
    assert np.array_equal(found.train.image(0), x[0])


def test_arrays_can_be_flipped(tmp_path: Path) -> None:
    found = load_data(save(tmp_path), Transform(SHAPE, "crop", ("flip",)))
    plain = found.train.image(0)
    images = [found.train.image(0, Draw(0, e)) for e in range(20)]
    assert any(np.array_equal(i, plain[:, ::-1]) for i in images)
    assert any(np.array_equal(i, plain) for i in images)


X = np.zeros((4, *SHAPE), np.uint8)
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"y_val": None}, "the array y_val is missing; give x_train, y_train, x_val, y_val"),
    "float images": ({"x_train": X.astype(np.float32)}, "x_train: float32; images are uint8 pixels, or int8"),
    "other shape": ({"x_train": X[:, :7]}, r"x_train: shape \(4, 7, 8, 3\); this model takes \(N, 8, 8, 3\)"),
    "no channel axis": ({"x_train": X[..., 0]}, r"x_train: shape \(4, 8, 8\)"),
    "no image": ({"x_val": X[:0], "y_val": np.zeros(0, np.int64)}, "x_val: there is no image"),
    "float labels": ({"y_train": np.zeros(4)}, "y_train: labels are whole numbers in one dimension, not float64"),
    "too few labels": ({"y_train": np.array([0, 1])}, "y_train: 2 labels for 4 images"),
    "negative label": ({"y_train": np.array([0, 1, -1, 2])}, "y_train: label -1 is out of range, labels go from 0"),
    "label out of range": ({"y_val": np.array([0, 1, 7])}, "y_val: label 7 is out of range, labels go from 0 to 2"),
    "a gap": ({"y_train": np.array([0, 3, 1, 1])}, "y_train: class '2' has no image"),
    "one class": ({"y_train": np.zeros(4, np.int64), "y_val": np.zeros(3, np.int64)}, "only one class"),
    "huge label": ({"y_train": np.array([0, 1, 2**40, 2])}, "label 1099511627776 is out of range"),
    "bad names": ({"classes": np.arange(3)}, "classes: a list of texts is expected"),
    "names too few": ({"classes": np.array(["a", "b"])}, "label 2 is out of range, labels go from 0 to 1"),
    "objects": ({"x_train": np.array([None, {}], dtype=object)}, "cannot be read .*; write it with numpy.savez"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_are_refused(tmp_path: Path, case: str) -> None:
    changes, message = BAD_ARRAYS[case]
    with pytest.raises(UsageError, match=message):
        load_data(save(tmp_path, **changes), SMALL)


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    content = path.read_bytes()
    for piece in (b"", b"PK\x03\x04", content[: len(content) // 2], b"x" * 500):
        path.write_bytes(piece)
        with pytest.raises(UsageError, match=r"set\.npz: cannot be read"):
            load_data(path, SMALL)


def test_too_many_arrays_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays_module, "MAX_ARRAYS", 100)
    with pytest.raises(UsageError, match="bytes of arrays; at most"):
        load_data(save(tmp_path), SMALL)


def test_arrays_have_nothing_to_crop(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to crop; augment with flip"):
        load_data(save(tmp_path), Transform(SHAPE, "crop", ("crop",)))
