"""A training run, from its settings to a plain checkpoint: what `pearl-train`, torchrun and Ray Train call."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pearl import __version__
from pearl.errors import PearlError
from pearl.trainer.config import ConfigError, TrainConfig, differences
from pearl.trainer.conversation import Template, load_template
from pearl.trainer.data import Examples, GroupedOrder, Table
from pearl.trainer.learner import Learner
from pearl.trainer.models import Loaded, describe_trainable, load, make_trainable
from pearl.trainer.objectives.base import Objective
from pearl.trainer.objectives.registry import make_objective
from pearl.trainer.packing import Packer
from pearl.trainer.views import ViewEncoder


class OutOfMemory(PearlError, RuntimeError):
    """The message says which settings to lower."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, before its first step."""

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


@dataclass(frozen=True)
class Report:
    """What came of a run.

    Attributes:
        model: The folder of the merged model.
        steps: Updates made.
        first, last: Figures logged first and last.
        evaluation: On what was held out; empty without it.
        refused: Trajectories that were left out, in `refused.jsonl`.
    """

    model: Path
    steps: int
    first: dict[str, float]
    last: dict[str, float]
    evaluation: dict[str, float]
    refused: int


def prepare(config: TrainConfig) -> Prepared:
    """
    Raises:
        PearlError: data, model, template or objective cannot be used; before any work.
    """
    objective = make_objective(config.objective, dict(config.objective_options))
    template = load_template(config.template)
    cache = Path(config.out) / "cache"
    table = Table(config.data, cache)
    rows, held = list(range(len(table))), list[int]()
    held_table = table
    if config.eval_data is not None:
        held_table = Table(config.eval_data, cache)
        held = list(range(len(held_table)))
    elif config.eval_fraction:
        rows, held = table.held_out(config.eval_fraction, config.seed)
    if not rows:
        raise ConfigError("nothing is left to train on: lower --eval-fraction, or give --eval-data")
    torch.manual_seed(config.seed)
    loaded = load(config, objective)
    encoder = ViewEncoder(loaded.processor, loaded.family, objective.latent_token)
    hidden_size = loaded.vlm.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    vlm = make_trainable(loaded, config, objective)
    if config.gradient_checkpointing:
        vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    learner = Learner(vlm, loaded.family, objective.losses(hidden_size))
    packer = Packer(loaded.family, loaded.vlm.config, encoder.padding, config.tree, not config.gradient_checkpointing)
    steps = table.num_steps()

    def examples(of: Table, chosen: list[int]) -> Examples:
        return Examples(of, chosen, objective, encoder, template, config.max_tokens)

    return Prepared(
        config, objective, template, loaded, encoder, learner, packer,
        examples(table, rows), examples(held_table, held), [steps[row] for row in rows],
    )  # fmt: skip


def precision(config: TrainConfig) -> str:
    if config.precision != "auto":
        return config.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def train(config: TrainConfig, progress: bool = True, callbacks: list[Any] | None = None) -> Report:
    """Trains, evaluates, and leaves `out/model`, a plain checkpoint of the base architecture.

    Raises:
        PearlError: data, model or settings cannot be used; the loss is no number; memory does not suffice.
    """
    out = Path(config.out)
    _claim(config, out)
    prepared = prepare(config)
    trainer = _trainer(prepared, out, progress, callbacks or [])
    checkpoint = last_checkpoint(out) if config.resume else None
    try:
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "memory does not suffice: lower --batch-size (and raise --accumulation), --max-pixels or --max-tokens, "
            "or use --gradient-checkpointing, --tune lora, --freeze vision"
        ) from error
    evaluation = trainer.evaluate() if len(prepared.held_out) else {}
    model = out / "model"
    if trainer.is_world_process_zero():
        from pearl.trainer.publish import save_model

        save_model(prepared, model, evaluation)
    trainer.accelerator.wait_for_everyone()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return Report(
        model, result.global_step, logged[0] if logged else {}, logged[-1] if logged else {}, evaluation,
        len(trainer.refused.ids),
    )  # fmt: skip


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written whole."""
    from pearl.trainer.loop import COMPLETE

    found = [p.parent for p in (out / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _claim(config: TrainConfig, out: Path) -> None:
    """Writes the settings into the run's folder.

    Raises:
        ConfigError: another run is there, or the settings of the one to resume were others.
    """
    path = out / "config.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if not config.resume:
            raise ConfigError(f"{out} holds a run already: give another --out, or --resume to go on with it")
        if changed := differences(config, before):
            raise ConfigError(f"the run in {out} had other settings: {'; '.join(changed)}")
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"version": __version__, "settings": config.to_json()}, indent=2), encoding="utf-8")
    partial.replace(path)


def _trainer(prepared: Prepared, out: Path, progress: bool, callbacks: list[Any]) -> Any:
    from transformers import TrainingArguments

    from pearl.trainer.loop import AtomicCheckpoints, Collator, LearnerTrainer, Lines, RefusedLog

    config = prepared.config
    on_gpu = torch.cuda.is_available()
    evaluates = bool(len(prepared.held_out)) and config.eval_steps > 0
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=precision(config) == "bf16",
        use_cpu=not on_gpu,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps if evaluates else None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=config.keep_checkpoints,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        disable_tqdm=not progress,
        dataloader_num_workers=config.data_workers,
        dataloader_persistent_workers=config.data_workers > 0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        accelerator_config={"dispatch_batches": False, "use_seedable_sampler": False},
        seed=config.seed,
    )
    world = arguments.world_size
    order = GroupedOrder(prepared.lengths, config.batch_size * config.accumulation * world, config.seed)
    return LearnerTrainer(
        model=prepared.learner,
        args=arguments,
        data_collator=Collator(prepared.packer),
        train_dataset=prepared.training,
        eval_dataset=prepared.held_out if len(prepared.held_out) else None,
        callbacks=[Lines(out / "log.jsonl"), AtomicCheckpoints(), *callbacks],
        order=order,
        refused=RefusedLog(out / "refused.jsonl"),
        prepared=prepared,
    )


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        parts: For each part of the model: name, trained and all parameters.
        gigabytes: Of weights, gradients and optimizer, per process without sharding; activations come on top.
        text: One example as the model reads it, what is learned in 【brackets】.
        tokens: Of each view of that example.
        row: Tokens of its row: what a forward takes.
    """

    trajectories: int
    held_out: int
    updates: int
    parts: list[tuple[str, int, int]]
    gigabytes: float
    text: str
    tokens: dict[str, int]
    row: int


def dry_run(config: TrainConfig) -> DryRun:
    """
    Raises:
        PearlError: as `train`, before any work.
    """
    prepared = prepare(config)
    example = prepared.training[0].example
    batch = prepared.packer([example])
    parts = describe_trainable(prepared.learner)
    trained = sum(part[1] for part in parts)
    everything = sum(part[2] for part in parts)
    updates = math.ceil(len(prepared.training) / (config.batch_size * config.accumulation) * config.epochs)
    return DryRun(
        trajectories=len(prepared.training),
        held_out=len(prepared.held_out),
        updates=config.max_steps or updates,
        parts=parts,
        gigabytes=(4 * everything + 12 * trained) / 1e9,
        text=_shown(prepared, example),
        tokens={name: len(view) for name, view in example.views.items()},
        row=batch.main.ids.shape[1],
    )


def _shown(prepared: Prepared, example: Any) -> str:
    """The first view's text, runs of visual tokens shortened, what is learned in brackets."""
    view = next(iter(example.views.values()))
    tokenizer = prepared.loaded.processor.tokenizer
    pieces: list[str] = []
    start = 0
    for stop in range(1, len(view) + 1):
        same = stop < len(view) and (view.visual[stop], view.supervised[stop]) == (
            view.visual[start],
            view.supervised[start],
        )
        if not same:
            words = tokenizer.decode(view.ids[start:stop])
            if view.visual[start]:
                words = f"⟨{stop - start} visual tokens⟩"
            pieces.append(f"【{words}】" if view.supervised[start] else words)
            start = stop
    return "".join(pieces)
