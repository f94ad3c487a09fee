"""The examples of the docs are what stands in examples/, and they work once they are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pearl.parquet import write_trajectories
from tests.plain import picture, step, trajectory
from tests.tiny_vlms import build_tiny_vlm

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "third_party_tool": ("pearl_tool_brighten.py", "tools.md"),
    "third_party_objective": ("pearl_mean_target.py", "training.md"),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_docs_show_the_example_as_it_is(example: str) -> None:
    module, page = EXAMPLES[example]
    docs = (ROOT / "docs" / page).read_text()
    assert (ROOT / "examples" / example / module).read_text() in docs
    entry_point = (ROOT / "examples" / example / "pyproject.toml").read_text().split("\n\n")[2]
    assert entry_point in docs


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the examples are installed."""
    folder = tmp_path_factory.mktemp("examples")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    for example in EXAMPLES:
        shutil.copytree(ROOT / "examples" / example, folder / example)
        subprocess.run([*command, "--target", str(folder / "site"), str(folder / example)], check=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}


def test_an_installed_tool_is_listed(installed: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pearl.cli.gen", "tools", "--json"]
    listed = json.loads(subprocess.run(command, env=installed, capture_output=True, check=True).stdout)
    brighten = next(tool["function"] for tool in listed if tool["function"]["name"] == "brighten")
    assert brighten["parameters"]["properties"]["gamma"]["maximum"] == 5


USE = """
import numpy as np
from pearl.images import Picture
from pearl.records import ToolCall
from pearl.tools import Toolbox
grey = Picture(np.full((8, 8, 3), 64, np.uint8))
good, bad = Toolbox(["brighten"]).execute([
    (ToolCall("brighten", {"gamma": 2.0}), [grey]), (ToolCall("brighten", {"gamma": 9}), [grey])
])
assert good.pixels.min() == 128, good
assert bad.failed and "gamma" in bad.text, bad
"""


def test_an_installed_tool_runs_and_its_bounds_hold(installed: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", USE], env=installed, check=True)


def test_an_installed_objective_trains(installed: dict[str, str], tmp_path: Path) -> None:
    model = build_tiny_vlm("qwen2_5_vl", tmp_path / "tiny")
    data = tmp_path / "steps.parquet"
    write_trajectories(data, [trajectory(step("I look.", picture(i)), image=picture(9 + i)) for i in range(4)])
    command = [sys.executable, "-m", "pearl.cli.train", "--data", str(data), "--model", str(model)]
    command += ["--out", str(tmp_path / "run"), "--objective", "mean-target", "-O", "weight=0.5", "--max-steps", "1"]
    subprocess.run(command, env=installed, check=True, capture_output=True)
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["loss_vlm"] + 0.5 * line["loss_mean"], rel=1e-5)
