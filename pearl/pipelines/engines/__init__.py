"""What makes the shards of a run: `local`, a plain loop in this process, or `ray`, workers on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pearl.pipelines.endpoint.config import EndpointConfig
from pearl.pipelines.shards import ShardMaker, ShardTask

OnDone = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class EngineConfig:
    """How a run is carried out; none of it changes the data.

    Attributes:
        address: A Ray cluster to join; Ray starts locally when None.
        num_workers: Workers; when None one for every CPU of the cluster that is joined, else one a CPU of this machine
            (one less where there are more than four, for the driver).
        num_gpus_per_worker: GPUs, also a fraction of one, that each worker reserves for its models.
        endpoint: The server of a planner.
    """

    engine: Literal["ray", "local"] = "ray"
    address: str | None = None
    num_workers: int | None = None
    num_gpus_per_worker: float = 0.0
    endpoint: EndpointConfig | None = None


def make_shards(task: ShardTask, shards: Iterable[int], engine: EngineConfig, on_done: OnDone) -> None:
    """Makes `shards` and calls `on_done` with each marker, in order of completion.

    Raises:
        RunError: the run cannot go on.
    """
    if engine.engine == "local":
        maker = ShardMaker(task)
        for number in shards:
            on_done(maker.make(number))
    else:
        from pearl.pipelines.engines.ray import RayEngine

        RayEngine(task, engine, on_done).run(shards)
