# SPDX-License-Identifier: Apache-2.0
"""Hostile trained states, checkpoints and job files. Whoever forges one can also forge its checksum: most cases do."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from hostile import tensors
from hostile.case import Attack, Kind, Place
from hostile.commands import run_commands
from hostile.mutate import Array, change_bytes, change_tree, junk, often
from trainlet.cli import main
from trainlet.errors import TrainletError
from trainlet.train.statefile import _checksum as state_checksum

BITS: Final = (8, 12, 16)


def _words(base: Path, bits: int, *more: object) -> tuple[object, ...]:
    which = ("--scheme", "last:2", "--bits", bits, "--limit", 4, "--epochs", 2)
    return ("train", "--model", base / "model.json", "--data", base / "data.npz", *which, *more)


def _prepare_runs(base: Path) -> None:
    """A finished run for each width, and the same as if it had stopped after its first epoch."""
    from graphs import int8_chain
    from separable import write_separable

    from trainlet.frontends import graph_file

    graph_file.save(int8_chain(), base / "model.json")
    write_separable(base / "data.npz", 16)
    for bits in BITS:
        run = base / f"run{bits}"
        code = main([str(w) for w in _words(base, bits, "--out", run)])
        assert code == 0, f"the sound run ended with {code}"
        (run / "metrics.jsonl").unlink()


@functools.cache
def _document(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    header, arrays = tensors.read(path.read_bytes())
    document = json.loads(header["__metadata__"]["trainlet"])
    del document["checksum"]
    return document, arrays


def _file(rng: random.Random, document: dict[str, Any], arrays: Mapping[str, Array], how: str) -> bytes:
    """A state file, its checksum forged but in a tenth of the cases."""
    try:
        checksum: object = state_checksum(document, arrays)
    except (ValueError, OverflowError):  # NaN has no checksum
        checksum = "0" * 64
    if often(rng, 0.1):
        checksum = junk(rng, checksum)
    text = json.dumps({**document, "checksum": checksum})
    metadata: object = {"trainlet": text}
    if how == "header":
        metadata = change_tree(rng, metadata) if often(rng, 0.5) else metadata
        return tensors.write(arrays, metadata, rng if often(rng, 0.7) else None)
    raw = tensors.write(arrays, metadata)
    return change_bytes(rng, raw) if how == "bytes" else raw


def _forged(rng: random.Random, path: Path) -> bytes:
    document, arrays = copy.deepcopy(_document(path))
    how = rng.choice(("arrays", "arrays", "document", "document", "scheme", "header", "bytes", "bytes"))
    if how == "arrays":
        arrays = tensors.change(rng, arrays)
    if how == "document":
        document = change_tree(rng, document)
    if how == "scheme":
        document["scheme"] = json.dumps(change_tree(rng, json.loads(document["scheme"])))
    return _file(rng, document, arrays, how)


def _make_state(rng: random.Random, place: Place) -> Attack:
    base, state = place.base, place.work / "state.safetensors"
    bits = rng.choice(BITS)
    state.write_bytes(_forged(rng, base / f"run{bits}" / "state.safetensors"))
    given = ("--model", base / "model.json", "--data", base / "data.npz", "--state", state)
    return lambda: run_commands(("eval", *given))


def _make_checkpoint(rng: random.Random, place: Place) -> Attack:
    """Into a run's folder, which ``train --resume`` goes on in."""
    bits = rng.choice(BITS)
    shutil.copytree(place.base / f"run{bits}", place.out)
    path = place.out / "checkpoint.safetensors"
    path.write_bytes(_forged(rng, path))
    if often(rng, 0.1):
        (place.out / "metrics.jsonl").write_bytes(rng.randbytes(99))
    how = rng.choice(("--resume", "--resume", "--resume", "--overwrite"))
    return lambda: run_commands(_words(place.base, bits, "--out", place.out, how))


# --- jobs -------------------------------------------------------------------------------------------------------

_SPECS: Final = tuple({"kind": "run", "n": n, "scheme": {"name": "x", "bits": 8}} for n in range(12))


def _result(n: int) -> dict[str, Any]:
    return {"loss": 1 / (n + 1), "accuracy": [0.5, n]}


def _prepare_jobs(base: Path) -> None:
    from trainlet.select.store import FILE, JobStore

    with JobStore(base / FILE) as store:
        for spec in _SPECS[:10]:
            store.put(spec, _result(spec["n"]), 1.5)


_TABLE: Final = "(key TEXT PRIMARY KEY, spec TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL, checksum TEXT)"
_STATEMENTS: Final = (
    "DROP TABLE jobs",
    "DROP TABLE jobs; CREATE TABLE jobs (key, spec)",
    f"ALTER TABLE jobs RENAME TO other; CREATE VIEW jobs AS SELECT * FROM other; CREATE TABLE more {_TABLE}",
    "ALTER TABLE jobs RENAME TO other; CREATE VIEW jobs AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1"
    " FROM r) SELECT n AS key, n AS spec, n AS result, 1.0 AS seconds, 'x' AS checksum FROM r",
    "CREATE TRIGGER t BEFORE INSERT ON jobs BEGIN SELECT RAISE(ABORT, 'no'); END",
    "CREATE TRIGGER t AFTER INSERT ON jobs BEGIN DELETE FROM jobs; END",
    "ALTER TABLE jobs ADD COLUMN more TEXT NOT NULL DEFAULT 'x'",
    "PRAGMA application_id = 1",
    "PRAGMA user_version = 99",
    "PRAGMA journal_mode = WAL",
    "UPDATE jobs SET result = zeroblob(20000000)",
    "UPDATE jobs SET seconds = 'x'",
    "UPDATE jobs SET seconds = 9e999",
    "UPDATE jobs SET spec = NULL",
    "DELETE FROM jobs",
    "CREATE INDEX i ON jobs (seconds)",
)


def _sql(rng: random.Random, path: Path) -> None:
    db = sqlite3.connect(path)
    try:
        db.executescript(rng.choice(_STATEMENTS))
    except sqlite3.Error:  # such as NULL where the schema has none
        pass
    finally:
        db.close()


def _rows(rng: random.Random, path: Path) -> None:
    """Rows whose checksums are right, whatever they hold."""
    db = sqlite3.connect(path)
    for key, spec, result in db.execute("SELECT key, spec, result FROM jobs").fetchall()[: rng.randrange(1, 10)]:
        spec, result = (rng.choice((text, _text(rng, text))) for text in (spec, result))
        digest = hashlib.sha256(_utf8(spec)).hexdigest()
        checksum = hashlib.sha256(_utf8(f"{digest}\n{spec}\n{result}")).hexdigest()
        row = (digest, spec, result, rng.choice((1.5, -1, 1e300, "x", b"x")), checksum, key)
        with_blob = tuple(_utf8(v) if isinstance(v, str) and not v.isprintable() else v for v in row)
        db.execute("UPDATE OR IGNORE jobs SET key = ?, spec = ?, result = ?, seconds = ?, checksum = ? WHERE key = ?",
                   with_blob)  # fmt: skip
    db.commit()
    db.close()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(rng: random.Random, text: str) -> str:
    how = rng.choice(("tree", "nonsense", "deep", "nan"))
    found = {"nonsense": "x", "deep": "[" * 20_000 + "]" * 20_000, "nan": '{"loss": NaN}'}
    return json.dumps(change_tree(rng, json.loads(text))) if how == "tree" else found[how]


def _raw(rng: random.Random, path: Path) -> None:
    path.write_bytes(change_bytes(rng, path.read_bytes()))


def _beside(rng: random.Random, path: Path) -> None:
    """Files that SQLite takes for its own."""
    name = rng.choice(("-journal", "-wal", "-shm"))
    path.with_name(path.name + name).write_bytes(rng.choice((b"", rng.randbytes(4096), path.read_bytes())))


def _modes(rng: random.Random, path: Path) -> None:
    path.chmod(rng.choice((0o000, 0o444)))


_JOBS: Final[tuple[Callable[[random.Random, Path], None], ...]] = (
    _raw,
    _raw,
    _raw,
    _sql,
    _rows,
    _rows,
    _beside,
    _modes,
)


def _make_jobs(rng: random.Random, place: Place) -> Attack:
    from trainlet.select.store import FILE, JobStore, job_key

    place.out.mkdir()
    path = Path(shutil.copyfile(place.base / FILE, place.out / FILE))
    rng.choice(_JOBS)(rng, path)

    def attack() -> str:
        try:
            with JobStore(path) as store:
                for spec in _SPECS:
                    key = job_key(spec)
                    if key in store:
                        assert isinstance(store.result(key), dict), "the result of a job is an object"
                        assert isinstance(store.seconds(key), float)
                store.put(_SPECS[11], _result(11), 0.5)
                assert store.result(job_key(_SPECS[11])) == _result(11)
        except TrainletError as e:
            return type(e).__name__
        return "read"

    return attack


KINDS: Final = (
    Kind("state", _prepare_runs, _make_state, compiles=True),
    Kind("checkpoint", _prepare_runs, _make_checkpoint, compiles=True),
    Kind("jobs", _prepare_jobs, _make_jobs),
)
