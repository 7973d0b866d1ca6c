# SPDX-License-Identifier: Apache-2.0
"""Errors meant for the user. Each names the thing, the rule and the next step; the CLI prints it and exits with
``exit_code``, never with a traceback."""

from __future__ import annotations


class TrainletError(Exception):
    """Base; anything else that escapes is a bug."""

    exit_code = 1


class UsageError(TrainletError):
    """Bad option, bad input file, bad data."""

    exit_code = 2


class UnsupportedError(TrainletError):
    """A model has something that trainlet cannot compile or train."""

    exit_code = 3


class OverBudgetError(TrainletError):
    """It does not fit into the memory that was named."""

    exit_code = 4


class MismatchError(TrainletError):
    """Two runs that must give the same bytes did not, or a run met a number it cannot continue with."""

    exit_code = 5


class ToolMissingError(TrainletError):
    """A compiler, emulator or extra is not installed; the message has the command that installs it."""

    exit_code = 6


class DeviceError(TrainletError):
    """The device or emulator stopped."""

    exit_code = 7
