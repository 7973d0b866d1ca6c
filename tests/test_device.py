# SPDX-License-Identifier: Apache-2.0
"""Device code in an emulated chip: the host's bytes, exactly the memory that was named, and what stops a run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain
from numpy.typing import NDArray

from trainlet.autodiff.scheme import UpdateScheme
from trainlet.cli import main
from trainlet.cli.prepare import load_model, prepare, resolve_scheme
from trainlet.compiler import Compiled, compile_model
from trainlet.errors import DeviceError, MismatchError, OverBudgetError, ToolMissingError, UnsupportedError, UsageError
from trainlet.frontends import attach_head
from trainlet.frontends import graph_file as irfile
from trainlet.measure.validate import validate
from trainlet.session.counter import CCounter, PythonCounter
from trainlet.session.emulator import EmulatorSession
from trainlet.session.host import HostSession
from trainlet.toolchain import chip as device_module
from trainlet.toolchain.chip import build_device
from trainlet.toolchain.find import ARM_GCC_VARIABLE, doctor, find_arm_gcc, libgcc
from trainlet.toolchain.stack import INTERRUPT_BYTES, stack_bound
from trainlet.toolchain.targets import TARGETS, find_target, parse_size, with_limits
from trainlet.toolchain.vectors import synthetic_image

M7 = TARGETS["stm32f746"]
LR = 0.01


def image(t: int) -> NDArray[np.int8]:
    return synthetic_image((8, 8, 3), t)


# --- targets and tools ------------------------------------------------------------------------------------------


def test_targets_are_what_their_makers_say() -> None:
    assert {t.name: (t.sram_bytes // 1024, t.flash_bytes // 1024) for t in TARGETS.values()} == {
        "stm32f746": (320, 1024), "nrf52840": (256, 1024), "nrf52832": (64, 512), "rp2040": (264, 2048),
        "lab": (16384, 16384),
    }  # fmt: skip
    assert [(p.name, p.nbytes // 1024) for p in M7.pools] == [("DTCM", 64), ("SRAM1", 240), ("SRAM2", 16)]


def test_limits_cut_pools_from_the_end() -> None:
    cut = with_limits(M7, 256 << 10, 512 << 10)
    assert [(p.name, p.nbytes // 1024) for p in cut.pools] == [("DTCM", 64), ("SRAM1", 192)]
    assert (cut.sram_bytes, cut.flash_bytes) == (256 << 10, 512 << 10)
    assert with_limits(M7) == M7


@pytest.mark.parametrize("sram", [0, -1024, 1000, 321 << 10])
def test_limits_the_chip_cannot_have(sram: int) -> None:
    with pytest.raises(UsageError, match="327680 bytes"):
        with_limits(M7, sram)


def test_an_unknown_target_lists_the_known() -> None:
    with pytest.raises(UsageError, match="stm32f746, nrf52840"):
        find_target("stm32")


@pytest.mark.parametrize(("text", "want"), [("256KB", 262144), ("1M", 1 << 20), ("4096", 4096), (" 64 kib ", 65536)])
def test_sizes(text: str, want: int) -> None:
    assert parse_size(text) == want


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "256KBs", "2G"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--flash"):
        parse_size(text, "--flash")


def test_a_missing_compiler_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ARM_GCC_VARIABLE, "/nowhere/gcc")
    with pytest.raises(ToolMissingError, match=r"/nowhere/gcc.*apt-get install .*gcc-arm-none-eabi"):
        find_arm_gcc()
    row = next(r for r in doctor() if r.tool == "arm-none-eabi-gcc")
    assert not row.found
    assert "apt-get install" in row.install


def test_a_wheel_is_found_where_the_system_has_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "gcc_arm_none_eabi"
    gcc = package / "toolchain" / "bin" / "arm-none-eabi-gcc"
    gcc.parent.mkdir(parents=True)
    gcc.write_text("#!/bin/sh\nexit 1\n")
    gcc.chmod(0o755)
    (package / "__init__.py").touch()
    helpers = package / "toolchain/lib/gcc/arm-none-eabi/13.2.1/thumb/v7e-m+dp/hard/libgcc.a"
    helpers.parent.mkdir(parents=True)
    helpers.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(ARM_GCC_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_arm_gcc() == str(gcc)
    gcc.write_text("#!/bin/sh\necho libgcc.a\n")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert Path(libgcc(str(gcc), M7.flags)) == helpers
    with pytest.raises(ToolMissingError, match="cortex-m0plus"):
        libgcc(str(gcc), TARGETS["rp2040"].flags)


def test_a_missing_emulator_names_the_extra(tools: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)
    with pytest.raises(ToolMissingError, match=r"unicorn.*trainlet\[m7\]"):
        EmulatorSession(chain, M7)


# --- the same bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["stm32f746", "nrf52840", "rp2040"])
def test_host_and_device_agree_to_the_byte(tools: str, chain: Compiled, target: str) -> None:
    device, host = EmulatorSession(chain, TARGETS[target], seed=3), HostSession(chain, seed=3)
    for t in range(3):
        assert device.train_step(image(t), t, LR) == host.train_step(image(t), t, LR)
        assert device.state_block() == host._state.tobytes()
        assert device.infer(image(t)).tobytes() == host.infer(image(t)).tobytes()
    prefix = device.prefix(image(5))
    assert prefix == host.prefix(image(5)) != b""
    assert device.infer_cached(prefix).tobytes() == host.infer_cached(prefix).tobytes()
    assert device.train_step_cached(prefix, 1, LR) == host.train_step_cached(prefix, 1, LR)
    assert device.state_block() == host._state.tobytes()
    other = EmulatorSession(chain, TARGETS[target])
    other.load_state(device.state())
    assert other.state_block() == device.state_block()
    device.reset(9)
    host.reset(9)
    assert device.state_block() == host._state.tobytes()


def test_what_c_refuses_is_refused_in_the_same_words(tools: str, chain: Compiled) -> None:
    device, host = EmulatorSession(chain, M7), HostSession(chain)
    before = device.state_block()
    for bad in ((image(0), 4, LR), (image(0), 0, -1.0), (image(0)[:4], 0, LR)):
        messages = []
        for session in (device, host):
            with pytest.raises(UsageError) as e:
                session.train_step(*bad)
            messages.append(str(e.value))
        assert messages[0] == messages[1]
    with pytest.raises(UsageError, match="stored prefix"):
        device.infer_cached(b"short")
    assert device.state_block() == before


def test_memory_is_what_the_elf_and_the_stack_say(tools: str, chain: Compiled) -> None:
    device = EmulatorSession(chain, M7)
    device.train_step(image(0), 0, LR)
    firmware = device.firmware
    assert sum(firmware.purposes.values()) == firmware.sections[".bss"]
    assert firmware.purposes["arena"] == chain.plan.arena_bytes
    assert firmware.purposes["state"] == chain.layout.nbytes
    assert ".data" not in firmware.sections, "nothing needs a copy in both memories"
    assert firmware.flash_bytes == sum(firmware.sections[k] for k in (".vectors", ".text", ".rodata"))
    assert device.ram_bytes == firmware.static_bytes + device.stack_used
    bound = firmware.stack_bytes - INTERRUPT_BYTES
    assert bound * 0.9 < device.stack_used <= bound
    device.machine.paint_stack()
    assert device.stack_used < 64
    device.infer(image(0))
    assert 64 < device.stack_used <= firmware.stack_bytes


def test_instructions_are_counted_by_node(tools: str, chain: Compiled) -> None:
    device = EmulatorSession(chain, M7)
    device.train_step(image(0), 0, LR)
    profile = device.profile()
    assert set(profile) - {""} == {f"{n.layer}: {n.op}" for n in chain.graph.flat().nodes}
    assert sum(profile.values()) == device.machine.counter.total() == sum(device.functions().values())
    assert profile[""] < 0.1 * sum(profile.values())
    assert device.last_instructions == device.facts()["instructions_per_step"] <= sum(profile.values())


def test_both_counters_count_the_same(tools: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kind in (CCounter, PythonCounter):
        monkeypatch.setattr("trainlet.session.emulator.make_counter", kind)
        session = EmulatorSession(chain, M7)
        session.train_step(image(0), 0, LR)
        found.append((session.profile(), session.functions(), session.last_instructions))
    assert found[0] == found[1]


# --- limits and faults ------------------------------------------------------------------------------------------


def test_one_kilobyte_less_fails_at_link_time(tools: str, chain: Compiled) -> None:
    firmware = build_device(chain, M7)
    need = -(-(firmware.static_bytes + firmware.stack_bytes) // 1024) * 1024
    session = EmulatorSession(chain, with_limits(M7, need))
    session.train_step(image(0), 0, LR)
    with pytest.raises(OverBudgetError) as e:
        build_device(chain, with_limits(M7, need - 1024))
    text = str(e.value)
    assert f"{firmware.static_bytes + firmware.stack_bytes} bytes of SRAM are needed, {need - 1024} are there" in text
    assert f".bss {firmware.static_bytes}" in text
    assert re.search(r"Largest tensors at the peak: .*scratch of conv\.\d\S* \(\d+\)", text)
    with pytest.raises(OverBudgetError, match="bytes of flash are needed, 16384 are there"):
        build_device(chain, with_limits(M7, flash=16 << 10))


def test_a_stack_that_overflows_is_stopped_and_named(tools: str, chain: Compiled) -> None:
    device = EmulatorSession(chain, M7, stack_bytes=512)
    with pytest.raises(DeviceError, match=r"overflowed its 512 bytes\), at 0x[0-9a-f]+ in tl_conv2d_s8, layer stem"):
        device.train_step(image(0), 0, LR)
    with pytest.raises(DeviceError, match="begin a new session"):
        device.infer(image(0))


@pytest.mark.parametrize(
    ("place", "pointer", "message"),
    [
        (
            "arena",
            M7.sram_base + M7.sram_bytes - 256,
            r"write outside memory: \d+ bytes at 0x2005.* in \w+, layer block.depthwise: conv2d",
        ),
        ("arena", M7.flash_base + 64, r"write to flash: \d+ bytes at 0x0800.*in \w+, layer block.depthwise: conv2d"),
        ("state", 0x1000, r"read outside memory: 4 bytes at 0x00001000, at 0x0800\w+ in tl_model_train_rest$"),
    ],
)
def test_an_access_outside_is_stopped_and_named(
    tools: str, chain: Compiled, place: str, pointer: int, message: str
) -> None:
    """The context's pointers are bent after the image is fed: the first node that follows one is stopped."""
    device = EmulatorSession(chain, M7)
    device._feed(image(0))
    at = device.firmware.symbols["tl_port_context"].address + 4 * ("arena", "state").index(place)
    device.machine.write(at, pointer.to_bytes(4, "little"))
    with pytest.raises(DeviceError, match=message):
        device._command(device_command("TRAIN"), label=0, lr=LR)


def device_command(name: str) -> object:
    from trainlet.session.mailbox import Command

    return Command[name]


def test_start_up_code_that_forgets_the_fpu_is_noticed(
    tools: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = device_module.port_sources()
    assert "#ifdef __ARM_FP" in texts["startup.c"]
    broken = {**texts, "startup.c": texts["startup.c"].replace("#ifdef __ARM_FP", "#if 0")}
    monkeypatch.setattr(device_module, "port_sources", lambda: broken)
    with pytest.raises(DeviceError, match="did not enable the FPU"):
        EmulatorSession(chain, M7)


# --- the stack bound --------------------------------------------------------------------------------------------


def frame(name: str, size: int, kind: str = "static") -> str:
    return f'node: {{ title: "{name}" label: "{name}\\na.c:1:1\\n{size} bytes ({kind})" }}\n'


def edge(source: str, to: str) -> str:
    return f'edge: {{ sourcename: "{source}" targetname: "{to}" label: "a.c:2:2" }}\n'


def test_the_deepest_path_is_found_across_files() -> None:
    first = frame("main", 8) + frame("a.c:leaf", 100) + edge("main", "a.c:leaf") + edge("main", "run")
    second = frame("run", 40) + frame("m.c:backward", 24) + edge("run", "__indirect_call")
    third = frame("kernel", 60) + edge("m.c:backward", "kernel") + edge("kernel", "__aeabi_fadd")
    assert stack_bound([first], "main", {}) == 112  # leaf; `run` is unknown: 64
    assert stack_bound([first, second, third], "main", {".*": "backward"}) == 8 + 40 + 24 + 60 + 64 + 4


def test_a_stack_without_a_bound_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="calls itself"):
        stack_bound([frame("a", 8) + frame("b", 8) + edge("a", "b") + edge("b", "a")], "a", {})
    with pytest.raises(UnsupportedError, match="dynamic"):
        stack_bound([frame("a", 8, "dynamic")], "a", {})


# --- validate and train -----------------------------------------------------------------------------------------


def test_validate_compares_and_counts(tools: str, chain: Compiled) -> None:
    device, host = EmulatorSession(chain, TARGETS["rp2040"]), HostSession(chain)
    found = validate(host, device, (8, 8, 3), 3)
    assert found.mismatching_bytes == 0
    assert found.changed_weights > 30
    arrays = host.state()
    assert found.compared_bytes == 3 * (sum(a.nbytes for a in arrays.values()) + 12 + 4 * 4)


class Flipped(HostSession):
    """Shows one bit of its bias wrongly."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        arrays = super().state()
        arrays["conv.1.bias"].view(np.uint8)[0] ^= 1
        return arrays


class Idle(HostSession):
    """Its state never changes."""

    def state(self) -> Mapping[str, NDArray[np.generic]]:  # type: ignore[override]
        return {"head.weight": np.zeros(3, np.float32)}


def test_validate_names_the_first_difference(chain: Compiled) -> None:
    with pytest.raises(MismatchError, match=r"step 0: 1 of \d+ bytes differ .* first in conv\.1\.bias \(1 bytes\)"):
        validate(HostSession(chain), Flipped(chain), (8, 8, 3), 2)


def test_validate_that_proves_nothing_fails(chain: Compiled) -> None:
    with pytest.raises(MismatchError, match="0 weights changed"):
        validate(Idle(chain), Idle(chain), (8, 8, 3), 1)
    with pytest.raises(UsageError, match="--steps 0"):
        validate(HostSession(chain), HostSession(chain), (8, 8, 3), 0)
    other = HostSession(compile_model(attach_head(int8_chain(), 4), UpdateScheme("head")))
    with pytest.raises(MismatchError, match="different models"):
        validate(HostSession(chain), other, (8, 8, 3), 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("device")
    irfile.save(int8_chain(), root / "chain.json")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(root / "arrays.npz", x_train=x[:9], y_train=np.arange(9) % 3, x_val=x[9:], y_val=np.arange(3))
    return root


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, object]]:
    code = main([*map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_train_on_a_chip_gives_the_hosts_bytes(
    tools: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--model", files / "chain.json", "--data", files / "arrays.npz", "--scheme", "full", "--epochs", 2]
    code, host = run(capsys, *args, "--out", tmp_path / "host")
    assert code == 0
    code, chip = run(capsys, *args, "--out", tmp_path / "chip", "--on", "cortex-m7", "--sram", "64KB")
    assert code == 0
    assert chip["state_sha256"] == host["state_sha256"]
    assert chip["val_loss"] == host["val_loss"]
    assert chip["target"] == "stm32f746"
    assert chip["sram_bytes"] == 65536
    assert 0 < int(str(chip["ram_bytes"])) < 65536
    assert int(str(chip["instructions_per_step"])) > 10_000
    code, failed = run(capsys, *args, "--out", tmp_path / "small", "--on", "cortex-m7", "--sram", "2KB")
    assert code == 4
    assert "bytes of SRAM are needed, 2048 are there" in str(failed["error"])


def test_validate_command(tools: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["validate", "--model", files / "chain.json", "--scheme", "full", "--classes", 5, "--steps", 2]
    code, found = run(capsys, *args, "--on", "cortex-m0plus")
    assert code == 0
    assert (found["mismatching_bytes"], found["target"]) == (0, "rp2040")
    assert main(list(map(str, args))) == 0
    assert "bytes compared over 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--on", "host"], "compares the host with a chip"),
        (["--on", "cortex-m7", "--target", "rp2040"], "that is a cortex-m0plus"),
        (["--on", "avr"], "cortex-m7"),
        (["--on", "host", "--target", "rp2040"], "--target"),
        (["--sram", "321KB"], "327680"),
    ],
)
def test_places_that_do_not_exist(
    files: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    code, found = run(
        capsys, "validate", "--model", files / "chain.json", "--scheme", "full", "--classes", 4, *args
    )  # fmt: skip
    assert code == 2
    assert message in str(found["error"])


def test_doctor_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys, "doctor")
    assert code == 0
    listed = found["tools"]
    assert isinstance(listed, list)
    assert {t["tool"] for t in listed} >= {"cc", "arm-none-eabi-gcc", "unicorn", "qemu-system-arm"}
    assert next(t for t in listed if t["tool"] == "cc")["found"]
    code, found = run(capsys, "targets")
    assert code == 0
    assert [t["name"] for t in found["targets"]] == list(TARGETS)  # type: ignore[attr-defined]
    assert main(["doctor"]) == main(["targets"]) == 0
    assert "rp2040" in capsys.readouterr().out


# --- a published model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["stm32f746", "lab-without-fpu"])
def test_a_published_model_on_a_chip(tools: str, assets: Path, target: str) -> None:
    graph = load_model(assets / "models" / "mcunet-5fps.pkl")
    p = prepare(graph, resolve_scheme("49kb", graph, None), 10)
    soft = replace(TARGETS["lab"], flags=TARGETS["rp2040"].flags, fpu=False)
    device = EmulatorSession(p.compiled, TARGETS.get(target, soft))
    found = validate(HostSession(p.compiled), device, p.shape, 2)
    assert found.changed_weights > 1000
    assert device.ram_bytes < 256 << 10
    assert device.flash_bytes < 1 << 20
    assert device.stack_used <= device.firmware.stack_bytes - INTERRUPT_BYTES < 2048
