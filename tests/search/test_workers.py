from __future__ import annotations

import functools
import os
import pathlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from slipstream.search import search
from slipstream.search.workers import RayExecutor, evaluate_in_worker, worker_count
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


@pytest.fixture(scope="module")
def cluster():  # type: ignore[no-untyped-def]
    try:
        import ray
    except ImportError:
        pytest.skip(
            "RAY IS NOT INSTALLED: the cluster search was not tested. pip install 'slipstream-diffusion[cluster]'"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _memory=2**30)
    with RayExecutor(workers=2, gpus=0) as executor:
        yield executor
    ray.shutdown()


@pytest.mark.timeout(600)  # three processes that import torch, on a machine that may be busy
def test_two_ray_workers_share_a_search_and_a_dead_one_is_replaced(
    cluster: RayExecutor, tmp_path: pathlib.Path
) -> None:
    expected = search(jobs.make_path(), jobs.make_config())
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(jobs)
    factory = functools.partial(by_value(), str(tmp_path / "marker"), str(jobs.ROOT))
    result = search(
        jobs.make_path(), jobs.make_config(), store=tmp_path / "a.sqlite", executor=cluster, factory=factory
    )
    assert (tmp_path / "marker").read_text() == "once"
    assert result.schedule.levels == expected.schedule.levels
    assert result.history == expected.history
    assert cluster.submit(os.getpid).result() != os.getpid()


def by_value():  # type: ignore[no-untyped-def]
    """Return a factory that a worker can run without importing these tests."""

    def factory(marker: str, root: str) -> Any:
        import importlib.util
        import os
        import pathlib

        if not pathlib.Path(marker).exists():
            pathlib.Path(marker).write_text("once")
            os._exit(1)
        spec = importlib.util.spec_from_file_location("jobs", pathlib.Path(root) / "tests" / "search" / "jobs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.make_task()

    return factory


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
