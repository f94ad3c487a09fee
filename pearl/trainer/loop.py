"""The training loop: transformers' Trainer around a `Learner`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.files import whole_file
from pearl.randomness import generator
from pearl.torch_setup import is_out_of_memory, prepare_torchvision
from pearl.trainer.answers import answer_accuracy
from pearl.trainer.console import tell
from pearl.trainer.data import Drawn, GroupedOrder, Refused, with_stand_ins
from pearl.trainer.learner import Learner
from pearl.trainer.models import load_trained_state, trained_state
from pearl.trainer.packing import Batch, Packer
from pearl.trainer.preparation import Prepared
from pearl.trainer.run_directory import COMPLETE
from pearl.trainer.watch import CollapseWatch

prepare_torchvision()
from transformers import Trainer, TrainerState  # noqa: E402

WEIGHTS, STATE = "trained.safetensors", "trainer_state.json"
MAX_ANSWERS = 64


class NanLoss(PearlError, RuntimeError):
    """The loss is NaN or infinite; the message names the trajectories of the step."""


class Collator:
    """Drawn examples as a batch, with what was refused on the way."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def __call__(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        refused = tuple(one for each in drawn for one in each.refused)
        return {"batch": self.packer([each.example for each in drawn]), "refused": refused}


class RefusedLog:
    """Trajectories that were left out, each told once, in a file of JSON lines that several processes may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = self.told()

    def add(self, refused: Sequence[Refused]) -> None:
        for one in refused:
            if (key := (one.id, one.row)) not in self._told:
                self._told.add(key)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(one)) + "\n")

    def told(self) -> set[tuple[str, int]]:
        """Id and row of all that are in the file."""
        if not self.path.exists():
            return set()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return {(one["id"], one["row"]) for one in found}


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
        self._sums: dict[str, Tensor] = {}
        self._updates = 0
        self._forwards: list[tuple[tuple[str, ...], Tensor]] = []
        self._held_out: dict[str, Tensor] = {}
        self._collapsed = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return with_stand_ins(range(len(eval_dataset)), self.order.multiple)

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
        assert num_items_in_batch is not None
        batch: Batch = inputs["batch"]
        torch.manual_seed(self._forward_seed())
        world = self.args.world_size  # over which the gradients are averaged
        means = {name: total * world / max(num_items_in_batch[name], 1.0) for name, total in model(batch).items()}
        loss = self._weighted(means)
        self._forwards.append((batch.sample_ids, loss.detach()))
        for name, mean in (*means.items(), ("total", loss)):
            self._sums[name] = self._sums.get(name, 0.0) + mean.detach().float()
        if self._learner.losses.watched is not None:
            self.watch.add(*self._learner.losses.watched)
        return (loss, means) if return_outputs else loss

    def _forward_seed(self) -> int:
        """Dropout depends on the forward's number alone: not on data workers, evaluations, or where a run resumed."""
        names = self.args.seed, self.state.global_step, len(self._forwards), self.args.process_index
        return int(generator("forward", *names).integers(2**63))

    def _weighted(self, means: Mapping[str, Tensor]) -> Tensor:
        weights = self._learner.losses.weights
        return torch.stack([weights[name] * mean for name, mean in means.items()]).sum()

    @property
    def _learner(self) -> Learner:
        learner: Learner = self.accelerator.unwrap_model(self.model)
        return learner

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Comes once an update, when its gradients are summed over all forwards and processes."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not math.isfinite(norm):
            self._stop()
        self._updates += 1
        self._forwards.clear()
        return norm

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """When memory does not suffice, a process that is alone saves the weights before this update; of several the others
        would wait for it."""
        try:
            return super().training_step(*args, **options)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and self.args.world_size == 1 and self.state.global_step:
                self._keep_weights()
            raise

    def _keep_weights(self) -> Path:
        """Saves those before the update that is under way."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if not (folder / COMPLETE).exists():
            self._save_checkpoint(self._learner, trial=None)
        if self.is_world_process_zero():
            (folder / COMPLETE).touch()
        return folder

    def _stop(self) -> None:
        """
        Raises:
            NanLoss: always, when the weights before the update are saved.
        """
        folder = self._keep_weights()
        finite = [bool(torch.isfinite(loss)) for _, loss in self._forwards]
        mine = [
            (ids if good else self._culprits(ids), good) for (ids, _), good in zip(self._forwards, finite, strict=True)
        ]
        forwards = gather_object(mine)
        bad = [ids for ids, good in forwards if not good]
        what = "loss" if bad else "loss's gradient"
        among = ", ".join(one for ids in bad or [ids for ids, _ in forwards] for one in ids)
        raise NanLoss(
            f"the {what} is NaN or infinite in step {self.state.global_step + 1}, on {among}. --resume goes on from the "
            f"weights before it ({folder}): --precision fp32 may help. Else begin anew, with a lower --learning-rate or "
            "data without these"
        )

    @torch.no_grad()
    def _culprits(self, forward: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a forward whose own loss is NaN or infinite; all of it where none's is, or where a forward of one alone
        would wait for the other processes."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return forward
        found = list[str]()
        for one in forward:
            with suppress(Exception):  # of an id that is given twice the first row may be a broken one
                batch = self.prepared.packer([self.prepared.training.named(one)]).to(self.args.device)
                with self.accelerator.autocast():
                    terms = self._learner(batch)
                if not all(bool(torch.isfinite(term)) for term in terms.values()):
                    found.append(one)
        return tuple(found) or forward

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            values = torch.stack([*self._sums.values()])
            if self.args.world_size > 1:
                values = self.accelerator.reduce(values, reduction="mean")
            means = dict(zip(self._sums, (values / max(self._updates, 1)).tolist(), strict=True))
            logs["loss"] = means.pop("total")
            logs |= {f"loss_{name}": mean for name, mean in means.items()}
            self._sums, self._updates = {}, 0
            logs |= self.watch.figures()
            warning = self.watch.warning(logs)
            if warning and not self._collapsed:
                tell(f"warning: {warning}")
            self._collapsed = warning is not None
        super().log(logs, start_time)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Comes once a batch, of training and of evaluation."""
        self.refused.add(inputs["refused"])
        return super()._prepare_inputs(inputs)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        batch: Batch = self._prepare_inputs(inputs)["batch"]
        with torch.no_grad():
            terms = model(batch)
        counts = self._learner.losses.counts(batch)
        for name, total in terms.items():
            pair = torch.tensor([total.item(), counts[name]], dtype=torch.float64)
            self._held_out[name] = self._held_out.get(name, 0.0) + pair
        return self._weighted({name: total / max(counts[name], 1) for name, total in terms.items()}), None, None

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Losses on what was held out, each a mean over all of it, and how often the right option is the likeliest."""
        self._held_out = {}
        output = super().evaluation_loop(*args, **options)
        metrics: dict[str, float] = output.metrics or {}
        pairs = torch.stack([*self._held_out.values()])
        if self.args.world_size > 1:
            pairs = self.accelerator.reduce(pairs.to(self.args.device, torch.float32), reduction="sum")
        means = dict(zip(self._held_out, pairs[:, 0] / pairs[:, 1].clamp(min=1), strict=True))
        metrics["eval_loss"] = self._weighted(means).item()
        metrics |= {f"eval_loss_{name}": mean.item() for name, mean in means.items()}
        held_out, packer = self.prepared.held_out, self.prepared.packer
        with self.accelerator.autocast():
            answers = answer_accuracy(
                self._learner, packer, held_out.encoder, held_out.template, held_out.sample(MAX_ANSWERS)
            )
        metrics |= {f"eval_{name}": value for name, value in answers.items()}
        if self.is_fsdp_enabled:
            self._learner.reshard()  # type: ignore[operator]  # a forward leaves weights gathered; shards are saved
        return output._replace(metrics=metrics)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Saves first what is due to be saved: an evaluation that fails takes nothing along."""
        due = self.control.should_save
        if due:
            self._save_checkpoint(self._learner, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        metrics: dict[str, float] = super().evaluate(*args, **options)
        if due and self.is_world_process_zero():
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            with whole_file(folder / STATE) as partial:
                self.state.save_to_json(str(partial))
        return metrics

    def is_evaluated(self) -> bool:
        """Whether what is held out was evaluated after the last update."""
        return any("eval_loss" in line for line in self.state.log_history if line["step"] == self.state.global_step)

    def restore_finished(self, checkpoint: Path) -> bool:
        """Loads a checkpoint after which nothing is left to train (Trainer itself would make one more update)."""
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if state.global_step < state.max_steps:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        super()._save_checkpoint(*args, **options)
        self.accelerator.wait_for_everyone()  # each process writes its own part

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, and nothing else; the base model is known by its name."""
        from safetensors.torch import save_file

        state = trained_state(self._learner)  # of all processes, where each has a shard
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer
        from transformers.trainer import SCHEDULER_NAME

        plugin = self.accelerator.state.fsdp_plugin  # Trainer would save all weights beside it
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from safetensors.torch import load_file

        load_trained_state(self._learner, load_file(Path(resume_from_checkpoint) / WEIGHTS))
