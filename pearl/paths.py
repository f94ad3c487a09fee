"""Absolute paths of this machine, which do not belong in what is published."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import PureWindowsPath
from typing import Any


def without_folders(value: Any) -> Any:
    """A JSON value in which every absolute path is cut to its last part."""
    if isinstance(value, str):
        kind, path = _local_path(value)
        return f"{kind}{PureWindowsPath(path).name}" if path else value
    if isinstance(value, Mapping):
        return {str(name): without_folders(one) for name, one in value.items()}
    if isinstance(value, Sequence):
        return [without_folders(one) for one in value]
    return value


def local_paths(value: Any) -> list[str]:
    """The absolute paths in a JSON value."""
    if isinstance(value, str):
        path = _local_path(value)[1]
        return [path] if path else []
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return list(dict.fromkeys(chain.from_iterable(map(local_paths, inner))))


def _local_path(text: str) -> tuple[str, str]:
    """`coco:/data/x.json` as its kind and its path; an empty path where there is no absolute one."""
    match = re.fullmatch(r"((?:[\w-]{2,}:)*)((?:/(?!/)|[A-Za-z]:[\\/]).*)", text, re.DOTALL)
    return (match[1], match[2]) if match else ("", "")
