# SPDX-License-Identifier: Apache-2.0
"""Where host and device differ, the first node that differs is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from graphs import int8_chain

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.cli import main
from trainlet.compiler import ALL, Compiled, compile_model
from trainlet.emit.code import comment
from trainlet.errors import MismatchError, OverBudgetError
from trainlet.frontends import attach_head
from trainlet.frontends import graph_file as irfile
from trainlet.ir import DepthFirst
from trainlet.measure.probe import _first, first_difference, instrument, roomy, written
from trainlet.measure.validate import validate
from trainlet.plan.arena import feeds
from trainlet.session.emulator import EmulatorSession
from trainlet.session.host import HostSession
from trainlet.session.mailbox import DeviceSession
from trainlet.session.qemu import QemuSession
from trainlet.toolchain import chip as device_module
from trainlet.toolchain.host import kernel_sources
from trainlet.toolchain.targets import TARGETS

M7 = TARGETS["stm32f746"]
SHAPE = (8, 8, 3)

# A line of a kernel, what a broken device build has in its place, and the first node that must be named.
PLANTED = {
    "forward": ("pool.c", "out[ch] = (int8_t)tl_clamp(v", "out[ch] = (int8_t)tl_clamp(v ^ 1", r"pool: avg_pool"),
    "a mask": ("mask.c", "(uint8_t)gather_bits(", "(uint8_t)~gather_bits(", r"block\.depthwise: clip_mask"),
    "in a stream": ("tl_requant.h", "v[j] = tl_clamp(", "v[j] = 1 ^ tl_clamp(", r"stem: conv2d, row 0"),
    "an update": ("bias.c", "bias[c] = ", "bias[c] = 1 + ", r"block\.project: conv2d_db_sgd"),
}  # fmt: skip


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """plant(kind) breaks a kernel of the device build alone; returns what must be named."""

    def do(kind: str) -> str:
        file, line, broken, node = PLANTED[kind]
        texts = kernel_sources()
        assert line in texts[file], f"{file} has no {line!r}: plant another fault"
        texts[file] = texts[file].replace(line, broken)
        monkeypatch.setattr(device_module, "kernel_sources", lambda: texts)
        return node

    return do


@pytest.mark.parametrize("by_rows", [True, False])
def test_every_node_has_a_call_behind_it(by_rows: bool) -> None:
    """A stream that the image is not fed to is a call itself; all rows of its nodes have one too."""
    model = compile_model(attach_head(int8_chain(), 4), UpdateScheme("head"), passes=replace(ALL, by_rows=by_rows))
    streams = model.graph.find("depth_first")
    assert streams
    assert (feeds(model.graph) is None) == (not by_rows)
    probed = instrument(model)
    text = probed.compiled.sources.files["int8_chain.c"]
    nodes = [*model.graph.flat().nodes, *(n for n in streams if n is not feeds(model.graph))]
    assert sorted(probed.points) == sorted(f"{comment(n.layer)}: {n.op}" for n in nodes)
    assert [int(i) for i in re.findall(r"tl_port_probe\(c, (\d+), ", text)] == list(range(len(nodes)))
    assert text.count(", y);\n") == sum(len(n.attrs.nodes) for n in streams if isinstance(n.attrs, DepthFirst))
    without = re.sub(r".*tl_port_probe.*\n", "", text)
    assert without == model.sources.files["int8_chain.c"], "nothing else is changed"
    assert all(written(model)[p] for p in probed.points if not p.endswith("check_lr"))


@pytest.mark.parametrize("make", [EmulatorSession, QemuSession])
def test_an_honest_device_has_no_first_difference(
    qemu: str, chain: Compiled, make: Callable[..., DeviceSession]
) -> None:
    assert first_difference(chain, make, M7, SHAPE, 1) == ""
    whole = compile_model(attach_head(int8_chain(), 4), UpdateScheme("head"), passes=replace(ALL, by_rows=False))
    assert first_difference(whole, make, M7, SHAPE, 0) == ""


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("make", [EmulatorSession, QemuSession])
def test_the_node_of_a_planted_fault_is_named(
    qemu: str, chain: Compiled, plant: Callable[[str], str], make: Callable[..., DeviceSession], kind: str
) -> None:
    assert re.fullmatch(plant(kind), first_difference(chain, make, M7, SHAPE, 0))


def test_a_node_without_streams_is_named(qemu: str, plant: Callable[[str], str]) -> None:
    plain = compile_model(attach_head(int8_chain(), 4), UpdateScheme("full"), passes=replace(ALL, depth_first=False))
    plant("in a stream")
    assert first_difference(plain, EmulatorSession, M7, SHAPE, 0) == "stem: conv2d"


def test_the_message_names_array_and_node(qemu: str, chain: Compiled, plant: Callable[[str], str]) -> None:
    node = plant("forward")
    device = EmulatorSession(chain, M7)
    with pytest.raises(MismatchError, match=rf"step 0: .* first in \w+.*whose output differs is {node}$"):
        validate(HostSession(chain), device, SHAPE, 1, lambda t: first_difference(chain, EmulatorSession, M7, SHAPE, t))


def test_a_node_that_cannot_be_named_hides_nothing(qemu: str, chain: Compiled, plant: Callable[[str], str]) -> None:
    plant("forward")
    device = EmulatorSession(chain, M7)

    def fails(step: int) -> str:
        raise OverBudgetError("no room")

    with pytest.raises(MismatchError, match=r"step 0: .* bytes differ .* cannot be named: no room"):
        validate(HostSession(chain), device, SHAPE, 1, fails)
    with pytest.raises(MismatchError, match="No node's output differs by itself"):
        validate(HostSession(chain), device, SHAPE, 1, lambda t: "")


def test_the_first_event_that_differs_counts() -> None:
    points = ("a: conv2d", "b: add", "c: add")
    assert _first(points, [(0, 0, 7), (1, -1, 8)], [(0, 0, 7), (1, -1, 8)]) == ""
    assert _first(points, [(0, 3, 7), (1, -1, 8)], [(0, 3, 6), (1, -1, 9)]) == "a: conv2d, row 3"
    assert _first(points, [(0, -1, 7)], [(0, -1, 7), (2, -1, 1)]) == "c: add, which only one of them reached"


def test_room_is_only_added() -> None:
    assert (roomy(M7).sram_bytes, roomy(M7).flash_bytes) == (4 << 20, 4 << 20)
    assert (roomy(M7).flags, roomy(M7).core) == (M7.flags, M7.core)
    lab = TARGETS["lab"]
    assert (roomy(lab).sram_bytes, roomy(lab).flash_bytes) == (lab.sram_bytes, lab.flash_bytes)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "chain.json"
    irfile.save(int8_chain(), path)
    return path


def test_both_emulators_give_one_report(qemu: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["validate", "--model", str(model), "--scheme", "full", "--classes", "5", "--steps", "2"]
    assert main([*args, "--emulator", "both", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["emulator"] for r in found["runs"]] == ["unicorn", "qemu"]
    assert found["emulator"] == "both"
    for key in ("mismatching_bytes", "compared_bytes", "changed_weights", "state_sha256", "ram_bytes"):
        assert found[key] == found["runs"][0][key] == found["runs"][1][key]
    assert found["runs"][1]["flash_bytes"] > found["runs"][0]["flash_bytes"], "protecting memory is code"
    assert main([*args, "--emulator", "qemu", "--on", "cortex-m0plus", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["emulator"], found["mismatching_bytes"], found["target"]) == ("qemu", 0, "rp2040")
    assert main([*args, "--emulator", "both"]) == 0
    shown = capsys.readouterr().out
    assert "equal on unicorn" in shown
    assert "equal on qemu" in shown


def test_the_command_names_the_node(
    qemu: str, model: Path, plant: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    node = plant("an update")
    args = ["validate", "--model", str(model), "--scheme", "full", "--classes", "5", "--emulator", "qemu", "--json"]
    assert main(args) == 5
    error = json.loads(capsys.readouterr().out)["error"]
    assert re.search(rf"first node whose output differs is {node}", error)


def test_an_unknown_emulator_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["validate", "--model", str(model), "--scheme", "full", "--classes", "5", "--emulator", "bochs", "--json"]
    assert main(args) == 2
    assert "give unicorn, qemu or both" in json.loads(capsys.readouterr().out)["error"]
