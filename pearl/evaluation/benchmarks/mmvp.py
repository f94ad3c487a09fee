"""MMVP: pairs of images that CLIP takes for the same (Tong et al., arXiv 2401.06209). 300 questions, 150 pairs."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pearl.evaluation.benchmarks.base import (
    SUFFIX,
    BadRecord,
    BenchmarkError,
    PublishedBenchmark,
    answer_index,
    image_file,
    text,
)
from pearl.evaluation.records import Question

IMAGE_FOLDERS = ("MMVP Images", "MMVP_Images")
_OPTIONS = re.compile(r"\s*\(a\)\s*(\S.*?)\s*\(b\)\s*(\S.*?)\s*", re.DOTALL)


class Mmvp(PublishedBenchmark):
    """One category; the authors count a pair as right where both its questions are.

    The answers are taken as published, though two pairs are known to be wrong (99 and 100, 279 and 280:
    tsb0601/MMVP, issue 30). Published code leaves the options in one line, which the scorings that repeat it do too.
    """

    name = "mmvp"
    version = 1
    hub_id = "MMVP/MMVP"
    files = ("Questions.csv", *(f"{folder}/*" for folder in IMAGE_FOLDERS))
    layout = "Questions.csv and a folder 'MMVP Images'"

    def records(self, folder: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
        path = folder / "Questions.csv"
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                return [(f"{path.name} row {number}", row) for number, row in enumerate(csv.DictReader(file), start=1)]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BenchmarkError(f"{path} cannot be read: {error}") from error

    def question(self, folder: Path, record: Mapping[str, Any]) -> Question:
        index = text(record, "lndex" if "lndex" in record else "Index").strip()  # copies spell it either way
        if not re.fullmatch(r"[1-9][0-9]*", index):
            raise BadRecord(f"column 'Index' holds {index!r}; expected a number from 1 on")
        listed = text(record, "Options")
        split = _OPTIONS.fullmatch(listed)
        if split is None:
            raise BadRecord(f"column 'Options' holds {listed!r}; expected (a) … (b) …")
        options = split.groups()
        answer = answer_index(text(record, "Correct Answer"), options)
        below = next((name for name in IMAGE_FOLDERS if (folder / name).is_dir()), IMAGE_FOLDERS[0])
        images = (image_file(folder, f"{below}/{index}.jpg"),)
        prompt = f"{text(record, 'Question')}\nOptions:\n{self._options(listed, options)}"
        return self.asked(index, "all", images, prompt, options, answer)

    def pairs(self, questions: Iterable[Question]) -> dict[str, str]:
        """1 and 2 are a pair, 3 and 4, …; one without the other is none."""
        pairs = {question.id: str((int(question.id) + 1) // 2) for question in questions}
        sizes = Counter(pairs.values())
        return {question: pair for question, pair in pairs.items() if sizes[pair] == 2}

    def _options(self, listed: str, options: tuple[str, ...]) -> str:
        if self.scoring == "strict":
            return f"A. {options[0]}\nB. {options[1]}{SUFFIX}"
        in_one_line = listed.replace("(a)", "A.").replace("(b)", "B.")
        return in_one_line + (SUFFIX if self.scoring == "lvr" else "")
