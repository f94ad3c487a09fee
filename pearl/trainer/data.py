"""Trajectories for training: any row at once, from files larger than memory, in an order that the seed decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from filelock import FileLock
from torch.utils.data import Dataset, Sampler

from pearl.errors import PearlError
from pearl.files import whole_file
from pearl.images import ImageError
from pearl.parquet import DataError, from_row, missing_shards, open_parquet, read_table, resolve_split, schema
from pearl.randomness import generator
from pearl.records import Trajectory
from pearl.torch_setup import is_out_of_memory
from pearl.trainer.conversation import Conversation, Template
from pearl.trainer.objectives.base import Objective
from pearl.trainer.packing import Example
from pearl.trainer.views import ViewEncoder

MAX_DRAWS = 100
"""How many rows are tried in the place of one that cannot be used, itself included, before the run stops."""
SAMPLED = 64
"""Trajectories whose words tell how many tokens a character makes."""


class TooLong(PearlError, ValueError):
    """A trajectory with more tokens than the limit; it is left out whole, never cut."""


class Table:
    """All rows of trajectory files, mapped into memory: a copy in Arrow's own format gives any row at once, which
    Parquet's row groups do not.

    Args:
        data: A file, a folder, a glob or a Hub dataset id; `:split` behind it where there are several.
        cache: Where the copy lies, from the first use of a row on; it is used again while the files are the same. Of
            several processes one writes it, the others wait.

    Attributes:
        missing: Shards that the files' names promise and that are not there, as of a generation that is not finished.

    Raises:
        DataError: there are no trajectories, or a file is none of this schema version.
    """

    def __init__(self, data: str | Path, cache: Path) -> None:
        files, rows = resolve_split(data), 0
        self._files, self.missing = files, missing_shards(files)
        for file in files:
            with open_parquet(file) as reader:  # one at a time: a process may not open thousands
                rows += reader.metadata.num_rows
        if not rows:
            raise DataError(f"{data} holds no trajectory")
        states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self.fingerprint = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
        self.path = cache / f"{self.fingerprint}.arrow"
        self._digest = self.path.with_suffix(".sha256")
        self._table: pa.Table | None = None

    def _is_written(self) -> bool:
        return self.path.exists() and self._digest.exists()

    def _copy(self) -> None:
        if self._is_written():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if not self._is_written():
                self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(f".{uuid4().hex}.partial")  # not every shared file system keeps locks
        digest = hashlib.sha256()
        try:
            with pa.ipc.new_file(partial, schema()) as writer:
                for file in self._files:
                    with open_parquet(file) as reader:
                        for number in range(reader.num_row_groups):
                            group = read_table(file, reader, number).replace_schema_metadata(schema().metadata)
                            writer.write_table(group)
                            for batch in group.to_batches():
                                digest.update(batch.serialize())
            with whole_file(self._digest) as name:
                name.write_text(digest.hexdigest()[:16])
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def table(self) -> pa.Table:
        """Opened where it is first used: a data worker maps the file itself."""
        if self._table is None:
            self._copy()
            self._table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Trajectory:
        return from_row(self.table.slice(row, 1).to_pylist()[0])

    def digest(self) -> str:
        """Of all that the rows hold, in their order and row groups."""
        self._copy()
        return self._digest.read_text()

    def lengths(self, objective: Objective, encoder: ViewEncoder) -> list[int]:
        """About how many tokens each row's longest view has, from its characters and its images' sizes."""
        some = self.table.select(["question", "conclusion"]).slice(0, SAMPLED).to_pydict()
        text = "\n".join(text or "" for texts in some.values() for text in texts)
        per_character = len(encoder.tokenizer(text)["input_ids"]) / len(text)
        found = [_lengths(batch, objective, encoder, per_character) for batch in self.table.to_batches()]
        return [round(length) for length in np.concatenate(found).tolist()]

    def held_out(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Rows to train on and rows to evaluate on; no image stands in both, whatever the rows' order."""
        train, held = list[int](), list[int]()
        for row, image in enumerate(self.table["image"]):
            digest = hashlib.blake2b(image["bytes"].as_buffer() or b"", key=str(seed).encode(), digest_size=8).digest()
            (held if int.from_bytes(digest, "big") < fraction * 2**64 else train).append(row)
        return train, held


def _lengths(rows: pa.RecordBatch, objective: Objective, encoder: ViewEncoder, per_character: float) -> np.ndarray:
    """(R,)"""
    choices, steps = rows["choices"], rows["steps"]
    inside = steps.flatten()
    characters = _characters(rows["question"], rows["answer"]) + _summed(choices, _characters(choices.flatten()))
    tokens = _visual_tokens(rows["image"], encoder)
    if objective.step_words:
        characters += _characters(rows["conclusion"])
        characters += _summed(steps, _characters(*(inside.field(name) for name in ("thought", "arguments", "text"))))
    if objective.step_images:
        tokens += _summed(steps, _visual_tokens(inside.field("image"), encoder))
    lengths: np.ndarray = characters * per_character + tokens
    return lengths


def _characters(*columns: pa.StringArray) -> np.ndarray:
    """(R,) of all columns together."""
    lengths = [pc.utf8_length(texts).fill_null(0).to_numpy(zero_copy_only=False) for texts in columns]
    together: np.ndarray = np.sum(lengths, axis=0, dtype=float)
    return together


def _visual_tokens(images: pa.StructArray, encoder: ViewEncoder) -> np.ndarray:
    contents = (content.as_py() for content in images.field("bytes"))
    return np.array([0 if content is None else encoder.num_tokens(content) for content in contents], float)


def _summed(lists: pa.ListArray, values: np.ndarray) -> np.ndarray:
    """(R,) the sum of the values in each list."""
    sums: np.ndarray = np.bincount(pc.list_parent_indices(lists), values, len(lists))
    return sums


@dataclass(frozen=True)
class Refused:
    """A trajectory that was left out, and why; ids may be given twice, so its row too."""

    id: str
    row: int
    reason: str


@dataclass(frozen=True)
class Drawn:
    """What a data worker gives: an example, and whom it stands in for."""

    example: Example
    refused: tuple[Refused, ...] = ()


class Examples(Dataset[Drawn]):
    """Rows as examples of an objective. In place of one that cannot be used comes another, drawn by lot; both are told.

    A negative index is a stand-in's (see `with_stand_ins`): the example is there, but counts for nothing.

    Args:
        rows: Of the table.
        max_tokens: The longest view that is taken; None: any.
        seed: Decides what stands in for what, the same in every process and epoch.
    """

    def __init__(
        self,
        table: Table,
        rows: Sequence[int],
        objective: Objective,
        encoder: ViewEncoder,
        template: Template,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.table, self.rows, self.seed = table, rows, seed
        self.objective, self.encoder, self.template, self.max_tokens = objective, encoder, template, max_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Drawn:
        if index < 0:
            return Drawn(self[-1 - index].example.silent())
        refused: dict[int, Refused] = {}
        cause: Exception | None = None
        for attempt in range(MAX_DRAWS):
            row = self.rows[self._substitute(index, attempt) if attempt else index]
            if row in refused:
                continue
            try:
                return Drawn(self.example(self.table[row]), tuple(refused.values()))
            except Exception as error:  # what others wrote may hold anything: the others are trained on
                if isinstance(error, OSError) or is_out_of_memory(error):
                    raise
                cause, kind = error, "" if isinstance(error, PearlError) else f"{type(error).__name__}: "
                refused[row] = Refused(str(self.table.table["id"][row].as_py()), row, f"{kind}{error}")
        last = refused[next(reversed(refused))]
        raise DataError(
            f"{len(refused)} trajectories in a row cannot be used; the last: {last.id}, row {last.row}: {last.reason}"
        ) from cause

    def _substitute(self, index: int, attempt: int) -> int:
        return int(generator("substitute", self.seed, index, attempt).integers(len(self.rows)))

    def named(self, id: str) -> Example:
        """Of the first row of this id, which is there."""
        return self.example(self.table[pc.index(self.table.table["id"], id).as_py()])

    def sample(self, count: int) -> list[Trajectory]:
        """Of so many rows, drawn by the seed alone, those that can be read."""
        found = []
        for number in generator("sample", self.seed).permutation(len(self.rows))[:count]:
            with suppress(DataError):
                found.append(self.table[self.rows[number]])
        return found

    def example(self, trajectory: Trajectory) -> Example:
        """
        Raises:
            ImageError, ViewError, TooLong: it cannot be used.
        """
        conversation = Conversation(trajectory, self.template)
        images = []
        for number, image in enumerate(conversation.images):
            try:
                images.append(self.encoder.image(image))
            except ImageError as error:
                raise ImageError(f"image {number}: {error}") from error
        example = self.objective.example(conversation, images, self.encoder)
        if self.max_tokens is not None and len(example) > self.max_tokens:
            raise TooLong(f"{len(example)} tokens, more than --max-tokens {self.max_tokens}")
        return replace(example, id=trajectory.id)


def with_stand_ins(indices: Iterable[int], multiple: int) -> list[int]:
    """Indices, padded to a multiple with `-1 - last`: a negative index gives an example without labels, so that every
    process gets as many batches and nothing counts twice."""
    real = list(indices)
    return real + [-1 - index for index in real[-1:]] * (-len(real) % multiple)


class GroupedOrder(Sampler[int]):
    """A random order in which neighbours are about as long, so that little is padded; seed and epoch decide it. Within
    each stretch of fifty batches the longest come first, as transformers' sampler has it.

    Args:
        lengths: Of each row, in any unit.
        batch_size: How many rows are padded together, over all processes.
        multiple: Stand-ins make the number of indices a multiple of this.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, multiple: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.multiple = lengths, batch_size, seed, multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + -len(self.lengths) % self.multiple

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import LengthGroupedSampler

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = LengthGroupedSampler(self.batch_size, lengths=list(self.lengths), generator=generator)
        yield from with_stand_ins(order, self.multiple)
