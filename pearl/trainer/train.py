"""A training run, from its settings to a plain checkpoint: what `pearl-train`, torchrun and Ray Train call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pearl.errors import PearlError
from pearl.parquet import DataError
from pearl.torch_setup import is_out_of_memory
from pearl.trainer.config import TrainConfig
from pearl.trainer.console import is_first, tell
from pearl.trainer.data import Examples, GroupedOrder
from pearl.trainer.model_folder import save_model
from pearl.trainer.models import trainable_text
from pearl.trainer.preparation import Prepared, check_names, prepare
from pearl.trainer.publish import open_repository, upload
from pearl.trainer.run_directory import alone_in, claim, last_checkpoint, record
from pearl.trainer.sharding import check_sharding, fit_deepspeed, keep_in_step, whole

NEVER = 2**31
"""An interval: only in the end."""
MEASURED = ("eval_loss", "eval_answer")
"""How the names of figures begin that go into the report and the model card."""


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
        PearlError: data, model or settings cannot be used; the loss is NaN or infinite; memory does not suffice.
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
