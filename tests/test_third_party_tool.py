"""The example of docs/tools.md is what stands in examples/, and it works once it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "third_party_tool"


def test_the_docs_show_the_example_as_it_is() -> None:
    docs = (ROOT / "docs" / "tools.md").read_text()
    assert (EXAMPLE / "pearl_tool_brighten.py").read_text() in docs
    entry_point = (EXAMPLE / "pyproject.toml").read_text().split("\n\n")[2]
    assert entry_point in docs


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example is installed."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source")], check=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site")}


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
