"""A run that was killed, whenever it was, and resumed ends as one that was not: the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pearl.torch_setup import prepare_torchvision
from pearl.trainer.cluster import train_on_ray
from pearl.trainer.config import ConfigError, TrainConfig
from pearl.trainer.conversation import load_template
from pearl.trainer.run_directory import COMPLETE, checkpoints
from pearl.trainer.train import train
from tests.runs import (
    ENVIRONMENT,
    command,
    config,
    data_file,
    flags,
    logged,
    model,
    on_two_processes,
    pearl_train,
    rows,
)

prepare_torchvision()
from transformers import TrainerCallback  # noqa: E402

# Epochs of five updates, each of two forwards, the fifth of one; dropout needs the random state, and evaluation
# disturbs it. The checkpoint after ten updates stands between two epochs.
SETTINGS: dict[str, Any] = {
    "tune": "lora", "lora_dropout": 0.2, "batch_size": 1, "accumulation": 2, "max_steps": 12, "save_steps": 2,
    "eval_steps": 5, "eval_fraction": 0.4,
}  # fmt: skip

# Runs the command, and dies in the middle of writing a file of a checkpoint: the how many'th, says the first argument.
DYING = """
import os, signal, sys, torch
left, write = int(sys.argv.pop(1)), torch.save
def save(value, path, *rest, **more):
    global left
    left -= 1
    write(value, path, *rest, **more)
    if not left:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
from pearl.cli.train import main
main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    train(config(data, out, **SETTINGS), progress=False)
    return out


def assert_same(out: Path, other: Path) -> None:
    mine, theirs = (folder / "model" / "model.safetensors" for folder in (out, other))
    assert mine.read_bytes() == theirs.read_bytes()
    assert logged(out) == logged(other)
    last, other_last = (load_file(checkpoints(folder)[-1] / "trained.safetensors") for folder in (out, other))
    assert last.keys() == other_last.keys()
    assert all(torch.equal(weight, other_last[name]) for name, weight in last.items())


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [(1, 5), (11,), (3, 7, 9)], ids=str)
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(
    data: Path, tmp_path: Path, uninterrupted: Path, steps: tuple[int, ...]
) -> None:
    settings = config(data, tmp_path / "out", resume=True, **SETTINGS)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            train(settings, False, [Stop(step)])
    assert [int(path.name[11:]) for path in checkpoints(tmp_path / "out")] == [
        n for n in (2, 4, 6, 8, 10) if n <= step
    ][-2:]
    train(replace(settings, data_workers=2 if steps == (11,) else 0), False)
    assert_same(tmp_path / "out", uninterrupted)


def test_a_killed_command_goes_on_bit_for_bit(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    settings = config(data, tmp_path / "out", **SETTINGS)
    died = subprocess.run([sys.executable, "-c", DYING, "4", *flags(settings)], env=ENVIRONMENT, check=False)
    assert died.returncode == -9
    cut = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    assert cut.exists()
    assert not (cut / COMPLETE).exists()
    assert kill_at(settings, 7, 0.05)
    train(replace(settings, resume=True), progress=False)
    assert_same(tmp_path / "out", uninterrupted)


def kill_at(settings: TrainConfig, step: int, seconds: float) -> bool:
    return kill_after(command(*flags(settings), "--resume"), Path(settings.out), step, seconds)


def kill_after(started: list[str], out: Path, step: int, seconds: float) -> bool:
    """Kills the command so long after it logged this update, which no checkpoint has yet; False: it had ended by then."""
    quiet, log = subprocess.DEVNULL, out / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0  # a resumed run begins by cutting off what it makes again
    process = subprocess.Popen(started, env=ENVIRONMENT, stdout=quiet, stderr=quiet, start_new_session=True)
    while process.poll() is None:
        if log.exists() and log.stat().st_mtime_ns != before and f'"step": {step},' in log.read_text():
            time.sleep(seconds)
            break
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_two_processes_killed_in_their_second_epoch_go_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    both: dict[str, Any] = {"tune": "lora", "lora_dropout": 0.2, "batch_size": 1, "max_steps": 15, "save_steps": 2}
    whole, settings = config(data, tmp_path / "whole", **both), config(data, tmp_path / "out", **both)
    subprocess.run(on_two_processes(whole), env=ENVIRONMENT, check=True)
    assert kill_after(on_two_processes(settings), tmp_path / "out", 10, 0.1)
    assert not (tmp_path / "out" / "model").exists()
    subprocess.run(on_two_processes(settings, "--resume"), env=ENVIRONMENT, check=True)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_ten_runs_killed_at_random_end_the_same(data: Path, tmp_path: Path, tune: str) -> None:
    whole = config(data, tmp_path / "whole", **{**SETTINGS, "tune": tune})
    assert pearl_train(*flags(whole)).returncode == 0
    for number in range(10):
        chance = random.Random(f"{tune} {number}")
        settings = config(data, tmp_path / f"run-{number}", **{**SETTINGS, "tune": tune})
        for _ in range(chance.randint(1, 3)):
            last = max((int(path.name[11:]) for path in checkpoints(Path(settings.out))), default=0)
            if chance.random() < 0.5:
                file = chance.randint(1, 3 * (12 - last) // 2)  # of the three that each checkpoint to come has
                died = [sys.executable, "-c", DYING, str(file), *flags(settings), "--resume"]
                assert subprocess.run(died, env=ENVIRONMENT, check=False, capture_output=True).returncode == -9
            else:
                assert kill_at(settings, chance.randint(last + 1, 11), chance.uniform(0, 0.2))
        ended = pearl_train(*flags(settings), "--resume")
        assert ended.returncode == 0, ended.stderr
        assert_same(Path(settings.out), Path(whole.out))


def test_a_run_killed_after_its_last_update_makes_no_further_one(
    data: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "model")
    report = train(config(data, out, resume=True, **SETTINGS), progress=False)
    assert report.steps == 12
    assert report.evaluation["eval_answers"] > 0
    assert_same(out, uninterrupted)


def test_other_settings_cannot_go_on_with_a_run(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    settings = config(data, out, resume=True, **SETTINGS)
    with pytest.raises(ConfigError, match=r"learning_rate: 0.01 → 0.1; lora_rank: 64 → 8"):
        train(replace(settings, learning_rate=0.1, lora_rank=8), progress=False)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(replace(settings, resume=False), progress=False)


def test_another_number_of_processes_cannot_go_on_with_a_run(
    data: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    settings = config(data, out, resume=True, **SETTINGS)
    with pytest.raises(ConfigError, match="had another number of processes: 1 → 2"):
        train_on_ray(settings, num_workers=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="had another number of processes: 1 → 2"):
        train(settings, progress=False)


def test_other_data_cannot_go_on_with_a_run(tmp_path: Path) -> None:
    data = data_file(tmp_path)
    settings = config(data, tmp_path / "out", max_steps=1)
    train(settings, progress=False)
    edited = [replace(one, conclusion=one.conclusion + " Indeed.") if n == 7 else one for n, one in enumerate(rows())]
    for others in (rows(13), edited):
        data_file(tmp_path, others)
        with pytest.raises(ConfigError, match="had other trajectories"):
            train(replace(settings, resume=True), progress=False)


@pytest.mark.parametrize("what", ["template", "frozen weights", "tokenizer, chat template or image sizes"])
def test_what_changed_where_it_lies_cannot_go_on_with_a_run(what: str, tmp_path: Path) -> None:
    base, words = tmp_path / "base", tmp_path / "words.json"
    shutil.copytree(model(), base)
    template = asdict(load_template("pearl"))
    words.write_text(json.dumps(template))
    settings = config(data_file(tmp_path), tmp_path / "out", model=str(base), template=str(words), tune="lora")
    train(settings, progress=False)
    if what == "template":
        words.write_text(json.dumps({**template, "direct": "It is $answer"}))
    elif what.startswith("tokenizer"):
        chat = base / "chat_template.jinja"
        chat.write_text("user " + chat.read_text())
    else:
        weights = load_file(base / "model.safetensors")
        save_file(
            {name: weight * 1.01 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"}
        )
    with pytest.raises(ConfigError, match=f"had other {what}: what lies there has changed"):
        train(replace(settings, resume=True), progress=False)


def test_what_compares_the_trajectories_of_a_forward_is_not_divided_otherwise(data: Path, tmp_path: Path) -> None:
    settings = config(
        data,
        tmp_path / "out",
        objective_options={"jepa_distance": "infonce"},
        batch_size=4,
        accumulation=1,
        max_steps=1,
    )
    train(settings, progress=False)
    with pytest.raises(ConfigError, match="accumulation: 1 → 2; batch_size: 4 → 2"):
        train(replace(settings, resume=True, batch_size=2, accumulation=2), progress=False)


def test_that_there_is_nothing_to_go_on_from_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(data, tmp_path / "out", resume=True, max_steps=1), progress=False)
    assert f"note: there is no checkpoint in {tmp_path / 'out'} to go on from" in capsys.readouterr().err


def test_a_resumed_run_saves_as_often_as_it_is_told(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "out", save_steps=2, keep_checkpoints=9, max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        train(settings, False, [Stop(3)])
    train(replace(settings, resume=True, save_steps=1), progress=False)
    found = {path.parent.name for path in (tmp_path / "out" / "checkpoints").glob("*/complete")}
    assert found == {f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)}


def test_two_runs_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "out")

    class Second(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **rest: Any) -> None:
            with pytest.raises(ConfigError, match="another run is at work in"):
                train(replace(settings, learning_rate=1e-3), progress=False)
            with pytest.raises(ConfigError, match="another run is at work in"):
                train_on_ray(settings, num_workers=1)

    train(settings, False, [Second()])
    assert len(logged(tmp_path / "out")) == 4


def test_only_the_last_checkpoints_are_kept(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "out", save_steps=1, keep_checkpoints=3), progress=False)
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_what_a_run_left_that_came_to_nothing_is_cleared(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "out", save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        train(settings, False, [Stop(2)])
    train(replace(settings, learning_rate=1e-3), progress=False)
    assert len(logged(tmp_path / "out")) == 4


def test_the_resolved_settings_stand_beside_the_checkpoints(uninterrupted: Path) -> None:
    resolved = json.loads((uninterrupted / "config.json").read_text())["resolved"]
    assert (resolved["tune"], resolved["precision"], resolved["objective_options"]["lambda_"]) == ("lora", "fp32", 0.2)
