"""The training loop: transformers' Trainer around a `Learner`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.answers import answer_accuracy
from pearl.trainer.data import Drawn, GroupedOrder, Refused
from pearl.trainer.learner import Learner
from pearl.trainer.models import load_trained_state, trained_state
from pearl.trainer.packing import Batch, Packer
from pearl.trainer.watch import CollapseWatch

prepare_torchvision()
from transformers import Trainer, TrainerCallback  # noqa: E402

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from pearl.trainer.train import Prepared

COMPLETE = "complete"
"""A checkpoint's last file: without it the checkpoint was cut off."""
WEIGHTS = "trained.safetensors"
MAX_ANSWERS = 64


class NanLoss(PearlError, RuntimeError):
    """The loss is no number; the message names the trajectories of the step."""


class Collator:
    """Drawn examples as a batch, with what was refused on the way."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def __call__(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        refused = tuple(one for each in drawn for one in each.refused)
        return {"batch": self.packer([each.example for each in drawn]), "refused": refused}


class RefusedLog:
    """Trajectories that were left out, each told once, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.ids = path, set[str]()

    def add(self, refused: Sequence[Refused]) -> None:
        for one in refused:
            if one.id not in self.ids:
                self.ids.add(one.id)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": one.id, "reason": one.reason}, ensure_ascii=False) + "\n")


class LearnerTrainer(Trainer):
    """Trainer for a `Learner`.

    Each loss term is a mean over all its tokens (or trajectories) of an update, whatever the number of processes and
    of accumulated forwards: the same update on one process or several.
    """

    def __init__(
        self, *args: Any, order: GroupedOrder, refused: RefusedLog, prepared: Prepared, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.order, self.refused, self.prepared = order, refused, prepared
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.watch = CollapseWatch()
        self._sums: dict[str, float] = {}
        self._updates = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The number of items of each term over all forwards and processes of an update."""
        counts = [self._learner.losses.counts(sample["batch"]) for sample in batch_samples]
        if not counts:
            return None
        names = list(counts[0])
        total = torch.tensor([[count[name] for name in names] for count in counts], dtype=torch.float64).sum(0)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total.to(device, torch.float32), reduction="sum").cpu().double()
        return dict(zip(names, total.tolist(), strict=True))

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, float] | None = None,
    ) -> Any:
        batch: Batch = inputs["batch"]
        self.refused.add(inputs["refused"])
        outcome = model(batch)
        counts = num_items_in_batch or {k: float(v) for k, v in self._learner.losses.counts(batch).items()}
        weights = self._learner.losses.weights
        world = self.args.world_size if num_items_in_batch is not None else 1
        means = {name: total * world / max(counts[name], 1.0) for name, total in outcome.items()}
        loss = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
        if not torch.isfinite(loss):
            self._stop_at(loss, batch)
        if model.training:
            self._record(means, loss)
            if self._learner.losses.watched is not None:
                self.watch.add(*self._learner.losses.watched)
        return (loss, {name: mean.detach() for name, mean in means.items()}) if return_outputs else loss

    @property
    def _learner(self) -> Learner:
        learner: Learner = self.accelerator.unwrap_model(self.model)
        return learner

    def _stop_at(self, loss: Tensor, batch: Batch) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if not folder.exists():
            self._save_checkpoint(self._learner, trial=None)
        raise NanLoss(
            f"the loss is {loss.item()} in step {self.state.global_step + 1} on {', '.join(batch.sample_ids)}; the "
            f"weights before it are in {folder}. A lower learning rate or fp32 often helps; or leave these out"
        )

    def _record(self, means: Mapping[str, Tensor], loss: Tensor) -> None:
        for name, mean in (*means.items(), ("total", loss)):
            self._sums[name] = self._sums.get(name, 0.0) + mean.detach().double().item()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            steps = max(self.state.global_step - self._updates, 1)
            sums = self._sums
            if self.args.world_size > 1:
                packed = torch.tensor([*sums.values()], device=self.args.device)
                summed = self.accelerator.reduce(packed, reduction="mean").tolist()
                sums = dict(zip(sums, summed, strict=True))
            logs |= {f"loss_{name}": total / steps for name, total in sums.items() if name != "total"}
            logs["loss"] = sums["total"] / steps
            self._sums, self._updates = {}, self.state.global_step
            logs |= self.watch.figures()
            if warning := self.watch.warning(logs):
                logs["collapsed"] = 1.0
                if self.is_world_process_zero():
                    print(f"warning: {warning}", flush=True)
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Losses on what was held out, and how often the right option is the likeliest."""
        figures: dict[str, float] = super().evaluate(*args, **options)
        chosen = self.prepared
        questions = [chosen.held_out.table[row] for row in chosen.held_out.rows[:MAX_ANSWERS]]
        answers = answer_accuracy(self._learner, chosen.packer, chosen.encoder, chosen.template, questions)
        answers = {f"eval_{name}": value for name, value in answers.items()}
        if answers:
            self.log(answers)
        return {**figures, **answers}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """What is trained, and nothing else; the base model is known by its name."""
        from safetensors.torch import save_file

        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = trained_state(self._learner) if state_dict is None else state_dict
        names = {name for name, parameter in self._learner.named_parameters() if parameter.requires_grad}
        save_file({name: tensor for name, tensor in state.items() if name in names}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from safetensors.torch import load_file

        load_trained_state(self._learner, load_file(Path(resume_from_checkpoint) / WEIGHTS))


class Lines(TrainerCallback):
    """Every logged figure as a JSON line in the run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **rest: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class AtomicCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is written; one without the mark was cut off and is never resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
