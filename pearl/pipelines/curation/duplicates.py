"""Near-duplicates within and across datasets: `pearl-gen dedup`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pearl.pipelines.curation.hashing import MAX_DISTANCE, NEAR, ImageIndex, digest
from pearl.pipelines.curation.rows import (
    CurationError,
    files_of,
    image_bytes,
    lineage,
    refuse_existing,
    scan,
    write_chosen,
)


@dataclass(frozen=True)
class Dedup:
    """What is a duplicate: the same question about a near image with the same answer, or about the very same image. Against
    what is only compared with, the answer does not matter.

    Attributes:
        near: Images that are linked by steps of at most so many bits of their perceptual hash count as one.
        images_only: Ignore question and answer.
    """

    near: int = NEAR
    images_only: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.near <= MAX_DISTANCE:
            raise CurationError(f"--near {self.near}: 0 to {MAX_DISTANCE} bits")


@dataclass(frozen=True)
class Duplicate:
    """A row that was left out, the row that stands for it, and how many bits their images' hashes differ in."""

    id: str
    of: str
    bits: int


@dataclass(frozen=True)
class Deduplicated:
    kept: int
    left_out: tuple[Duplicate, ...]
    unreadable: int


def dedup_data(
    inputs: Sequence[str | Path], out: Path, wanted: Dedup, against: Sequence[str | Path] = ()
) -> Deduplicated:
    """Writes the first of each group of duplicates, in order, as one file.

    Args:
        inputs: Earlier datasets have precedence.
        against: Datasets that have precedence over all of them, and are not written.

    Raises:
        CurationError: `out` exists, or nothing is left.
        DataError: the data cannot be read.
    """
    refuse_existing(out)
    every = files_of([*against, *inputs])
    files = [path for paths in every for path in paths]
    index, ids, image_of = ImageIndex(perceptual=True), list[str](), list[int]()
    questions, answers = list[bytes](), list[bytes]()
    for row in scan(files, ["id", "image.bytes", "question", "answer"]):
        ids.append(row["id"])
        image_of.append(index.add(image_bytes(row)))
        questions.append(b"" if wanted.images_only else _plain(row["question"]))
        answers.append(b"" if wanted.images_only else _plain(row["answer"]))
    groups = index.groups(wanted.near)
    only_compared = sum(1 for _ in scan([path for paths in every[: len(against)] for path in paths], ["id"]))
    chosen, left_out = np.zeros(len(ids), bool), list[Duplicate]()
    compared = dict[tuple[int, bytes], int]()
    alike, same = dict[tuple[int, bytes, bytes], int](), dict[tuple[int, bytes], int]()
    for number, image in enumerate(image_of):
        question = questions[number]
        if number < only_compared:
            compared.setdefault((groups[image], question), number)
            continue
        stands = compared.get((groups[image], question), same.get((image, question)))
        if stands is None:
            stands = alike.setdefault((groups[image], question, answers[number]), number)
            same[image, question] = stands
        if stands == number:
            chosen[number] = True
        else:
            left_out.append(Duplicate(ids[number], ids[stands], _bits(index, image, image_of[stands])))
    settings = {"near": wanted.near, "images_only": wanted.images_only, "against": [str(data) for data in against]}
    write_chosen(files, chosen, out, lineage("dedup", settings, inputs))
    return Deduplicated(int(chosen.sum()), tuple(left_out), index.unreadable)


def _plain(text: str | None) -> bytes:
    return digest(" ".join((text or "").casefold().split()).encode())


def _bits(index: ImageIndex, one: int, other: int) -> int:
    first, second = index.hashes[one], index.hashes[other]
    return 0 if first is None or second is None else (first ^ second).bit_count()
