"""Weights in shards, one for each process, as accelerate's own configuration asks for: FSDP 2 and DeepSpeed's ZeRO."""

from __future__ import annotations

import os
from typing import Any

from pearl.trainer.config import ConfigError
from pearl.trainer.learner import Learner
from pearl.trainer.models import load_trained_state, trained_state
from pearl.trainer.preparation import Prepared, prepare


def check_sharding() -> None:
    """
    Raises:
        ConfigError: accelerate is to shard weights in a way in which they cannot be saved here.
    """
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError(
            "training under FSDP 1 is not supported; FSDP 2 is: accelerate launch --use_fsdp --fsdp_version 2"
        )


def keep_in_step(learner: Learner) -> None:
    """Every process is to make as many forwards as the others, each of which waits for the other's shards.

    Raises:
        ConfigError: they would make different numbers.
    """
    if learner.family.differs_when_several:
        raise ConfigError(
            "images of this family take each process another number of forwards, which FSDP and DeepSpeed do not "
            "allow: train without"
        )
    learner.in_step = True


def fit_deepspeed(settings: dict[str, Any]) -> None:
    """Where DeepSpeed's configuration and the run's have the same settings, the run's count.

    Raises:
        ConfigError: DeepSpeed is to bring an optimizer or schedule of its own, or to shard nothing.
    """
    if own := [name for name in ("optimizer", "scheduler") if name in settings]:
        raise ConfigError(f"DeepSpeed's configuration has a section {own[0]!r}: leave it out, the run has its own")
    if settings["zero_optimization"].get("stage", 0) == 0:
        raise ConfigError("DeepSpeed's ZeRO 0 shards nothing: --zero_stage 1, 2 or 3, or train without DeepSpeed")
    same = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
    settings.update(dict.fromkeys(same, "auto"))
    for name in ("fp16", "bf16"):
        settings.setdefault(name, {})["enabled"] = "auto"


def whole(prepared: Prepared, first: bool) -> Prepared:
    """The full model on the first of processes that have a shard each: trained weights are gathered, frozen ones loaded
    again. Every process must call it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    state = trained_state(prepared.learner)
    unset_hf_deepspeed_config()  # else the model would be loaded in shards again
    if first:
        prepared = prepare(prepared.config)
        load_trained_state(prepared.learner, state)
    return prepared
