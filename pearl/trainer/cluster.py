"""The same training run under Ray Train: on one machine, or on a cluster."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pearl.errors import PearlError
from pearl.trainer.config import TrainConfig, make_config
from pearl.trainer.run_directory import claim
from pearl.trainer.train import Report

REPORT = "report.json"


class ClusterError(PearlError, RuntimeError):
    """Training on Ray did not come to its end; the message says why."""


def train_on_ray(
    config: TrainConfig, num_workers: int, use_gpu: bool = False, address: str | None = None, max_failures: int = 3
) -> Report:
    """Trains with `num_workers` processes. A worker that dies is replaced, and all go on from the last checkpoint.

    `config.out` must be a folder that every node sees.

    Raises:
        PearlError: as `train`; or workers died more than `max_failures` times.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = replace(config, out=str(Path(config.out).resolve()), data=_absolute(config.data))
    claim(config, Path(config.out))
    started = not ray.is_initialized()
    if started:
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    try:
        trainer = TorchTrainer(
            _worker,
            train_loop_config=replace(config, resume=True).to_json(),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            run_config=RunConfig(
                name="ray", storage_path=config.out, failure_config=FailureConfig(max_failures=max_failures)
            ),
        )
        trainer.fit()
    except Exception as error:
        raise ClusterError(f"training on Ray stopped: {_cause(error)}") from error
    finally:
        if started:
            ray.shutdown()
    report = json.loads((Path(config.out) / REPORT).read_text(encoding="utf-8"))
    return Report(**{**report, "model": Path(report["model"])})


def _worker(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = make_config(settings, "the driver's settings")
    from pearl.trainer.train import train

    first = ray.train.get_context().get_world_rank() == 0
    report = train(config, progress=first)
    if first:
        text = json.dumps({**asdict(report), "model": str(report.model)})
        (Path(config.out) / REPORT).write_text(text, encoding="utf-8")


def _absolute(data: str) -> str:
    """A local path as every worker finds it; a Hub id as it is."""
    path = Path(data)
    return str(path.resolve()) if path.exists() or "*" in data else data


def _cause(error: BaseException) -> str:
    """The innermost message: Ray wraps what happened in a worker several times."""
    while (inner := error.__cause__) is not None:
        error = inner
    return " ".join(str(error).split())[-600:]
