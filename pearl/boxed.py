r"""Answers in `\boxed{…}`, as mathematics has them."""

from __future__ import annotations

_OPEN = "\\boxed{"


def last_boxed(text: str) -> tuple[str, str, str] | None:
    r"""What is before, in and behind the last `\boxed{…}`; None where there is none, or none that closes."""
    start = text.rfind(_OPEN)
    depth = 1
    for place in range(start + len(_OPEN), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[:start], text[start + len(_OPEN) : place], text[place + 1 :]
    return None
