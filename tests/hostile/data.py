# SPDX-License-Identifier: Apache-2.0
"""Hostile data: .npz and .npy files, and folders of images. Most cases read everything through the library, which is
quick; the others train."""

from __future__ import annotations

import ast
import functools
import io
import json
import os
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from hostile.case import Attack, Kind, Place
from hostile.commands import run_commands
from hostile.mutate import NAMES, Array, change_array, change_bytes, change_tree, often
from trainlet.errors import TrainletError

SHAPE: Final = (8, 8, 3)


def _read_all(path: Path, rng: random.Random) -> Attack:
    """Opens the data and asks for every image, as training does."""
    resize, augment = rng.choice(("crop", "squeeze")), rng.choice(((), (), ("flip",), ("crop",), ("crop", "flip")))
    seed = rng.randrange(1 << 31)

    def attack() -> str:
        from trainlet.train.data import Draw, Transform, load_data

        try:
            found = load_data(path, Transform(SHAPE, resize, augment))
            for split, draw in ((found.train, Draw(seed, 1)), (found.val, None)):
                for i, label in enumerate(split.labels):
                    image = split.image(i, draw)
                    assert image.shape == SHAPE
                    assert image.dtype == np.int8
                    assert 0 <= label < len(found.classes)
        except TrainletError as e:
            return type(e).__name__
        return "read"

    return attack


def _train(path: Path, place: Place) -> Attack:
    words = ("train", "--model", place.base / "model.json", "--scheme", "head", "--epochs", 1, "--limit", 4)
    return lambda: run_commands((*words, "--data", path, "--out", place.out))


def _use(rng: random.Random, place: Place, path: Path, trains: float) -> Attack:
    return _train(path, place) if often(rng, trains) else _read_all(path, rng)


def _prepare_model(base: Path) -> None:
    from graphs import int8_chain

    from trainlet.frontends import graph_file

    graph_file.save(int8_chain(), base / "model.json")


# --- arrays -----------------------------------------------------------------------------------------------------


def _prepare_arrays(base: Path) -> None:
    _prepare_model(base)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, *SHAPE), dtype=np.uint8)
    arrays = {"x_train": x[:8], "y_train": np.arange(8) % 4, "x_val": x[8:], "y_val": np.arange(4)}
    np.savez(base / "arrays.npz", **arrays, classes=np.array(["a", "b", "c", "d"]))


@functools.cache
def _arrays(base: Path) -> dict[str, Array]:
    with np.load(base / "arrays.npz") as f:
        return dict(f)


def _npy(rng: random.Random, a: Array, plain: bool) -> bytes:
    """An array as a file; its header changed where not ``plain``."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = None if plain else rng.choice((None, (1, 0), (2, 0), (3, 0)))
        np.lib.format.write_array(out, np.asarray(a), version, allow_pickle=True)
    raw = out.getvalue()
    if plain:
        return raw
    if often(rng, 0.4):
        return change_bytes(rng, raw)
    return _header(rng, raw)


_DESCR: Final = (
    "|O",
    "|V4",
    "<U3",
    "<f8",
    "<i8",
    ">i2",
    "|b1",
    "<M8[s]",
    "x",
    "",
    [["a", "<i4"]],
    "|i1",
    "<c16",
    "|S0",
)
_SHAPES: Final = ((), (0,), (2**40,), (-1,), (2**63, 8, 8, 3), (8, 8, 8, 3), (10**6, 8, 8, 3), "x", None, (8.5,))


def _header(rng: random.Random, raw: bytes) -> bytes:
    """Another text in the header, which Python's own literals are read from."""
    at, form = (10, "<H") if raw[6] == 1 else (12, "<I")
    size = struct.unpack(form, raw[8:at])[0]
    body = raw[at + size :]
    fields = ast.literal_eval(raw[at : at + size].decode("latin1"))
    fields["shape"] = list(fields["shape"])
    how = rng.choice(("tree", "descr", "shape", "text"))
    if how == "tree":
        fields = change_tree(rng, fields)
    if how == "descr":
        fields["descr"] = rng.choice(_DESCR)
    if how == "shape":
        fields["shape"] = rng.choice(_SHAPES)
    if isinstance(fields, dict) and isinstance(fields.get("shape"), list):
        fields["shape"] = tuple(fields["shape"])
    text = repr(fields)
    if how == "text":
        text = rng.choice(
            ("{", "(" * 5000, "[" * 200, "1 " * 30, "'" * 99, "{'a': 1}", "\0" * 20, "9" * 5000, "-" * 9000)
        )
    line = text.encode("utf-8", "surrogatepass")[:60000] + b"\n"
    return raw[:8] + struct.pack(form, len(line)) + line + body


_METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def _zipped(rng: random.Random, files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", rng.choice(_METHODS)) as z:
        warnings.simplefilter("ignore")  # a name twice
        for name, raw in files.items():
            z.writestr(name, raw)
        if often(rng, 0.1):
            z.writestr(rng.choice(("x_train.npy", "../x.npy", "/x.npy", "x" * 300, ".")), b"x" * 10)
        if often(rng, 0.03):
            z.writestr("x_train.npy", _bomb(), zipfile.ZIP_DEFLATED, 1)
    return out.getvalue()


@functools.cache
def _bomb() -> bytes:
    """An array of 64 MB of zeros, which deflate to nothing; its header says that it is far larger."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.zeros((1 << 18, *SHAPE), np.uint8))
    return out.getvalue().replace(b"(262144, 8, 8, 3)", b"(99999999,8, 8,3)")


def _make_npz(rng: random.Random, place: Place) -> Attack:
    arrays = dict(_arrays(place.base))
    how = rng.choice(("arrays", "arrays", "header", "zip", "zip", "names"))
    changed = rng.choice(sorted(arrays))
    if how == "arrays":
        arrays[changed] = change_array(rng, arrays[changed])
    if how == "names":
        arrays["classes"] = np.array([rng.choice(NAMES)[:200] for _ in range(rng.choice((0, 1, 4, 4, 5)))], "U")
    files = {f"{k}.npy": _npy(rng, a, how != "header" or k != changed) for k, a in arrays.items()}
    if often(rng, 0.05):
        files.pop(f"{changed}.npy")
    raw = _zipped(rng, files)
    path = place.work / "arrays.npz"
    path.write_bytes(change_bytes(rng, raw) if how == "zip" else raw)
    return _use(rng, place, path, 0.04)


def _make_npy(rng: random.Random, place: Place) -> Attack:
    """One array where a set of them is expected, under either name."""
    arrays = _arrays(place.base)
    path = place.work / rng.choice(("x.npy", "arrays.npz", "x.NPZ"))
    path.write_bytes(_npy(rng, arrays[rng.choice(sorted(arrays))], plain=often(rng, 0.3)))
    return _use(rng, place, path, 0.1)


# --- images -----------------------------------------------------------------------------------------------------

_FORMATS: Final = ("png", "jpg", "bmp", "gif", "webp", "ppm", "pgm", "tif")


def _prepare_images(base: Path) -> None:
    from PIL import Image

    _prepare_model(base)
    rng = np.random.default_rng(0)
    for i, suffix in enumerate(_FORMATS):
        pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        (picture.convert("L") if suffix == "pgm" else picture).save(base / f"picture{i}.{suffix}")
    Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).convert("P").save(
        base / "palette.png", exif=b"Exif\0\0"
    )
    Image.fromarray(rng.integers(0, 65536, (9, 9), dtype=np.uint16)).save(base / "deep.png")


@functools.cache
def _pictures(base: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(base.iterdir()) if f.suffix not in (".json", ".safetensors")}


def _png(width: int, height: int, data: bytes, depth: int = 8, color: int = 2) -> bytes:
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


_SIDES: Final = (0, 1, 7, 999, 7000, 8192, 65535, 65536, 50_000_000, 2**31 - 1, 2**32 - 1)


def _huge(rng: random.Random, raw: bytes) -> bytes:
    width, height = rng.choice(_SIDES), rng.choice(_SIDES)
    if often(rng, 0.7):
        return _png(width, height, zlib.compress(bytes(1 << 16)), rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 4, 6)))
    return f"P6 {width} {height} {rng.choice((0, 1, 255, 65535, 10**9))}\n".encode() + bytes(4096)


def _other(rng: random.Random, raw: bytes) -> bytes:
    return rng.choice((b"", b"\0", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", raw[: len(raw) // 2]))


def _place_fifo(path: Path) -> None:
    os.mkfifo(path)


def _place_loop(path: Path) -> None:
    path.symlink_to(path.name)


def _place_folder(path: Path) -> None:
    path.mkdir()


def _place_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _place_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


_ODD: Final[tuple[Callable[[Path], None], ...]] = (_place_fifo, _place_loop, _place_folder, _place_zero, _place_nothing)
_FILE_NAMES: Final = (b"\xff\xfe.png", b"a\nb.png", b"-o.png", b" .png", b"$(x).png", b"\xc3\xa4.png",
                      b"a" * 250 + b".png",
                      b"\x1b[31m.png", b"[bold].png", b".png", b"x.PNG", b"%s%n.png")  # fmt: skip


def _make_images(rng: random.Random, place: Place) -> Attack:
    sound = _pictures(place.base)
    names = sorted(sound)
    folder = place.work / "set"
    for split in ("train", "val"):
        for c in ("a", "b"):
            (folder / split / c).mkdir(parents=True)
            name = rng.choice(names)
            (folder / split / c / name).write_bytes(sound[name])
    where = folder / rng.choice(("train", "val")) / rng.choice(("a", "b"))
    how = rng.choice(("bytes",) * 8 + ("huge", "huge", "other", "odd", "odd", "odd", "names", "names", "folders"))
    if how in _CHANGES:
        name = rng.choice(names)
        (where / name).write_bytes(_CHANGES[how](rng, sound[name]))
    if how == "odd":
        rng.choice(_ODD)(where / "odd.png")
    if how == "names":
        raw = rng.choice(_FILE_NAMES)
        Path(os.fsdecode(os.fsencode(where) + b"/" + raw)).write_bytes(sound["picture0.png"])
    if how == "folders":
        _change_folders(rng, folder, sound["picture0.png"])
    return _use(rng, place, folder, 0.04)


_CHANGES: Final = {"bytes": change_bytes, "huge": _huge, "other": _other}


def _change_folders(rng: random.Random, folder: Path, raw: bytes) -> None:
    name = rng.choice((b"\xff", b"a\nb", b"..a", b"$(x)", b"c" * 200, b"[red]", b" ", b"-o"))
    for split in rng.choice((("train",), ("train", "val"))):
        made = Path(os.fsdecode(os.fsencode(folder / split) + b"/" + name))
        made.mkdir()
        (made / "x.png").write_bytes(raw)
    if often(rng, 0.2):
        (folder / "val" / "again").symlink_to("..")
    if often(rng, 0.2):
        (folder / "train" / "note.json").write_text(json.dumps({"a": 1}))


KINDS: Final = (
    Kind("npz", _prepare_arrays, _make_npz, compiles=True),
    Kind("npy", _prepare_arrays, _make_npy, compiles=True),
    Kind("images", _prepare_images, _make_images, compiles=True),
)
