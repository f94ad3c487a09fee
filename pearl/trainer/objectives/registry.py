"""The objectives that there are: ours, and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pearl.errors import PearlError
from pearl.plugins import Plugins
from pearl.trainer.config import checked
from pearl.trainer.objectives.base import Objective

_PACKAGE = "pearl.trainer.objectives"
OBJECTIVES = Plugins(
    "objective",
    "pearl.objectives",
    {
        "pearl": f"{_PACKAGE}.pearl:Pearl",
        "sft": f"{_PACKAGE}.sft:Sft",
        "sft-answer": f"{_PACKAGE}.sft:SftAnswer",
        "lvr": f"{_PACKAGE}.lvr:Lvr",
        "mirage": f"{_PACKAGE}.mirage:Mirage",
    },
    f"{_PACKAGE}.base:Objective",
    PearlError,
)


def make_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """The objective of that name with these settings.

    Raises:
        PearlError: there is no such objective, or it has no such option, or refuses a value.
    """
    kind = OBJECTIVES.find(name)
    made: Objective = kind(**checked(kind, options, f"objective {name}"))
    return made
