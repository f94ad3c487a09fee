"""A training run, from its settings to a plain checkpoint: what `pearl-train`, torchrun and Ray Train call."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pearl.errors import PearlError
from pearl.parquet import DataError
from pearl.torch_setup import is_out_of_memory
from pearl.trainer.callbacks import is_first, tell
from pearl.trainer.config import TrainConfig
from pearl.trainer.data import Examples, GroupedOrder
from pearl.trainer.families import Unknown
from pearl.trainer.models import trainable_text
from pearl.trainer.preparation import Prepared, check_names, prepare
from pearl.trainer.publish import open_repository, save_model, upload
from pearl.trainer.run_directory import alone_in, claim, last_checkpoint, record
from pearl.trainer.sharding import check_sharding, fit_deepspeed, keep_in_step, whole

NEVER = 2**31
"""An interval: only in the end."""
MEASURED = ("eval_loss", "eval_answer")


class OutOfMemory(PearlError, RuntimeError):
    """The message says which settings to lower."""


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


def train(config: TrainConfig, progress: bool = True, callbacks: list[Any] | None = None) -> Report:
    """Trains, evaluates, and leaves `out/model`, a plain checkpoint of the base architecture.

    Raises:
        PearlError: data, model or settings cannot be used; the loss is no number; memory does not suffice.
    """
    check_names(config)
    if config.resume and last_checkpoint(Path(config.out)) is None:
        tell(f"note: there is no checkpoint in {config.out} to go on from: the run begins")
    with alone_in(Path(config.out)) if is_first() else nullcontext():
        return train_alone(config, progress, callbacks)


def train_alone(config: TrainConfig, progress: bool = True, callbacks: list[Any] | None = None) -> Report:
    """As `train`, in a folder that the caller keeps other runs out of (`alone_in`)."""
    check_sharding()
    out, first = Path(config.out), is_first()
    if first:
        claim(config, out, int(os.environ.get("WORLD_SIZE", "1")))
        if config.push_to_hub:
            open_repository(config.push_to_hub)
    with _explained():
        prepared = prepare(config)
        if len(prepared.held_out):
            _check_held_out(prepared.held_out)
        if first:
            record(prepared.config, prepared.digests(), out)
        trainer = _trainer(prepared, out, progress, callbacks or [])
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if sharded:
            keep_in_step(prepared.learner)
        checkpoint = last_checkpoint(out) if config.resume else None
        if checkpoint is None or not trainer.restore_finished(checkpoint):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        elif len(prepared.held_out) and not trainer.is_evaluated():
            trainer.evaluate()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    evaluation = {k: v for k, v in evaluated[-1].items() if k.startswith(MEASURED)} if evaluated else {}
    model = out / "model"
    steps = trainer.state.global_step
    if sharded:
        prepared = whole(prepared, trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()  # and not once more: what follows may take longer than others may wait
    if trainer.is_world_process_zero():
        save_model(prepared, model, evaluation)
        if config.push_to_hub:
            upload(model, config.push_to_hub)
    return Report(
        model, steps, logged[0] if logged else {}, logged[-1] if logged else {}, evaluation, len(trainer.refused.told()),
    )  # fmt: skip


def _check_held_out(held_out: Examples) -> None:
    """
    Raises:
        DataError: none of what is held out can be used, which otherwise would be noticed after the first training.
    """
    try:
        held_out[0]
    except DataError as error:
        raise DataError(f"what is held out cannot be evaluated on: {error}") from error


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of torch that a user can mend, as what to do about them.

    Raises:
        PearlError: in their place.
    """
    try:
        yield
    except PearlError as error:
        if "Original Traceback" not in str(error):
            raise
        kind = type(error)  # of a data worker: behind its traceback
        raise PearlError(str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                "memory does not suffice: lower --batch-size and raise --accumulation as much, or use "
                "--gradient-checkpointing: with these --resume goes on. A new run may have lower --max-pixels or "
                "--max-tokens, --tune lora, --freeze vision"
            ) from error
        if "DataLoader worker (pid" in str(error):
            raise PearlError(
                f"a data worker died, perhaps of too little memory: lower --data-workers: {error}"
            ) from error
        raise


def _trainer(prepared: Prepared, out: Path, progress: bool, callbacks: list[Any]) -> Any:
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback

    from pearl.trainer.callbacks import Epochs, Intervals, Lines, Progress, WholeCheckpoints
    from pearl.trainer.loop import Collator, LearnerTrainer, RefusedLog

    config = prepared.config
    on_gpu = torch.cuda.is_available()
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
        bf16=config.precision == "bf16",
        use_cpu=not on_gpu,
        eval_strategy="steps" if len(prepared.held_out) else "no",
        eval_steps=config.eval_steps or NEVER,
        save_strategy="steps",
        save_steps=config.save_steps or NEVER,
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=config.data_workers or 0,
        dataloader_persistent_workers=bool(config.data_workers),
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        accelerator_config={"dispatch_batches": False, "use_seedable_sampler": False},
        seed=config.seed,
    )
    if arguments.deepspeed_plugin is not None:
        fit_deepspeed(arguments.deepspeed_plugin.deepspeed_config)
    world = arguments.world_size
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else a machine's further GPUs would be used in threads
    together = config.batch_size * world
    order = GroupedOrder(
        prepared.lengths, together * config.accumulation, config.seed, multiple=together if world > 1 else 1
    )
    board = TensorBoardCallback()
    board.logging_dir = str(out / "tensorboard")
    around: list[Any] = [Intervals(), Epochs(order), Lines(out / "log.jsonl"), board]
    if progress:
        around.append(Progress())
    trainer = LearnerTrainer(
        model=prepared.learner,
        args=arguments,
        data_collator=Collator(prepared.packer),
        train_dataset=prepared.training,
        eval_dataset=prepared.held_out if len(prepared.held_out) else None,
        callbacks=[*around, WholeCheckpoints(out, config.keep_checkpoints), *callbacks],
        order=order,
        refused=RefusedLog(out / "refused.jsonl"),
        prepared=prepared,
    )
    trainer.remove_callback(PrinterCallback)
    if progress:
        tell(trainable_text(prepared.learner))
    return trainer


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        trained: What of the model is, in a few lines.
        gigabytes: Of weights, gradients and optimizer, per process without sharding.
        activations: Gigabytes that a forward of the longest examples keeps, about.
        text: One example as the model reads it, what is learned in 【brackets】.
        tokens: Of each view of that example.
        row: Tokens of its row: what a forward takes.
    """

    trajectories: int
    held_out: int
    updates: int
    trained: str
    gigabytes: float
    activations: float
    text: str
    tokens: dict[str, int]
    row: int


def dry_run(config: TrainConfig, processes: int = 1) -> DryRun:
    """What a run in so many processes would do.

    Raises:
        PearlError: as `train`, before any work.
    """
    prepared = prepare(config)
    example = prepared.training[0].example
    batch = prepared.packer([example])
    parameters = list(prepared.learner.parameters())
    kept = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    forwards = math.ceil(len(prepared.training) / (config.batch_size * processes))
    updates = math.ceil(math.ceil(forwards / config.accumulation) * config.epochs)
    return DryRun(
        trajectories=len(prepared.training),
        held_out=len(prepared.held_out),
        updates=config.max_steps or updates,
        trained=trainable_text(prepared.learner),
        gigabytes=(kept + 12 * trained) / 1e9,
        activations=_activations(prepared) / 1e9,
        text=_shown(prepared, example),
        tokens={name: len(view) for name, view in example.views.items()},
        row=batch.main.ids.shape[1],
    )


def _activations(prepared: Prepared) -> float:
    """Bytes that a forward keeps for the backward pass: 34 a token (or patch), layer and unit of width at 16 bits
    (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, without the attention matrix, which SDPA does not keep), and
    the logits, their softmax and its gradient where a label stands. Of an unknown family without the vision tower."""
    config = prepared.config
    settings: Any = prepared.loaded.vlm.config
    text = settings.get_text_config()
    longest = prepared.training[max(range(len(prepared.lengths)), key=prepared.lengths.__getitem__)].example
    batch = prepared.packer([longest] * config.batch_size)

    def kept(tokens: int, width: int, layers: int) -> int:
        return (layers + 17 if config.gradient_checkpointing else 17 * layers) * tokens * width

    units = kept(batch.main.ids.numel(), text.hidden_size, text.num_hidden_layers)
    if "vision" not in config.freeze and not isinstance(prepared.loaded.family, Unknown):
        vision = settings.vision_config
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        units += kept(_patches(batch.images["pixel_values"], vision.patch_size), vision.hidden_size, depth)
    labels = sum(len(places.supervised) for places in batch.places.values())
    return float((2 if config.precision == "bf16" else 4) * units + 3 * 4 * labels * text.vocab_size)


def _patches(pixels: torch.Tensor, size: int | Sequence[int]) -> int:
    """Of images as a vision tower takes them: patches (N, D), or (…, height, width)."""
    if pixels.ndim == 2:
        return len(pixels)
    side = size if isinstance(size, int) else size[0]
    return pixels[..., 0, :, :].numel() // side**2


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
