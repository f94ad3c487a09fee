"""Splits that share no image: `pearl-gen split`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pearl.files import whole_folder
from pearl.pipelines.curation.hashing import MAX_DISTANCE, ImageIndex, share
from pearl.pipelines.curation.rows import (
    CurationError,
    RowWriter,
    copy_rows,
    files_of,
    image_bytes,
    lineage,
    refuse_existing,
    scan,
)


@dataclass(frozen=True)
class Split:
    """How to split.

    Attributes:
        parts: Shares by name; they are divided by their sum.
        seed: Another one gives another split.
        near: Images that differ in at most so many bits of their perceptual hash stay together; None: only the same
            bytes do.
    """

    parts: Mapping[str, float]
    seed: int = 0
    near: int | None = None

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or not all(value > 0 for value in self.parts.values()):
            raise CurationError(f"a split has two or more parts, each with a share above 0, not {dict(self.parts)}")
        if bad := [name for name in self.parts if not name.replace("_", "").isalnum()]:
            raise CurationError(f"{bad[0]!r} is no name for a part: letters, digits and _")
        if self.near is not None and not 0 <= self.near <= MAX_DISTANCE:
            raise CurationError(f"--near {self.near}: 0 to {MAX_DISTANCE} bits")


def split_data(data: str | Path, out: Path, split: Split) -> dict[str, int]:
    """Writes the folder `out` with a file a part, `train-00000-of-00001.parquet`, …: a split for `datasets`, for `PLACE:train`
    and for the Hub. The number of rows by part.

    Where an image goes depends on its bytes and the seed alone, so shares are met on average, and data that is added
    later moves nothing that was there (with `near`, only what it ties together).

    Raises:
        CurationError: `out` exists, or a part would be empty.
        DataError: the data cannot be read.
    """
    refuse_existing(out)
    [files] = files_of([data])
    parts = _parts(files, split)
    names = list(split.parts)
    counts = Counter(parts.tolist())
    if empty := [name for number, name in enumerate(names) if not counts[number]]:
        raise CurationError(f"{', '.join(empty)} would be empty: {len(parts)} trajectories have too few images")
    settings = {"parts": dict(split.parts), "seed": split.seed, "near": split.near}
    made_by = lineage("split", settings, [data])
    with whole_folder(out) as folder, ExitStack() as stack:
        writers = [
            stack.enter_context(RowWriter(folder / f"{name}-00000-of-00001.parquet", {**made_by, "part": name}))
            for name in names
        ]
        copy_rows(files, parts, writers)
    return {name: counts[number] for number, name in enumerate(names)}


def _parts(files: list[Path], split: Split) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The number of the part of each row."""
    index = ImageIndex(perceptual=split.near is not None)
    image_of = np.fromiter((index.add(image_bytes(row)) for row in scan(files, ["id", "image.bytes"])), np.int64)
    bounds = np.cumsum(list(split.parts.values())) / sum(split.parts.values())
    bounds[-1] = 1.0  # sums of shares may end just below it
    keys = index.digests if split.near is None else _keys(index, split.near)
    places = [int(np.searchsorted(bounds, share(split.seed, key), side="right")) for key in keys]
    return np.array(places, np.int16)[image_of]


def _keys(index: ImageIndex, near: int) -> list[bytes]:
    """For each image the least digest of its group, which does not depend on the order of rows."""
    groups = index.groups(near)
    least = dict[int, bytes]()
    for key, group in zip(index.digests, groups, strict=True):
        least[group] = min(key, least.get(group, key))
    return [least[group] for group in groups]
