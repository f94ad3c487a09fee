"""Training under Ray Train: the same curve as one process, and a killed worker is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pearl.parquet import write_trajectories
from pearl.trainer.cluster import from_anywhere
from pearl.trainer.config import TrainConfig
from tests.plain import trajectories
from tests.tiny_vlms import build_tiny_vlm

ON_TWO = ["--batch-size", "1", "--num-workers", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cluster")
    write_trajectories(made / "steps.parquet", [one for one in trajectories() for _ in range(4)])
    build_tiny_vlm("qwen2_5_vl", made / "tiny")
    return made


def start(folder: Path, out: str, *options: str, **variables: str) -> subprocess.Popen[bytes]:
    """The command in this folder, with relative paths."""
    command = [sys.executable, "-m", "pearl.cli.train", "--data", "steps.parquet", "--model", "tiny", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [*command, "--eval-fraction", "0", *options],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def curve(folder: Path, out: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def finished(process: subprocess.Popen[bytes]) -> str:
    """What it said on stderr."""
    said = process.communicate(timeout=290)[1].decode()
    assert process.returncode == 0, said[-2000:]
    return said


@pytest.mark.timeout(600)
def test_two_workers_make_the_curve_of_one_process(folder: Path) -> None:
    steps = ["--max-steps", "4", "--learning-rate", "1e-2"]
    finished(start(folder, "alone", "--batch-size", "2", *steps))
    finished(start(folder, "two", *ON_TWO, *steps))
    assert curve(folder, "two") == pytest.approx(curve(folder, "alone"), rel=1e-4)
    assert (folder / "two" / "model" / "model.safetensors").exists()


@pytest.mark.timeout(600)
def test_a_cluster_that_is_there_is_joined(folder: Path, two_nodes: str) -> None:
    """Each of its two nodes has room for one worker."""
    steps = ["--max-steps", "2", "--learning-rate", "1e-2"]
    finished(start(folder, "here", "--batch-size", "2", *steps))
    finished(start(folder, "joined", *ON_TWO, *steps, "--address", two_nodes))
    assert curve(folder, "joined") == pytest.approx(curve(folder, "here"), rel=1e-4)


def test_settings_are_those_of_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "words.json").write_text("{}")
    options = {"target_encoder": "tiny", "lambda_": 0.5}
    local = TrainConfig("tiny/../steps.parquet", out="o", model="tiny", template="words.json", eval_data=".:train")
    found = from_anywhere(replace(local, objective_options=options))
    assert (found.data, found.eval_data) == (f"{folder}/steps.parquet", f"{folder}:train")
    assert (found.model, found.template, found.out) == (f"{folder}/tiny", f"{folder}/words.json", f"{folder}/o")
    assert found.objective_options == {"target_encoder": f"{folder}/tiny", "lambda_": 0.5}
    assert from_anywhere(TrainConfig("st?ps*")).data == f"{folder}/st?ps*"
    timm = from_anywhere(TrainConfig("a", objective_options={"target_encoder": "timm:local-dir:tiny"}))
    assert timm.objective_options == {"target_encoder": f"timm:local-dir:{folder}/tiny"}


def test_names_and_hub_ids_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vlm-nano", "pearl"):
        (tmp_path / name).mkdir()
    options = {"target_encoder": "timm:resnet18"}
    given = TrainConfig("org/data:train", model="vlm-nano", eval_data="org/data", objective_options=options)
    for settings in (given, replace(given, model=None), replace(given, model="org/model")):
        assert from_anywhere(settings) == replace(settings, out=f"{tmp_path}/runs/pearl")


PICKY = """
from pearl.errors import PearlError
from pearl.trainer.objectives.sft import NextToken, Sft

class Picky(Sft):
    name = "picky"
    def losses(self, hidden_size):
        return Losses("full")

class Losses(NextToken):
    def forward(self, states):
        if "bad" in states.batch.sample_ids:
            raise PearlError("this one cannot be learned:\\nno hope")
        return super().forward(states)
"""


def test_an_error_in_one_worker_ends_the_run_with_its_message(folder: Path, tmp_path: Path) -> None:
    """The other worker waits for it meanwhile."""
    write_trajectories(folder / "bad.parquet", [*trajectories(), replace(trajectories()[0], id="bad")])
    (tmp_path / "picky.py").write_text(PICKY)
    (tmp_path / "picky-1.dist-info").mkdir()
    (tmp_path / "picky-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: picky\nVersion: 1\n")
    (tmp_path / "picky-1.dist-info" / "entry_points.txt").write_text("[pearl.objectives]\npicky = picky:Picky\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = start(folder, "bad", "--data", "bad.parquet", "--objective", "picky", *ON_TWO, PYTHONPATH=path)
    said = process.communicate(timeout=290)[1].decode()
    assert process.returncode == 1
    assert said.endswith("error: this one cannot be learned:\nno hope\n")
    assert said.count("trained parameters:") == 1  # the workers were not started anew


def test_more_workers_than_the_machine_has_cores_are_refused(folder: Path) -> None:
    ended = start(folder, "many", "--num-workers", "4000")
    said = ended.communicate(timeout=100)[1].decode()
    assert ended.returncode == 1
    assert "error: --num-workers 4000 takes as many CPUs, and this machine has " in said


def test_a_cluster_that_is_not_there_is_told(folder: Path) -> None:
    ended = start(folder, "nowhere", "--num-workers", "1", "--address", "no:such:place")
    said = ended.communicate(timeout=100)[1].decode()
    assert ended.returncode == 1
    assert "error: Ray cannot be started or reached (no:such:place)" in said
    assert "Traceback" not in said


def workers_of(process: int) -> list[int]:
    """Ray's training workers among a process's descendants."""
    found = []
    for one in psutil.Process(process).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [one.pid] if "ray::RayTrainWorker" in " ".join(one.cmdline()) else []
    return found


@pytest.mark.slow
def test_a_killed_worker_is_replaced(folder: Path) -> None:
    steps = ["--max-steps", "30", "--save-steps", "3", "--learning-rate", "1e-2"]
    finished(start(folder, "whole", *ON_TWO, *steps))
    process = start(folder, "killed", *ON_TWO, *steps, RAY_DEDUP_LOGS="0")
    while not list((folder / "killed" / "checkpoints").glob("checkpoint-*/complete")):
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    said = finished(process)
    assert said.count("trained parameters:") == 2
    assert said.count("step 1/30 ") == said.count("step 30/30 ") == 1  # the second attempt went on from a checkpoint
    assert curve(folder, "killed") == pytest.approx(curve(folder, "whole"), rel=1e-4)
