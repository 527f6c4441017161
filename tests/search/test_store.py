from __future__ import annotations

import errno
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from slipstream.search import search
from slipstream.search import store as store_module
from slipstream.search.store import Rung, Store, differences
from slipstream_tests.search import jobs

RECORD = (Rung(4, 0.5, 0.1, 8), Rung(8, 0.25, 0.1, 8))


def test_what_was_put_survives_the_process(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "a.sqlite", {"x": 1}) as store:
        assert store.get("search", "c") is None
        store.put("search", "c", RECORD)
        store.put_tensor("teacher", torch.arange(6.0).reshape(2, 3))
    with Store(tmp_path / "a.sqlite", {"x": 1}) as store:
        assert store.get("search", "c") == RECORD
        assert store.get("holdout", "c") is None
        assert store.count("search") == 1
        assert torch.equal(store.tensor("teacher"), torch.arange(6.0).reshape(2, 3))


def test_a_longer_record_replaces_a_shorter_and_never_the_reverse(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "a.sqlite") as store:
        store.put("search", "c", RECORD[:1])
        store.put("search", "c", RECORD)
        store.put("search", "c", RECORD[:1])
        store.forget("search", "c")
        assert store.get("search", "c") == RECORD


def test_the_file_is_in_write_ahead_mode(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "a.sqlite") as store:
        assert store.connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_store_of_another_model_is_refused_with_the_fields(tmp_path: pathlib.Path) -> None:
    Store(tmp_path / "a.sqlite", {"model": {"hash": "abc", "name": "m"}, "cfg": 7.0}).close()
    with pytest.raises(ValueError, match=r"another cfg, model\.hash\. Choose another file"):
        Store(tmp_path / "a.sqlite", {"model": {"hash": "def", "name": "m"}, "cfg": 3.0})
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}, "c": 0}) == ["c"]


def test_another_model_on_the_same_store_through_search(tmp_path: pathlib.Path) -> None:
    search(jobs.make_path(), jobs.make_config(evaluations=12), store=tmp_path / "a.sqlite")
    with pytest.raises(ValueError, match="was made with another cfg"):
        search(jobs.make_path(cfg_scale=2.0), jobs.make_config(evaluations=12), store=tmp_path / "a.sqlite")
    search(jobs.make_path(), jobs.make_config(evaluations=14), store=tmp_path / "a.sqlite")  # more budget: same job


def test_a_file_that_is_no_database(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.sqlite").write_text("hello " * 1000)
    with pytest.raises(ValueError, match="to be a search's SQLite file"):
        Store(tmp_path / "a.sqlite")


def test_a_database_whose_pages_are_damaged_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.sqlite"
    Store(path, {"a": 1}).close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"to be a search's SQLite file, but got .*malformed"):
        Store(path, {"a": 1})


def test_a_full_disk_is_told_and_the_search_goes_on(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = search(jobs.make_path(), jobs.make_config())
    store = tmp_path / "a.sqlite"
    search(jobs.make_path(), jobs.make_config(evaluations=12), store=store)
    opened = Store.__init__

    def limited(self: Store, *args: object, **options: object) -> None:
        opened(self, *args, **options)
        pages = self.connection.execute("PRAGMA page_count").fetchone()[0]
        self.connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own "database or disk is full"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "__init__", limited)
        result = search(jobs.make_path(), jobs.make_config(), store=store)
    assert result.schedule.levels == expected.schedule.levels
    assert any("continues in memory" in w for w in result.warnings)
    assert "database or disk is full" in caplog.text


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("database or disk is full"), OSError(errno.ENOSPC, "No space left")]
)
def test_a_disk_that_is_full_from_the_start(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    expected = search(jobs.make_path(), jobs.make_config(evaluations=13))

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(store_module, "_check_identity" if isinstance(error, sqlite3.Error) else "_open", full)
    result = search(jobs.make_path(), jobs.make_config(evaluations=13), store=tmp_path / "a.sqlite")
    assert result.schedule.levels == expected.schedule.levels
    assert any("continues in memory" in w for w in result.warnings)
    assert "continues in memory" in caplog.text


def test_a_store_where_no_file_can_be(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.sqlite"):
        with pytest.raises(ValueError, match="Expected `store` where a file can be written"):
            Store(path)


def test_claims_keep_two_workers_apart(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "a.sqlite") as one, Store(tmp_path / "a.sqlite") as two:
        assert one.claim("search", "c")
        assert one.claim("search", "c")
        assert not two.claim("search", "c")
        assert two.claim("search", "d")
        one.close()
        assert two.claim("search", "c")


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "a.sqlite") as dead, Store(tmp_path / "a.sqlite") as alive:
        finished = subprocess.Popen([sys.executable, "-c", ""])
        finished.wait()
        host, _, tail = dead.worker.rsplit(":", 2)
        dead.worker = f"{host}:{finished.pid}:{tail}"
        assert dead.claim("search", "c")
        assert alive.claim("search", "c")
        assert not dead.claim("search", "c")


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="only Linux tells when a process was started")
def test_a_claim_whose_process_number_lives_again_is_taken_over(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "a.sqlite") as dead, Store(tmp_path / "a.sqlite") as alive:
        head, token = dead.worker.rsplit(":", 1)
        began, tail = token.split("-")
        assert dead.claim("search", "c")
        assert not alive.claim("search", "c")
        dead.close()
    with Store(tmp_path / "a.sqlite") as dead, Store(tmp_path / "a.sqlite") as alive:
        dead.worker = f"{head}:{int(began) - 1}-{tail}"
        assert dead.claim("search", "c")
        assert alive.claim("search", "c")


def test_a_locked_store_is_left_after_seconds(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PATIENCE", 0.2)
    path = tmp_path / "a.sqlite"
    with Store(path) as store:
        store.put("search", "a", RECORD)
        with sqlite3.connect(path) as other:
            other.execute("BEGIN EXCLUSIVE")
            begun = time.monotonic()
            store.put("search", "b", RECORD)
            assert time.monotonic() - begun < 5
        other.close()
        assert "database is locked" in store.problem
        assert store.get("search", "b") == RECORD


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE bookmarks (name TEXT)",
        "CREATE VIEW best AS SELECT * FROM job",
        "CREATE TRIGGER trap AFTER INSERT ON claim BEGIN DELETE FROM evaluation; END",
        "DROP TABLE tensor; CREATE TABLE tensor (name TEXT, price REAL)",
    ],
)
def test_the_file_of_another_program_is_refused_untouched(tmp_path: pathlib.Path, statement: str) -> None:
    path = tmp_path / "a.sqlite"
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.executescript(statement)
    db.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another program's"):
        Store(path)
    assert path.read_bytes() == before


def test_damaged_rows_are_evaluated_again(tmp_path: pathlib.Path) -> None:
    with Store(tmp_path / "a.sqlite") as store:
        store.put("search", "a", RECORD)
        store.put_tensor("t", torch.ones(2, 3))
    for rungs, shape in (("[1]", "[7]"), ('[{"pairs": 1}]', "{"), ("{", '"x"'), ("[]", "[2, -4]")):
        with sqlite3.connect(tmp_path / "a.sqlite") as db:
            db.execute("UPDATE evaluation SET rungs = ?", (rungs,))
            db.execute("UPDATE tensor SET shape = ?", (shape,))
        db.close()
        with Store(tmp_path / "a.sqlite") as store:
            assert store.get("search", "a") is None
            assert store.tensor("t") is None


def test_two_processes_on_one_store_share_the_work(tmp_path: pathlib.Path) -> None:
    """Both decide alike, and neither repeats what the other has evaluated."""
    expected = search(jobs.make_path(), jobs.make_config())
    store = tmp_path / "a.sqlite"
    command = [sys.executable, jobs.__file__, str(store), "0.03"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while other.poll() is None and jobs.stored(store) < 3:
        time.sleep(0.005)
    result = search(jobs.make_path(0.03), jobs.make_config(), store=store)
    printed, _ = other.communicate(timeout=200)
    assert other.returncode == 0
    assert printed.strip() == str(result.schedule.levels) == str(expected.schedule.levels)
    assert result.history == expected.history
    with sqlite3.connect(store) as db:
        counts = dict(db.execute("SELECT worker, COUNT(*) FROM evaluation GROUP BY worker").fetchall())
    assert len(counts) == 2
    assert min(counts.values()) > 10  # of about 52, and a few more that one of them tried ahead of need


def test_kill_9_in_the_middle_then_run_again_ends_with_the_same_winner(tmp_path: pathlib.Path) -> None:
    expected = search(jobs.make_path(), jobs.make_config())
    store = tmp_path / "a.sqlite"
    script = pathlib.Path(jobs.__file__)
    for wanted in (5, 25):
        command = [sys.executable, str(script), str(store), "0.01"]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while jobs.stored(store) < wanted and time.monotonic() < deadline:
            assert process.poll() is None, "the search ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert jobs.stored(store) >= wanted
    before = jobs.stored(store)
    result = search(jobs.make_path(), jobs.make_config(), store=store)
    assert result.schedule.levels == expected.schedule.levels
    assert result.schedule.objective == expected.schedule.objective
    assert result.history == expected.history
    assert result.evaluated_now <= expected.evaluated_now - before + 1
    again = search(jobs.make_path(), jobs.make_config(), store=store)
    assert again.evaluated_now == 0
    assert again.schedule.levels == expected.schedule.levels


def test_a_damaged_store_that_no_user_named_is_kept_aside_and_the_search_begins_again(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "job.sqlite"
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a database"):
        Store(file, {})
    with Store(file, {}, own=True) as store:
        assert (
            store.problem
            == "The stored search job.sqlite was damaged, so it began again. The file is kept as job.damaged."
        )
        store.put_tensor("teacher", torch.ones(2))
    assert (tmp_path / "job.damaged").read_bytes() == b"junk"
    with Store(file, {}, own=True) as store:
        assert not store.problem
        assert store.tensor("teacher") is not None
