"""What stands around the training loop: progress, logs, checkpoints that are whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pearl.files import whole_file
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.console import tell
from pearl.trainer.data import GroupedOrder
from pearl.trainer.run_directory import COMPLETE, checkpoints

prepare_torchvision()
from transformers import TrainerCallback  # noqa: E402

if TYPE_CHECKING:
    from transformers import TrainerState


def loss_text(figures: Mapping[str, float], prefix: str = "") -> str:
    """`loss 6.62 (vlm 5.42, jepa 0.068)` of figures that were logged."""
    start = f"{prefix}loss_"
    terms = {name.removeprefix(start): value for name, value in figures.items() if name.startswith(start)}
    inner = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in terms.items())
    return f"loss {figures[f'{prefix}loss']:.3g}" + (f" ({inner})" if inner else "")


class Progress(TrainerCallback):
    """One bar with the losses on it; where stderr is no terminal, a line every log step."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True,
            disable=None if state.is_world_process_zero else True,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.bar.update()

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.bar.set_description("evaluating")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.bar.set_description("")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.bar.close()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **rest: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        at = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            found = f", retrieval {logs['retrieval']:.2f}" if "retrieval" in logs else ""
            if self.bar.disable:
                tell(f"{at} {loss_text(logs)}{found}")
            self.bar.set_postfix_str(loss_text(logs) + found)
        elif "eval_loss" in logs:
            right = ""
            if "eval_answer_accuracy" in logs:
                right = f", answers {logs['eval_answer_accuracy']:.3g} (chance {logs['eval_answer_chance']:.2g})"
            tell(f"{at} held out: {loss_text(logs, 'eval_')}{right}")


class Lines(TrainerCallback):
    """Every logged figure as a JSON line in the run's folder; a resumed run drops those after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            with whole_file(self.path) as partial:
                partial.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **rest: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is written, and only then removes older ones."""

    def __init__(self, out: Path, keep: int) -> None:
        self.out, self.keep = out, keep

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            for folder in (self.out / "checkpoints").glob("checkpoint-*"):
                if not (folder / COMPLETE).exists():
                    shutil.rmtree(folder)

    def on_save(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            (self.out / "checkpoints" / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            for old in checkpoints(self.out)[: -self.keep]:
                (old / COMPLETE).unlink()
                shutil.rmtree(old)


class Intervals(TrainerCallback):
    """A resumed run saves, evaluates and logs as often as it is told, not as often as the run of its checkpoint."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        state.compute_steps(args, state.max_steps)


class Epochs(TrainerCallback):
    """Tells the order which epoch it is: through the wrappers of a resumed run on several processes nothing else does."""

    def __init__(self, order: GroupedOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.order.set_epoch(int(state.epoch or 0))
