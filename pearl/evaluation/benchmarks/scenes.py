"""Held-out rendered scenes: as many questions of each family, from the split that no recipe trains on.

`scenes_test.json` fixes which: of the `test` split with its seed, the first indices of each family.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pearl.evaluation.benchmarks.base import Benchmark, BenchmarkError
from pearl.evaluation.benchmarks.trajectories import TEMPLATE, question_of
from pearl.evaluation.records import Question, Scoring
from pearl.files import whole_file
from pearl.parquet import read_trajectories, write_trajectories
from pearl.records import Sample, Trajectory
from pearl.scenes.samples import NoFittingScene, family_due, scene_sample
from pearl.trainer.conversation import load_template


class Scenes(Benchmark):
    """The prompt is the one that `pearl-train` trains on: the options are words, without letters.

    So none but the strict scoring can read its answers. Rendered scenes are kept below `$PEARL_CACHE`
    (`~/.cache/pearl` unless set), as Parquet with the columns of trajectories.
    """

    name = "scenes"
    version = 1

    def __init__(self, place: str | None = None, scoring: Scoring = "strict", count: int | None = None) -> None:
        super().__init__(place, scoring, count)
        if place is not None:
            raise BenchmarkError(f"scenes are rendered, so they have no place; given was {place!r}")
        if scoring != "strict":
            raise BenchmarkError(f"scenes name their options in words, which the scoring {scoring!r} cannot read")

    def questions(self) -> tuple[Question, ...]:
        listed = json.loads((files("pearl.evaluation.benchmarks") / "scenes_test.json").read_text(encoding="utf-8"))
        indices = list(_first_of_each_family(listed, self.count))
        path = _cache() / f"scenes-{_fingerprint(self.version, listed, indices)}.parquet"
        if not path.exists():
            _write(path, _rendered(listed, indices))
        template = load_template(TEMPLATE)
        return tuple(question_of(row, template, self.name) for row in read_trajectories(path))


def _first_of_each_family(listed: dict[str, Any], count: int | None) -> Iterator[int]:
    had = Counter[str]()
    for index in listed["indices"]:
        family = family_due("test", listed["seed"], index)
        had[family] += 1
        if count is None or had[family] <= count:
            yield index


def _cache() -> Path:
    return Path(os.environ.get("PEARL_CACHE", "~/.cache/pearl")).expanduser()


def _fingerprint(version_: int, listed: dict[str, Any], indices: list[int]) -> str:
    """Of what decides the pictures; another MuJoCo may render other bytes."""
    try:
        renderer = version("mujoco")
    except PackageNotFoundError:
        raise BenchmarkError("rendered scenes need MuJoCo: pip install -e '.[scenes]', or mujoco") from None
    decisive = [version_, listed["version"], listed["seed"], listed["size"], indices, renderer]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def _write(path: Path, samples: Iterator[Sample]) -> None:
    """All of them or no file."""
    try:
        with whole_file(path) as partial:
            write_trajectories(partial, map(_as_trajectory, samples))
    except OSError as error:
        raise BenchmarkError(
            f"scenes: {path} cannot be written ({error}); set PEARL_CACHE to a folder that can"
        ) from error


def _rendered(listed: dict[str, Any], indices: list[int]) -> Iterator[Sample]:
    for index in tqdm(indices, desc="rendering scenes", unit="scene", disable=None):
        try:
            yield scene_sample("test", listed["seed"], index, listed["size"])[0]
        except NoFittingScene as error:
            raise BenchmarkError(
                f"scenes: index {index} of {listed['seed']} cannot be rendered here: {error}"
            ) from error


def _as_trajectory(sample: Sample) -> Trajectory:
    return Trajectory(
        id=sample.key, image=sample.image, question=sample.question, choices=sample.choices, answer=sample.answer,
        steps=(), conclusion="", expert="", skill=sample.skill, source=sample.source, license=sample.license, seed=0,
    )  # fmt: skip
