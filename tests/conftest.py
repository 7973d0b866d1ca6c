# SPDX-License-Identifier: Apache-2.0
"""What all tests share: where outside assets are, and that nothing skips unseen where they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from cli_run import Run

    from trainlet.compiler import Compiled

ASSETS = os.environ.get("TRAINLET_ASSETS", "")

# The same examples in every run, so that a run without a change gives what the last one gave; machines differ in speed.
settings.register_profile("trainlet", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("trainlet")


OBJECTS = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Workers and sanitized processes share a folder of compiled kernels (kernel_library.py); its maker removes it."""
    if "TRAINLET_TEST_OBJECTS" not in os.environ:
        config.stash[OBJECTS] = TemporaryDirectory(prefix="trainlet-kernels-")
        os.environ["TRAINLET_TEST_OBJECTS"] = config.stash[OBJECTS].name


def pytest_unconfigure(config: pytest.Config) -> None:
    """See pytest_configure."""
    if OBJECTS in config.stash:
        config.stash[OBJECTS].cleanup()
        del os.environ["TRAINLET_TEST_OBJECTS"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--update-golden: files under tests/golden are rewritten instead of compared."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden with what is made now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) asserts that tests/golden/NAME holds ``text``, or writes it with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing; pytest --update-golden writes it"
        assert path.read_text() == text, f"{path} differs; where that is meant, rewrite it with pytest --update-golden"

    return compare


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of published checkpoints, image folders and test vectors; skips where TRAINLET_ASSETS is not set."""
    if not ASSETS:
        pytest.skip("TRAINLET_ASSETS is not set: it names the folder with models/, data/ and vectors2/")
    path = Path(ASSETS)
    assert path.is_dir(), f"TRAINLET_ASSETS={ASSETS} is no folder"
    return path


@pytest.fixture(scope="session")
def tools() -> str:
    """Path of the Arm compiler; skips where it or the emulator is missing."""
    from trainlet.errors import ToolMissingError
    from trainlet.toolchain.find import find_arm_gcc

    try:
        gcc = find_arm_gcc()
    except ToolMissingError as e:
        pytest.skip(str(e))
    pytest.importorskip("unicorn", reason="the emulator is not installed: pip install 'trainlet[m7]'")
    pytest.importorskip("elftools", reason="pyelftools is not installed: pip install 'trainlet[m7]'")
    return gcc


@pytest.fixture(scope="session")
def qemu(tools: str) -> str:
    """Path of QEMU; skips where it, or what ``tools`` looks for, is missing."""
    from trainlet.errors import ToolMissingError
    from trainlet.toolchain.find import find_qemu

    try:
        return find_qemu()
    except ToolMissingError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def chain() -> Compiled:
    """The chain of graphs.py: its last two layers train, half of the channels of the last, with 4 fraction bits."""
    from graphs import int8_chain

    from trainlet.autodiff.scheme import UpdateScheme
    from trainlet.compiler import compile_model
    from trainlet.frontends import attach_head

    weights = {"block.depthwise": 1.0, "block.project": 0.5}
    return compile_model(attach_head(int8_chain(), 4), UpdateScheme("chain", tuple(weights), weights, 12))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with --json: exit code, the one JSON object, standard error."""
    from cli_run import runner

    return runner(capsys)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With the assets there, a skip is a failure; a test marked ``hardware`` may skip all the same."""
    report = yield
    if ASSETS and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("hardware"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped although TRAINLET_ASSETS is set: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module that skips itself while it is collected."""
    report = yield
    if ASSETS and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skipped although TRAINLET_ASSETS is set: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
