"""BLINK: perception that people do within a blink (Fu et al., arXiv 2404.12390); the `val` split of some of its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pearl.evaluation.benchmarks.base import (
    SUFFIX,
    BadRecord,
    BenchmarkError,
    PublishedBenchmark,
    answer_index,
    column,
    image,
    parquet_records,
    text,
)
from pearl.evaluation.records import LETTERS, Question

IMAGES = ("image_1", "image_2", "image_3", "image_4")


class Blink(PublishedBenchmark):
    """One category a task. Questions have one to four images; all scorings word them alike, as LVR's code does.

    A subclass may name other `tasks` of the repository.
    """

    name = "blink"
    version = 1
    tasks: ClassVar[tuple[str, ...]] = (
        "Counting",
        "IQ_Test",
        "Jigsaw",
        "Relative_Reflectance",
        "Spatial_Relation",
        "Object_Localization",
    )
    hub_id = "BLINK-Benchmark/BLINK"
    files = ("*/val-*.parquet",)
    layout = "TASK/val-*.parquet"

    def records(self, folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
        files = {task: sorted((folder / task).glob("val-*.parquet")) for task in self.tasks}
        if missing := [task for task, paths in files.items() if not paths]:
            raise BenchmarkError(f"blink: {folder} has no {', '.join(f'{task}/val-*.parquet' for task in missing)}")
        for task, paths in files.items():
            for where, row in parquet_records(folder, paths):
                yield where, {**row, "task": task}

    def question(self, folder: Path, record: Mapping[str, Any]) -> Question:
        choices = column(record, "choices")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS) or not all(choices):
            raise BadRecord(f"column 'choices' holds {choices!r:.60}; expected a list of 2 texts or more")
        options = tuple(map(str, choices))
        answer = answer_index(text(record, "answer"), options)
        there = [name for name in IMAGES if name == IMAGES[0] or record.get(name) is not None]
        images = tuple(image(folder, record, name) for name in there)
        lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        prompt = f"{text(record, 'question')}\nOptions:\n{lines}{SUFFIX}"
        return self.asked(text(record, "idx"), record["task"], images, prompt, options, answer)
