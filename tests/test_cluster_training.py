"""Training under Ray Train: the same curve as one process, and a killed worker is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pearl.parquet import write_trajectories
from tests.plain import trajectories
from tests.tiny_vlms import build_tiny_vlm

ON_TWO = ["--batch-size", "1", "--num-workers", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cluster")
    write_trajectories(made / "steps.parquet", [one for one in trajectories() for _ in range(4)])
    build_tiny_vlm("qwen2_5_vl", made / "tiny")
    return made


def start(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pearl.cli.train", "--data", str(folder / "steps.parquet")]
    command += ["--model", str(folder / "tiny"), "--out", str(folder / out), "--eval-fraction", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def curve(folder: Path, out: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=290)
    assert process.returncode == 0, errors.decode()[-2000:]


@pytest.mark.timeout(600)
def test_two_workers_make_the_curve_of_one_process(folder: Path) -> None:
    steps = ["--max-steps", "4", "--learning-rate", "1e-2"]
    finished(start(folder, "alone", "--batch-size", "2", *steps))
    finished(start(folder, "two", *ON_TWO, *steps))
    assert curve(folder, "two") == pytest.approx(curve(folder, "alone"), rel=1e-4)
    assert (folder / "two" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_killed_worker_is_replaced(folder: Path) -> None:
    steps = ["--max-steps", "30", "--save-steps", "3", "--learning-rate", "1e-2"]
    finished(start(folder, "whole", *ON_TWO, *steps))
    process = start(folder, "killed", *ON_TWO, *steps)
    while not list((folder / "killed" / "checkpoints").glob("checkpoint-*/complete")):
        assert process.poll() is None
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, check=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    finished(process)
    assert curve(folder, "killed") == pytest.approx(curve(folder, "whole"), rel=1e-4)
