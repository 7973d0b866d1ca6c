# SPDX-License-Identifier: Apache-2.0
"""Runs commands with --json in this process, for tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from trainlet.cli import main

Run = Callable[..., tuple[int, dict[str, Any], str]]
"""Takes the words of a command; gives its exit code, the one JSON object, and standard error."""


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """What the fixture ``run`` is."""

    def call(*args: object) -> tuple[int, dict[str, Any], str]:
        code = main([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        assert out.count("\n") == 1, "one line, the JSON object"
        return code, json.loads(out), err

    return call
