# SPDX-License-Identifier: Apache-2.0
"""Measured memory: every byte of the ELF has a purpose, the sums are the ELF's, inference alone holds nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import int8_chain

from trainlet.cli import main
from trainlet.cli.plan import plan as plan_command
from trainlet.cli.prepare import load_model, prepare, resolve_scheme
from trainlet.compiler import Compiled, compile_inference
from trainlet.errors import MismatchError
from trainlet.frontends import attach_head
from trainlet.frontends import graph_file as irfile
from trainlet.measure import program as measure_module
from trainlet.measure.program import Measurement, Program, flash_by_purpose, measure
from trainlet.session.emulator import EmulatorSession
from trainlet.toolchain import chip as device_module
from trainlet.toolchain import find
from trainlet.toolchain.chip import Firmware, build_device
from trainlet.toolchain.sizes import (
    FLASH_PURPOSES,
    RAM_PURPOSES,
    Section,
    Symbol,
    code_purpose,
    constant_purpose,
    spread,
)
from trainlet.toolchain.stack import INTERRUPT_BYTES, split_arguments, stack_bound
from trainlet.toolchain.targets import TARGETS

M7 = TARGETS["stm32f746"]
TRAINING = ("tl_conv2d_dw_s8", "tl_conv2d_dx_s8", "tl_bias_sgd_s8", "tl_softmax_xent_f32", "tl_model_train_rest")


@pytest.fixture(scope="module")
def inference() -> Compiled:
    return compile_inference(attach_head(int8_chain(), 4))


@pytest.fixture(scope="module")
def found(tools: str, chain: Compiled, inference: Compiled) -> Measurement:
    return measure(chain, inference, M7)


# --- bytes of a section -----------------------------------------------------------------------------------------


def test_every_byte_of_a_section_is_counted_once() -> None:
    section = Section(".text", 100, 60, True)
    symbols = [
        Symbol("a", 100, 6),
        Symbol("alias", 100, 6),
        Symbol("inner", 102, 2),
        Symbol("b", 108, 10),  # 2 bytes before it: padding
        Symbol("c", 140, 16),  # 22 bytes before it: something without a name
        Symbol("outside", 160, 8),
    ]
    parts = spread(section, reversed(symbols), lambda s: s.name, "unnamed")
    assert parts == {"a": 6, "padding": 2 + 4, "b": 10, "unnamed": 22, "c": 16}
    assert parts.total() == section.size
    long = [Symbol("a", 100, 400), Symbol("b", 200, 4)]
    assert spread(section, long, lambda s: s.name) == {"a": 60}, "a symbol ends with its section"
    assert spread(section, [], lambda s: s.name) == {"other": 60}


@pytest.mark.parametrize(
    ("symbol", "want"),
    [
        (Symbol("Reset_Handler", 0, 4), "startup"),
        (Symbol("tl_port_wait", 0, 4), "startup"),
        (Symbol("memcpy", 0, 4), "startup"),
        (Symbol("tl_tile", 0, 4), "kernels"),
        (Symbol("load", 0, 4, "add.c"), "kernels"),
        (Symbol("prefix", 50, 4, "net.c"), "model"),
        (Symbol("__aeabi_idiv", 0, 4), "helpers"),
        (Symbol("load", 0, 4, "mystery.c"), "other"),
    ],
)
def test_the_purpose_of_code(symbol: Symbol, want: str) -> None:
    assert code_purpose(["add.c"], range(40, 60))(symbol) == want


def test_the_purpose_of_constants() -> None:
    purpose = constant_purpose({"conv_0_weight": "weights"}, "net.c", ["head.c"])
    given = [
        Symbol("conv_0_weight", 0, 1, "net.c"), Symbol("CSWTCH.1", 0, 1, "net.c"), Symbol("log2", 0, 1, "head.c"),
        Symbol("__clz_tab", 0, 1), Symbol("conv_0_weight", 0, 1, "another.c"),
    ]  # fmt: skip
    assert [purpose(s) for s in given] == ["weights", "other", "constants", "helpers", "other"]


# --- sums -------------------------------------------------------------------------------------------------------


def elf_bytes(firmware: Firmware) -> tuple[int, int]:
    """(bytes that are loaded into flash, .data and .bss), read anew."""
    from elftools.elf.elffile import ELFFile

    with firmware.path.open("rb") as f:
        elf = ELFFile(f)
        static = sum(s["sh_size"] for s in elf.iter_sections() if s.name in (".data", ".bss"))
        return sum(s["p_filesz"] for s in elf.iter_segments("PT_LOAD")), static


def test_purposes_add_up_to_the_elf(found: Measurement) -> None:
    for program in (found.train, found.infer):
        flash, static = elf_bytes(program.firmware)
        facts = program.facts()
        assert sum(facts[f"flash_{k}_bytes"] for k in FLASH_PURPOSES) == flash == facts["flash_bytes"]
        assert sum(facts[f"ram_{k}_bytes"] for k in RAM_PURPOSES) == static
        assert facts["ram_bytes"] == static + facts["ram_stack_bytes"]
        assert 0 < facts["ram_stack_bytes"] <= facts["stack_reserved_bytes"] == facts["sections"][".stack"]
        assert facts["flash_other_bytes"] == facts["ram_other_bytes"] == 0
        assert facts["ram_arena_bytes"] == facts["arena_bytes"] >= facts["lower_bound_bytes"]
        assert facts["ram_state_bytes"] == facts["state_bytes"]
        assert facts["flash_padding_bytes"] < 100


def weight_tables(program: Program) -> int:
    """Bytes of the tables that the emitted C has for weights; some are padded for their kernel."""
    text = program.compiled.sources.files["int8_chain_data.h"]
    return sum(int(n) for n in re.findall(r"static const int8_t conv_\d_weight\w*\[(\d+)\]", text))


def test_constants_are_what_the_graph_has(found: Measurement) -> None:
    """The chain has 162 + 54 + 36 weights; of the 54 all and of the 36 half train, with 6 biases each."""
    train, infer = found.train.flash, found.infer.flash
    assert infer["weights"] == weight_tables(found.infer) >= 162 + 54 + 36
    assert train["weights"] == weight_tables(found.train) >= 162 + 18
    rho = sum(v.nbytes for v in found.train.compiled.graph.states() if v.name.endswith(".rho"))
    assert train["initial_state"] == 54 + 18 + 2 * 6 * 4 + rho
    assert infer["initial_state"] == 0
    assert infer["tables"] == 3 * 6 * (4 + 4 + 1), "bias, multiplier and shift of three layers"
    assert train["tables"] > infer["tables"]


def test_inference_alone_holds_nothing_of_training(found: Measurement) -> None:
    train, infer = found.train, found.infer
    assert set(TRAINING) <= {s.name for s in train.firmware.functions}
    assert not set(TRAINING) & {s.name for s in infer.firmware.functions}
    assert infer.facts()["state_bytes"] == 8 + 4 * (4 * 6 + 4), "seed, step and the head"
    for key in ("ram_bytes", "flash_bytes", "flash_kernels_bytes", "flash_model_bytes", "state_bytes"):
        assert infer.facts()[key] < train.facts()[key]
    assert found.train_infers < train.work.instructions
    assert infer.work.instructions < 1.2 * found.train_infers  # with less to keep, more of it may be streamed
    assert {n.rpartition(": ")[2] for n in infer.work.nodes} <= {
        "",
        "conv2d",
        "add",
        "avg_pool",
        "dense",
        "depth_first",
    }


def test_instructions_of_nodes_and_functions_add_up(found: Measurement) -> None:
    for program in (found.train, found.infer):
        work = program.work
        assert sum(work.nodes.values()) == sum(work.functions.values()) == work.instructions
        assert work.executions.min() == 0 < work.executions.max()


# --- planted faults ---------------------------------------------------------------------------------------------


def planted(chain: Compiled, monkeypatch: pytest.MonkeyPatch, text: str, use: str) -> Program:
    """The chain's program with more in its main.c."""
    sources = device_module.port_sources()
    begin = "int main(void)\n{\n"
    assert begin in sources["main.c"]
    broken = {**sources, "main.c": sources["main.c"].replace(begin, f"{text}\n{begin}    {use}\n")}
    monkeypatch.setattr(device_module, "port_sources", lambda: broken)
    session = EmulatorSession(chain, M7)
    return measure_module._program(session, measure_module._observe(session, lambda: None))


def test_what_has_no_purpose_is_other(
    tools: str, found: Measurement, chain: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "static const uint8_t mystery[64] = {1};\n"
        "static volatile uint8_t lost[100];\n"
        "static volatile uint32_t started[5] = {7};\n"
        "__attribute__((noinline)) static void strange(void)\n"
        "{ lost[0] = mystery[lost[1] & 63]; started[1] = lost[2]; }\n"
    )
    program = planted(chain, monkeypatch, text, "strange();")
    flash, static = elf_bytes(program.firmware)
    size = program.firmware.symbols["strange"].size
    assert program.flash["other"] == 64 + size
    assert program.flash["data_init"] == 20 == program.firmware.sections[".data"]
    assert program.ram["other"] == 100 + 20
    assert program.ram["padding"] in (0, 2)
    assert program.flash_bytes == flash
    assert program.ram_bytes == static + program.ram["stack"]
    same = ("weights", "tables", "initial_state", "constants", "kernels", "model", "helpers")
    assert {k: program.flash[k] for k in same} == {k: found.train.flash[k] for k in same}


def test_a_lost_byte_fails_loudly(found: Measurement, chain: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(section: Section, *args: Any) -> Any:
        parts = spread(section, *args)
        parts["weights"] -= section.name == ".rodata"
        return parts

    firmware = found.train.firmware
    monkeypatch.setattr(measure_module, "spread", lossy)
    lost = found.train.flash["weights"] - 1
    with pytest.raises(MismatchError, match=rf"flash: .*weights {lost}\b.* has {firmware.flash_bytes} there \(\.vec"):
        flash_by_purpose(firmware, chain)
    monkeypatch.undo()
    longer = replace(firmware, layout=(*firmware.layout, Section(".extra", 0, 4, True)))
    with pytest.raises(MismatchError, match=r"flash: the sections add up to"):
        flash_by_purpose(longer, chain)
    monkeypatch.setattr(device_module, "spread", lossy)
    monkeypatch.setattr(Firmware, "purposes", property(lambda self: {"arena": self.static_bytes + 1}))
    session = EmulatorSession(chain, M7)
    with pytest.raises(MismatchError, match=r"SRAM: arena \d+, stack \d+ add up to \d+ bytes"):
        measure_module._program(session, found.train.work)


def test_another_model_is_noticed(tools: str, chain: Compiled) -> None:
    with pytest.raises(MismatchError, match="has other logits"):
        measure(chain, compile_inference(attach_head(int8_chain(1), 4)), M7)


# --- the stack --------------------------------------------------------------------------------------------------


def test_arguments_half_in_registers_are_part_of_the_stack() -> None:
    """GCC reports the frame without them."""
    assembly = (
        "f:\n.LFB1:\n\t.loc 1 2 3\n\t@ args = 8, pretend = 0, frame = 16\n\tpush\t{lr}\n"
        "g.part.0:\n.LFB2:\n\t@ args = 64, pretend = 8, frame = 1176\n\tsub\tsp, sp, #8\n.L3:\n"
    )
    assert split_arguments(assembly) == 'split: { title: "g.part.0" bytes: 8 }\n'
    nodes = "".join(f'node: {{ title: "{n}" label: "{n}\\na.c:1:1\\n16 bytes (static)" }}\n' for n in ("f", "a.c:g"))
    edge = 'edge: { sourcename: "f" targetname: "a.c:g" label: "a.c:2:2" }\n'
    assert stack_bound([nodes + edge], "f", {}) == 32
    assert stack_bound([nodes + edge + split_arguments(assembly.replace("g.part.0", "g"))], "f", {}) == 40


def test_the_bound_holds_where_gcc_reports_too_little(tools: str, inference: Compiled) -> None:
    """tl_conv2d_s8 takes a struct whose first half comes in registers."""
    firmware = build_device(inference, M7)
    session = EmulatorSession(inference, M7)
    session.infer(np.zeros((8, 8, 3), np.int8))
    bound = firmware.stack_bytes - INTERRUPT_BYTES
    assert bound - 64 <= session.stack_used <= bound


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measure") / "chain.json"
    irfile.save(int8_chain(), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def plan_args(model: Path, *more: object) -> list[object]:
    return ["plan", "--model", model, "--scheme", "full", "--classes", 5, *more]


def test_plan_measures(tools: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, got = run(capsys, *plan_args(model, "--measure", "--target", "stm32f746", "--bits", 12))
    assert code == 0
    assert (got["on"], got["target"], got["bits"]) == ("cortex-m7", "stm32f746", 12)
    assert "nodes" not in got
    for part in (got, got["inference"]):
        static = part["sections"][".bss"] + part["sections"].get(".data", 0)
        assert part["ram_bytes"] == static + part["ram_stack_bytes"]
        assert part["flash_bytes"] == sum(part[f"flash_{k}_bytes"] for k in FLASH_PURPOSES)
        assert part["instructions_per_inference"] > 10_000
    assert got["instructions_per_step"] > got["instructions_per_inference"]
    _, planned = run(capsys, *plan_args(model, "--bits", 12))
    assert planned.pop("notes") is not None
    assert planned.items() <= got.items(), "what is planned stays what it was"


def test_plan_profiles(tools: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, got = run(capsys, *plan_args(model, "--profile"))
    assert code == 0
    for part, whole in ((got, "instructions_per_step"), (got["inference"], "instructions_per_inference")):
        for kind in ("nodes", "functions"):
            counts = [row["instructions"] for row in part[kind]]
            assert sum(counts) == part[whole]
            assert counts == sorted(counts, reverse=True)
            assert sum(row["share"] for row in part[kind]) == pytest.approx(1)
    assert {("stem", "conv2d"), ("stem", "conv2d_dw_sgd")} <= {(row["layer"], row["op"]) for row in got["nodes"]}
    assert main([*map(str, plan_args(model, "--profile"))]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("SRAM, measured", "flash, measured", "stem: conv2d", "initial state"))


def test_measured_and_estimated_share_no_table(tools: str, model: Path) -> None:
    report = plan_command(model, "full", 5, profile=True)
    kinds = [{w for w in ("measured", "estimate") if w in f"{t.title} {t.headers}".replace("not a measure", "")}
             for t in report.tables]  # fmt: skip
    assert all(len(k) <= 1 for k in kinds)
    assert sum(k == {"measured"} for k in kinds) == 5
    shown = {cell for t, k in zip(report.tables, kinds, strict=True) if k != {"estimate"} for r in t.rows for cell in r}
    cycles_ = report.data["estimated_cycles_per_step"]
    assert cycles_ is None or f"{cycles_:,}" not in shown
    assert cycles_ is None or cycles_ / 216e6 == pytest.approx(report.data["estimated_seconds_per_step"])


def test_a_missing_estimate_says_why(
    tools: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, got = run(capsys, *plan_args(model, "--measure", "--on", "cortex-m0plus"))
    assert code == 0
    assert (got["target"], got["estimated_cycles_per_step"]) == ("rp2040", None)
    assert "for cortex-m7 only, and rp2040 is a cortex-m0plus" in got["estimate"]
    monkeypatch.setattr(find, "_mca_candidates", lambda: iter(()))
    assert main([*map(str, plan_args(model, "--measure"))]) == 0
    assert "no estimate of cycles: llvm-mca was not found; on Debian: apt-get" in capsys.readouterr().out


def test_one_kib_below_the_need_fails_at_link_time(
    tools: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the plan alone, arena and state, would still fit."""
    _, got = run(capsys, *plan_args(model, "--measure"))
    sections = got["sections"]
    need = sections[".bss"] + sections[".stack"]
    enough = -(-need // 1024)
    assert run(capsys, *plan_args(model, "--measure", "--sram", f"{enough}K"))[0] == 0
    x = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "arrays.npz", x_train=x, y_train=np.arange(5), x_val=x, y_val=np.arange(5))
    train = ["train", "--model", model, "--data", tmp_path / "arrays.npz", "--scheme", "full", "--epochs", 1]
    place = ["--out", tmp_path / "run", "--on", "cortex-m7", "--sram"]
    assert run(capsys, *train, *place, f"{enough}K")[0] == 0
    for args in (plan_args(model, "--measure", "--sram"), [*train, "--overwrite", *place]):
        code, error = run(capsys, *args, f"{enough - 1}K")
        assert code == 4
        assert f"{need} bytes of SRAM are needed, {1024 * (enough - 1)} are there" in error["error"]
        assert f".bss {sections['.bss']}" in error["error"]
        assert "Largest tensors at the peak: " in error["error"]
    assert (enough - 1) * 1024 > got["arena_bytes"] + got["state_bytes"]
    assert run(capsys, *plan_args(model, "--measure", "--flash", "16K"))[0] == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "stm32f746"], "--target: a plan needs no chip"),
        (["--on", "cortex-m7"], "add --measure"),
        (["--flash", "1M"], "--flash: a plan needs no chip"),
        (["--measure", "--on", "host"], "give --on cortex-m7"),
        (["--measure", "--target", "nowhere"], "unknown"),
        (["--measure", "--on", "cortex-m4", "--target", "rp2040"], "that is a cortex-m0plus"),
        (["--measure", "--sram", "321K"], "327680"),
    ],
)
def test_options_that_contradict(
    model: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    code, error = run(capsys, *plan_args(model, *args))
    assert code == 2
    assert message in error["error"]


# --- a published model ------------------------------------------------------------------------------------------


def test_a_published_model(tools: str, assets: Path) -> None:
    graph = load_model(assets / "models" / "mcunet-5fps.pkl")
    p = prepare(graph, resolve_scheme("49kb", graph, None), 10)
    got = measure(p.compiled, compile_inference(attach_head(graph, 10)), M7)
    assert elf_bytes(got.train.firmware)[0] == got.train.flash_bytes < 1 << 20
    assert got.train.ram_bytes < 256 << 10
    assert got.infer.ram_bytes < got.train.ram_bytes
    assert 463_216 <= got.infer.flash["weights"] < 1.1 * 463_216, "of all its convolutions, a byte each; some padded"
    assert got.train.flash["other"] == got.train.ram["other"] == 0
    assert got.train.work.instructions > got.train_infers > 50_000_000
    assert 50_000_000 < got.infer.work.instructions < 1.2 * got.train_infers
