# SPDX-License-Identifier: Apache-2.0
"""Trains the small model that `trainlet demo` ships, on Fashion-MNIST, and writes the demo's files.

    pip install trainlet torch && apt-get install dataset-fashion-mnist
    python examples/train_small.py --out src/trainlet/demo/assets

An inverted-residual net in PyTorch -> batch norm folded -> a FLOAT graph -> calibrated and quantized to an INT8 graph,
as NAME.json and NAME.safetensors. The images that the demo trains on are left out here, and its validation images are
of the test split. README.md beside this file says more.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainlet.frontends import graph_file as irfile
from trainlet.frontends.quantize import fold_batch_norm, quantize
from trainlet.ir import Attrs
from trainlet.ir.graph import Graph, GraphBuilder, Kind, Node, Stage, Value
from trainlet.ops import Add, AvgPool, Conv2d, conv_out_hw, is_depthwise
from trainlet.reference import infer
from trainlet.train.data import to_int8

NAME = "fashion"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
STEM = 16
BLOCKS = ((16, 24, 2), (48, 24, 1), (48, 24, 1), (48, 24, 1))  # expanded and output channels, stride
FEATURES = 96
SHIPPED = 1000  # images of each split that the demo has
CALIBRATION = 512
FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_val": "t10k-images-idx3-ubyte.gz",
    "y_val": "t10k-labels-idx1-ubyte.gz",
}


# --- data -------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", raw[3], 4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def first_balanced(labels: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """The first ``count`` images with equally many of each class, ascending."""
    each = count // len(CLASSES)
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[:each] for k in range(len(CLASSES))]))


def save_images(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """An .npz with LZMA, which numpy reads; the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as z:
        for name, a in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_LZMA
            with z.open(entry, "w") as f:
                np.lib.format.write_array(f, np.ascontiguousarray(a))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the net ----------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Convolution, batch norm and perhaps ReLU6; ``layer`` is what the exported graph calls it."""

    def __init__(self, layer: str, ins: int, outs: int, kernel: int, stride: int = 1, *, relu: bool = True) -> None:
        super().__init__()
        depthwise = layer.endswith("depthwise")
        self.layer, self.relu = layer, relu
        self.conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=ins if depthwise else 1, bias=False)
        self.norm = nn.BatchNorm2d(outs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return nn.functional.relu6(y) if self.relu else y


class Block(nn.Module):
    """Inverted residual: expand (where that widens), depthwise, project, and the input added where shapes allow."""

    def __init__(self, name: str, ins: int, wide: int, outs: int, stride: int) -> None:
        super().__init__()
        self.name, self.residual = name, ins == outs and stride == 1
        expand = [] if wide == ins else [ConvNorm(f"{name}.expand", ins, wide, 1)]
        self.layers = nn.Sequential(
            *expand,
            ConvNorm(f"{name}.depthwise", wide, wide, 3, stride),
            ConvNorm(f"{name}.project", wide, outs, 1, relu=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class Net(nn.Module):
    """28 x 28 x 1 pixels from 0 to 1 -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm("stem", 1, STEM, 3, 2)
        ins, blocks = STEM, []
        for i, (wide, outs, stride) in enumerate(BLOCKS, 1):
            blocks.append(Block(f"block{i}", ins, wide, outs, stride))
            ins = outs
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNorm("last", ins, FEATURES, 1)
        self.head = nn.Linear(FEATURES, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of the images mirrored, all shifted by up to two pixels."""
    flip = torch.rand(len(x), generator=rng) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    dy, dx = (int(v) for v in torch.randint(0, 5, (2,), generator=rng))
    return padded[:, :, dy : dy + 28, dx : dx + 28]


def train(net: Net, x: NDArray[np.uint8], y: NDArray[np.uint8], args: argparse.Namespace) -> None:
    """SGD with momentum, one cycle of the rate."""
    rng = torch.Generator().manual_seed(args.seed)
    images = torch.from_numpy(x.astype(np.float32) / 255)[:, None]
    labels = torch.from_numpy(y.astype(np.int64))
    steps = args.epochs * (len(x) // args.batch)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps)
    net.train()
    for epoch in range(args.epochs):
        order, total = torch.randperm(len(x), generator=rng), 0.0
        for i in range(len(x) // args.batch):
            pick = order[i * args.batch : (i + 1) * args.batch]
            optimizer.zero_grad()
            logits = net(augment(images[pick], rng))
            loss = nn.functional.cross_entropy(logits, labels[pick], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}/{args.epochs}: loss {total / (i + 1):.4f}", flush=True)
    net.eval()


# --- export -----------------------------------------------------------------------------------------------------


def array(t: torch.Tensor) -> NDArray[np.float32]:
    """A parameter as numpy."""
    return t.detach().numpy()


class Export:
    """A trained net -> FLOAT graph, NHWC, weights OHWI."""

    def __init__(self) -> None:
        self.g = GraphBuilder(NAME)
        self.value = self.g.add(Value("input", (28, 28, 1), "f32", Kind.INPUT))

    def emit(self, op: str, name: str, inputs: tuple[str, ...], attrs: Attrs, shape: tuple[int, ...]) -> None:
        out = Value("logits" if op == "dense" else f"{name}.y", shape, "f32")
        self.value = self.g.emit(Node(op, name, name, inputs, (out.name,), attrs), out)

    def conv(self, m: ConvNorm) -> None:
        c, n = m.conv, m.norm
        norm = [array(a) for a in (n.running_mean, n.running_var, n.weight, n.bias)]
        weight, bias = fold_batch_norm(array(c.weight), None, *norm, n.eps)
        ins, pad = self.g.values[self.value].shape[2], c.padding[0]
        attrs = Conv2d(
            tuple(c.kernel_size),
            tuple(c.stride),
            (pad,) * 4,
            groups=c.groups,
            clamp=(0.0, 6.0) if m.relu else None,
            activation=m.relu,
            depthwise=is_depthwise(c.groups, ins, c.out_channels),
        )
        w = self.g.const(f"{m.layer}.weight", np.ascontiguousarray(weight.transpose(0, 2, 3, 1)), "f32")
        b = self.g.const(f"{m.layer}.bias", bias, "f32")
        hw = conv_out_hw(attrs, *self.g.values[self.value].shape[:2])
        self.emit("conv2d", m.layer, (self.value, w, b), attrs, (*hw, c.out_channels))

    def block(self, block: Block) -> None:
        entry = self.value
        for layer in block.layers:
            self.conv(layer)
        if block.residual:
            self.emit("add", f"{block.name}.add", (entry, self.value), Add(), self.g.values[entry].shape)

    def net(self, net: Net) -> Graph:
        self.conv(net.stem)
        for block in net.blocks:
            self.block(block)
        self.conv(net.last)
        h, w, c = self.g.values[self.value].shape
        self.emit("avg_pool", "pool", (self.value,), AvgPool((h, w)), (1, 1, c))
        weight = self.g.const("head.weight", array(net.head.weight), "f32")
        bias = self.g.const("head.bias", array(net.head.bias), "f32")
        self.emit("dense", "head", (self.value, weight, bias), Attrs(), (len(CLASSES),))
        return self.g.build(Stage.FLOAT, (self.value,))


def accuracy(logits: NDArray[Any], labels: NDArray[np.uint8]) -> float:
    """Share of right answers."""
    return float((logits.argmax(1) == labels).mean())


def main() -> None:
    """Trains, exports, quantizes, and writes everything with a record of how."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=0.2)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the order of sums, and so every byte, is the same on any machine of one kind
    data = {k: read_idx(args.data / f) for k, f in FILES.items()}
    x, y, x_test, y_test = (data[k] for k in FILES)
    kept = first_balanced(y, SHIPPED)
    rest = np.setdiff1d(np.arange(len(y)), kept)
    net = Net()
    train(net, x[rest], y[rest], args)

    exported = Export().net(net)
    graph = quantize(exported, to_int8(x[rest[:CALIBRATION], :, :, None]))
    with torch.no_grad():
        real = net(torch.from_numpy(x_test.astype(np.float32) / 255)[:, None]).numpy()
    pixels = x_test[..., None]
    folded = infer(exported, None, pixels[:200].astype(np.float64) / 255)
    worst = float(np.abs(folded - real[:200]).max())
    if worst > 1e-3:
        raise SystemExit(f"the exported graph differs from the net by up to {worst:g}")
    args.out.mkdir(parents=True, exist_ok=True)
    irfile.save(graph, args.out / f"{NAME}.json")
    val = first_balanced(y_test, SHIPPED)
    images = {"x_train": x[kept], "x_val": x_test[val]}
    arrays = {k: v[..., None] for k, v in images.items()} | {"y_train": y[kept], "y_val": y_test[val]}
    save_images(args.out / f"{NAME}.npz", {**arrays, "classes": np.array(CLASSES)})
    written = [args.out / f"{NAME}.{e}" for e in ("json", "safetensors", "npz")]
    record = {
        "command": shlex.join(["python", "examples/train_small.py", *sys.argv[1:]]),
        "data": "Fashion-MNIST, MIT License, https://github.com/zalandoresearch/fashion-mnist",
        "data_sha256": {f: digest(args.data / f) for f in FILES.values()},
        "seed": args.seed,
        "epochs": args.epochs,
        "training_images": len(rest),
        "test_images": len(y_test),
        "float_accuracy": accuracy(real, y_test),
        "int8_accuracy": accuracy(infer(graph, None, to_int8(pixels)), y_test),
        "parameters": sum(v.numel() for v in net.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "sha256": {f.name: digest(f) for f in written},
        "bytes": {f.name: f.stat().st_size for f in written},
    }
    (args.out / f"{NAME}.provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
