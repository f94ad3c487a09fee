r"""Answers in `\boxed{…}`, as mathematics has them."""

from __future__ import annotations

_OPEN = "\\boxed{"


def last_boxed(text: str) -> tuple[str, str, str] | None:
    r"""What is before, in and behind the last `\boxed{…}` that closes; None where there is none."""
    start, end = text.rfind(_OPEN), len(text)
    while start >= 0:
        depth = 1
        for place in range(start + len(_OPEN), end):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[:start], text[start + len(_OPEN) : place], text[place + 1 :]
        start, end = text.rfind(_OPEN, 0, start), start  # what closes at all closes before one that does not
    return None
