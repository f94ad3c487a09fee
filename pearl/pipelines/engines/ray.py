"""Shards on a Ray cluster: a pool of worker actors, one shard in flight each; only markers travel.

A worker that dies is replaced and its shard tried twice more; then the shard is bisected until the samples that kill
are alone in quarantine. Ray's own retries are off: this file alone decides what runs again.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Collection, Iterable
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from pearl.errors import PearlError
from pearl.machine import num_cores
from pearl.pipelines.engines import EngineConfig, OnDone
from pearl.pipelines.errors import RunError
from pearl.pipelines.shards import ShardMaker, ShardTask

RETRIES = 2
PATIENCE = 60.0
logger = logging.getLogger(__name__)

DIED = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, RaySystemError)


@ray.remote
class ShardWorker:
    """A process that makes shards."""

    def __init__(self, task: ShardTask) -> None:
        self.maker = ShardMaker(task)

    def ready(self) -> None:
        """Returns once the worker stands."""

    def make(self, number: int, culprits: Collection[int] = ()) -> dict[str, Any]:
        return self.maker.make(number, culprits)

    def probe(self, number: int, ordinals: Collection[int]) -> None:
        self.maker.probe(number, ordinals)


class RayEngine:
    """Drives the workers of one run."""

    def __init__(self, task: ShardTask, engine: EngineConfig, on_done: OnDone) -> None:
        self.task, self.engine, self.on_done = task, engine, on_done
        self.crashes: Counter[int] = Counter()
        self.failed_starts = 0
        self.isolated: Any = None

    def run(self, shards: Iterable[int]) -> None:
        joined = ray.is_initialized()
        try:
            if not joined:
                self._start_ray()
            self._drive(deque(shards))
        except RayTaskError as error:
            if isinstance(error.cause, PearlError):
                raise RunError(str(error.cause)) from None
            raise
        finally:
            if not joined:
                ray.shutdown()

    def _start_ray(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
        if self.engine.address:
            options = {"log_to_driver": False, "logging_level": "error", "address": self.engine.address}
        else:
            options |= {"address": "local", "num_cpus": self.num_workers}
        try:
            ray.init(**options)
        except Exception as error:  # a bare one where a node takes too long to start
            where = self.engine.address or "on this machine"
            raise RunError(f"Ray cannot be started or reached ({where}): {error}") from error
        if self.engine.num_gpus_per_worker and not ray.cluster_resources().get("GPU"):
            raise RunError("--num-gpus-per-worker: no GPU in this cluster")

    @property
    def num_workers(self) -> int:
        if self.engine.num_workers:
            return self.engine.num_workers
        if self.engine.address:
            return max(1, int(ray.cluster_resources().get("CPU", 1)))
        cpus = num_cores()
        return cpus if cpus <= 4 else cpus - 1

    def _spawn(self) -> Any:
        gpus = self.engine.num_gpus_per_worker
        unseen = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}  # Ray leaves GPUs in sight of who asked for none
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "runtime_env": {"env_vars": unseen}}
        return ShardWorker.options(**options).remote(self.task)  # type: ignore[attr-defined]

    def _drive(self, pending: deque[int]) -> None:
        """A pool of workers, each with at most one shard, until nothing is pending; then the shards that kill."""
        suspects: list[int] = []
        in_flight: dict[Any, tuple[Any, int | None]] = {}

        def start_worker() -> None:
            worker = self._spawn()
            in_flight[worker.ready.remote()] = (worker, None)

        for _ in range(min(self.num_workers, len(pending))):
            start_worker()
        started = False
        while pending or any(number is not None for _, number in in_flight.values()):
            done, _ = ray.wait(list(in_flight), num_returns=1, timeout=PATIENCE)
            if not done:
                if not started:
                    self._warn_of_starvation()
                continue
            started = True
            worker, number = in_flight.pop(done[0])
            try:
                marker = ray.get(done[0])
            except DIED as error:
                self._count_crash(number, error, pending, suspects)
                if len(pending) > len(in_flight):
                    start_worker()
                continue
            if number is not None:
                self.on_done(marker)
            if pending:
                following = pending.popleft()
                in_flight[worker.make.remote(following)] = (worker, following)
            else:
                ray.kill(worker)
        for worker, _ in in_flight.values():
            ray.kill(worker)  # never had a place to start
        for number in suspects:
            self._isolate(number)

    def _warn_of_starvation(self) -> None:
        free, gpus = ray.available_resources(), self.engine.num_gpus_per_worker
        logger.warning("still waiting for a worker: each needs 1 CPU and %g GPU; free in the cluster: %s", gpus, free)

    def _count_crash(self, number: int | None, error: Exception, pending: deque[int], suspects: list[int]) -> None:
        if number is None:
            self.failed_starts += 1
            if self.failed_starts > 3 * self.num_workers:
                raise RunError(f"workers die while they start: {error}") from error
            return
        self.crashes[number] += 1
        if self.crashes[number] > RETRIES:
            suspects.append(number)
        else:
            pending.appendleft(number)

    def _isolate(self, number: int) -> None:
        """Finds the samples that kill their worker, quarantines them, and makes the shard without them."""
        planned = [ordinal for ordinal, _, _ in self.task.directory().planned(number)]
        culprits = tuple(self._culprits(number, planned))
        for _ in range(RETRIES + 1):
            if (marker := self._try("make", number, culprits)) is not None:
                self.on_done(marker)
                return
        raise RunError(f"shard {number} kills every worker, and no single sample is the cause; see Ray's logs")

    def _culprits(self, number: int, ordinals: list[int]) -> list[int]:
        if self._survives(number, ordinals):
            return []
        if len(ordinals) == 1:
            return ordinals
        middle = len(ordinals) // 2
        return self._culprits(number, ordinals[:middle]) + self._culprits(number, ordinals[middle:])

    def _survives(self, number: int, ordinals: list[int]) -> bool:
        """One sample alone gets a second chance, so that a worker killed from outside condemns nobody."""
        tries = RETRIES if len(ordinals) == 1 else 1
        return any(self._try("probe", number, ordinals) is not None for _ in range(tries))

    def _try(self, method: str, *arguments: Any) -> dict[str, Any] | None:
        """Calls a worker that has nothing else to do; None when it dies of it."""
        self.isolated = self.isolated or self._spawn()
        try:
            return dict(ray.get(getattr(self.isolated, method).remote(*arguments)) or {})
        except DIED:
            self.isolated = None
            return None
