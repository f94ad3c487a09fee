"""V*: small things in large photographs (Wu & Xie, arXiv 2312.14135). 191 questions, two categories."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pearl.evaluation.benchmarks.base import (
    SUFFIX,
    BadRecord,
    BenchmarkError,
    PublishedBenchmark,
    answer_index,
    image,
    parquet_records,
    text,
)
from pearl.evaluation.records import LETTERS, Question

LISTING = "test_questions.jsonl"
_OPTION = re.compile(r"^\(([A-Z])\)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


class VStar(PublishedBenchmark):
    """`text` is the prompt: the question, a line an option ("(A) …"), and what `SUFFIX` says.

    The repository holds `test_questions.jsonl` with paths of images; copies as Parquet hold the images themselves.
    LVR's code appends the suffix to a text that ends with it already; here it stands once.
    """

    name = "vstar"
    version = 1
    hub_id = "craigwu/vstar_bench"
    files = (LISTING, "direct_attributes/*", "relative_position/*", "*.parquet")
    layout = f"{LISTING} with its folders of images, or Parquet files"

    def records(self, folder: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
        if (folder / LISTING).is_file():
            return _lines(folder / LISTING)
        return parquet_records(folder, sorted(folder.rglob("*.parquet")))

    def question(self, folder: Path, record: Mapping[str, Any]) -> Question:
        prompt = text(record, "text")
        options = _options(prompt)
        answer = answer_index(text(record, "label"), options)
        if self.scoring != "pearl-published" and SUFFIX.strip() not in prompt:
            prompt += SUFFIX
        images = (image(folder, record, "image"),)
        return self.asked(text(record, "question_id"), text(record, "category"), images, prompt, options, answer)


def _options(prompt: str) -> tuple[str, ...]:
    found = _OPTION.findall(prompt)
    if len(found) < 2 or "".join(letter for letter, _ in found) != LETTERS[: len(found)]:
        raise BadRecord("column 'text' lists no options; expected lines (A) …, (B) …")
    return tuple(option for _, option in found)


def _lines(listing: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with listing.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{listing.name} line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BenchmarkError(f"{listing} line {number} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise BenchmarkError(f"{listing} line {number} holds {type(record).__name__}; expected a JSON object")
            yield where, record
