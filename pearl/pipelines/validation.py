"""Is a dataset sound? Every row is checked as a stranger's would be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pearl.images import HARD_MAX_PIXELS, ImageError, decode
from pearl.machine import num_cores
from pearl.parquet import DataError, from_row, missing_shards, open_parquet, read_group, resolve
from pearl.records import Trajectory
from pearl.tools import ToolError, ToolUnavailable, parse_arguments, tool_class


def validate_data(data: str) -> tuple[int, list[str]]:
    """The number of rows, and what is wrong with them (file, row, id and reason) or missing.

    Raises:
        DataError: there is no file to check.
    """
    files = resolve(data)
    problems = [f"{shard} is missing" for shard in missing_shards(files)]
    seen: dict[str, str] = {}
    pictures = Pictures()
    rows = 0
    for path in files:
        number = 0
        for group in _groups(path, problems):
            read = [_read(row) for row in group]
            pictures.check(data for one in read if isinstance(one, Trajectory) for data in _pictures(one))
            for row, one in zip(group, read, strict=True):
                where = f"{path} row {number} ({row['id']})"
                problems += [f"{where}: {problem}" for problem in _row_problems(row, one, pictures)]
                if row["id"] in seen:
                    problems.append(f"{where}: the id stands already in {seen[row['id']]}")
                seen.setdefault(row["id"], f"{path} row {number}")
                number += 1
        rows += number
    return rows, problems


class Pictures:
    """What is wrong with pictures. Each is decoded once, for many questions may be about one, and on all cores, for
    decoding is most of the work and runs without the interpreter's lock."""

    def __init__(self) -> None:
        self._known: dict[bytes, str | None] = {}

    def check(self, pictures: Iterable[bytes]) -> None:
        new = {key: data for data in pictures if (key := _key(data)) not in self._known}
        with ThreadPoolExecutor(num_cores()) as pool:
            self._known.update(zip(new, pool.map(_picture_problem, new.values()), strict=True))

    def problem(self, data: bytes) -> str | None:
        return self._known[_key(data)]


def _key(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _picture_problem(data: bytes) -> str | None:
    try:
        decode(data, HARD_MAX_PIXELS)
    except ImageError as error:
        return str(error)
    return None


def _groups(path: Path, problems: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows that can be read, by row group; what cannot is added to `problems`."""
    try:
        file = open_parquet(path)
    except DataError as error:
        problems.append(str(error))
        return
    for group in range(file.num_row_groups):
        try:
            rows = read_group(path, file, group)
        except DataError as error:
            problems.append(str(error))
            continue
        yield rows


def _read(row: dict[str, Any]) -> Trajectory | str:
    """Or why it cannot be read."""
    try:
        return from_row(row)
    except (ValueError, TypeError, KeyError) as error:
        return f"cannot be read: {error}"


def _pictures(trajectory: Trajectory) -> Iterator[bytes]:
    yield trajectory.image.data
    yield from (step.observation.image.data for step in trajectory.steps if step.observation.image is not None)


def _row_problems(row: dict[str, Any], trajectory: Trajectory | str, pictures: Pictures) -> Iterator[str]:
    empty = [name for name in ("id", "question", "answer", "conclusion", "skill", "source") if not row[name]]
    if empty:
        yield f"empty: {', '.join(empty)}"
    if isinstance(trajectory, str):
        yield trajectory
        return
    if trajectory.choices and trajectory.answer not in trajectory.choices:
        yield f"the answer {trajectory.answer!r} is not among the choices"
    if not trajectory.steps:
        yield "there is no step"
    if problem := pictures.problem(trajectory.image.data):
        yield f"the image: {problem}"
    yield from _step_problems(trajectory, pictures)


def _step_problems(trajectory: Trajectory, pictures: Pictures) -> Iterator[str]:
    has_image = [True]
    for number, step in enumerate(trajectory.steps, start=1):
        where = f"step {number}"
        named = step.call.arguments.get("image", 0)
        if not isinstance(named, int) or not 0 <= named < len(has_image) or not has_image[named]:
            yield f"{where}: there is no image {named!r}"
        if problem := _argument_problem(step.call.tool, dict(step.call.arguments)):
            yield f"{where}: {problem}"
        if not step.thought or not step.observation.text:
            yield f"{where}: the thought or the observation is empty"
        shown = step.observation.image
        if shown is not None and (problem := pictures.problem(shown.data)):
            yield f"{where}: {problem}"
        has_image.append(shown is not None)


def _argument_problem(tool: str, arguments: dict[str, Any]) -> str | None:
    """Tools that are not installed here are not judged."""
    try:
        known = tool_class(tool)
    except ToolUnavailable:
        return None
    try:
        parse_arguments(known, arguments)
    except ToolError as error:
        return str(error)
    return None
