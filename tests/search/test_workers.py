from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from slipstream.cli import main
from slipstream.search import Schedule, search
from slipstream.search.workers import evaluate_in_worker, worker_count
from slipstream_tests.search import jobs


def test_an_executor_takes_the_same_way_as_one_process() -> None:
    expected = search(jobs.make_path(), jobs.make_config())
    with ThreadPoolExecutor(3) as executor:
        result = search(jobs.make_path(), jobs.make_config(), executor=executor, factory=jobs.make_task)
    assert result.schedule.levels == expected.schedule.levels
    assert result.history == expected.history
    assert result.baselines == expected.baselines


class Unreliable:
    """Runs calls at once; every fifth one dies in its worker."""

    workers = 2

    def __init__(self, dies: int) -> None:
        self.count, self.dies = 0, dies

    def submit(self, function: Any, *args: Any) -> Future:
        self.count += 1
        future: Future = Future()
        if self.count % self.dies == 0:
            future.set_exception(RuntimeError("lost"))
        else:
            future.set_result(function(*args))
        return future


def test_a_failed_evaluation_is_run_again(caplog: pytest.LogCaptureFixture) -> None:
    expected = search(jobs.make_path(), jobs.make_config(evaluations=20))
    result = search(jobs.make_path(), jobs.make_config(evaluations=20), executor=Unreliable(5), factory=jobs.make_task)
    assert result.schedule.levels == expected.schedule.levels
    assert "run again" in caplog.text


def test_an_evaluation_that_always_fails_ends_the_search() -> None:
    with pytest.raises(RuntimeError, match="lost"):
        search(jobs.make_path(), jobs.make_config(), executor=Unreliable(1), factory=jobs.make_task)


def test_worker_counts() -> None:
    assert worker_count(None) == 1
    assert worker_count(Unreliable(1)) == 2
    with ThreadPoolExecutor(3) as executor:
        assert worker_count(executor) == 3


# --------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture
def cluster():  # type: ignore[no-untyped-def]
    try:
        import ray
    except ImportError:
        pytest.skip(
            "RAY IS NOT INSTALLED: the cluster search was not tested. pip install 'slipstream-diffusion[cluster]'"
        )
    if not pathlib.Path("/proc/self/cmdline").exists():
        pytest.skip("NO /proc HERE: a worker cannot be found to be killed, and the cluster search was not tested.")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _memory=2**30)
    yield
    ray.shutdown()


PROGRAM = "import runpy, sys; runpy.run_path(sys.argv.pop(1)); from slipstream.cli import main; sys.exit(main())"
COMMAND = ["search", "--size", "32", "32", "--pairs", "2", "--steps", "2", "--evaluations", "16"]
BUSY = b"ray::Worker.run"  # how Ray calls a worker's process while it evaluates


@pytest.mark.timeout(600)  # four processes that import torch, on a machine that may be busy
@pytest.mark.usefixtures("cluster")
def test_the_command_joins_a_cluster_and_outlives_a_worker(tmp_path: pathlib.Path) -> None:
    """`slipstream search --ray auto` with two workers: kill -9 of one at work, and the result is as without Ray."""
    store, out, log = tmp_path / "a.sqlite", tmp_path / "ray.json", tmp_path / "log"
    command = [sys.executable, "-c", PROGRAM, str(jobs.ROOT / "tests" / "conftest.py"), *COMMAND]
    command += ["--ray", "auto", "--workers", "2", "--store", str(store), "--out", str(out)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        killed = False
        while process.poll() is None and not killed:
            killed = jobs.stored(store) >= 1 and any(kill_at_work(pid) for pid in descendants(BUSY))
            time.sleep(0.002)
        assert killed, log.read_text()
        # Meanwhile the same here, alone.
        assert main([*COMMAND, "--out", str(tmp_path / "alone.json")]) == 0
        expected = Schedule.load(tmp_path / "alone.json")
        assert process.wait(timeout=400) == 0, log.read_text()
    text = log.read_text()
    assert "it is replaced and its candidate run again" in text
    assert "16 schedules tried" in text
    assert Schedule.load(out).levels == expected.levels
    assert Schedule.load(out).objective == expected.objective


def kill_at_work(pid: int) -> bool:
    """Stop a process, and kill it -9 if it is at work as it stands still: on a busy machine it may have finished by then."""
    try:
        os.kill(pid, signal.SIGSTOP)
        at_work = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().startswith(BUSY)
        os.kill(pid, signal.SIGKILL if at_work else signal.SIGCONT)
    except OSError:  # it has ended meanwhile
        return False
    return at_work


def descendants(named: bytes) -> list[int]:
    """Return the running processes below this one whose command line begins with `named`."""
    parents, names = {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue

    def below(pid: int) -> bool:
        return pid in parents and (parents[pid] == os.getpid() or below(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith(named) and below(pid)]


def test_the_worker_keeps_its_model_between_candidates() -> None:
    made = []

    def factory() -> Any:
        made.append(1)
        return jobs.make_task()

    task = jobs.make_task()
    candidates = [sigmas for name, sigmas in task.path.stock(3).items() if name in ("karras", "beta")]
    from slipstream.search.space import candidate_of

    for sigmas in candidates:
        evaluate_in_worker(factory, "job of this test", "search", None, candidate_of(sigmas), (float("inf"),) * 3)
    assert made == [1]
