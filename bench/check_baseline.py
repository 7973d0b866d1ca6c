# SPDX-License-Identifier: Apache-2.0
"""Checks bench/float_baseline.py: the forward pass against the published test vectors, every gradient against PyTorch's
own autograd through a float64 network. Run: TRAINLET_ASSETS=... python bench/check_baseline.py"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from float_baseline import AddLayer, ConvLayer, FloatTrainer, Values, pad, qparams
from numpy.typing import NDArray
from torch.nn import functional

from trainlet.autodiff.scheme import resolve
from trainlet.frontends import load
from trainlet.ir.graph import Graph


def _vector_image(t: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    h, w, c = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return ((7 * h + 13 * w + 29 * c + 31 * t + (h * w * t) // 64) % 256 - 128).astype(np.int8)


def check_vectors(assets: Path) -> list[Mapping[str, object]]:
    """Runs the published 20-step cases. Step 0 must agree: the int8 features exactly, the loss to float32 precision.
    After that the engine rounds its gradients and this baseline does not; the cosine of the updates says how alike
    they are."""
    rows: list[Mapping[str, object]] = []
    for case in json.loads((assets / "vectors2" / "nets.json").read_text()):
        graph = load(assets / "models" / f"{case['model']}.pkl")
        scheme = resolve(case["scheme"], graph)
        trainer = FloatTrainer(graph, scheme, case["classes"], case["seed"])
        want = np.load(assets / "vectors2" / case["file"], allow_pickle=False)
        images = np.stack([_vector_image(t, graph.values[graph.inputs[0]].shape) for t in range(case["steps"])])
        cached = trainer.prefix(images)
        with torch.no_grad():
            values = trainer.run(trainer.tail_nodes, {v: t[:1].float() for v, t in cached.items()})
        features = values[trainer.features].flatten().numpy() + qparams(graph, trainer.features).zero
        lr = float(np.float32(0.1 / 256))
        start = time.perf_counter()
        steps = [trainer.train_step(cached, t, t % 10, lr) for t in range(case["steps"])]
        seconds = time.perf_counter() - start
        mine, theirs = [], []
        for i, layer in enumerate(trainer.convs):
            if layer.bias_master is None or f"b{i}" not in want:
                continue
            assert layer.bias_start is not None
            # in units of the engine's own real bias, so that no layer drowns the others
            unit = (layer.scale * layer.x.scale).numpy()
            mine.append(unit * layer.bias_master.numpy())
            theirs.append(unit * (want[f"b{i}"] - layer.bias_start.numpy()))
        a, b = np.concatenate(mine), np.concatenate(theirs)
        rows.append(
            {
                "case": case["file"],
                "features0_equal": bool(np.array_equal(features, want["features0"].reshape(-1))),
                "loss0_error": abs(steps[0].loss - float(want["loss"][0])),
                "loss_max_error": float(np.abs(np.array([s.loss for s in steps]) - want["loss"]).max()),
                "bias_update_cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
                "bias_update_slope": float(a @ b / (a @ a)),
                "head_update_error": float(np.abs(trainer.head.detach().numpy() - want["head_w"]).max()),
                "steps_per_second": case["steps"] / seconds,
            }
        )
    return rows


def check_gradients(assets: Path) -> list[Mapping[str, object]]:
    """Gradients of one image against a float64 network whose layers are plain PyTorch, with the stored activations put
    in place of its own (straight through). Relative error per trained tensor; the largest one is reported."""
    rows: list[Mapping[str, object]] = []
    for model, name in (("mcunet-5fps", "99kb"), ("mbv2-w0.35", "138kb"), ("proxyless-w0.3", "148kb")):
        graph = load(assets / "models" / f"{model}.pkl")
        trainer = FloatTrainer(graph, resolve(name, graph), 10, 17)
        cached = trainer.prefix(_vector_image(3, graph.values[graph.inputs[0]].shape)[None])
        functional.cross_entropy(trainer.logits(cached), torch.tensor([3])).backward()  # type: ignore[no-untyped-call]
        want = _plain_gradients(graph, trainer, cached, 3)
        errors = {}
        for key, g in want.items():
            layer, kind = key.rsplit(".", 1)
            conv = trainer.layers[layer]
            assert isinstance(conv, ConvLayer)
            mine = conv.weight.grad if kind == "weight" else conv.bias.grad
            assert mine is not None
            errors[key] = float((mine.double() - g).norm() / g.norm())
        worst = max(errors, key=lambda k: errors[k])
        rows.append({"model": model, "scheme": name, "tensors": len(errors), "worst": worst, "error": errors[worst]})
    return rows


def _plain_gradients(graph: Graph, trainer: FloatTrainer, cached: Values, label: int) -> Values:
    """d loss / d real weight and bias of each trained convolution, by autograd alone."""
    with torch.no_grad():
        ints = trainer.run(trainer.tail_nodes, {v: t[:1].float() for v, t in cached.items()})
    real = {v: ints[v].double() * qparams(graph, v).scale for v in trainer.cut}
    leaves: Values = {}
    for n in trainer.tail_nodes:
        out = n.outputs[0]
        layer = trainer.layers[n.name]
        ins = [real[v] for v in trainer.data_inputs(n)]
        if isinstance(layer, ConvLayer):
            scale = layer.scale.double()
            w = (layer.weight.detach().double() * scale.view(-1, 1, 1, 1)).requires_grad_(layer.weight.requires_grad)
            b = (layer.bias.detach() * scale * layer.x.scale).requires_grad_(layer.bias.requires_grad)
            leaves |= {f"{n.name}.{k}": t for k, t in (("weight", w), ("bias", b)) if t.requires_grad}
            a = layer.attrs
            y = functional.conv2d(pad(ins[0], a.pads), w, b, a.stride, 0, a.dilation, a.groups)
            if a.activation:
                q = ints[out] + layer.y.zero
                y = torch.where((q > layer.clamp[0]) & (q < layer.clamp[1]), y, y.detach())
        else:
            y = ins[0] + ins[1] if isinstance(layer, AddLayer) else ins[0].mean((2, 3), keepdim=True)
        real[out] = ints[out].double() * qparams(graph, out).scale + (y - y.detach())
    logits = functional.linear(real[trainer.features].flatten(1), trainer.head.double(), trainer.head_bias.double())
    functional.cross_entropy(logits, torch.tensor([label])).backward()  # type: ignore[no-untyped-call]
    return {k: t.grad for k, t in leaves.items() if t.grad is not None}


def main() -> None:
    """Prints one JSON object per case; exit code 1 where one fails."""
    assets = os.environ.get("TRAINLET_ASSETS")
    if not assets:
        raise SystemExit("TRAINLET_ASSETS is not set; it names the folder with models/ and vectors/")
    torch.set_num_threads(1)
    forward, gradients = check_vectors(Path(assets)), check_gradients(Path(assets))
    for row in (*forward, *gradients):
        print(json.dumps(row))
    bad = [r["case"] for r in forward if not r["features0_equal"] or float(str(r["loss0_error"])) > 1e-5]
    # a wrong factor in an update shows here: random roundings do not change its mean
    bad += [r["case"] for r in forward if not 0.7 < float(str(r["bias_update_slope"])) < 1.4]
    bad += [r["model"] for r in gradients if float(str(r["error"])) > 1e-4]
    raise SystemExit(f"differs: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
