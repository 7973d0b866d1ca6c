# SPDX-License-Identifier: Apache-2.0
"""Sparse update: which biases, which weights and which of their input channels train, in how many bits.

Layers are named as in ``Node.layer``. The head always trains and is not part of a scheme.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from trainlet.errors import UsageError
from trainlet.frontends.common import features, trunk
from trainlet.ir import Graph, Node
from trainlet.ops import OPS, Conv2d, No
from trainlet.ops.roles import is_trainable, trains

FORMAT: Final = "trainlet.scheme"
VERSION: Final = 1
FRACTION_BITS: Final = MappingProxyType({8: 0, 12: 4, 16: 8})
MAX_FILE: Final = 1 << 20
MAX_NAME: Final = 200

_FIELDS: Final = ("format", "version", "name", "bits", "biases", "weights")


@dataclass(frozen=True)
class UpdateScheme:
    """What trains. ``biases`` are layers whose bias trains; ``weights`` maps a layer to the share 0 < r <= 1 of its
    input channels whose weights train; ``bits`` (8, 12 or 16) is the width of a trained weight in memory. ``origin``
    says in words where the scheme comes from and takes no part in comparisons."""

    name: str
    biases: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    bits: int = 8
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_bits(self.name, self.bits)
        twice = _twice(self.biases)
        if twice:
            raise UsageError(f"scheme {self.name!r}: bias of {twice} is named twice; name it once")
        for layer, ratio in self.weights.items():
            if not _is_number(ratio) or not 0 < ratio <= 1:
                raise UsageError(
                    f"scheme {self.name!r}: {layer}: ratio {ratio!r:.40} is not above 0 and at most 1; leave out "
                    "a layer whose weights do not train"
                )
        object.__setattr__(self, "weights", MappingProxyType({k: float(v) for k, v in self.weights.items()}))

    @property
    def fraction_bits(self) -> int:
        """Bits behind the int8 of a trained weight: 0, 4 or 8."""
        return FRACTION_BITS[self.bits]

    def trains(self, operand: str) -> Collection[str]:
        """The layers whose parameter of that name trains: ``bias`` or ``weight``."""
        return {"bias": self.biases, "weight": self.weights}.get(operand, ())

    def to_json(self) -> str:
        """The scheme as a JSON document that ``from_json`` reads."""
        content = (FORMAT, VERSION, self.name, self.bits, list(self.biases), dict(self.weights))
        return json.dumps(dict(zip(_FIELDS, content, strict=True)), indent=2) + "\n"


def _twice(names: Iterable[str]) -> str | None:
    """The first name that comes more than once."""
    return next((k for k, n in Counter(names).items() if n > 1), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_bits(name: str, bits: object) -> None:
    if isinstance(bits, bool) or bits not in FRACTION_BITS:
        raise UsageError(
            f"scheme {name!r}: {bits!r} bits; a trained weight has {_list(map(str, FRACTION_BITS), 'or')} bits"
        )


def _list(items: Iterable[str], last: str = "and") -> str:
    """a, b and c"""
    *head, tail = items
    return f"{', '.join(head)} {last} {tail}" if head else tail


def _hint(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), 3)
    return f" (did you mean {_list(close, 'or')}?)" if close else ""


# --- the layers of a graph ----------------------------------------------------------------------------------


def trainable_layers(graph: Graph) -> dict[str, Node]:
    """The nodes with parameters before the features, by layer, in order: those a scheme may name."""
    found = [n for n in trunk(graph) if is_trainable(n)]
    layers = {n.layer: n for n in found}
    if len(layers) < len(found):
        raise ValueError(f"{graph.name}: a front end gave two trainable nodes the same layer name")
    return layers


def weight_axis(node: Node) -> int:
    """The axis of a trainable node's weight along which a ratio selects channels. UsageError where none can be
    selected."""
    rule = next((p.channels for p in OPS[node.op].params if p.operand == "weight"), No("it has no weight"))
    if isinstance(rule, No):
        raise UsageError(f"{node.layer}: no share of its weights can train, since {rule.why}; leave them out")
    return rule.axis(node.attrs)


def _unknown(scheme: str, layer: str, graph: Graph, layers: Mapping[str, Node]) -> UsageError:
    """The error for a layer that a scheme may not name."""
    where = f"scheme {scheme!r}: {layer}"
    if layer in ("head", "classifier"):
        return UsageError(f"{where}: the head always trains and takes the classifier's place; leave it out")
    other = next((n for n in graph.nodes if n.layer == layer), None)
    if other is not None:
        return UsageError(f"{where}: this layer ({other.op}) has nothing that a scheme can train; leave it out")
    by_node = {n.name: n.layer for n in layers.values()}
    names = (*layers,) or ("none",)
    hint = f" (did you mean {by_node[layer]}?)" if layer in by_node else _hint(layer, layers)
    return UsageError(
        f"{where}: {graph.name} has no such layer{hint}; its {len(layers)} trainable layers go from "
        f"{names[0]} to {names[-1]}"
    )


def check_scheme(scheme: UpdateScheme, graph: Graph) -> UpdateScheme:
    """The same scheme with its layers in the order of ``graph``. Raises UsageError naming the first layer that the
    graph does not have, that has nothing to train, or whose ratio selects no channel."""
    layers = trainable_layers(graph)
    for operand in ("bias", "weight"):
        for layer in scheme.trains(operand):
            if layer not in layers or not trains(layers[layer], operand):
                raise _unknown(scheme.name, layer, graph, layers)
    for layer, ratio in scheme.weights.items():
        node = layers[layer]
        channels = graph.values[node["weight"]].shape[weight_axis(node)]
        _count(channels, ratio, f"scheme {scheme.name!r}: {layer}")
    return replace(
        scheme,
        biases=tuple(k for k in layers if k in scheme.biases),
        weights={k: scheme.weights[k] for k in layers if k in scheme.weights},
    )


# --- channels -----------------------------------------------------------------------------------------------


def _count(channels: int, ratio: float, layer: str) -> int:
    """How many of so many channels ``ratio`` selects, rounded down."""
    if not 0 < ratio <= 1:
        raise UsageError(
            f"{layer}: ratio {ratio:g} is not above 0 and at most 1; leave out a layer that does not train"
        )
    count = math.floor(ratio * channels)
    if count < 1:
        raise UsageError(
            f"{layer}: ratio {ratio:g} selects none of its {channels} input channels; "
            f"give at least {1 / channels:.6g}, or leave the layer's weights out"
        )
    if channels > 1 << 16:
        raise UsageError(
            f"{layer}: it has {channels} input channels, and at most 65536 can be numbered; freeze its weights"
        )
    return count


def selected_channels(
    weight: NDArray[np.generic], ratio: float, *, axis: int, layer: str = "weight"
) -> NDArray[np.uint16]:
    """The channels along ``axis`` of an int8 ``weight`` that train, ascending: those with the largest sum of squares;
    ties go to the lower index. The same ones apply in every group. ``layer`` is for the UsageError where ``ratio``
    selects nothing."""
    count = _count(weight.shape[axis], ratio, layer)
    axes = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    wide = weight.astype(np.int64 if weight.dtype.kind == "i" else np.float64)
    squares = np.square(wide).sum(axis=axes)
    best = np.argsort(-squares, kind="stable")[:count]
    return np.sort(best).astype(np.uint16)


def extra_memory_bytes(graph: Graph, scheme: UpdateScheme) -> int:
    """The analytic "extra memory" of a scheme in bytes, the figure behind the published names (floor of KiB).

    A 1-bit mask for each output element of the first trained convolution and all behind it, 32 bits for each trained
    bias, ``bits`` for each trained weight, 8 bits for each kept input element, and the head's input. It leaves out
    forward activations, gradients and scratch: what a compiled plan needs is more."""
    return (extra_memory_bits(graph, scheme) + 7) // 8


def extra_memory_bits(graph: Graph, scheme: UpdateScheme) -> int:
    """``extra_memory_bytes`` in bits: a sum over layers, each of which counts by itself."""
    scheme = check_scheme(scheme, graph)
    bits = 8 * graph.values[features(graph)].size
    reached: set[str] = set()  # values behind a trained layer: gradients flow through what makes them
    for node in trunk(graph):
        trained = node.layer in scheme.biases or node.layer in scheme.weights
        if not trained and reached.isdisjoint(node.inputs):
            continue
        reached.update(node.outputs)
        if is_trainable(node):
            bits += _layer_bits(graph, node, scheme)
    return bits


def _layer_bits(graph: Graph, node: Node, scheme: UpdateScheme) -> int:
    x, w, y = graph.values[node["x"]], graph.values[node["weight"]], graph.values[node.output]
    bits = y.size
    if node.layer in scheme.biases:
        bits += 32 * graph.values[node["bias"]].size
    if node.layer in scheme.weights:
        axis = weight_axis(node)
        count = _count(w.shape[axis], scheme.weights[node.layer], node.layer)
        kept = x.shape[2] * count // w.shape[axis]  # channels, over all groups
        bits += 8 * x.shape[0] * x.shape[1] * kept + scheme.bits * (w.size // w.shape[axis]) * count
    return bits


# --- published schemes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Published:
    """The schemes published for one model; convolutions by number."""

    model: str
    structure: str
    schemes: Mapping[str, tuple[int, Mapping[int, float]]]


@cache
def _published() -> tuple[_Published, ...]:
    files = sorted((resources.files("trainlet.autodiff") / "schemes").iterdir(), key=lambda f: f.name)
    found = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.name.endswith(".json")]
    return tuple(
        _Published(
            d["model"],
            d["structure"],
            {
                name: (s["last_biases"], {int(i): float(r) for i, r in s["weights"].items()})
                for name, s in d["schemes"].items()
            },
        )
        for d in found
    )


def structure_hash(graph: Graph) -> str:
    """A short hash of the shapes of all convolutions, kernels, strides and groups included, names and weights not: a
    published model is recognized by it also under another file name or fine-tuned."""
    rows = [
        (graph.values[n.output].shape, graph.values[n["weight"]].shape, a.stride, a.pads, a.dilation, a.groups)
        for n in trainable_layers(graph).values()
        if isinstance(a := n.attrs, Conv2d)
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def recognize(graph: Graph) -> str | None:
    """The name of the published model that ``graph`` has the structure of, or None."""
    found = _recognize(graph)
    return found.model if found else None


def _recognize(graph: Graph) -> _Published | None:
    mine = structure_hash(graph)
    return next((p for p in _published() if p.structure == mine), None)


def published_names(graph: Graph) -> tuple[str, ...]:
    """The names of the schemes published for this model; empty if it is none of the published models."""
    found = _recognize(graph)
    return tuple(found.schemes) if found else ()


# --- from a word or a file ----------------------------------------------------------------------------------


def resolve(spec: str | Path, graph: Graph, bits: int | None = None) -> UpdateScheme:
    """The scheme that ``spec`` names for ``graph``: a published name (``99kb``), ``head`` (nothing but the head),
    ``bias:K`` (biases of the last K convolutions), ``last:K`` (their biases and all their weights), ``full``, or the
    path of a JSON file. ``bits`` is 8 where it is not given; it overrides that of a file. Raises UsageError."""
    text = str(spec)
    if isinstance(spec, Path) or text.endswith(".json") or "/" in text:
        scheme = load_scheme(spec, graph)
        return scheme if bits is None else replace(scheme, bits=bits)
    bits = 8 if bits is None else bits
    _check_bits(text, bits)
    word, colon, number = text.partition(":")
    layers = tuple(trainable_layers(graph))
    rule = _WORDS.get((word, bool(colon)))
    if rule is None:
        return _from_published(text, graph, layers, bits)
    k = _last(text, number, len(layers)) if colon else len(layers)
    return check_scheme(rule(text, layers[len(layers) - k :], bits), graph)


def _last(text: str, number: str, convs: int) -> int:
    if not (number.isascii() and number.isdigit()) or len(number) > 9 or not 1 <= int(number) <= convs:
        raise UsageError(f"scheme {text!r}: {number!r} is no number of convolutions; this model has 1 to {convs}")
    return int(number)


def _all(name: str, layers: tuple[str, ...], bits: int) -> UpdateScheme:
    return UpdateScheme(name, layers, dict.fromkeys(layers, 1.0), bits)


_WORDS: Final[dict[tuple[str, bool], Callable[[str, tuple[str, ...], int], UpdateScheme]]] = {
    ("head", False): lambda name, layers, bits: UpdateScheme(name, bits=bits),
    ("full", False): _all,
    ("last", True): _all,
    ("bias", True): lambda name, layers, bits: UpdateScheme(name, layers, bits=bits),
}


def _from_published(text: str, graph: Graph, layers: tuple[str, ...], bits: int) -> UpdateScheme:
    found = _recognize(graph)
    if found is None or text not in found.schemes:
        _no_such(text, graph, found, len(layers))
    last, weights = found.schemes[text]
    origin = f"published for {found.model}, recognized by the shapes of its {len(layers)} convolutions"
    by_layer = {layers[i]: r for i, r in weights.items()}
    return check_scheme(UpdateScheme(text, layers[len(layers) - last :], by_layer, bits, origin), graph)


def _no_such(text: str, graph: Graph, found: _Published | None, convs: int) -> NoReturn:
    words = f"head, bias:K, last:K (K = 1 to {convs}), full, or the path of a JSON file"
    if found is None:
        models = _list(p.model for p in _published())
        raise UsageError(
            f"scheme {text!r}: {graph.name} has the structure of no published model ({models}), so it has no published "
            f"schemes; give {words}"
        )
    known = "" if graph.name == found.model else f", recognized as {found.model} by its {convs} convolutions,"
    raise UsageError(
        f"scheme {text!r}: {graph.name}{known} has no such scheme{_hint(text, (*found.schemes, 'head', 'full'))}; "
        f"it has {_list(found.schemes)}; else give {words}"
    )


def load_scheme(path: str | Path, graph: Graph) -> UpdateScheme:
    """Reads a scheme from a JSON file and checks it against ``graph``. Raises UsageError naming the file."""
    path = Path(path)
    try:
        with path.open("rb") as f:
            raw = f.read(MAX_FILE + 1)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror}); give the path of a scheme in JSON") from None
    if len(raw) > MAX_FILE:
        raise UsageError(f"{path}: more than {MAX_FILE >> 20} MiB; this is no scheme")
    try:
        return check_scheme(from_json(raw.decode("utf-8")), graph)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8; give a scheme in JSON") from None
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice would silently hide the first."""
    twice = _twice(k for k, _ in pairs)
    if twice:
        raise UsageError(f"scheme: {twice[:MAX_NAME]!r} is given twice; give it once")
    return dict(pairs)


def from_json(text: str) -> UpdateScheme:
    """Reads what ``UpdateScheme.to_json`` writes; strict. Raises UsageError. Layers are checked by ``check_scheme``."""
    try:
        d = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"scheme: not JSON ({e}); write one with UpdateScheme.to_json") from None
    if not isinstance(d, dict) or d.get("format") != FORMAT:
        raise UsageError(f'scheme: a JSON object with "format": "{FORMAT}" is expected')
    if type(d.get("version")) is not int or d["version"] != VERSION:
        raise UsageError(f"scheme: version {d.get('version')!r} is not read, version {VERSION} is; update trainlet")
    wrong = [f"{k} is missing" for k in _FIELDS if k not in d]
    wrong += [f"{k!r} is unknown{_hint(k, _FIELDS)}" for k in d if k not in _FIELDS]
    if wrong:
        raise UsageError(f"scheme: field {wrong[0]}; the fields are {_list(_FIELDS)}")
    name, bits, biases, weights = d["name"], d["bits"], d["biases"], d["weights"]
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise UsageError(f"scheme: name is a text of 1 to {MAX_NAME} characters")
    if type(bits) is not int:
        raise UsageError(f"scheme {name!r}: bits is a whole number, not {bits!r:.40}")
    if not isinstance(biases, list) or not all(isinstance(b, str) for b in biases):
        raise UsageError(f"scheme {name!r}: biases is a list of layer names")
    if not isinstance(weights, dict):
        raise UsageError(f"scheme {name!r}: weights maps layer names to ratios")
    if any(len(k) > MAX_NAME for k in (*biases, *weights)):
        raise UsageError(f"scheme {name!r}: a layer name has more than {MAX_NAME} characters")
    return UpdateScheme(name, tuple(biases), weights, bits)
