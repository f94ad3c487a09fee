"""The same training run under Ray Train: on one machine, or on a cluster."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from glob import has_magic
from pathlib import Path
from typing import Any

from pearl.errors import PearlError
from pearl.parquet import place_and_split
from pearl.trainer.config import TrainConfig, make_config
from pearl.trainer.conversation import template_names
from pearl.trainer.models import BUILT_IN
from pearl.trainer.objectives.encoders import LOCAL
from pearl.trainer.preparation import check_names
from pearl.trainer.run_directory import alone_in, claim, write_json
from pearl.trainer.train import Report

REPORT = "report.json"
"""What the workers leave for the driver: the report, or the error that ends the run."""


class ClusterError(PearlError, RuntimeError):
    """Training on Ray did not come to its end; the message says why."""


def train_on_ray(
    config: TrainConfig, num_workers: int, use_gpu: bool = False, address: str | None = None, max_failures: int = 3
) -> Report:
    """Trains with `num_workers` processes. A worker that dies is replaced, and all go on from the last checkpoint;
    an error that a new start would only repeat ends the run.

    `config.out` must be a folder that every node sees.

    Raises:
        PearlError: as `train`; or workers died more than `max_failures` times.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    check_names(config)
    config = from_anywhere(config)
    report = Path(config.out) / REPORT

    class Stop(UserCallback):
        """Without it the workers would be started anew after any error; one in a callback ends the run."""

        def after_exception(self, *args: Any, **options: Any) -> None:
            if error := _read(report).get("error"):
                raise ClusterError(error)

    unseen = {} if use_gpu else {"CUDA_VISIBLE_DEVICES": ""}  # Ray leaves GPUs in sight of who asked for none
    trainer = TorchTrainer(
        _worker,
        train_loop_config=replace(config, resume=True).to_json(),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=config.out,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[Stop()],  # type: ignore[list-item]  # those of the old Ray Train
            worker_runtime_env={"env_vars": unseen},
        ),
    )
    with alone_in(Path(config.out)):
        claim(config, Path(config.out), num_workers)
        report.unlink(missing_ok=True)
        started = not ray.is_initialized()
        if started:
            _start_ray(address, num_workers, use_gpu)
        try:
            trainer.fit()
        except Exception as error:
            if said := _read(report).get("error"):
                raise ClusterError(said) from error
            raise ClusterError(f"training on Ray stopped: {_cause(error)}") from error
        finally:
            if started:
                ray.shutdown()
    found = _read(report)
    return Report(**{**found, "model": Path(found["model"])})


def _start_ray(address: str | None, num_workers: int, use_gpu: bool) -> None:
    """
    Raises:
        ClusterError: Ray is not there, or this machine has too little for so many workers, for which Ray would wait.
    """
    import ray

    try:
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    except Exception as error:  # a bare one where a node takes too long to start
        where = address or "on this machine"
        raise ClusterError(f"Ray cannot be started or reached ({where}): {error}") from error
    kind = "GPU" if use_gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if address is None and there < num_workers:
        ray.shutdown()
        raise ClusterError(f"--num-workers {num_workers} takes as many {kind}s, and this machine has {there}")


def _worker(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = make_config(settings, "the driver's settings")
    from pearl.trainer.train import train_alone

    first = ray.train.get_context().get_world_rank() == 0
    report = Path(config.out) / REPORT
    try:
        made = train_alone(config, progress=first)
    except PearlError as error:
        write_json(report, {"error": str(error)})
        raise
    if first:
        write_json(report, {**asdict(made), "model": str(made.model)})


def _read(report: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    return found


def from_anywhere(config: TrainConfig) -> TrainConfig:
    """The same settings for processes that run in other folders: local paths absolute, names and Hub ids as they are."""
    options = dict(config.objective_options)
    if isinstance(encoder := options.get("target_encoder"), str):
        before = LOCAL if encoder.startswith(LOCAL) else ""
        options["target_encoder"] = before + _absolute(encoder.removeprefix(before))
    return replace(
        config,
        out=str(Path(config.out).resolve()),
        data=_absolute_data(config.data),
        eval_data=config.eval_data and _absolute_data(config.eval_data),
        model=config.model if config.model in (None, BUILT_IN) else _absolute(str(config.model)),
        template=config.template if config.template in template_names() else _absolute(config.template),
        objective_options=options,
    )


def _absolute(name: str) -> str:
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def _absolute_data(data: str) -> str:
    place, split = place_and_split(data)
    found = str(Path(place).resolve()) if has_magic(place) else _absolute(place)
    return f"{found}:{split}" if split else found


def _cause(error: BaseException) -> str:
    """The innermost message: Ray wraps what happened in a worker several times."""
    while (inner := error.__cause__) is not None:
        error = inner
    return " ".join(str(error).split())[-600:]
