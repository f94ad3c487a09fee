"""Questions as tokens, packed into the rows behind a scene's image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from recipes.vlm_nano.model import IMAGE, SIZE, TOKEN, prompt

SIDE = SIZE // TOKEN
ROWS, LENGTH = 2, 192
OPENING = "<|im_start|>user\n<|vision_start|>"
ANSWERING = "<|im_end|>\n<|im_start|>assistant\n"
SHOWING = "\n<|im_start|>user\n"
SPEECH = -2
"""The family of what is said besides answers."""


@dataclass(frozen=True)
class Turn:
    """A question with its answer; with `crop`, (rows, columns) of visual tokens, the crop is shown in between.

    `thought` is what the assistant says before it (nothing: no turn of its own), `said` the text before the crop,
    `conclusion` what the assistant says once it has seen it. `opening` stands before the answer, and is not learned.
    """

    question: str
    choices: tuple[str, ...]
    answer: str
    crop: tuple[int, int] | None = None
    thought: str = ""
    said: str = ""
    conclusion: str = ""
    opening: str = ""


@dataclass(frozen=True)
class Segment:
    """Tokens (n,), M-RoPE positions (3, n) from zero, the label of each (-1: none), which labels are speech (thoughts,
    calls and conclusions, not answers), visual token of the crop or -1."""

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    speech: np.ndarray
    crop_at: np.ndarray


class Part(NamedTuple):
    """Of n tokens: ids, positions (3, n) from zero, which the assistant says, which of these are speech, and which
    visual token of the crop stands there or -1."""

    tokens: np.ndarray
    positions: np.ndarray
    said: np.ndarray
    speech: np.ndarray
    crop_at: np.ndarray


def _placed(parts: Sequence[Part]) -> Iterator[Part]:
    """Each part behind the greatest position of those before."""
    start = 0
    for part in parts:
        if len(part.tokens):
            yield part._replace(positions=part.positions + start)
            start += int(part.positions.max()) + 1


@dataclass(frozen=True)
class PackedScene:
    """One scene's prefix and rows, T = prefix + ROWS * LENGTH.

    Attributes:
        tokens: (T,) ids.
        positions: (3, T) M-RoPE positions.
        labels: (T,) the id to be said next, or -1.
        image_at: (T,) which visual token of the image stands there, or -1; `crop_at` likewise for the crop.
        mask: (ROWS, LENGTH, LENGTH) whether a token sees another of its row.
        families: (T,) the question's family where a label stands, as an index; `SPEECH` where it is no answer's.
    """

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    image_at: np.ndarray
    crop_at: np.ndarray
    mask: np.ndarray
    families: np.ndarray


class Packer:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer.backend_tokenizer
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        opening, end = self._ids(OPENING), self._ids("<|vision_end|>")
        place = np.arange(SIDE * SIDE)
        grid = np.stack([0 * place, place // SIDE, place % SIDE]) + len(opening)
        start = np.tile(np.arange(len(opening)), (3, 1))
        after = len(opening) + SIDE
        self.prefix = np.array([*opening, *[self.image_id] * len(place), *end])
        self.prefix_positions = np.concatenate([start, grid, np.full((3, 1), after)], 1)
        self.prefix_image = np.concatenate([np.full(len(opening), -1), place, [-1]])
        self.first_position = after + 1

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def segment(self, turn: Turn) -> Segment:
        """The parts one after another: what is given, and what is said, which has labels."""
        given, spoken = self._given, self._spoken
        parts = [given(prompt(turn.question, turn.choices) + ANSWERING)]
        if turn.crop is not None:
            if turn.thought:
                parts += [spoken(f"{turn.thought}<|im_end|>", speech=True), given(SHOWING)]
            else:
                parts = [given(prompt(turn.question, turn.choices) + "<|im_end|>" + SHOWING)]
            parts += [given(turn.said), given("<|vision_start|>"), self._shown(*turn.crop)]
            parts += [given(f"<|vision_end|>{ANSWERING}")]
        if turn.conclusion:
            parts.append(spoken(turn.conclusion, speech=True))
        parts += [given(turn.opening), spoken(f"{' ' if turn.opening else ''}{turn.answer}<|im_end|>")]
        tokens, positions, said, speech, crop_at = (
            np.concatenate(columns, -1) for columns in zip(*_placed(parts), strict=True)
        )  # fmt: skip
        labels = np.where(said[1:], tokens[1:], -1)
        return Segment(tokens[:-1], positions[:, :-1], labels, speech[1:] & said[1:], crop_at[:-1])

    def _given(self, text: str) -> Part:
        return self._text(text, said=False, speech=False)

    def _spoken(self, text: str, speech: bool = False) -> Part:
        return self._text(text, said=True, speech=speech)

    def _text(self, text: str, said: bool, speech: bool) -> Part:
        ids = np.array(self._ids(text) if text else [], np.int64)
        count = len(ids)
        places = np.tile(np.arange(count), (3, 1))
        return Part(ids, places, np.full(count, said), np.full(count, speech), np.full(count, -1))

    def _shown(self, rows: int, columns: int) -> Part:
        place = np.arange(rows * columns)
        nothing = np.zeros(len(place), bool)
        places = np.stack([0 * place, place // columns, place % columns])
        return Part(np.full(len(place), self.image_id), places, nothing, nothing, place)

    def pack(self, turns: Sequence[Turn], families: Sequence[int]) -> PackedScene:
        """As many of the turns, in their order, as fit."""
        head = len(self.prefix)
        total = head + ROWS * LENGTH
        tokens, labels = np.zeros(total, np.int64), np.full(total, -1, np.int64)
        positions = np.zeros((3, total), np.int64)
        image_at, crop_at, family_of = (np.full(total, -1, np.int64) for _ in range(3))
        tokens[:head], positions[:, :head], image_at[:head] = self.prefix, self.prefix_positions, self.prefix_image
        mask = np.zeros((ROWS, LENGTH, LENGTH), bool)
        mask[:, np.arange(LENGTH), np.arange(LENGTH)] = True
        filled = [0] * ROWS
        for turn, family in zip(turns, families, strict=True):
            segment = self.segment(turn)
            size = len(segment.tokens)
            row = next((r for r in range(ROWS) if filled[r] + size <= LENGTH), None)
            if row is None:
                continue
            inside = slice(filled[row], filled[row] + size)
            span = slice(head + row * LENGTH + inside.start, head + row * LENGTH + inside.stop)
            tokens[span], labels[span], crop_at[span] = segment.tokens, segment.labels, segment.crop_at
            positions[:, span] = segment.positions + self.first_position
            family_of[span] = np.where(segment.speech, SPEECH, family)
            mask[row, inside, inside] = np.tri(size, dtype=bool)
            filled[row] += size
        return PackedScene(tokens, positions, labels, image_at, crop_at, mask, np.where(labels >= 0, family_of, -1))
