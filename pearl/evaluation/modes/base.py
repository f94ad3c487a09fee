"""What a decoding mode is: from questions, as one batch, to replies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from pearl.errors import PearlError
from pearl.evaluation.records import Mode, Question, Reply
from pearl.evaluation.subject import Chat, ChatRefused, Message, Said, Subject
from pearl.images import ImageError, decode


class QuestionError(PearlError, ValueError):
    """A question that cannot be put to a model; the message names it and says why."""

    def __init__(self, question: Question, reason: str) -> None:
        super().__init__(f"question {question.id} of {question.benchmark}: {reason}")


class DecodingMode(ABC):
    """A way of answering. Settings are its constructor's arguments."""

    name: ClassVar[Mode]

    def check(self, subject: Subject) -> None:  # noqa: B027
        """
        Raises:
            PearlError: this model cannot answer so.
        """

    def identity(self) -> dict[str, Any]:
        """What decides its answers and is not among its settings, as JSON values."""
        return {}

    def leave(self) -> None:  # noqa: B027
        """Keeps nothing of the model that was asked: the next one needs its memory."""

    @abstractmethod
    def answer(self, subject: Subject, questions: Sequence[Question]) -> list[Reply]:
        """One reply a question, in order; the questions are decoded together.

        Raises:
            QuestionError: an image is broken, or the model cannot take the question.
            SubjectError: out of memory.
        """


def pictures(question: Question) -> list[np.ndarray]:
    """Its images as uint8 RGB (H, W, 3).

    Raises:
        QuestionError: one is broken.
    """
    decoded = []
    for number, image in enumerate(question.images):
        try:
            decoded.append(decode(image.data))
        except ImageError as error:
            raise QuestionError(question, f"image {image.path or number}: {error}") from error
    return decoded


def message(role: str, *parts: str | np.ndarray) -> Message:
    """A chat message of texts and pictures (H, W, 3) in their order."""
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": Image.fromarray(part)}
            for part in parts
        ],
    }


def told_before(subject: Subject) -> list[Message]:
    """The system turn that a model of `pearl-train` learned to answer behind, if any."""
    words = subject.training.template.system if subject.training else ""
    return [message("system", words)] if words else []


def ask(
    subject: Subject, questions: Sequence[Question], conversations: Sequence[Chat], limits: Sequence[int]
) -> list[Said]:
    """What the subject says to these questions, those with one limit of new tokens together.

    Raises:
        QuestionError: the model's processor does not take a conversation.
    """
    said: dict[int, Said] = {}
    for limit in dict.fromkeys(limits):
        rows = [row for row, other in enumerate(limits) if other == limit]
        try:
            answers = subject.say([conversations[row] for row in rows], limit)
        except ChatRefused as error:
            raise QuestionError(questions[rows[error.index]], error.reason) from error
        said.update(zip(rows, answers, strict=True))
    return [said[row] for row in range(len(conversations))]


def too_long(subject: Subject, question: Question, tokens: int, limit: int) -> QuestionError:
    """The question alone left no room for an answer."""
    return QuestionError(
        question, f"{tokens} tokens and up to {limit} new ones exceed the model's {subject.max_positions}"
    )
