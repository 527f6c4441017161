"""Who evaluates: this process, a `concurrent.futures` executor, or a Ray cluster. One model per worker."""

from __future__ import annotations

import logging
import pathlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from torch import Tensor

from .evaluation import Task, TaskFactory, banks
from .space import Candidate
from .store import Record, Store

logger = logging.getLogger(__name__)
# One task per process and job: a model is built once, however many candidates come.
_TASKS: dict[str, tuple[Task, Store]] = {}
_LOCK = threading.Lock()


class Executor(Protocol):
    """What a search needs of an executor; `concurrent.futures` ones fit."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]: ...


def evaluate_in_worker(
    factory: TaskFactory, job: str, bank: str, teacher: Tensor | None, candidate: Candidate, limits: tuple[float, ...]
) -> Record:
    """Evaluate one candidate in this process; the first call of a job builds its model. Runs in the worker."""
    with _LOCK:  # threads of one process share a model, and a model samples one thing at a time
        if job not in _TASKS:
            _TASKS.clear()
            _TASKS[job] = (factory(), Store())
        task, store = _TASKS[job]
        pairs = banks(task.path, task.config, store)[bank]
        if teacher is not None:
            store.put_tensor(f"teacher {pairs.key}", teacher)
        return task.evaluate(pairs, candidate, limits)


def worker_count(executor: Executor | None) -> int:
    """Return how many candidates may be in flight."""
    if executor is None:
        return 1
    return int(getattr(executor, "workers", None) or getattr(executor, "_max_workers", None) or 4)


class RayExecutor:
    """A `concurrent.futures`-like executor on a Ray cluster: one actor per worker, dead actors are replaced.

    Args:
        address: "auto" joins the cluster that this machine belongs to, None starts a local one, or an address.
        workers: actors; None = one per GPU of the cluster, else one per CPU.
        gpus: GPUs of each actor; None = 1 when the cluster has any.

    Raises ValueError when Ray is not installed.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, gpus: float | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "Expected Ray to be installed for a cluster search, but it is not. pip install 'slipstream-diffusion[cluster]'"
            ) from error
        self.ray = ray
        self.owns = not ray.is_initialized()
        if self.owns:
            ray.init(address=address, logging_level=logging.ERROR, include_dashboard=False if address is None else None)
        resources = ray.cluster_resources()
        self.gpus = gpus if gpus is not None else float(resources.get("GPU", 0) > 0)
        self.workers = workers or max(1, int(resources.get("GPU" if self.gpus else "CPU", 1)))
        self.actor = _actor_class(ray).options(num_gpus=self.gpus, num_cpus=1, max_restarts=0)
        self.idle: list[Any] = [self.actor.remote() for _ in range(self.workers)]
        self.ready = threading.Condition()

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Run `function(*args)` in the next idle worker; a worker that dies is replaced and the call made again, twice."""
        from ray import cloudpickle

        call = cloudpickle.dumps((function, args))
        future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(call, future), daemon=True).start()
        return future

    def _run(self, call: bytes, future: Future[Any]) -> None:
        for attempt in range(3):
            worker = self._take()
            try:
                result = self.ray.get(worker.run.remote(package_root(), call))
            except self.ray.exceptions.RayActorError as error:
                logger.warning("A worker died (%s): it is replaced and its candidate run again.", type(error).__name__)
                worker = self.actor.remote()
                if attempt == 2:
                    future.set_exception(error)
            except BaseException as error:
                future.set_exception(getattr(error, "cause", None) or error)
                return
            else:
                future.set_result(result)
                return
            finally:
                self._give(worker)

    def _take(self) -> Any:
        with self.ready:
            while not self.idle:
                self.ready.wait()
            return self.idle.pop()

    def _give(self, worker: Any) -> None:
        with self.ready:
            self.idle.append(worker)
            self.ready.notify()

    def shutdown(self) -> None:
        """Stop the workers, and Ray itself when this executor started it."""
        for worker in self.idle:
            self.ray.kill(worker)
        if self.owns:
            self.ray.shutdown()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()


def package_root() -> tuple[str, str]:
    """Return this package's name and folder, so that a worker can import it although nothing is installed there."""
    return __name__.split(".search", 1)[0], str(pathlib.Path(__file__).resolve().parent.parent)


def _actor_class(ray: Any) -> Any:
    # A local class is sent by value: the worker can run it before it can import this package.
    class Worker:
        def run(self, package: tuple[str, str], call: bytes) -> Any:
            import importlib.util
            import os
            import sys

            name, folder = package
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                spec = importlib.util.spec_from_file_location(
                    name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
                )
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[name] = module
                spec.loader.exec_module(module)
            import torch
            from ray import cloudpickle

            if torch.get_num_threads() > 1:
                torch.set_num_threads(1)  # many workers share the cores
            function, args = cloudpickle.loads(call)
            return function(*args)

    return ray.remote(Worker)
