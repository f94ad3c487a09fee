"""What the machine gives this process."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that this process may use: a scheduler may give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
