"""A folder of results: what was asked, and every prediction.

    run.json                                          what was asked, of which models, with which software
    predictions/{model}--{mode}--{benchmark}.jsonl    while it runs: a line a prediction
    predictions/{model}--{mode}--{benchmark}.parquet  when it is complete

Every file but the journals appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pearl.errors import PearlError
from pearl.evaluation.records import CallMade, Key, Prediction, Reply, Scoring
from pearl.files import whole_file

FORMAT = 3
PARTS = ("models", "modes", "benchmarks")
RUN_FILE = "run.json"
MAX_NAME = 100
PLACE = "place"
"""Where a benchmark lies: it may lie elsewhere when a run is resumed, if its questions are the same."""
LIBRARIES = ("pearl-vlm", "torch", "transformers", "peft", "numpy", "pillow")

_CALL = pa.struct([(name, pa.string()) for name in ("tool", "arguments", "fault", "observation")])
_COLUMNS = pa.schema(
    [
        ("question", pa.string()),
        ("benchmark", pa.string()),
        ("category", pa.string()),
        ("model", pa.string()),
        ("mode", pa.string()),
        ("answer", pa.int64()),
        ("choice", pa.int64()),
        ("correct", pa.bool_()),
        ("said", pa.string()),
        ("turns", pa.list_(pa.field("item", pa.string()))),
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("calls", pa.list_(pa.field("item", _CALL))),
    ],
    metadata={"pearl": json.dumps({"results_format": FORMAT})},
)


class ResultsError(PearlError, ValueError):
    """Results that cannot be read, or not be resumed; the message names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is asked. Models, modes and benchmarks have their names and, as JSON values, what decides an answer.

    Attributes:
        models: Their weights (a digest, a revision) and numeric type.
        modes: How they answer: the most new tokens, calls, latents, …
        benchmarks: Their version, a digest of their questions, and `PLACE`.
        scoring: How questions are worded and answers are read.
    """

    models: Mapping[str, Mapping[str, Any]]
    modes: Mapping[str, Mapping[str, Any]]
    benchmarks: Mapping[str, Mapping[str, Any]]
    scoring: Scoring


@dataclass(frozen=True)
class StoredResults:
    """What a folder holds: predictions in the order of models, modes and benchmarks, as they came. `sittings` are the
    times at which it was worked on: date, software, machine."""

    setup: Setup
    sittings: list[dict[str, Any]]
    predictions: dict[Key, list[Prediction]]


class Results:
    """A folder that is being filled, by one process at a time. Open it with `Results.open`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "predictions"
        self._lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)

    @classmethod
    def open(cls, folder: Path, setup: Setup, resume: bool = False) -> Results:
        """Makes the folder, or goes on with one that was made before.

        With `resume` models, modes and benchmarks may be added to those that are there.

        Raises:
            ResultsError: there are results and `resume` is not set; or what is there was asked with another scoring,
                of other questions or weights, or in another way; or another process is filling it.
        """
        results = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            results._lock.acquire()
        except Timeout as error:
            raise ResultsError(f"{folder} is being filled by another process: give another folder") from error
        run, asked = folder / RUN_FILE, _as_json(setup)
        if not run.exists() and results._folder.exists():
            raise ResultsError(f"{folder} holds predictions, but no {RUN_FILE} that says of what: give another folder")
        sittings: list[dict[str, Any]] = []
        if run.exists():
            if not resume:
                raise ResultsError(f"{folder} holds results already: give another folder, or resume them")
            before, sittings = _read_run(folder)
            if changed := _differences(before, asked):
                raise ResultsError(f"{folder} holds results of something else: {'; '.join(changed)}")
            asked = _merged(before, asked)
        for journal in results._folder.glob("*.jsonl"):
            _drop_cut_off_line(journal)
        _write_json(run, {"results_format": FORMAT, **asked, "sittings": [*sittings, surroundings()]})
        results._folder.mkdir(exist_ok=True)
        return results

    def predictions(self, key: Key) -> list[Prediction]:
        """What is there already: questions that need not be asked again."""
        if self._parquet(key).exists():
            return _read_parquet(self._parquet(key))
        return _read_journal(self._journal(key)) if self._journal(key).exists() else []

    def add(self, key: Key, predictions: Sequence[Prediction]) -> None:
        """Appends a batch to the journal; it is with the operating system when this returns.

        Raises:
            ValueError: a prediction belongs to another key, or the key is finished.
        """
        if strange := [one for one in predictions if Key.of(one) != key]:
            raise ValueError(f"a prediction of {Key.of(strange[0])} was added to {key}")
        if self._parquet(key).exists():
            raise ValueError(f"{key} is finished: nothing can be added to it")
        lines = "".join(json.dumps(_to_row(one), ensure_ascii=False) + "\n" for one in predictions)
        with self._journal(key).open("ab") as journal:
            journal.write(lines.encode("utf-8", "replace"))  # half a surrogate pair fits into no file

    def finish(self, key: Key) -> None:
        """Turns the journal, which holds all predictions now, into Parquet. Doing it twice does no harm."""
        if not self._parquet(key).exists():
            rows = [_to_row(one) for one in self.predictions(key)]
            with whole_file(self._parquet(key)) as partial:
                pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), partial, compression="zstd")
        self._journal(key).unlink(missing_ok=True)

    def is_finished(self, key: Key) -> bool:
        return self._parquet(key).exists()

    def _journal(self, key: Key) -> Path:
        return self._folder / f"{_file_name(key)}.jsonl"

    def _parquet(self, key: Key) -> Path:
        return self._folder / f"{_file_name(key)}.parquet"


def read_results(folder: Path) -> StoredResults:
    """All that a folder holds, what is still being asked included. Nothing in it is changed.

    Raises:
        ResultsError: it holds no results, or a file of them is damaged.
    """
    run, sittings = _read_run(folder)
    setup = Setup(**run)
    finished = {path.stem: _read_parquet(path) for path in sorted((folder / "predictions").glob("*.parquet"))}
    unfinished = sorted(path for path in (folder / "predictions").glob("*.jsonl") if path.stem not in finished)
    read = {Key.of(rows[0]): rows for rows in (*finished.values(), *map(_read_journal, unfinished)) if rows}
    asked = [Key(*names) for names in product(setup.models, setup.modes, setup.benchmarks)]
    if strange := read.keys() - asked:
        raise ResultsError(f"{folder} holds predictions of {min(strange)}, which its {RUN_FILE} does not name")
    return StoredResults(setup, sittings, {key: read[key] for key in asked if key in read})


def surroundings() -> dict[str, Any]:
    """The date, the software and the machine, for the record."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "cpus": os.cpu_count(),
        "gpu": gpu,
    }


def _file_name(key: Key) -> str:
    """Of any length that a file system takes: a long one is cut, and a digest tells it from others."""
    name = "--".join(quote(part, safe=" ") for part in key)
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}--{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _as_json(setup: Setup) -> dict[str, Any]:
    """The setup as it will be read back."""
    asked: dict[str, Any] = json.loads(json.dumps(asdict(setup)))
    return asked


def _differences(before: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    changed = list[str]()
    for names in PARTS:
        for name in sorted(before[names].keys() & asked[names].keys()):
            was, now = before[names][name], asked[names][name]
            changed += [
                f"{key} of {names.removesuffix('s')} {name!r} was {was.get(key)!r}, now {now.get(key)!r}"
                for key in sorted((was.keys() | now.keys()) - {PLACE})
                if was.get(key) != now.get(key)
            ]
    if before["scoring"] != asked["scoring"]:
        changed.append(f"the scoring was {before['scoring']!r}, now {asked['scoring']!r}")
    return changed


def _merged(before: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    return {**asked, **{names: before[names] | asked[names] for names in PARTS}}


def _read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was asked, by the names of `Setup`'s fields, and the sittings."""
    path = folder / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        found = run.pop("results_format")
        if found != FORMAT:
            raise ResultsError(f"{path} has format {found}; this release reads {FORMAT}")
        sittings = run.pop("sittings")
        asked = _as_json(Setup(**run))
    except FileNotFoundError as error:
        raise ResultsError(f"{folder} holds no results (there is no {RUN_FILE})") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is not the record of an evaluation: {error}") from error
    return asked, sittings


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _drop_cut_off_line(journal: Path) -> None:
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(journal, whole)


def _read_journal(path: Path) -> list[Prediction]:
    """Its whole lines: the last one may still be on its way."""
    lines = path.read_bytes().split(b"\n")[:-1]
    predictions = [_of_line(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    _refuse_repetition(predictions, path)
    return predictions


def _of_line(line: bytes, where: str) -> Prediction:
    try:
        return _from_row(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{where} is no prediction: {error}") from error


def _read_parquet(path: Path) -> list[Prediction]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ResultsError(f"{path} is not a readable Parquet file: {error}") from error
    if not table.schema.equals(_COLUMNS):
        raise ResultsError(f"{path} does not have the columns of predictions")
    predictions = [_from_row(row) for row in table.to_pylist()]
    _refuse_repetition(predictions, path)
    return predictions


def _refuse_repetition(predictions: Sequence[Prediction], path: Path) -> None:
    counts = Counter(one.question for one in predictions)
    if repeated := [question for question, count in counts.items() if count > 1]:
        raise ResultsError(f"{path} answers question {repeated[0]!r} more than once: two runs have written it")


def _to_row(prediction: Prediction) -> dict[str, Any]:
    reply = prediction.reply
    return {
        "question": prediction.question,
        "benchmark": prediction.benchmark,
        "category": prediction.category,
        "model": prediction.model,
        "mode": prediction.mode,
        "answer": prediction.answer,
        "choice": prediction.choice,
        "correct": prediction.correct,
        "said": reply.said,
        "turns": list(reply.turns),
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "seconds": reply.seconds,
        "calls": [asdict(call) for call in reply.calls],
    }


def _from_row(row: Mapping[str, Any]) -> Prediction:
    reply = Reply(
        said=row["said"],
        turns=tuple(row["turns"]),
        prompt_tokens=row["prompt_tokens"],
        new_tokens=row["new_tokens"],
        seconds=row["seconds"],
        calls=tuple(CallMade(**call) for call in row["calls"]),
    )
    named = {name: row[name] for name in ("question", "benchmark", "category", "model", "mode", "choice", "answer")}
    return Prediction(**named, reply=reply)
