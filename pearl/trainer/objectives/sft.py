"""Supervised fine-tuning: the baselines without latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pearl.trainer.conversation import Conversation
from pearl.trainer.objectives.base import Losses, Objective, States
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import ImageInputs, ViewEncoder


@dataclass(frozen=True)
class Sft(Objective):
    """Next-token loss on the assistant's turns of the whole trajectory: the model learns to call tools."""

    name: ClassVar[str] = "sft"

    def example(self, conversation: Conversation, images: Sequence[ImageInputs], encoder: ViewEncoder) -> Example:
        full = encoder.view(conversation.full(), images)
        return Example(conversation.trajectory.id, tuple(images), {"full": full})

    def losses(self, hidden_size: int) -> Losses:
        return NextToken("full")


@dataclass(frozen=True)
class SftAnswer(Objective):
    """Next-token loss on the answer, straight after image and question: no tools at all."""

    name: ClassVar[str] = "sft-answer"
    step_words: ClassVar[bool] = False
    step_images: ClassVar[bool] = False

    def example(self, conversation: Conversation, images: Sequence[ImageInputs], encoder: ViewEncoder) -> Example:
        view = encoder.view((*conversation.question(), conversation.direct()), images)
        return Example(conversation.trajectory.id, tuple(images[:1]), {"direct": view})

    def losses(self, hidden_size: int) -> Losses:
        return NextToken("direct")


class NextToken(Losses):
    """`L = −log p(token | what is before it)`, the mean over a view's supervised tokens."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.view = view
        self.weights = {"vlm": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"vlm": len(batch.places[self.view].supervised)}

    def forward(self, states: States) -> dict[str, Tensor]:
        return {"vlm": states.next_token(self.view)}
