# SPDX-License-Identifier: Apache-2.0
"""What came of many cases, as one JSON object."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hostile.case import FAULTS, Verdict

SHOWN: Final = 5  # seeds that are named for equal failures


def _signature(fault: str, detail: str) -> str:
    """What equal failures have in common: of a traceback the innermost place and the type of the error."""
    lines = [line.strip() for line in detail.strip().splitlines()]
    if fault != "tracebacks":
        first, error, rest = (lines or [""])[0].partition("error:")
        return re.sub(r"\S*/", "", first) + error + re.sub(r"[-+\d]+", "", rest)[:120]
    places = [line for line in lines if line.startswith("File ")]
    return f"{places[-1] if places else ''} {lines[-1].split(':')[0][:200]}"


@dataclass
class Tally:
    """Counts of verdicts; equal failures are kept once."""

    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FAULTS, 0)))
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, v: Verdict) -> None:
        """Counts one."""
        blank = {"inputs": 0, "outcomes": Counter(), "slowest": 0.0, "largest": 0}
        k = self.kinds.setdefault(v.kind, blank)
        k["inputs"] += 1
        k["outcomes"][v.outcome] += 1
        k["slowest"] = max(k["slowest"], round(v.seconds, 2))
        k["largest"] = max(k["largest"], v.nbytes)
        for fault, detail in v.faults.items():
            self.faults[fault] += 1
            self._fail(fault, v.kind, detail, [v.seed], 1)

    def _fail(self, fault: str, kind: str, detail: str, seeds: list[int], times: int) -> None:
        blank = {"fault": fault, "kind": kind, "times": 0, "seeds": [], "detail": detail}
        found = self.failures.setdefault(f"{kind} {fault} {_signature(fault, detail)}", blank)
        found["times"] += times
        found["seeds"] = sorted({*found["seeds"], *seeds})[:SHOWN]

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds what ``to_json`` of another gave."""
        for name, theirs in other["kinds"].items():
            mine = self.kinds.setdefault(name, {"inputs": 0, "outcomes": Counter(), "slowest": 0.0, "largest": 0})
            mine["inputs"] += theirs["inputs"]
            mine["outcomes"].update(theirs["outcomes"])
            mine["slowest"] = max(mine["slowest"], theirs["slowest"])
            mine["largest"] = max(mine["largest"], theirs["largest"])
        self.faults.update(other["faults"])
        for f in other["failures"]:
            self._fail(f["fault"], f["kind"], f["detail"], f["seeds"], f["times"])

    @property
    def inputs(self) -> int:
        """All cases."""
        return sum(k["inputs"] for k in self.kinds.values())

    def to_json(self) -> dict[str, Any]:
        """Counts, and each failure with the command that repeats it."""
        failures = sorted(self.failures.values(), key=lambda f: (f["kind"], -f["times"]))
        return {
            "inputs": self.inputs,
            "faults": dict(self.faults),
            "kinds": {n: {**k, "outcomes": dict(k["outcomes"].most_common())} for n, k in sorted(self.kinds.items())},
            "failures": [{**f, "repeat": repeat(f["kind"], f["seeds"][0])} for f in failures],
        }


def repeat(kind: str, seed: int) -> str:
    """The command that runs a case again, shows what it did and keeps its files."""
    return f"python bench/hostile.py --kind {kind} --seed {seed} --keep hostile-{kind}-{seed}"


def merged(parts: Iterable[Mapping[str, Any]]) -> Tally:
    """One tally of several."""
    found = Tally()
    for part in parts:
        found.merge(part)
    return found
