"""The words of evaluation: question, reply, prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pearl.records import EncodedImage

Mode = Literal["direct", "tools", "latent"]
Scoring = Literal["strict", "lvr", "pearl-published"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: Unique within its benchmark.
        category: What accuracy is reported by.
        images: In the order in which the model sees them, before the prompt.
        prompt: The user's text as the scoring words it, options included.
        options: Their texts in order, which the letters A, B, … name.
        answer: Index of the right option.
        opening: What the assistant's turn begins with, where a scoring prescribes that.
        max_new_tokens: How much a scoring lets the model say; None: the run's own limit.
    """

    id: str
    benchmark: str
    category: str
    images: tuple[EncodedImage, ...]
    prompt: str
    options: tuple[str, ...]
    answer: int
    opening: str = ""
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class CallMade:
    """One tool call of a model.

    Attributes:
        tool: As the model named it; empty where the call could not be read.
        arguments: JSON text.
        fault: Empty where the call was run, else the kind of mistake.
        observation: The text that the model got.
    """

    tool: str
    arguments: str
    fault: str
    observation: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said to one question.

    Attributes:
        said: The last assistant turn, special tokens removed.
        turns: All assistant turns, the last one included.
        prompt_tokens: Tokens given to the model, images and observations included, each counted once.
        new_tokens: Tokens that it made, latent tokens included.
        seconds: Wall-clock time of its batch (tools included) divided by the batch's size.
    """

    said: str
    turns: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    calls: tuple[CallMade, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """A reply with its score. `choice` is the option that was parsed, None where none could be."""

    question: str
    benchmark: str
    category: str
    model: str
    mode: str
    reply: Reply
    choice: int | None
    answer: int

    @property
    def correct(self) -> bool:
        return self.choice == self.answer


class Key(NamedTuple):
    """One run through a benchmark."""

    model: str
    mode: str
    benchmark: str

    @classmethod
    def of(cls, prediction: Prediction) -> Key:
        return cls(prediction.model, prediction.mode, prediction.benchmark)
