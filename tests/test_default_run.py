"""What the command without further flags promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pearl.parquet import read_trajectories


@pytest.mark.slow
def test_the_default_command_gives_enough_of_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pearl.cli.gen", "trajectories", "--tools", "crop,depth"]
    subprocess.run(command, cwd=tmp_path, check=True)
    tools = [{step.call.tool for step in t.steps} for t in read_trajectories(tmp_path / "traj.parquet")]
    steps = [len(t.steps) for t in read_trajectories(tmp_path / "traj.parquet")]
    assert len(tools) >= 200
    assert sum(count >= 2 for count in steps) >= 0.40 * len(steps)
    assert sum(used == {"crop", "depth"} for used in tools) >= 0.25 * len(tools)


@pytest.mark.slow
def test_datasets_reads_the_default_output(tmp_path: Path) -> None:
    from datasets import load_dataset

    command = [sys.executable, "-m", "pearl.cli.gen", "trajectories", "--count", "20"]
    subprocess.run(command, cwd=tmp_path, check=True)
    rows = load_dataset("parquet", data_files=str(tmp_path / "traj.parquet"), split="train", cache_dir=str(tmp_path))
    assert {row["source"] for row in rows} == {"photos", "scenes"}
    assert rows[0]["steps"][0]["image"].size[0] > 0
