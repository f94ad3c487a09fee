"""The objectives that there are: ours, and those of other packages under the entry-point group `pearl.objectives`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from pearl.errors import PearlError
from pearl.trainer.config import checked
from pearl.trainer.objectives.base import Objective
from pearl.trainer.objectives.lvr import Lvr
from pearl.trainer.objectives.mirage import Mirage
from pearl.trainer.objectives.pearl import Pearl
from pearl.trainer.objectives.sft import Sft, SftAnswer

GROUP = "pearl.objectives"


def objective_classes() -> dict[str, type[Objective]]:
    found: dict[str, type[Objective]] = {kind.name: kind for kind in (Pearl, Sft, SftAnswer, Lvr, Mirage)}
    for entry in entry_points(group=GROUP):
        try:
            kind = entry.load()
        except Exception as error:
            raise PearlError(f"entry point {entry.name} of {GROUP} cannot be loaded: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Objective)):
            raise PearlError(f"entry point {entry.name} of {GROUP} is no Objective: {entry.value}")
        found[kind.name] = kind
    return found


def make_objective(name: str, options: dict[str, Any]) -> Objective:
    """
    Raises:
        PearlError: there is no such objective, or it has no such option, or refuses a value.
    """
    classes = objective_classes()
    if name not in classes:
        raise PearlError(f"there is no objective {name!r}; there are {', '.join(classes)}")
    return classes[name](**checked(classes[name], options, f"objective {name}"))
