# SPDX-License-Identifier: Apache-2.0
"""The rule of ``conftest.py`` that no test skips unseen, tried on a folder of tests that skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPERS = """
import pytest

def test_ok():
    pass

def test_skips():
    pytest.skip("no reason")

@pytest.mark.hardware
def test_needs_a_board():
    pytest.skip("no board")

@pytest.mark.xfail(reason="known")
def test_known():
    assert False

def test_needs_assets(assets):
    assert assets.is_dir()
"""


@pytest.mark.parametrize("where", ["set", "unset"])
def test_a_skip_fails_exactly_where_the_assets_are(where: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    hardware: x\n")
    (tmp_path / "test_skippers.py").write_text(SKIPPERS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module_at_all')\n")
    env = {**os.environ, "TRAINLET_ASSETS": str(tmp_path) if where == "set" else ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path), "--rootdir", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    if where == "set":
        # the module that skips itself is an error of the collection, which ends the run
        assert "test_module.py skipped although TRAINLET_ASSETS is set" in run.stdout
        assert run.returncode != 0
        run = subprocess.run([*command, "--ignore", str(tmp_path / "test_module.py")], cwd=tmp_path, env=env,
                             capture_output=True, text=True, check=False)  # fmt: skip
        assert "test_skips skipped although TRAINLET_ASSETS is set: Skipped: no reason" in run.stdout
        assert "1 failed, 2 passed, 1 skipped, 1 xfailed" in run.stdout
        assert run.returncode == 1
    else:
        assert "1 passed, 4 skipped, 1 xfailed" in run.stdout
        assert run.returncode == 0
