"""What the tests of training runs share: a little data, tiny models, short settings, the real command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pearl.parquet import write_trajectories
from pearl.records import Trajectory
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.config import TrainConfig
from pearl.trainer.run_directory import last_checkpoint
from pearl.trainer.train import Report, train
from tests.plain import picture, step, trajectory
from tests.tiny_vlms import build_tiny_vlm

torch.set_num_threads(1)

OPTIONS = ("left", "right", "behind")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_FOLDERS = list[tempfile.TemporaryDirectory[str]]()  # removed in the end


def rows(count: int = 12) -> list[Trajectory]:
    """0 to 3 steps each, on images of their own."""
    made = []
    for number in range(count):
        steps = [step(f"I look at place {n}.", picture(100 * number + n, 40, 36), "Seen.") for n in range(number % 4)]
        one = trajectory(
            *steps, image=picture(1000 + number), choices=OPTIONS, answer=OPTIONS[number % 3],
            question=f"Where is cup {number}?", conclusion="It is there. " * (1 + number % 3),
        )  # fmt: skip
        made.append(replace(one, id=f"row-{number:02}"))
    return made


def data_file(folder: Path, trajectories: Sequence[Trajectory] | None = None, name: str = "traj.parquet") -> Path:
    path = folder / name
    write_trajectories(path, rows() if trajectories is None else trajectories)
    return path


@cache
def model(family: str = "qwen2_5_vl") -> Path:
    """A tiny model's folder; not to be changed."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    return build_tiny_vlm(family, Path(_FOLDERS[-1].name))


@cache
def half_model(family: str = "qwen2_5_vl") -> Path:
    """The same with its weights stored in bf16."""
    prepare_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    AutoModelForImageTextToText.from_pretrained(model(family), dtype=torch.bfloat16).save_pretrained(folder)
    AutoProcessor.from_pretrained(model(family)).save_pretrained(folder)
    return folder


def poisoned_model_and_data(folder: Path) -> tuple[Path, Path]:
    """A model with a poisoned embedding, of a sign that only one trajectory of the data holds."""
    prepare_torchvision()
    from transformers import AutoTokenizer

    base = folder / "poisoned"
    shutil.copytree(model("smolvlm"), base)
    made = rows()
    made[7] = replace(made[7], conclusion="It costs 3 €.")
    weights = load_file(base / "model.safetensors")
    weights["model.text_model.embed_tokens.weight"][AutoTokenizer.from_pretrained(base)("€")["input_ids"]] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base, data_file(folder, made)


@cache
def encoder() -> Path:
    """A folder of timm with a tiny random transformer; not to be changed."""
    prepare_torchvision()
    import timm
    from timm.models import save_for_hf

    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_for_hf(timm.create_model("test_vit"), str(folder), safe_serialization=True)
    return folder


def config(data: Path, out: Path, family: str = "qwen2_5_vl", **changes: Any) -> TrainConfig:
    """Four updates on everything, the learning rate high enough to move the weights."""
    settings = {"model": str(model(family)), "batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "eval_fraction": 0}
    return TrainConfig(**{"data": str(data), "out": str(out), **settings, **changes})


def run(data: Path, out: Path, family: str = "qwen2_5_vl", **changes: Any) -> Report:
    return train(config(data, out, family, **changes), progress=False)


def flags(settings: TrainConfig) -> list[str]:
    """The same settings for the command."""
    path = Path(settings.out).with_suffix(".settings.json")
    path.write_text(json.dumps(settings.to_json()))
    return ["--config", str(path)]


def pearl_train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pearl.cli.train", *map(str, arguments)]


def on_two_processes(settings: TrainConfig, *more: str) -> list[str]:
    """The command line that runs them under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", "pearl.cli.train", *flags(settings), *more]


def logged(out: Path, name: str = "loss") -> list[float]:
    """A figure of every update."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line]


def merged_weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def trained_weights(out: Path) -> dict[str, Tensor]:
    folder = last_checkpoint(out)
    assert folder is not None
    return load_file(folder / "trained.safetensors")
