"""The settings of a training run: one frozen value, written beside every checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pearl.errors import PearlError

Tune = Literal["auto", "full", "lora"]
Precision = Literal["auto", "bf16", "fp32"]
AttentionImplementation = Literal["sdpa", "eager"]

POSITIVE = (
    "batch_size", "accumulation", "epochs", "max_steps", "learning_rate", "lora_rank", "lora_alpha", "log_steps",
    "keep_checkpoints", "min_pixels", "max_pixels", "max_tokens",
)  # fmt: skip
NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "eval_steps", "save_steps", "data_workers", "seed")
SHARES = ("eval_fraction", "warmup", "lora_dropout")


class ConfigError(PearlError, ValueError):
    """Settings that cannot be used; the message names them."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings.

    Attributes:
        data: Trajectories: a Parquet file, a folder, a glob or a Hub dataset id.
        out: The run's folder: checkpoints, logs, and in the end `model/`.
        model: A folder or Hub id of transformers; None: vlm-nano, which ships with the package.
        objective: Its name; `objective_options` are its fields.
        template: A shipped conversation template's name, or a JSON file.
        tune: All weights, or LoRA adapters on all linear layers; "auto": all below 100 million parameters.
        freeze: Parts that are not trained: vision, projector, language.
        lora_rank, lora_alpha, lora_dropout: Of the adapters.
        batch_size: Trajectories a process and forward.
        accumulation: Forwards an update.
        epochs, max_steps: How long; `max_steps` counts where it is set.
        learning_rate, warmup, weight_decay, max_grad_norm: AdamW with a cosine; warm-up is a share of all steps.
        precision: "auto": bf16 on a GPU, fp32 on a CPU.
        gradient_checkpointing: Less memory for more time.
        eval_data: Trajectories to evaluate on; else `eval_fraction` of the images is held out.
        eval_steps, save_steps, log_steps: How often; 0: evaluation and saving at the end only.
        keep_checkpoints: How many of the last.
        min_pixels, max_pixels: Limits of an image's size, where the model's image processor has them.
        max_tokens: Longer trajectories are left out and named.
        attention: transformers' implementation; those that take a tree's mask.
        tree: Views share rows; False: each has its own, as for families where a tree cannot be laid.
        data_workers: Processes that decode and tokenize; 0: the training process itself; None: on a GPU as many as there
            are cores for, up to 4, on a CPU 0.
        seed: Decides everything that is random.
        resume: Go on from the last checkpoint in `out`.
        trust_remote_code, allow_pickle: For models that need them.
        push_to_hub: The Hub id under which `model/` is published, privately.
    """

    data: str
    out: str = "runs/pearl"
    model: str | None = None
    objective: str = "pearl"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    template: str = "pearl"
    tune: Tune = "auto"
    freeze: tuple[str, ...] = ()
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.1
    batch_size: int = 4
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    eval_data: str | None = None
    eval_fraction: float = 0.05
    eval_steps: int = 0
    save_steps: int = 200
    log_steps: int = 1
    keep_checkpoints: int = 2
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tokens: int | None = None
    attention: AttentionImplementation = "sdpa"
    tree: bool = True
    data_workers: int | None = None
    seed: int = 0
    resume: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value}")
        for name in NOT_NEGATIVE:
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ConfigError(f"{name} must not be negative, but is {value}")
        for name in SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ConfigError(f"seed must be below 2**32, not {self.seed}")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels is above max_pixels: {self.min_pixels} > {self.max_pixels}")
        if unknown := set(self.freeze) - {"vision", "projector", "language"}:
            raise ConfigError(f"freeze has {', '.join(sorted(unknown))}; the parts are vision, projector, language")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "freeze": list(self.freeze), "objective_options": dict(self.objective_options)}


FREE_TO_CHANGE = frozenset(
    {
        "out", "resume", "data_workers", "keep_checkpoints", "push_to_hub", "log_steps", "save_steps", "eval_steps",
        "precision", "gradient_checkpointing", "attention", "tree",
    }
)  # fmt: skip
"""What may change on `--resume`: the weights depend on it by rounding, and dropout's masks, at most."""
TOGETHER = ("batch_size", "accumulation")
"""And these, as long as their product stays (as many trajectories an update, in the same order) and the objective does
not compare the trajectories of a forward."""


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a JSON file; several files may make one configuration.

    Raises:
        ConfigError: it cannot be read, is no JSON object, or a setting is unknown or of another type.
    """
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as settings: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a JSON object of settings")
    return checked(TrainConfig, settings, str(path), complete=False)


def make_config(settings: Mapping[str, Any], where: str) -> TrainConfig:
    """
    Raises:
        ConfigError: a setting is unknown, missing or wrong.
    """
    return TrainConfig(**checked(TrainConfig, settings, where))


def checked(kind: type, values: Mapping[str, Any], where: str, complete: bool = True) -> dict[str, Any]:
    """Values for the fields of a dataclass, each of its field's type; for all that need one, if `complete`.

    Raises:
        ConfigError: one is unknown, missing or of another type; the message names it and what is possible.
    """
    from pydantic import TypeAdapter, ValidationError

    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; there are {', '.join(sorted(known)) or 'none'}")
    needed = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
    if complete and (missing := sorted(needed - values.keys())):
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    hints = get_type_hints(kind)
    found = {}
    for name, given in values.items():
        value = tuple(given) if isinstance(given, list) else given  # JSON knows no tuples
        try:
            found[name] = TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise ConfigError(f"{where}: {name} is {value!r}; expected {said}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name} is {value}; expected a finite number")
    return found


def differences(config: TrainConfig, other: Mapping[str, Any], regroup: bool = True) -> list[str]:
    """The settings that a resumed run may not have changed but has, as `name: before → now`; `regroup`: an update's
    trajectories may be divided among other forwards."""
    mine = json.loads(json.dumps(config.to_json()))
    same = regroup and math.prod(mine[name] for name in TOGETHER) == math.prod(other.get(name, 0) for name in TOGETHER)
    names = sorted((mine.keys() | other.keys()) - FREE_TO_CHANGE.union(TOGETHER if same else ()))
    return [f"{n}: {other.get(n)} → {mine.get(n)}" for n in names if mine.get(n) != other.get(n)]
