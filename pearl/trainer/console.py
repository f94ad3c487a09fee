"""Lines for the user."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def is_first() -> bool:
    """Whether this is the first of a run's processes, also before these are joined."""
    return int(os.environ.get("RANK", "0")) == 0


def tell(text: str) -> None:
    """A line on stderr, of the first process alone, above the bar if there is one."""
    if is_first():
        tqdm.write(text, file=sys.stderr)
