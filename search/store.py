"""Every finished evaluation in one SQLite file: a search that was killed continues where it was, and workers share the work."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pathlib
import socket
import sqlite3
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
VERSION = 1
LEASE = 120.0  # seconds after which another worker may take over an evaluation that is not finished
PATIENCE = 5.0  # seconds to wait for a file that another program has locked; a commit of ours takes milliseconds

SCHEMA = """
CREATE TABLE IF NOT EXISTS job (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluation (
    bank TEXT NOT NULL, candidate TEXT NOT NULL, rungs TEXT NOT NULL, finished REAL NOT NULL, worker TEXT NOT NULL,
    PRIMARY KEY (bank, candidate));
CREATE TABLE IF NOT EXISTS claim (
    bank TEXT NOT NULL, candidate TEXT NOT NULL, worker TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (bank, candidate));
CREATE TABLE IF NOT EXISTS tensor (name TEXT PRIMARY KEY, shape TEXT NOT NULL, data BLOB NOT NULL);
"""
CONTENT = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"


@dataclass(frozen=True)
class Rung:
    """Score on the first `pairs` pairs, with the seconds and network calls spent since the previous rung."""

    pairs: int
    score: float
    seconds: float
    calls: int


Record = tuple[Rung, ...]


class Store:
    """The evaluations of one job, by bank and candidate.

    Args:
        path: SQLite file, made when missing; None keeps everything in memory.
        identity: what the job measures. A file of another job is refused with the fields that differ.
        own: no user chose the path. A file that is no store is kept beside it, and the job begins again with a `problem`.

    When the disk is full or the file cannot be written any more, the store continues in memory and warns once, in the log
    and in `problem`. Raises ValueError for a path where no store can be made, a file of another kind, or of another job.
    """

    def __init__(
        self, path: str | pathlib.Path | None = None, identity: dict[str, Any] | None = None, own: bool = False
    ) -> None:  # fmt: skip
        self.path = None if path is None else pathlib.Path(path)
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}-{uuid.uuid4().hex[:8]}"
        self.problem = ""
        self.lock = threading.RLock()
        self.records: dict[tuple[str, str], Record] = {}
        self.tensors: dict[str, Tensor] = {}
        self.connection: sqlite3.Connection | None = None
        if self.path is not None:
            try:
                self.connection = self._opened(own)
                _check_identity(self.connection, self.path, identity or {})
            except (sqlite3.OperationalError, OSError) as error:
                if not _is_full(error):
                    raise ValueError(
                        f"Expected `store` where a file can be written, but got {str(path)!r} ({error}). Choose another path."
                    ) from error
                self._give_up(error)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if self.connection is not None:
                    self.connection.close()
                raise ValueError(
                    f"Expected `store` to be a search's SQLite file, but got {str(path)!r} ({error}). Choose another file name."
                ) from error

    def _opened(self, own: bool) -> sqlite3.Connection:
        assert self.path is not None
        try:
            return _open(self.path)
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            if not own:
                raise
        kept = self.path.with_suffix(".damaged")
        os.replace(self.path, kept)
        for ending in ("-wal", "-shm"):
            pathlib.Path(f"{self.path}{ending}").unlink(missing_ok=True)
        self.problem = (
            f"The stored search {self.path.name} was damaged, so it began again. The file is kept as {kept.name}."
        )
        return _open(self.path)

    def get(self, bank: str, candidate: str) -> Record | None:
        """Return the finished evaluation of a candidate, if there is one."""
        with self.lock:
            if (bank, candidate) not in self.records:
                row = self._run("SELECT rungs FROM evaluation WHERE bank = ? AND candidate = ?", bank, candidate)
                record = _read(row[0][0]) if row else None
                if record and is_finite(record):
                    self.records[bank, candidate] = record
            return self.records.get((bank, candidate))

    def put(self, bank: str, candidate: str, record: Record) -> None:
        """Commit a finished evaluation; one that went further than a stored one replaces it.

        One that is not finite is kept in memory: the next run tries again, because the fault may have been a passing one.
        """
        with self.lock:
            known = self.get(bank, candidate)
            if known is not None and len(known) >= len(record):
                return
            self.records[bank, candidate] = record
            if not is_finite(record):
                self._run("DELETE FROM claim WHERE bank = ? AND candidate = ?", bank, candidate)
                return
            rungs = json.dumps([asdict(r) for r in record])
            self._run(
                "INSERT OR REPLACE INTO evaluation VALUES (?, ?, ?, ?, ?)",
                bank, candidate, rungs, time.time(), self.worker,
            )  # fmt: skip
            self._run("DELETE FROM claim WHERE bank = ? AND candidate = ?", bank, candidate)

    def forget(self, bank: str, candidate: str) -> None:
        """Read a candidate from the file again next time: another worker may have taken it further."""
        with self.lock:
            if self.connection is not None:
                self.records.pop((bank, candidate), None)

    def claim(self, bank: str, candidate: str) -> bool:
        """Return whether this worker may evaluate the candidate: nobody alive is at it. True without a file."""
        with self.lock:
            now = time.time()
            row = self._run("SELECT worker, until FROM claim WHERE bank = ? AND candidate = ?", bank, candidate)
            if row and row[0][0] != self.worker and row[0][1] > now and _alive(row[0][0]):
                return False
            previous = row[0][0] if row else None
            changed = self._run(
                "INSERT INTO claim VALUES (?, ?, ?, ?) ON CONFLICT (bank, candidate) DO UPDATE "
                "SET worker = excluded.worker, until = excluded.until WHERE claim.worker IS ? OR claim.until <= ? RETURNING worker",
                bank, candidate, self.worker, now + LEASE, previous, now,
            )  # fmt: skip
            return self.connection is None or bool(changed)

    def claimant(self, bank: str, candidate: str) -> str:
        """Return the worker that evaluates a candidate, as HOST:PROCESS, or ""."""
        with self.lock:
            row = self._run("SELECT worker FROM claim WHERE bank = ? AND candidate = ?", bank, candidate)
            return row[0][0].rpartition(":")[0] if row else ""

    def count(self, bank: str) -> int:
        """Return how many evaluations of a bank are stored."""
        with self.lock:
            rows = self._run("SELECT COUNT(*) FROM evaluation WHERE bank = ?", bank)
            return int(rows[0][0]) if rows else sum(b == bank for b, _ in self.records)

    def tensor(self, name: str) -> Tensor | None:
        """Return a stored tensor (a teacher run), if there is one."""
        with self.lock:
            if name not in self.tensors:
                row = self._run("SELECT shape, data FROM tensor WHERE name = ?", name)
                value = _read_tensor(*row[0]) if row else None
                if value is not None and value.isfinite().all():
                    self.tensors[name] = value
            return self.tensors.get(name)

    def put_tensor(self, name: str, value: Tensor) -> None:
        """Commit a tensor, in float32; one that is not finite is kept in memory."""
        with self.lock:
            value = value.detach().float().cpu().contiguous()
            self.tensors[name] = value
            if not value.isfinite().all():
                return
            self._run(
                "INSERT OR REPLACE INTO tensor VALUES (?, ?, ?)",
                name, json.dumps(list(value.shape)), value.numpy().tobytes(),
            )  # fmt: skip

    def close(self) -> None:
        with self.lock:
            if self.connection is not None:
                self._run("DELETE FROM claim WHERE worker = ?", self.worker)
            if self.connection is not None:
                self.connection.close()
                self.connection = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Execute and commit one statement; a full or broken disk ends the file's use, not the search."""
        if self.connection is None:
            return []
        try:
            with self.connection:
                return self.connection.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            self._give_up(error)
            return []

    def _give_up(self, error: Exception) -> None:
        self.problem = f"{self.path} cannot be written ({error}): the search continues in memory. Free the disk, or delete that file."
        logger.warning("Schedule search: %s", self.problem)
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def _is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error)


def _open(path: pathlib.Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        _check_schema(connection, path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_schema(connection: sqlite3.Connection, path: pathlib.Path) -> None:
    """Raise ValueError for a file with tables, triggers or views that are not ours: another program's, or a trap."""
    with sqlite3.connect(":memory:") as own:
        own.executescript(SCHEMA)
        ours = set(own.execute(CONTENT).fetchall())
    own.close()
    found = set(connection.execute(CONTENT).fetchall())
    if found - ours:
        kind, name, _ = sorted(found - ours, key=str)[0]
        raise ValueError(
            f"Expected `store` to be a search's SQLite file, but {str(path)!r} has another program's {kind} {name!r:.60}. "
            "Choose another file name."
        )


def _check_identity(connection: sqlite3.Connection, path: pathlib.Path, identity: dict[str, Any]) -> None:
    wanted = json.dumps({"store": VERSION, **identity}, sort_keys=True)
    with connection:  # the first of two runs that start together decides
        connection.execute("INSERT OR IGNORE INTO job VALUES ('identity', ?)", (wanted,))
        (found,) = connection.execute("SELECT value FROM job WHERE name = 'identity'").fetchone()
    if found != wanted:
        connection.close()
        fields = ", ".join(differences(_object(found), json.loads(wanted))) or "identity"
        raise ValueError(
            f"Expected `store` {str(path)!r} to belong to this search, but it was made with another {fields}. "
            "Choose another file, or undo the change."
        )


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the fields in which two nested dictionaries differ."""
    found = []
    for name in sorted(a.keys() | b.keys()):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append(f"{prefix}{name}")
    return found


def is_finite(record: Record) -> bool:
    return all(math.isfinite(rung.score) for rung in record)


def _read(rungs: str) -> Record | None:
    """Return a stored record, None for one that is damaged: it is evaluated again."""
    try:
        record = tuple(Rung(**r) for r in json.loads(rungs))
        return record if all(isinstance(v, (int, float)) for r in record for v in asdict(r).values()) else None
    except (ValueError, TypeError):
        return None


def _read_tensor(shape: str, data: bytes) -> Tensor | None:
    """Return a stored tensor, None for one that is damaged."""
    try:
        return torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy()).reshape(json.loads(shape))
    except (ValueError, TypeError, RuntimeError):
        return None


def _alive(worker: str) -> bool:
    """Whether a worker may still be running; one on another machine is believed until its lease ends."""
    host, pid, token = worker.rsplit(":", 2)
    if host != socket.gethostname() or os.name == "nt":  # on Windows signal 0 is not a question
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    # Another process may have got the number since; stores of earlier releases hold no time.
    began = token.rpartition("-")[0]
    return not began or began == _started(int(pid))


def _started(pid: int) -> str:
    """Return when a process of this machine was started, in ticks since it was booted; "" where Linux does not tell."""
    try:
        # The name in parentheses may hold spaces; the time is the 22nd field.
        return pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
