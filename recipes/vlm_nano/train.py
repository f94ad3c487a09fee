"""Trains vlm-nano on what `data.py` made, in stages.

    torchrun --nproc-per-node 2 -m recipes.vlm_nano.train --out runs/vlm_nano/model     # 2 cores
    python -m recipes.vlm_nano.train --out runs/vlm_nano/model                          # 1 core, or a GPU

`objects`: answers from true visual tokens, which say what stands in their cell; `places`: also where things are and how
far; `cells`: the same among the empty ones. `crops`: the vision tower names what a crop shows; `sight`: it learns to
produce these tokens. `joint`: answers from pictures, some with a zoomed crop in context, and thoughts and calls;
`closer`, twice: most about small objects. `heads` is for a training that begins with `--weights`: what is not exported
learns to read the model before that moves. Each stage has its budget in core-minutes (minutes times processes), in
which its learning rate falls; `--clock cpu` counts the time on the processor instead of the wall clock, for a machine
that is busy with other things. A run that was stopped continues from its last checkpoint, with as many processes as
there are now.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pearl.torch_setup import prepare_torchvision
from recipes.vlm_nano.batches import FAMILIES, HELD_OUT, Batches, Stock, as_patches
from recipes.vlm_nano.corpus import texts
from recipes.vlm_nano.data import Questions
from recipes.vlm_nano.initial import look_at_neighbours, whiten_patches
from recipes.vlm_nano.losses import Pupil, Result
from recipes.vlm_nano.model import build_model, build_processor, export, train_tokenizer
from recipes.vlm_nano.muon import BatchedMuon

SEED = 5
WARMUP_STEPS = 100
FLOOR = 0.05
MUON_RATE = 3.0
LAYER = re.compile(r"\b(layers|blocks)\.\d+\.")


@dataclass(frozen=True)
class Stage:
    """`minutes`: minutes times processes; `measuring`: whether it learns where things are and how far; `cropping`: the
    share of scenes with a crop in a conversation; `told`: of so many steps, one shows true visual tokens in place of
    pictures; `questions`: of a scene, at most."""

    name: str
    minutes: float
    rate: float
    seeing: bool
    measuring: bool = True
    cropping: float = 0.0
    told: int = 0
    questions: int = 20


STAGES = (
    Stage("objects", 45, 1.5e-3, seeing=False, measuring=False),
    Stage("places", 40, 1e-3, seeing=False),
    Stage("cells", 5, 1e-3, seeing=False),
    Stage("crops", 15, 1.5e-3, seeing=True),
    Stage("sight", 50, 8e-4, seeing=True),
    Stage("heads", 0, 3e-3, seeing=True, told=3),
    Stage("joint", 110, 8e-4, seeing=True, cropping=0.6, told=2),
    Stage("closer", 15, 4e-4, seeing=True, cropping=1.0, questions=6),
    Stage("closer", 25, 4e-4, seeing=True, cropping=1.0, questions=6),
)


@dataclass
class Progress:
    """Where a run stands: the stage, its steps, scenes and seconds (times processes) so far."""

    stage: int = 0
    step: int = 0
    scenes: int = 0
    spent: float = 0.0


class Steps(Dataset[Any]):
    def __init__(self, draw: Callable[[int], Any], start: int) -> None:
        self.draw, self.start = draw, start

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> Any:
        torch.set_num_threads(1)
        return self.draw(self.start + index)


def loss_of(pupil: Pupil, stage: Stage, batch: Any) -> Result:
    loss: Result = getattr(pupil, f"{stage.name}_loss")(batch)
    return loss


@dataclass
class Run:
    """One process's share of a training."""

    pupil: Pupil
    processor: Any
    stock: Stock
    out: Path
    stages: tuple[Stage, ...]
    device: str
    batch: int
    loaders: int
    report_seconds: float
    clock: Callable[[], float]
    rank: int = 0
    world: int = 1

    def train(self) -> None:
        progress = Progress()
        checkpoint = self.out / "checkpoint.pt"
        state = torch.load(checkpoint, map_location=self.device, weights_only=True) if checkpoint.exists() else None
        if state:
            self.pupil.load_state_dict(state["pupil"])
            progress = Progress(**state["progress"])
        while progress.stage < len(self.stages):
            stage = self.stages[progress.stage]
            if not stage.minutes:
                progress = Progress(progress.stage + 1)
                continue
            self.pupil.requires_grad_(False)
            optimizer = Optimizer(self.modules(stage).requires_grad_(), stage.rate)
            if state and progress.step:
                optimizer.load_state_dict(state["optimizer"])
            state = None
            self._train_stage(stage, optimizer, progress)
            progress = Progress(progress.stage + 1)
            self._save(optimizer, progress)
        if self.rank == 0:
            export(self.pupil.model, self.processor, self.out / "export")

    def modules(self, stage: Stage) -> torch.nn.ModuleList:
        pupil = self.pupil
        readers = [pupil.read_token, pupil.read_crop, pupil.read_patch]
        speaking = [pupil.model.model.language_model, pupil.things, pupil.read_measures]
        chosen = {
            "objects": speaking,
            "places": speaking,
            "cells": speaking,
            "crops": [pupil.model.model.visual, pupil.read_crop],
            "sight": [pupil.model.model.visual, *readers],
            "heads": [pupil.things, pupil.read_measures, *readers],
            "joint": [pupil.model, pupil.things, pupil.read_measures, *readers],
            "closer": [pupil.model, pupil.things, pupil.read_measures, *readers],
        }[stage.name]
        return torch.nn.ModuleList(chosen)

    def _train_stage(self, stage: Stage, optimizer: Optimizer, progress: Progress) -> None:
        batches = Batches(
            self.stock,
            self.processor.tokenizer,
            self.batch,
            self.rank,
            seeing=stage.seeing,
            measuring=stage.measuring,
            cropping=stage.cropping,
            more=stage.name == "sight",
            told=stage.told,
            questions=stage.questions,
        )
        if stage.name == "crops" and not progress.step:
            self._open_eyes()
        batches_ahead = self._ahead(batches.draw_crops if stage.name == "crops" else batches.draw, progress.step)
        figures, budget = Figures(), stage.minutes * 60
        begin, before, last = self.clock(), progress.spent, progress.spent
        while True:
            progress.spent = before + self._agreed(self.clock() - begin) * self.world
            done = min(progress.spent / budget, 1.0)
            if progress.spent - last > self.report_seconds * self.world or done >= 1:
                last = progress.spent
                self._report(stage, batches, figures, progress)
                self._save(optimizer, progress)
                figures = Figures()
            if done >= 1:
                return
            optimizer.scale_rates(min(1, (progress.step + 1) / WARMUP_STEPS) * (1 - (1 - FLOOR) * done))
            with self._autocast():
                result = loss_of(self.pupil, stage, next(batches_ahead).to(self.device))
            result.loss.backward()
            self._share_gradients(optimizer)
            torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
            optimizer.step()
            figures.add(result)
            progress.step += 1
            progress.scenes += self.batch * self.world

    def _open_eyes(self) -> None:
        patches = np.concatenate([as_patches(image) for image in self.stock.arrays.images[:200]])
        visual = self.pupil.model.model.visual
        whiten_patches(visual, self.pupil.sight.normalised(torch.from_numpy(patches).to(self.device)))
        look_at_neighbours(visual)

    def _ahead(self, draw: Callable[[int], Any], start: int) -> Iterator[Any]:
        steps = Steps(draw, start)
        loader: Iterable[Any] = (
            DataLoader(
                steps, batch_size=None, num_workers=self.loaders, prefetch_factor=4, pin_memory=self.device == "cuda"
            )
            if self.loaders
            else (steps[index] for index in range(len(steps)))
        )
        return iter(loader)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16)

    def _agreed(self, seconds: float) -> float:
        """All processes must see the same clock."""
        if self.world == 1:
            return seconds
        clock = torch.tensor(seconds, dtype=torch.float64)
        dist.broadcast(clock, 0)
        return float(clock)

    def _share_gradients(self, optimizer: Optimizer) -> None:
        if self.world == 1:
            return
        gradients = [p.grad for p in optimizer.parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.world).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _report(self, stage: Stage, batches: Batches, figures: Figures, progress: Progress) -> None:
        if self.rank:
            return
        held_out = Figures()
        size, batches.size = batches.size, 10
        for start in range(0, HELD_OUT if self.device == "cuda" else 40, 10):
            with self._autocast():
                drawn = batches.draw_crops(start, held_out=True) if stage.name == "crops" else batches.held_out(start)
                held_out.add(loss_of(self.pupil, stage, drawn.to(self.device)))
        batches.size = size
        line = {
            "stage": stage.name, "step": progress.step, "scenes": progress.scenes,
            "core-minutes": round(progress.spent / 60, 1), "train": figures.summary(), "held out": held_out.summary(),
        }  # fmt: skip
        with (self.out / "log.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        print(json.dumps(line), flush=True)

    def _save(self, optimizer: Optimizer, progress: Progress) -> None:
        if self.rank:
            return
        state = {
            "pupil": self.pupil.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress),
        }  # fmt: skip
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")


class Optimizer:
    """Muon for the matrices within layers, AdamW for everything else."""

    def __init__(self, modules: torch.nn.Module, rate: float) -> None:
        self.parameters = list(modules.parameters())
        within = {
            id(p) for name, m in modules.named_modules() if isinstance(m, torch.nn.Linear) and LAYER.search(name)
            for p in [m.weight]
        }  # fmt: skip
        matrices = [p for p in self.parameters if id(p) in within]
        others = [p for p in self.parameters if id(p) not in within]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True), rate)
        ]
        if matrices:
            muon = BatchedMuon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
            self.parts.append((muon, MUON_RATE * rate))

    def scale_rates(self, scale: float) -> None:
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale

    def step(self) -> None:
        for optimizer, _ in self.parts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


class Figures:
    """Means of losses, and the share of right answers by family, over some steps."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self.families, self.correct = list[Tensor](), list[Tensor]()

    def add(self, result: Result) -> None:
        """Nothing is read here, which would make a GPU wait."""
        for name, value in result.parts.items():
            self.parts[name].append(value.detach())
        if result.correct is not None and result.families is not None:
            self.families.append(result.families)
            self.correct.append(result.correct)

    def summary(self) -> dict[str, float]:
        means = {name: torch.stack(values).float().mean() for name, values in self.parts.items()}
        shares = dict[str, Tensor]()
        if self.families:
            families, correct = torch.cat(self.families), torch.cat(self.correct)
            for index, family in enumerate(FAMILIES):
                if len(found := correct[families == index]):
                    shares[family] = found.mean()
        return {name: round(float(value), 4) for name, value in {**means, **shares}.items()}


def load_tokenizer(folder: Path, data: Path, start: Path | None) -> Any:
    """The run's tokenizer: that of the weights it starts with, or trained when there is none yet."""
    from transformers import AutoTokenizer

    if not folder.exists():
        made = AutoTokenizer.from_pretrained(start) if start else train_tokenizer(texts(Questions(data)))
        made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path) -> Any:
    prepare_torchvision()
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/vlm_nano/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/vlm_nano/model"))
    parser.add_argument(
        "--core-minutes", type=float, nargs=len(STAGES), default=[s.minutes for s in STAGES], help="of each stage"
    )
    parser.add_argument(
        "--weights", type=Path, help="weights to begin with, an export's folder; a stage of 0 is left out"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4, help="scenes a step and process")
    parser.add_argument("--loaders", type=int, default=0, help="processes that prepare batches; a GPU wants a dozen")
    parser.add_argument("--report-seconds", type=float, default=240)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    options.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        load_tokenizer(options.out / "tokenizer", options.data, options.weights)
    if world > 1:
        dist.barrier()
    tokenizer = load_tokenizer(options.out / "tokenizer", options.data, options.weights)
    torch.manual_seed(SEED)
    pupil = Pupil(load_model(options.weights) if options.weights else build_model(tokenizer)).to(options.device)
    stages = tuple(replace(s, minutes=minutes) for s, minutes in zip(STAGES, options.core_minutes, strict=True))
    Run(
        pupil, build_processor(tokenizer), Stock(options.data), options.out, stages, options.device, options.batch,
        options.loaders, options.report_seconds,
        time.monotonic if options.clock == "wall" else time.process_time, rank, world,
    ).train()  # fmt: skip
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
