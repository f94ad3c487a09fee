"""The files of a run: the plan, the shards with their done-markers, what was refused, the manifest.

    OUT/data/train-00007-of-00123.parquet   trajectories; `load_dataset(OUT)` and the Hub take these
    OUT/manifest.json                       written last: its existence means that the run is complete
    OUT/run/run.json                        configuration and fingerprint
    OUT/run/_plan.parquet                   every sample's ordinal, key and shard, frozen before work starts
    OUT/run/done/00007.json                 counts, hash and timings of a finished shard
    OUT/run/refused/00007.jsonl             its rejected and quarantined samples, with reasons
    OUT/run/tries/00007.jsonl               what a planner tried and what was not kept, with reasons
    OUT/run/replies/                        every reply of a planner's model, by the content of the request
    OUT/run/ledger.json                     what a planner has cost so far
    OUT/run/annotations/00007.jsonl         the regions that tools annotated in the kept trajectories' images
    OUT/run/differences/00007.jsonl         how recorded calls came out when they were carried out again

With `--out FILE.parquet`, OUT is `FILE.parquet.run`, and the shards are joined into FILE.parquet in the end.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pearl.files import file_hash, whole_file
from pearl.pipelines.errors import RunError
from pearl.pipelines.sources import Item, Source

_PLAN = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("shard", pa.int32()),
        ("source", pa.int32()),
        ("key", pa.string()),
        ("record", pa.string()),
        ("problem", pa.string()),
    ]
)
SHARD_SIZE, FEW_SHARDS = 128, 16
PER_SHARD = ("done", "refused", "differences", "tries", "annotations")

_SYSTEM_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
)  # fmt: skip


class RunDirectory:
    """Paths and atomic writes of one run. `out` is a folder, or a `.parquet` file with a run folder beside it."""

    def __init__(self, out: Path, split: str = "train") -> None:
        self.single_file = out if out.suffix == ".parquet" else None
        self.root = out.with_name(out.name + ".run") if self.single_file else out
        self.split = split
        self.data, self.run = self.root / "data", self.root / "run"
        self.manifest, self.plan, self.settings = (
            self.root / "manifest.json",
            self.run / "_plan.parquet",
            self.run / "run.json",
        )

    def shard(self, number: int, total: int) -> Path:
        return self.data / f"{self.split}-{number:05d}-of-{total:05d}.parquet"

    def marker(self, number: int) -> Path:
        return self.run / "done" / f"{number:05d}.json"

    def refused(self, number: int) -> Path:
        return self.run / "refused" / f"{number:05d}.jsonl"

    def tries(self, number: int) -> Path:
        return self.run / "tries" / f"{number:05d}.jsonl"

    @property
    def replies(self) -> Path:
        return self.run / "replies"

    @property
    def ledger(self) -> Path:
        return self.run / "ledger.json"

    def differences(self, number: int) -> Path:
        return self.run / "differences" / f"{number:05d}.jsonl"

    def annotations(self, number: int) -> Path:
        return self.run / "annotations" / f"{number:05d}.jsonl"

    def create(self) -> None:
        with faults_explained(self.root):
            for folder in (self.data, self.run / "done", self.run / "refused"):
                folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Deletes what an earlier run made here, but for its lock, a planner's replies, which were paid for, and its
        settings, without which the folder would be no run's."""
        with faults_explained(self.root):
            for path in filter(None, (self.manifest, self.plan, self.ledger, self.single_file)):
                path.unlink(missing_ok=True)
            for folder in (self.data, *(self.run / name for name in PER_SHARD)):
                shutil.rmtree(folder, ignore_errors=True)
        self.create()

    def remove(self) -> None:
        """Deletes this run, with its folders."""
        self.clear()
        for folder in (self.data, self.run):
            shutil.rmtree(folder, ignore_errors=True)
        if not any(self.root.iterdir()):
            self.root.rmdir()

    def sweep(self) -> None:
        """Deletes temporary files that a killed run left."""
        for folder in (self.data, self.run, *(self.run / name for name in PER_SHARD)):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def write_plan(self, sources: Iterable[Source], shard_size: int | None, plan: Path | None = None) -> int:
        """Lists all sources into the plan (or that file), one row group a shard; the number of samples.

        Without `shard_size` a shard holds `SHARD_SIZE` samples; a run too small for `FEW_SHARDS` of them gets
        smaller ones, so that workers share it and progress shows.
        """
        rows = _plan_rows(sources)
        head = list(islice(rows, FEW_SHARDS * SHARD_SIZE))
        size = shard_size or min(SHARD_SIZE, max(8, math.ceil(len(head) / FEW_SHARDS)))
        everything, total = chain(head, rows), 0
        with whole(plan or self.plan) as partial, pq.ParquetWriter(partial, _PLAN, compression="zstd") as writer:
            while shard := list(islice(everything, size)):
                for row in shard:
                    row["shard"] = total // size
                total += len(shard)
                writer.write_batch(pa.RecordBatch.from_pylist(shard, _PLAN))
        return total

    def planned(self, shard: int) -> Iterator[tuple[int, int, Item]]:
        """The samples of a shard: ordinal, index of the source, item."""
        with pq.ParquetFile(self.plan) as file:
            rows = file.read_row_group(shard).to_pylist()
        for row in rows:
            yield row["ordinal"], row["source"], Item(row["key"], json.loads(row["record"]), row["problem"])

    def size(self) -> tuple[int, int]:
        """Samples and shards of the plan."""
        metadata = pq.read_metadata(self.plan)
        return metadata.num_rows, metadata.num_row_groups

    def remove_strangers(self, total: int) -> None:
        """Deletes shards of another plan, which an orphaned worker of an overwritten run may still have renamed."""
        known = {self.shard(number, total) for number in range(total)}
        for path in self.data.glob("*.parquet"):
            if path not in known:
                path.unlink()

    def finished(self, number: int, total: int, fingerprint: str) -> dict[str, Any] | None:
        """The marker of a shard that is there, whole and of this recipe; else None."""
        marker = read_json(self.marker(number))
        shard = self.shard(number, total)
        if marker is None or marker.get("fingerprint") != fingerprint or not shard.exists():
            return None
        return marker if marker.get("sha256") == file_hash(shard) else None

    def markers(self, total: int) -> Iterator[dict[str, Any]]:
        for number in range(total):
            marker = read_json(self.marker(number))
            if marker is None:
                raise RunError(f"shard {number} has no done-marker in {self.run / 'done'}")
            yield marker

    def refusals(self) -> Iterator[dict[str, Any]]:
        for path in sorted((self.run / "refused").glob("*.jsonl")):
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line) for line in file)


def counted_as(refusal: Mapping[str, Any]) -> str:
    """What a line of `run/refused` is counted under: its reason, said to be of a quarantined sample where it is."""
    return f"quarantined: {refusal['reason']}" if refusal["quarantined"] else str(refusal["reason"])


def _plan_rows(sources: Iterable[Source]) -> Iterator[dict[str, Any]]:
    ordinals = count()
    for number, source in enumerate(sources):
        for item in source.items():
            record = json.dumps(item.record, ensure_ascii=False)
            problem = None if item.problem is None else _storable(item.problem)
            yield {
                "ordinal": next(ordinals), "source": number, "key": _storable(item.key), "record": _storable(record),
                "problem": problem,
            }  # fmt: skip


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """As `whole_file`, with faults explained."""
    with faults_explained(path), whole_file(path) as partial:
        yield partial


@contextmanager
def faults_explained(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into a RunError that names the place."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        cause: BaseException | None = error
        while cause is not None:  # a writer that fails may fail again, in other words, while it is closed
            if isinstance(cause, OSError) and cause.errno in _SYSTEM_FAULTS:
                raise RunError(f"cannot write {path}: {os.strerror(cause.errno)}") from error
            cause = cause.__context__
        raise


def _storable(text: str) -> str:
    """Lone surrogates, which no file can hold, as `\\udcff`; in JSON this is the same text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines; what no file can hold is escaped."""
    with whole(path) as partial:
        lines = (json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        partial.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when it is missing or cut off."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None
