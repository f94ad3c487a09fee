"""A subject's states, by the trainer's own views and packing: what evidence about latents and gains is read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pearl.errors import PearlError
from pearl.evaluation.subject import Subject
from pearl.trainer.families import FAMILIES, Family, Unknown, family_of
from pearl.trainer.learner import Learner
from pearl.trainer.model_folder import MODEL_SETTINGS, OBJECTIVE_WEIGHTS, load_objective
from pearl.trainer.objectives.base import Losses, Objective
from pearl.trainer.packing import Batch, Example, Packer
from pearl.trainer.views import ViewEncoder


class FamilyError(PearlError, ValueError):
    """A model whose states cannot be read; the message says why."""


@dataclass(frozen=True)
class Insides:
    """A subject behind the trainer's views and packing."""

    subject: Subject
    family: Family
    encoder: ViewEncoder
    packer: Packer

    @classmethod
    def of(cls, subject: Subject, latent_token: str | None = None) -> Self:
        """What a subject's states are read with.

        Raises:
            FamilyError: nothing is known about the model's family.
            ViewError: its processor lacks what is needed.
        """
        config = subject.model.config
        family = family_of(config)()
        if isinstance(family, Unknown):
            raise FamilyError(
                f"{subject.name} is of the family {config.model_type!r}; its states can be read for {', '.join(FAMILIES)}"
            )
        encoder = ViewEncoder(subject.processor, family, latent_token, config)
        return cls(subject, family, encoder, Packer(family, config, encoder.padding))

    def learner(self, losses: Losses) -> Learner:
        device = self.subject.model.device
        return Learner(self.subject.model, self.family, losses.to(device)).eval()

    def batch(self, examples: list[Example]) -> Batch:
        return self.packer(examples).to(self.subject.model.device)


def objective_of(subject: Subject) -> tuple[Objective, Losses]:
    """What a subject was trained with, and what that learned beside the model.

    Raises:
        PearlError: it was not trained by `pearl-train`, or the weights are missing.
    """
    if subject.training is None:
        raise PearlError(f"{subject.name} has no {MODEL_SETTINGS}, so nothing says how it was trained")
    hidden_size = subject.model.config.get_text_config().hidden_size
    return load_objective(subject.training, subject.file(OBJECTIVE_WEIGHTS), hidden_size)
