from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pearl.cli.eval import app as eval_app
from pearl.cli.gen import app
from pearl.parquet import write_trajectories
from tests.plain import picture, trajectories

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
    assert "mission patch" in page.read_text()


@pytest.mark.parametrize(
    "command", [["view", "--out"], ["stats", "--out"], ["stats", "--markdown"], ["dedup", "--out", "new", "--report"]]
)
def test_pages_and_reports_are_not_written_over_trajectories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trajectories(Path("d.parquet"), [])
    Path("plain").write_bytes(Path("d.parquet").read_bytes())
    for place, said in (
        ("d.parquet", "d.parquet ends in .parquet: that is for trajectories; a page or report goes elsewhere"),
        ("new.parquet", "new.parquet ends in .parquet"),
        ("plain", "plain is a Parquet file: a page or report goes elsewhere"),
    ):
        refused = runner.invoke(app, [command[0], "d.parquet", *command[1:], place])
        assert refused.exit_code == 2
        assert said in " ".join(refused.output.replace("│", " ").split())
    assert Path("plain").read_bytes() == Path("d.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.parquet", "plain"]


def test_a_report_of_duplicates_does_not_take_the_place_of_what_is_kept(tmp_path: Path) -> None:
    data, out = tmp_path / "d.parquet", tmp_path / "kept"
    write_trajectories(data, trajectories()[:1])
    refused = runner.invoke(app, ["dedup", str(data), "--out", str(out), "--report", f"{tmp_path}/./kept"])
    assert refused.exit_code == 2
    assert "cannot be both --out and --report" in " ".join(refused.output.replace("│", " ").split())
    assert not out.exists()


def test_gains_are_not_written_over_trajectories(tmp_path: Path) -> None:
    """It is said before a model is looked for."""
    data = tmp_path / "d.parquet"
    write_trajectories(data, trajectories()[:1])
    before = data.read_bytes()
    refused = runner.invoke(eval_app, ["gain", str(data), "--out", str(data), "--model", "nowhere/at/all"])
    assert refused.exit_code == 1
    assert f"error: {data} is a file of trajectories: choose another --out" in refused.output
    assert data.read_bytes() == before


def made_of_an_image(content: bytes, folder: Path) -> Result:
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(content)
    flags = ["--source", f"folder:{folder}/images", "--tools", "depth", "--engine", "local"]
    return runner.invoke(app, ["trajectories", *flags, "--out", f"{folder}/d.parquet"])


def test_answers_that_are_a_tools_own_reading_are_told(tmp_path: Path) -> None:
    said = made_of_an_image(picture(0).data, tmp_path).output.replace("\n", " ")
    assert "are the tools' readings, which nothing has checked; depth-nano has seen nothing but rendered scenes" in said


def test_a_run_that_keeps_nothing_has_failed(tmp_path: Path) -> None:
    made = made_of_an_image(b"no image", tmp_path)
    assert "nothing was kept" in made.output
    assert made.exit_code == 1


def test_dry_run_shows_a_trajectory_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "traj.parquet"
    flags = ["--source", "photos", "--tools", "crop", "--dry-run", "--out", str(out)]
    shown = runner.invoke(app, ["trajectories", *flags], catch_exceptions=False).output
    assert "would write 21 samples" in shown
    assert "conclusion:" in shown
    assert not list(tmp_path.iterdir())
