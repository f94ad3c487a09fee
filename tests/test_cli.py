from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pearl.cli.gen import app

runner = CliRunner()


@pytest.mark.parametrize("module", ["torch", "ray", "transformers", "datasets", "mujoco", "pyarrow", "cv2"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, pearl, pearl.cli.gen; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [[], ["trajectories"], ["tools"], ["inspect"], ["validate"], ["view"]])
def test_every_command_has_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_tools_are_listed_as_function_calling_specs() -> None:
    specs = json.loads(runner.invoke(app, ["tools", "--json"]).output)
    names = [spec["function"]["name"] for spec in specs]
    assert names[:3] == ["crop", "zoom", "depth"]
    assert all(spec["function"]["parameters"]["type"] == "object" for spec in specs)


def test_a_tool_without_its_model_says_what_brings_it() -> None:
    assert "--detect-model" in runner.invoke(app, ["tools"]).output.replace("\n", "")


def test_a_run_from_flag_to_page(tmp_path: Path) -> None:
    out = str(tmp_path / "traj.parquet")
    made = runner.invoke(
        app,
        ["trajectories", "--source", "photos", "--tools", "crop", "--engine", "local", "--out", out],
        catch_exceptions=False,
    )
    assert "21 planned" in made.output.replace("\n", " ")
    assert runner.invoke(app, ["validate", out]).exit_code == 0
    assert "needs depth" in runner.invoke(app, ["inspect", out]).output
    page = tmp_path / "page.html"
    assert runner.invoke(app, ["view", out, "--out", str(page)]).exit_code == 0
    before = Path(out).read_bytes()
    for command in (["view", out, "--out", out], ["stats", out, "--out", out], ["stats", out, "--markdown", out]):
        assert "is a file of trajectories" in " ".join(runner.invoke(app, command).output.replace("│", " ").split())
    assert Path(out).read_bytes() == before
    assert "mission patch" in page.read_text()


def test_dry_run_shows_a_trajectory_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "traj.parquet"
    flags = ["--source", "photos", "--tools", "crop", "--dry-run", "--out", str(out)]
    shown = runner.invoke(app, ["trajectories", *flags], catch_exceptions=False).output
    assert "would write 21 samples" in shown
    assert "conclusion:" in shown
    assert not list(tmp_path.iterdir())
