"""Experts: what decides the steps. Those here are programs that read annotations; one generator a skill."""

from __future__ import annotations

from collections.abc import Callable

from pearl.pipelines.errors import Unsolvable
from pearl.pipelines.experts.base import Case, Conclusion, Expertise
from pearl.pipelines.experts.distance import chain, closer, closer_point, nearest
from pearl.pipelines.experts.looking import attribute, comparison, counting, existence, relation, text

EXPERT = "annotations"

EXPERTS: dict[str, Callable[[Case], Expertise]] = {
    "attribute": attribute,
    "shape": attribute,
    "outermost": attribute,
    "fine detail": attribute,
    "existence": existence,
    "counting": counting,
    "spatial relation": relation,
    "comparison": comparison,
    "text": text,
    "depth": closer,
    "relative depth": closer_point,
    "nearest": nearest,
    "chain": chain,
}


def solve(case: Case) -> Expertise:
    """The expert for the sample's skill, started.

    Raises:
        Unsolvable: there is none.
    """
    expert = EXPERTS.get(case.sample.skill)
    if expert is None:
        raise Unsolvable(f"no expert for the skill {case.sample.skill!r}")
    return expert(case)


__all__ = ["EXPERT", "EXPERTS", "Case", "Conclusion", "Expertise", "solve"]
