"""What a training run needs before its first step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pearl.trainer.config import ConfigError, TrainConfig
from pearl.trainer.console import tell
from pearl.trainer.conversation import Template, load_template
from pearl.trainer.data import Examples, Table
from pearl.trainer.families import FAMILIES, Unknown, family_of
from pearl.trainer.learner import Learner
from pearl.trainer.models import (
    Loaded,
    data_workers,
    frozen_digest,
    load,
    make_trainable,
    model_settings,
    place_of,
    precision,
)
from pearl.trainer.objectives.base import Objective
from pearl.trainer.objectives.registry import make_objective
from pearl.trainer.packing import Packer
from pearl.trainer.views import ViewEncoder


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, before its first step; nothing in its settings is left to be decided."""

    config: TrainConfig
    objective: Objective
    template: Template
    loaded: Loaded
    encoder: ViewEncoder
    learner: Learner
    packer: Packer
    training: Examples
    held_out: Examples
    lengths: list[int]

    def digests(self) -> dict[str, str]:
        """Of what the settings name by its place, and a checkpoint does not hold."""
        return {
            "trajectories": f"{self.training.table.digest()} {self.held_out.table.digest()}",
            "template": hashlib.sha256(json.dumps(asdict(self.template)).encode()).hexdigest()[:16],
            "frozen weights": frozen_digest(self.learner),
            "tokenizer, chat template or image sizes": self._tokens(),
        }

    def _tokens(self) -> str:
        """Of what the first trajectories come to."""
        digest = hashlib.sha256()
        for number in range(min(4, len(self.training))):
            for view in self.training[number].example.views.values():
                digest.update(view.ids.tobytes())
        return digest.hexdigest()[:16]


def check_names(config: TrainConfig) -> None:
    """
    Raises:
        PearlError: there is no such objective, option of it, or template; before a folder is made.
    """
    make_objective(config.objective, dict(config.objective_options))
    load_template(config.template)


def prepare(config: TrainConfig) -> Prepared:
    """Loads data, model, template and objective, and checks that they go together.

    Raises:
        PearlError: data, model, template or objective cannot be used; before any work.
    """
    objective = make_objective(config.objective, dict(config.objective_options))
    template = load_template(config.template)
    family = family_of(model_settings(config))
    if objective.needs_grids and family is Unknown:
        raise ConfigError(
            f"{objective.name} places boxes on an image's visual tokens, and where those of {place_of(config.model)} lie "
            f"is not known; it can train {', '.join(FAMILIES)}"
        )
    if config.batch_size < objective.least_batch:
        raise ConfigError(
            f"with these settings {objective.name} compares the trajectories of a forward: give --batch-size of at "
            f"least {objective.least_batch}"
        )
    cache = Path(config.out) / "cache"
    table = Table(config.data, cache)
    _tell_what_is_missing(config.data, table)
    held_table = table
    if config.eval_data is not None:
        held_table = Table(config.eval_data, cache)
        _tell_what_is_missing(config.eval_data, held_table)
    torch.manual_seed(config.seed)
    loaded = load(config, objective)
    encoder = ViewEncoder(loaded.processor, loaded.family, objective.latent_token, loaded.vlm.config)
    hidden_size = loaded.vlm.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    vlm = make_trainable(loaded, config, objective)
    learner = Learner(vlm, loaded.family, objective.losses(hidden_size))
    if learner.losses.recurrent and config.gradient_checkpointing:
        raise ConfigError(
            "latents that the model makes itself stand on keys and values, which --gradient-checkpointing does not keep"
        )
    if learner.losses.recurrent and family is Unknown:
        raise ConfigError(
            f"latents that the model makes itself stand on keys and values, and how {place_of(config.model)} masks "
            f"these is not known; they can be trained in {', '.join(FAMILIES)}"
        )
    rows, held = list(range(len(table))), list[int]()
    if config.eval_data is not None:
        held = list(range(len(held_table)))
    elif config.eval_fraction:
        rows, held = table.held_out(config.eval_fraction, config.seed)
        if not held:
            tell(
                f"note: no image is among the share of {config.eval_fraction:g} that is held out: nothing is evaluated"
            )
    if not rows:
        raise ConfigError("nothing is left to train on: lower --eval-fraction, or give --eval-data")
    packer = Packer(
        loaded.family,
        loaded.vlm.config,
        encoder.padding,
        config.tree and loaded.family.tree,
        not config.gradient_checkpointing,
    )
    lengths = table.lengths(objective, encoder)

    def examples(of: Table, chosen: list[int]) -> Examples:
        return Examples(of, chosen, objective, encoder, template, config.max_tokens, config.seed)

    resolved = replace(
        config,
        objective_options=asdict(objective),
        tune="full" if vlm is loaded.vlm else "lora",
        precision=precision(config),
        data_workers=data_workers(config),
    )
    return Prepared(
        resolved, objective, template, loaded, encoder, learner, packer,
        examples(table, rows), examples(held_table, held), [lengths[row] for row in rows],
    )  # fmt: skip


def _tell_what_is_missing(data: str, table: Table) -> None:
    if table.missing:
        tell(
            f"note: {data} is not whole: {table.missing[0]} is missing"
            + (f", and {len(table.missing) - 1} more" if len(table.missing) > 1 else "")
        )
