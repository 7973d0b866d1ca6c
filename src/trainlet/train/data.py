# SPDX-License-Identifier: Apache-2.0
"""Labelled images for training: folders of image files, or arrays. Everything comes out as int8 (H, W, C) of the
model's size, q = pixel - 128.

    NAME/train/CLASS/*.jpg, NAME/val/CLASS/*.jpg          classes and files in the order of their names
    NAME.npz with x_train, y_train, x_val, y_val          x uint8 or int8 (N, H, W, C), y whole numbers from 0

What an image becomes depends on the file, the settings and, when augmented, on (seed, epoch, index): never on the
order in which images are asked for.
"""

from __future__ import annotations

import hashlib
import io
import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import ToolMissingError, UsageError
from trainlet.ir import Image
from trainlet.train.arrays import Header, read_npz
from trainlet.train.digests import file_digests, read_file

if TYPE_CHECKING:
    from PIL import Image as PilImage

RESIZE: Final = ("crop", "squeeze")
AUGMENT: Final = ("crop", "flip")
CROP_SHARE: Final = 0.875  # a crop keeps this share of the shorter side
MAX_PIXELS: Final = 50_000_000  # of an image file
MAX_SIDE: Final = 65_535  # of an image file: a row costs Pillow more than its pixels
MAX_RESIZED: Final = 1 << 22  # pixels of an image brought to size: a file far longer than wide is refused
CACHE_BYTES: Final = 4 << 30
MAX_CLASSES: Final = 65535
MAX_NAMES: Final = 16 << 20  # bytes of all names of classes in an array

# no decoder that runs another program (EPS), none for formats that are no photographs
_FORMATS: Final = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF")
_SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"))

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Draw:
    """What an augmented image is drawn from, with its index."""

    seed: int
    epoch: int


class Split(Protocol):
    """The training or the validation images."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,), each 0 .. classes - 1."""

    def name(self, index: int) -> str:
        """Where the image comes from, for messages."""

    def image(self, index: int, draw: Draw | None = None) -> Image:
        """The int8 image (H, W, C); augmented if ``draw`` is given. UsageError where a file cannot be decoded."""

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of ``indices`` that ``image`` would have to decode and then keep."""


@dataclass(frozen=True)
class Dataset:
    """Both splits. ``fingerprint`` changes with the classes, the labels and the content of the images; see the function
    of that name. ``transform`` is how the images of ``load_data`` were made."""

    classes: tuple[str, ...]
    train: Split = field(repr=False)
    val: Split = field(repr=False)
    fingerprint: str
    transform: Transform | None = None


@dataclass(frozen=True, slots=True)
class Transform:
    """How a picture becomes an image of ``shape`` (H, W, C). ``crop``: the shorter side to ceil(size / 0.875), then the
    center, or with ``augment`` crop anywhere. ``squeeze``: both sides to size, whatever the aspect; with ``augment``
    crop both to ceil(size / 0.875), then anywhere. ``augment`` flip: left and right change places in half of the draws.
    Validation images are never augmented."""

    shape: tuple[int, int, int]
    resize: str = "crop"
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.resize not in RESIZE:
            raise UsageError(f"resize {self.resize!r}: give one of {', '.join(RESIZE)}")
        for word in self.augment:
            if word not in AUGMENT:
                raise UsageError(f"augment {word!r}: give {', '.join(AUGMENT)} or both, with a comma between")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture of this size is resized to, before any crop."""
        h, w, _ = self.shape
        margin = self.resize == "crop" or "crop" in self.augment
        th, tw = (math.ceil(h / CROP_SHARE), math.ceil(w / CROP_SHARE)) if margin else (h, w)
        if self.resize == "squeeze":
            return tw, th
        if width * th <= height * tw:  # whole numbers, so that equal aspects give equal sizes
            return tw, max(th, tw * height // width)
        return max(tw, th * width // height), th

    def cut(self, pixels: Pixels, words: Sequence[int] | None) -> Pixels:
        """The (H, W, C) piece of a resized picture: its center, or the one that three 64-bit ``words`` choose."""
        h, w, _ = self.shape
        free_y, free_x = pixels.shape[0] - h, pixels.shape[1] - w
        y, x = round(free_y / 2), round(free_x / 2)
        if words is not None and "crop" in self.augment:
            y, x = words[0] % (free_y + 1), words[1] % (free_x + 1)
        piece = pixels[y : y + h, x : x + w]
        if words is not None and "flip" in self.augment and words[2] >> 63:
            piece = piece[:, ::-1]
        return np.ascontiguousarray(piece)


def load_data(path: Path, transform: Transform) -> Dataset:
    """Opens a folder of images or an .npz of arrays. Image files are decoded when they are asked for. Raises UsageError
    naming what is missing, empty or out of range; ToolMissingError without Pillow."""
    if path.is_dir():
        return _open_folder(path, transform)
    if not path.exists():
        raise UsageError(f"{path}: does not exist; give a folder with train/ and val/, or an .npz of arrays")
    if path.suffix.lower() != ".npz":
        raise UsageError(f"{path}: neither a folder with train/ and val/ nor an .npz of arrays")
    return _open_arrays(path, transform)


def fingerprint(classes: Sequence[str], images: Iterable[tuple[str, int, bytes]]) -> str:
    """What tells one data set from another: the SHA-256, in hex, over the names of the classes and the name, label and
    SHA-256 of the content of each image of both splits, in their order."""
    h = hashlib.sha256()
    for name in classes:
        h.update(f"{len(name)} {name}\n".encode())
    for name, label, digest in images:
        h.update(f"{len(name)} {name} {label}\n".encode("utf-8", "surrogateescape") + digest)
    return h.hexdigest()


def _check_names(where: str, classes: Sequence[str]) -> None:
    """A name is shown, and written as UTF-8: control characters and halves of characters have no place in it."""
    for name in classes:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise UsageError(f"{where}: the class name {name!a} has a character that is no text; rename this class")
    if len(set(classes)) != len(classes):
        name, _ = Counter(classes).most_common(1)[0]
        raise UsageError(f"{where}: the class name {name!a} is there twice; give each class its own")


def to_int8(pixels: Pixels) -> Image:
    """q = pixel - 128."""
    return (pixels ^ np.uint8(0x80)).view(np.int8)


def _words(draw: Draw | None, index: int) -> list[int] | None:
    """Three 64-bit words; the stream of a bit generator, unlike a distribution's, is the same in every numpy."""
    if draw is None:
        return None
    words: list[int] = np.random.PCG64([draw.seed, draw.epoch, index]).random_raw(3).tolist()
    return words


# --- folders ------------------------------------------------------------------------------------------------


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ToolMissingError("image files need Pillow, which is missing: pip install 'trainlet[data]'") from None
    return PIL


class _Folder:
    """One split of a folder. Decoded pictures are kept, resized but not cut where crops are drawn, up to
    ``CACHE_BYTES``."""

    def __init__(
        self, files: Sequence[Path], digests: Sequence[bytes], labels: Sequence[int], transform: Transform
    ) -> None:
        self._files = files
        self._digests = digests
        self._labels = np.array(labels, np.int64)
        self._transform = transform
        self._kept: dict[int, Pixels] = {}
        self._kept_bytes = 0

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._labels

    def name(self, index: int) -> str:
        return str(self._files[index])

    def missing(self, indices: Iterable[int]) -> list[int]:
        room = (CACHE_BYTES - self._kept_bytes) // math.prod(self._transform.shape)
        return [int(i) for i in indices if int(i) not in self._kept][: max(room, 0)]

    def image(self, index: int, draw: Draw | None = None) -> Image:
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = self._decode(index)
        return to_int8(self._transform.cut(pixels, _words(draw, index)))

    def _decode(self, index: int) -> Pixels:
        file = self._files[index]
        content = read_file(file)
        if hashlib.sha256(content).digest() != self._digests[index]:
            raise UsageError(f"{file}: has changed while this command ran; leave the images alone and start it again")
        pixels = decode(file, content, self._transform)
        if "crop" not in self._transform.augment:
            pixels = self._transform.cut(pixels, None)
        if self._kept_bytes + pixels.nbytes <= CACHE_BYTES:
            self._kept[index] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels


def _open_folder(path: Path, transform: Transform) -> Dataset:
    if transform.shape[2] not in _MODES:
        raise UsageError(f"{path}: images have 1 or 3 channels, this model takes {transform.shape[2]}; give arrays")
    _pillow()
    found = {name: _list_split(path, name) for name in ("train", "val")}
    train, val = found["train"], found["val"]
    only = [(c, "val", "train") for c in train if c not in val] + [(c, "train", "val") for c in val if c not in train]
    if only:
        name, lacks, has = only[0]
        raise UsageError(f"{path / lacks}: class {name!r} of {has} is missing; both need the same class folders")
    classes = tuple(train)
    if len(classes) < 2:
        raise UsageError(f"{path / 'train'}: {classes[0]!r} is the only class; training needs at least 2 class folders")
    if len(classes) > MAX_CLASSES:
        raise UsageError(f"{path / 'train'}: {len(classes)} classes; at most {MAX_CLASSES} are possible")
    _check_names(str(path / "train"), classes)
    plain = Transform(transform.shape, transform.resize)
    files = {name: [f for c in classes for f in groups[c]] for name, groups in found.items()}
    labels = {name: [k for k, c in enumerate(classes) for _ in groups[c]] for name, groups in found.items()}
    digests = {name: file_digests(path / name, files[name]) for name in files}
    images = [
        (file.relative_to(path).as_posix(), label, digest)
        for name in files
        for file, label, digest in zip(files[name], labels[name], digests[name], strict=True)
    ]
    train_split = _Folder(files["train"], digests["train"], labels["train"], transform)
    val_split = _Folder(files["val"], digests["val"], labels["val"], plain)
    return Dataset(classes, train_split, val_split, fingerprint(classes, images), transform)


def _list_split(path: Path, split: str) -> dict[str, list[Path]]:
    """Class name -> its image files, both in the order of their names; hidden and foreign files are passed over."""
    root = path / split
    if not root.is_dir():
        raise UsageError(f"{path}: there is no folder {split}/; images lie in {path.name}/{{train,val}}/CLASS/*.jpg")
    try:
        folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        groups = {folder.name: _list_class(folder) for folder in folders}
    except OSError as e:
        raise UsageError(f"{e.filename or root}: cannot be read ({e.strerror}); give a folder that can") from None
    if not groups:
        raise UsageError(f"{root}: there is no class folder; images lie in {path.name}/{{train,val}}/CLASS/*.jpg")
    for name, files in groups.items():
        if not files:
            kinds = " ".join(sorted(_SUFFIXES))
            raise UsageError(f"{root / name}: this class has no image ({kinds}); add some, or remove the folder")
    return groups


def _list_class(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))


_MODES: Final = {1: "L", 3: "RGB"}


def decode(path: Path, content: bytes, transform: Transform) -> Pixels:
    """Decodes the ``content`` of an image file, turned upright as its EXIF says, in 1 or 3 channels and resized as
    ``transform`` says, but not cut. Raises UsageError naming the file where it is damaged or absurdly large."""
    pil = _pillow()
    claimed = _webp_size(content)
    if claimed is not None:
        _check_size(path, *claimed, transform)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # remarks on odd metadata
            with pil.Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
                _check_size(path, picture.width, picture.height, transform)
                upright = _convert(pil.ImageOps.exif_transpose(picture), _MODES[transform.shape[2]], pil)
    except UsageError:
        raise
    except (pil.Image.DecompressionBombError, pil.Image.DecompressionBombWarning):
        raise UsageError(f"{path}: more than {MAX_PIXELS} pixels; make it smaller or remove it") from None
    except Exception as e:  # decoders raise anything from SyntaxError to struct.error on damaged files
        raise UsageError(f"{path}: cannot be decoded ({e}); mend or remove this image") from None
    size = transform.resized(*upright.size)
    if size != upright.size:
        upright = upright.resize(size, pil.Image.Resampling.BILINEAR)
    pixels = np.asarray(upright, np.uint8)
    return pixels.reshape(pixels.shape[0], pixels.shape[1], transform.shape[2])


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Width and height that the header of a WebP file claims; None for other files. Pillow takes the memory for all
    pixels before it says how many there are."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return None
    if content[12:16] == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(content[26:28], "little") & 0x3FFF, int.from_bytes(content[28:30], "little") & 0x3FFF


def _check_size(path: Path, width: int, height: int, transform: Transform) -> None:
    if not width * height:
        raise UsageError(f"{path}: {width} x {height} has no pixel; mend or remove this image")
    if width * height > MAX_PIXELS:
        raise UsageError(f"{path}: {width} x {height} is more than {MAX_PIXELS} pixels; make it smaller or remove it")
    rw, rh = transform.resized(width, height)
    if rw * rh > MAX_RESIZED:
        raise UsageError(f"{path}: {width} x {height} would become {rw} x {rh}; crop it to a usual shape or remove it")
    if max(width, height) > MAX_SIDE:
        raise UsageError(
            f"{path}: {width} x {height} has a side above {MAX_SIDE}; crop it to a usual shape or remove it"
        )


def _convert(picture: PilImage.Image, mode: str, pil: Any) -> PilImage.Image:
    """To 8-bit gray or RGB; 16-bit gray keeps its upper bits, which Pillow by itself would clip."""
    if picture.mode.startswith("I"):
        upper = np.clip(np.asarray(picture) >> 8, 0, 255).astype(np.uint8)
        picture = pil.Image.fromarray(upper)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture if picture.mode == mode else picture.convert(mode)


# --- arrays -------------------------------------------------------------------------------------------------


class _Arrays:
    """One split of an .npz."""

    def __init__(self, x: Image, y: NDArray[np.int64], transform: Transform, name: str) -> None:
        self._x = x
        self._y = y
        self._transform = transform
        self._name = name

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._y

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def missing(self, indices: Iterable[int]) -> list[int]:
        return []

    def image(self, index: int, draw: Draw | None = None) -> Image:
        return self._transform.cut(self._x[index].view(np.uint8), _words(draw, index)).view(np.int8)


def _open_arrays(path: Path, transform: Transform) -> Dataset:
    if "crop" in transform.augment:
        raise UsageError(f"{path}: arrays have the model's size, so there is nothing to crop; augment with flip")
    found = read_npz(path, _NAMES, ("classes",), lambda headers: _check_headers(path, headers, transform.shape))
    images = {s: _images(found[f"x_{s}"]) for s in ("train", "val")}
    y = {s: _labels(path, f"y_{s}", found[f"y_{s}"]) for s in images}
    classes = _array_classes(path, found.get("classes"), y["train"])
    for s, labels in y.items():
        wrong = labels[labels >= len(classes)]
        if wrong.size:
            raise UsageError(f"{path}: y_{s}: label {wrong[0]} is out of range, labels go from 0 to {len(classes) - 1}")
    empty = np.flatnonzero(np.bincount(y["train"], minlength=len(classes)) == 0)
    if empty.size:
        raise UsageError(f"{path}: y_train: class {classes[empty[0]]!r} has no image; number the classes without a gap")
    each = (
        (s, label, hashlib.sha256(x).digest()) for s in y for x, label in zip(images[s], y[s].tolist(), strict=True)
    )
    splits = [_Arrays(images[s], y[s], transform, f"{path}: x_{s}") for s in ("train", "val")]
    return Dataset(classes, splits[0], splits[1], fingerprint(classes, each), transform)


_NAMES: Final = ("x_train", "y_train", "x_val", "y_val")


def _check_headers(path: Path, headers: Mapping[str, Header], shape: tuple[int, int, int]) -> None:
    for s in ("train", "val"):
        _check_images(path, f"x_{s}", headers[f"x_{s}"], shape)
        _check_labels(path, f"y_{s}", headers[f"y_{s}"], headers[f"x_{s}"].shape[0])
    names = headers.get("classes")
    if names is None:
        return
    if len(names.shape) != 1 or names.dtype.kind != "U":
        raise UsageError(f"{path}: classes: a list of texts is expected, not {names.dtype} {names.shape}")
    if names.shape[0] > MAX_CLASSES or names.nbytes > MAX_NAMES:
        raise UsageError(f"{path}: classes: at most {MAX_CLASSES} are possible, with {MAX_NAMES >> 20} MiB of names")


def _check_images(path: Path, name: str, x: Header, shape: tuple[int, int, int]) -> None:
    if x.dtype not in (np.uint8, np.int8):
        raise UsageError(f"{path}: {name}: {x.dtype}; images are uint8 pixels, or int8 (pixel - 128)")
    if len(x.shape) != 4 or x.shape[1:] != shape:
        raise UsageError(f"{path}: {name}: shape {x.shape}; this model takes (N, {', '.join(map(str, shape))})")
    if not x.shape[0]:
        raise UsageError(f"{path}: {name}: there is no image")


def _check_labels(path: Path, name: str, y: Header, count: int) -> None:
    if len(y.shape) != 1 or y.dtype.kind not in "iu":
        raise UsageError(f"{path}: {name}: labels are whole numbers in one dimension, not {y.dtype} {y.shape}")
    if y.shape[0] != count:
        raise UsageError(f"{path}: {name}: {y.shape[0]} labels for {count} images")


def _images(x: NDArray[Any]) -> Image:
    return np.ascontiguousarray(x if x.dtype == np.int8 else to_int8(x))


def _labels(path: Path, name: str, y: NDArray[Any]) -> NDArray[np.int64]:
    wrong = y[(y < 0) | (y >= MAX_CLASSES)]
    if wrong.size:
        raise UsageError(f"{path}: {name}: label {wrong[0]} is out of range, labels go from 0 to {MAX_CLASSES - 1}")
    return y.astype(np.int64)


def _array_classes(path: Path, names: NDArray[Any] | None, y: NDArray[np.int64]) -> tuple[str, ...]:
    if names is not None and names.view(np.dtype("u4").newbyteorder(names.dtype.byteorder)).max(initial=0) > 0x10FFFF:
        raise UsageError(f"{path}: classes: a name has a character that is no text; rename this class")
    classes = tuple(map(str, range(int(y.max()) + 1) if names is None else names))
    if len(classes) < 2:
        raise UsageError(f"{path}: y_train: there is only one class; training needs at least 2")
    _check_names(f"{path}: classes", classes)
    return classes
