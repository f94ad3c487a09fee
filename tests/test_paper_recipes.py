"""The paper's settings: every pair of a data file and a model file is parsed and dry-run on a tiny model of its class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pearl.cli.train import app
from pearl.parquet import write_trajectories
from tests.plain import trajectories
from tests.tiny_vlms import build_tiny_vlm

FOLDER = Path(__file__).parent.parent / "recipes" / "paper"
MODELS = {"qwen2.5-vl-3b": "qwen2_5_vl", "qwen2.5-vl-7b": "qwen2_5_vl", "qwen3-vl-4b": "qwen3_vl"}
DATA = ("lvr", "thinkmorph", "pixelreasoner")


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*MODELS, *DATA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("paper")
    write_trajectories(made / "steps.parquet", trajectories())
    for family in set(MODELS.values()):
        build_tiny_vlm(family, made / family)
    return made


def test_a_baseline_is_dry_run_with_the_papers_settings(folder: Path) -> None:
    files = ["--config", str(FOLDER / "lvr.json"), "--config", str(FOLDER / "qwen2.5-vl-3b.json"), "--objective", "sft"]
    tiny = ["--model", str(folder / MODELS["qwen2.5-vl-3b"]), "--data", str(folder / "steps.parquet")]
    shown = CliRunner().invoke(app, [*files, *tiny, "--out", str(folder / "sft"), "--dry-run"])
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("data", DATA)
def test_a_run_of_the_paper_is_dry_run(data: str, model: str, folder: Path) -> None:
    files = ["--config", str(FOLDER / f"{data}.json"), "--config", str(FOLDER / f"{model}.json")]
    tiny = ["--model", str(folder / MODELS[model]), "--data", str(folder / "steps.parquet")]
    shown = CliRunner().invoke(app, [*files, *tiny, "--out", str(folder / data / model), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    epochs = 4 if data == "pixelreasoner" else 1
    settings = json.loads((FOLDER / f"{data}.json").read_text())
    assert (settings["epochs"], settings["accumulation"]) == (epochs, 2 if epochs == 4 else 8)
    assert "as LoRA adapters" in shown.output
