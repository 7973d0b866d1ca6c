# SPDX-License-Identifier: Apache-2.0
"""Device code on QEMU's boards: the host's bytes, the target's memory by protection, and the faults that only real
exceptions show. The debugger's protocol is tested against programs that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import int8_chain
from numpy.typing import NDArray

from trainlet.cli.prepare import load_model, prepare, resolve_scheme
from trainlet.compiler import Compiled
from trainlet.errors import DeviceError, ToolMissingError, UsageError
from trainlet.frontends import graph_file as irfile
from trainlet.measure.validate import validate
from trainlet.session import gdb
from trainlet.session.emulator import EmulatorSession
from trainlet.session.gdb import Remote
from trainlet.session.host import HostSession
from trainlet.session.qemu import BOARDS, QemuMachine, QemuSession, Region, board_target, protection, regions
from trainlet.toolchain import chip as device_module
from trainlet.toolchain.find import find_qemu
from trainlet.toolchain.host import kernel_sources
from trainlet.toolchain.stack import INTERRUPT_BYTES
from trainlet.toolchain.targets import TARGETS, with_limits
from trainlet.toolchain.vectors import synthetic_image

M7 = TARGETS["stm32f746"]
LR = 0.01


def image(t: int) -> NDArray[np.int8]:
    return synthetic_image((8, 8, 3), t)


# --- the same bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["stm32f746", "nrf52840", "rp2040"])
def test_host_and_board_agree_to_the_byte(qemu: str, chain: Compiled, target: str) -> None:
    board, host = QemuSession(chain, TARGETS[target], seed=3), HostSession(chain, seed=3)
    other = EmulatorSession(chain, TARGETS[target], seed=3)
    for t in range(2):
        want = host.train_step(image(t), t, LR)
        assert board.train_step(image(t), t, LR) == other.train_step(image(t), t, LR) == want
        assert board.state_block() == other.state_block() == host._state.tobytes()
        assert board.infer(image(t)).tobytes() == host.infer(image(t)).tobytes()
        other.infer(image(t))
    assert board.stack_used == other.stack_used, "the same code has the same stack"
    assert {k: v for k, v in board.facts().items() if k.startswith("ram_")} == {
        k: v for k, v in other.facts().items() if k.startswith("ram_")
    }
    prefix = board.prefix(image(5))
    assert prefix == host.prefix(image(5)) != b""
    assert board.train_step_cached(prefix, 1, LR) == host.train_step_cached(prefix, 1, LR)
    board.reset(9)
    host.reset(9)
    assert board.state_block() == host._state.tobytes()
    board.close()


def test_every_core_has_a_board() -> None:
    assert {t.core for t in TARGETS.values()} == set(BOARDS)


def test_a_target_larger_than_the_board_is_refused(chain: Compiled) -> None:
    with pytest.raises(UsageError, match=r"lab has .* give --flash 4M --sram 4M"):
        QemuSession(chain, TARGETS["lab"])
    assert board_target(with_limits(TARGETS["lab"], 4 << 20, 4 << 20)).sram_bytes == 4 << 20


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [1, 2, 7, 37, 64, 263, 264, 320, 511, 1000, 1024, 4096])
@pytest.mark.parametrize("base", [0x20000000, 0x00400000])
def test_regions_cover_exactly_what_is_there(kib: int, base: int) -> None:
    """The pieces touch each other, each begins at a multiple of its region, and eight registers are enough."""
    found = list(regions(base, kib << 10, True))
    at = base
    for r in found:
        assert r.base == at
        assert r.base % r.size == 0
        assert 1 <= r.parts <= 8
        at += r.parts * r.size // 8
    assert at == base + (kib << 10)
    assert len(found) <= 4


def test_attributes_of_a_region() -> None:
    """Against the Armv7-M manual: size in bits 1 to 5 as log2 - 1, subregions off in 8 to 15, access in 24 to 26."""
    base, attributes = Region(0x20000000, 512 << 10, 5, True).registers()
    assert base == 0x20000000
    assert attributes & 1
    assert 2 << (attributes >> 1 & 31) == 512 << 10
    assert attributes >> 8 & 0xFF == 0b11100000
    assert (attributes >> 24 & 7, attributes >> 28 & 1) == (3, 1)
    _, flash = Region(0, 1 << 20, 8, False).registers()
    assert (flash >> 8 & 0xFF, flash >> 24 & 7, flash >> 28 & 1) == (0, 6, 0)


@pytest.mark.parametrize("kib", [5, 37, 320])
def test_memory_ends_where_the_targets_does(qemu: str, chain: Compiled, kib: int) -> None:
    """The last byte of SRAM can be written, the next one cannot: the arena is bent to either."""
    target = with_limits(M7, kib << 10)
    end = 0x20000000 + (kib << 10)
    last = end - chain.plan.arena_bytes
    for address, message in ((last, ""), (end, f"outside memory: at {end:#010x}")):
        session = QemuSession(chain, target)
        context = session.firmware.symbols["tl_port_context"].address
        session.machine.write(context, address.to_bytes(4, "little"))
        if message:
            with pytest.raises(DeviceError, match=message):
                session.infer(image(0))
        else:
            session.infer(image(0))
        session.close()


# --- faults -----------------------------------------------------------------------------------------------------

UNALIGNED = {
    "ldrd": 'asm volatile("ldrd r2, r3, [%0]" :: "r"((char *)scratch + 1) : "r2", "r3", "memory");',
    "ldm": 'asm volatile("ldm %0, {r2, r3}" :: "r"((char *)scratch + 2) : "r2", "r3", "memory");',
    "vldr": 'asm volatile("vldr s0, [%0]" :: "r"((char *)scratch + 2) : "s0", "memory");',
    "word on Armv6-M": 'asm volatile("ldr r2, [%0]" :: "r"((char *)scratch + 1) : "r2", "memory");',
}


JUMP = '__asm__ volatile("blx %0" :: "r"({}) : "lr", "memory");'


def plant(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Puts ``code`` at the beginning of the average pooling of the device build."""
    texts = kernel_sources()
    line = "    int32_t *sum = scratch;\n"
    assert texts["pool.c"].count(line) == 1
    texts["pool.c"] = texts["pool.c"].replace(line, f"{line}    __{code}\n" if code.startswith("asm") else line + code)
    monkeypatch.setattr(device_module, "kernel_sources", lambda: texts)


@pytest.mark.parametrize("kind", UNALIGNED)
def test_unaligned_accesses_are_caught(qemu: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The other emulator lets all of them pass."""
    plant(monkeypatch, UNALIGNED[kind])
    target = TARGETS["rp2040"] if "v6" in kind else M7
    session = QemuSession(chain, target)
    with pytest.raises(DeviceError, match=r"unaligned access, at 0x[0-9a-f]+ in tl_avg_pool_s8, layer pool: avg_pool$"):
        session.infer(image(0))
    with pytest.raises(DeviceError, match="begin a new session"):
        session.infer(image(0))


def test_an_unaligned_word_is_fine_where_the_core_allows_it(
    qemu: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, UNALIGNED["word on Armv6-M"])
    assert np.isfinite(QemuSession(chain, M7).infer(image(0))).all()


def test_start_up_code_that_forgets_the_fpu_is_caught(
    qemu: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = device_module.port_sources()
    assert "#ifdef __ARM_FP" in texts["startup.c"]
    broken = {**texts, "startup.c": texts["startup.c"].replace("#ifdef __ARM_FP", "#if 0")}
    monkeypatch.setattr(device_module, "port_sources", lambda: broken)
    with pytest.raises(DeviceError, match=r"the FPU is used and .* did not enable it, at 0x\w+ in tl_"):
        QemuSession(chain, M7).infer(image(0))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("*(volatile int *)0;", r"access outside memory: at 0x00000000, at 0x0040\w+ in tl_avg_pool_s8, layer pool"),
        ("*(volatile int *)0x20050000 = 1;", r"access outside memory: at 0x20050000, .*in tl_avg_pool_s8, layer pool"),
        ("*(volatile int *)0x00401000 = 1;", r"write to flash: at 0x00401000, .* in tl_avg_pool_s8, layer pool"),
        ("*(volatile int *)0x40004000 = 1;", r"access outside memory: at 0x40004000, "),
        (JUMP.format("((uintptr_t)scratch | 1u)"), r"execution outside memory, or in SRAM, at 0x2000.*pool"),
        (JUMP.format("((uintptr_t)tl_avg_pool_s8 & ~1u)"), r"without the Thumb bit, at .*, layer pool"),
        ('__asm__ volatile("udf #1");', r"undefined instruction, at 0x\w+ in tl_avg_pool_s8, layer pool: avg_pool$"),
    ],
)
def test_faults_are_named(qemu: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    plant(monkeypatch, f"    {code}\n")
    session = QemuSession(chain, M7)
    with pytest.raises(DeviceError, match=message):
        session.infer(image(0))


def test_a_stack_that_overflows_is_caught(qemu: str, chain: Compiled) -> None:
    session = QemuSession(chain, M7, stack_bytes=512)
    with pytest.raises(DeviceError, match=r"stack has overflowed its 512 bytes\).*, at 0x0040\w+ in \w+, layer stem"):
        session.train_step(image(0), 0, LR)
    with pytest.raises(DeviceError, match="begin a new session"):
        session.infer(image(0))


def test_a_command_without_an_end_is_interrupted(qemu: str, chain: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "    for (volatile int endless = 1; endless;) {}\n")
    session = QemuSession(chain, M7)
    session.machine._seconds = 0.5
    with pytest.raises(DeviceError, match=r"no end after 0.5 s, at 0x\w+ in tl_avg_pool_s8, layer pool: avg_pool$"):
        session.infer(image(0))


# --- the debugger's protocol ------------------------------------------------------------------------------------


def server(answers: str) -> list[str]:
    """A child that answers every packet with what ``answers`` gives for it, in Python, and then as it likes."""
    text = f"""
import sys, time
def packet(text): return b'$%s#%02x' % (text.encode(), sum(text.encode()) & 255)
while True:
    c = sys.stdin.buffer.read(1)
    if not c: sys.exit()
    if c != b'$': continue
    ask = b''
    while (c := sys.stdin.buffer.read(1)) != b'#': ask += c
    sys.stdin.buffer.read(2)
    ask = ask.decode()
    {answers}
    sys.stdout.buffer.write(b'+' + answer); sys.stdout.buffer.flush()
"""
    return [sys.executable, "-c", text]


FIRST = "answer = packet('l') if ask[0] == 'q' else "


def test_memory_is_read_and_written_in_pieces() -> None:
    answers = FIRST + "packet('OK') if ask[0] == 'M' else packet('ab' * int(ask.split(',')[1], 16))"
    remote = Remote(server(answers))
    assert remote.read(0x100, 2500) == b"\xab" * 2500
    remote.write(0x100, bytes(3000))
    remote.close()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (FIRST + "b'$ab#00'", "damaged packet"),
        (FIRST + "packet('E14')", r"4 bytes at 0x00000100 cannot be read \(answer E14\)"),
        (FIRST + "b''", r"no answer to 'm100,4' within 0.3 s"),
        (FIRST + "sys.exit('out of order')", "it has ended: out of order"),
    ],
)
def test_a_server_that_misbehaves_is_named(monkeypatch: pytest.MonkeyPatch, answers: str, message: str) -> None:
    remote = Remote(server(answers))
    monkeypatch.setattr(gdb, "ANSWER_SECONDS", 0.3)
    with pytest.raises(DeviceError, match=message):
        remote.read(0x100, 4)


def test_a_refused_breakpoint_and_a_program_that_exits_are_named() -> None:
    remote = Remote(server(FIRST + "packet('W00') if ask == 'c' else packet('')"))
    with pytest.raises(DeviceError, match="'Z1,100,2' was answered '', not 'OK'"):
        remote.break_at(0x100)
    with pytest.raises(DeviceError, match="ended instead of stopping"):
        remote.run(5)


def test_the_child_ends_with_the_session(qemu: str, chain: Compiled) -> None:
    session = QemuSession(chain, M7)
    child = session.machine._remote._child.pid
    session.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(DeviceError, match="it has ended"):
        session.infer(image(0))
    forgotten = QemuMachine(session.firmware)._remote._child
    assert forgotten.poll() is not None, "nothing holds it any more"


def end_of(pid: int) -> bool:
    """Whether the process ends within some seconds; a zombie has ended."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


DEAF = f"{FIRST}packet('')\n    sys.stdout.buffer.write(answer); sys.stdout.buffer.flush()\n    time.sleep(60)"
OWNER = """
import sys, time
from trainlet.session.gdb import Remote
remote = Remote(sys.argv[1:])
print(remote._child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_child_ends_with_a_process_that_is_killed(kind: signal.Signals) -> None:
    """Also one that does not mind the end of its input."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *server(DEAF)], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        owner.send_signal(kind)
    assert owner.returncode == -kind
    assert end_of(child)


def test_a_child_of_another_thread_outlives_the_thread() -> None:
    """It is not tied to the thread's end."""
    found: list[Remote] = []
    answers = FIRST + "packet('ab' * 4)"
    thread = threading.Thread(target=lambda: found.append(Remote(server(answers))))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert found[0].read(0x100, 4) == b"\xab" * 4
    found[0].close()


def emulators(pid: int) -> list[int]:
    """Children of a process that are QEMU."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child)] if Path(f"/proc/{child}/comm").read_text().startswith("qemu-system") else []
    return found


def test_a_validation_that_is_killed_leaves_no_emulator(qemu: str, tmp_path: Path) -> None:
    irfile.save(int8_chain(), tmp_path / "chain.json")
    words = ["validate", "--model", str(tmp_path / "chain.json"), "--scheme", "head", "--classes", "4"]
    words += ["--emulator", "qemu", "--steps", "1000000"]
    with subprocess.Popen([sys.executable, "-m", "trainlet", *words]) as owner:
        while owner.poll() is None and not (found := emulators(owner.pid)):
            time.sleep(0.02)
        owner.send_signal(signal.SIGTERM)
    assert end_of(found[0])


def test_a_program_that_qemu_refuses_is_named(qemu: str, chain: Compiled, tmp_path: Path) -> None:
    board = board_target(M7)
    firmware = device_module.build_device(chain, board, startup=protection(board))
    with pytest.raises(DeviceError, match=r"it has ended: .*none\.elf"):
        QemuMachine(replace(firmware, path=tmp_path / "none.elf"))


def test_without_qemu_the_command_that_installs_it_is_named(
    chain: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissingError, match="apt-get install --no-install-recommends qemu-system-arm"):
        find_qemu()


# --- a published model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["stm32f746", "rp2040"])
def test_a_published_model_on_a_board(qemu: str, assets: Path, target: str) -> None:
    graph = load_model(assets / "models" / "mcunet-5fps.pkl")
    p = prepare(graph, resolve_scheme("49kb", graph, None), 10)
    session = QemuSession(p.compiled, TARGETS[target])
    found = validate(HostSession(p.compiled), session, p.shape, 2)
    assert found.changed_weights > 1000
    assert session.ram_bytes < 256 << 10
    assert session.stack_used <= session.firmware.stack_bytes - INTERRUPT_BYTES < 2048
