"""An objective of another package: the question's last state meets the mean state of the answer's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pearl.trainer.conversation import Conversation
from pearl.trainer.objectives.base import Losses, Objective, States
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import ImageInputs, ViewEncoder


@dataclass(frozen=True)
class MeanTarget(Objective):
    """`weight` is an option: pearl-train --objective mean-target -O weight=0.5"""

    name: ClassVar[str] = "mean-target"
    weight: float = 0.1

    def example(self, conversation: Conversation, images: Sequence[ImageInputs], encoder: ViewEncoder) -> Example:
        full = encoder.view(conversation.full(), images)
        question_ends = full.ends[len(conversation.question()) - 1]
        return Example(conversation.trajectory.id, tuple(images), {"full": full.marked(question=[question_ends])})

    def losses(self, hidden_size: int) -> Losses:
        return MeanTargetLosses(self.weight)


class MeanTargetLosses(Losses):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weights = {"vlm": 1.0, "mean": weight}

    def counts(self, batch: Batch) -> dict[str, int]:
        full = batch.places["full"]
        return {"vlm": len(full.supervised), "mean": len(full.marks["question"])}

    def forward(self, states: States) -> dict[str, Tensor]:
        full = states.batch.places["full"]
        said = states.of("full", full.supervised).detach()
        owner = full.sample[full.supervised]
        question = states.of("full", full.marks["question"])
        sums = question.new_zeros(question.shape).index_add(0, owner, said)
        distance = 1 - F.cosine_similarity(question.float(), sums.float())  # a mean's direction is its sum's
        return {"vlm": states.next_token("full"), "mean": distance.sum()}
