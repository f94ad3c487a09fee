"""Checks that decide whether a trajectory is kept, beyond the expert's own: they look at one trajectory alone."""

from __future__ import annotations

import re

from pearl.pipelines.errors import Rejected
from pearl.records import Trajectory
from pearl.tools.base import ToolResult

MIN_SIDE = 8
MAX_STEPS = 6


def check_observation(result: ToolResult) -> None:
    """Refuses what shows nothing.

    Raises:
        Rejected
    """
    if not result.text.strip():
        raise Rejected("an observation is empty")
    if result.pixels is None:
        return
    height, width = result.pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise Rejected("an observation is too small", f"{width}×{height} pixels")
    if (result.pixels == result.pixels[0, 0]).all():
        raise Rejected("an observation is of one colour")


def states_answer(text: str, answer: str) -> bool:
    """Whether the answer stands there as words of its own, not in others: no "no" in "know"."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def check_trajectory(trajectory: Trajectory) -> None:
    """Refuses what cannot be learned from.

    Raises:
        Rejected
    """
    if not 1 <= len(trajectory.steps) <= MAX_STEPS:
        raise Rejected("the number of steps is out of bounds", str(len(trajectory.steps)))
    if trajectory.choices and trajectory.answer not in trajectory.choices:
        raise Rejected("the answer is not among the choices", trajectory.answer)
    # looser than `states_answer`: experts put the answer there themselves, perhaps inflected or without spaces around it
    if not trajectory.answer or trajectory.answer not in trajectory.conclusion:
        raise Rejected("the conclusion does not give the answer", trajectory.conclusion)
