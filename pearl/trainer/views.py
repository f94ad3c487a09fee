"""Turns of a conversation as tokens of one model: through its own chat template, processor and tokenizer.

Which tokens are learned is known from the turns, never found by searching text: the template is applied to every
prefix of the conversation, so each turn's characters are known, and the tokenizer's offsets give its tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pearl.errors import PearlError
from pearl.images import ImageError, decode, stored_size
from pearl.records import Box, EncodedImage
from pearl.trainer.conversation import ImagePart, Turn

if TYPE_CHECKING:
    from pearl.trainer.families import Family

PREDICTOR_MARK = "\ue000"
"""Holds the predictor tokens' place while the chat template is applied (a private-use character)."""


class ViewError(PearlError, ValueError):
    """A conversation that this model's processor cannot express; the message says why."""


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """One preprocessed image: what the vision tower takes, and what stands for it in the text.

    Attributes:
        tensors: The image processor's output for this image alone.
        text: What replaces its placeholder in the rendered conversation.
        num_tokens: How many merged visual tokens it has.
        shown: The part of the image that they show: some image processors cut off the borders.
        when_several: The same image as it is in a view of several, where the family then preprocesses it in another way.
    """

    tensors: dict[str, Tensor]
    text: str
    num_tokens: int
    shown: Box = (0.0, 0.0, 1.0, 1.0)
    when_several: ImageInputs | None = None


def images_of_view(images: Sequence[ImageInputs], shown: Sequence[int]) -> list[ImageInputs]:
    """The images that a view shows, in order, as they are where there is one or where there are several."""
    chosen = [images[index] for index in shown]
    return [image.when_several or image for image in chosen] if len(chosen) > 1 else chosen


@dataclass(frozen=True, slots=True)
class LatentRun:
    """A run of latent tokens, each fed with the mean of some of an image's merged visual tokens.

    Attributes:
        image: Index into the conversation's distinct images.
        groups: For each latent token, indices into that image's merged visual tokens; none of them where the model
            makes its latents itself.
    """

    image: int
    groups: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class View:
    """Tokens of one view; T is their number.

    Attributes:
        ids: (T,) token ids; at predictor tokens the padding id.
        supervised: (T,) whether the token is to be predicted.
        predictors: (T,) index of the predictor token that stands here, or -1.
        visual: (T,) whether a visual token stands here.
        images: Indices of the conversation's images, in the order in which they stand.
        ends: For each turn its last token: the end-of-turn token where the chat template has one.
        latents: The runs of latent tokens in order; `latent_slots` (T,) says where they stand.
        marks: Named indices of tokens whose states the objective asks for.
    """

    ids: np.ndarray
    supervised: np.ndarray
    predictors: np.ndarray
    visual: np.ndarray
    images: tuple[int, ...]
    ends: tuple[int, ...]
    latents: tuple[LatentRun, ...]
    latent_slots: np.ndarray
    marks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def marked(self, **marks: Sequence[int]) -> View:
        return replace(self, marks={name: tuple(tokens) for name, tokens in marks.items()})

    def silent(self) -> View:
        """The same tokens, of which nothing is asked: none is supervised, latent or marked."""
        none = np.zeros(len(self), bool)
        return replace(self, supervised=none, latents=(), latent_slots=none, marks=dict.fromkeys(self.marks, ()))

    def __len__(self) -> int:
        return len(self.ids)


class ViewEncoder:
    """Makes views with one model's processor.

    Args:
        processor: Of transformers; its tokenizer must be a fast one and it must have a chat template.
        latent_token: The token that marks latents, where the objective has them.
        core_config: The model's configuration, where the objective places boxes on images.

    Raises:
        ViewError: the processor lacks what is needed.
    """

    def __init__(
        self, processor: Any, family: Family, latent_token: str | None = None, core_config: Any = None
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise ViewError(f"{type(processor).__name__} has no fast tokenizer, whose offsets make the labels")
        if not getattr(processor, "chat_template", None) and not getattr(tokenizer, "chat_template", None):
            raise ViewError(f"{type(processor).__name__} has no chat template; put a chat_template.jinja beside it")
        self.processor, self.tokenizer, self.family, self.core_config = processor, tokenizer, family, core_config
        self.special = special_ids(tokenizer)
        self.padding: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.latent_id = None if latent_token is None else tokenizer.convert_tokens_to_ids(latent_token)
        self.control = self._control_tokens()

    def image(self, image: EncodedImage) -> ImageInputs:
        """Decodes and preprocesses one image.

        Raises:
            ImageError: it cannot be decoded.
            ViewError: the image processor refuses it.
        """
        pixels = torch.from_numpy(decode(image.data)).permute(2, 0, 1)
        several = self._preprocessed(pixels, several=True) if self.family.differs_when_several else None
        return replace(self._preprocessed(pixels), when_several=several)

    def _preprocessed(self, pixels: Tensor, *, several: bool = False) -> ImageInputs:
        try:
            inputs = self.family.preprocess(self.processor, pixels, several=several)
        except ValueError as error:
            _, height, width = pixels.shape
            raise ViewError(f"the image processor refuses an image of {width} by {height} pixels: {error}") from error
        text = self.processor.replace_image_token(inputs, 0)
        count = text.count(self.family.visual_token(self.processor))
        shown = self.family.shown(self.processor, *pixels.shape[1:])
        return ImageInputs({k: v for k, v in inputs.items() if isinstance(v, Tensor)}, text, count, shown)

    def num_tokens(self, image: bytes) -> int:
        """About how many visual tokens an image has, from its header at most; 0 where it cannot be used."""
        if not self.family.keeps_sizes:
            return self._usual
        processor = self.processor.image_processor
        try:
            width, height = stored_size(image)
            patches = processor.get_number_of_image_patches(height, width)
        except (ImageError, ValueError):
            return 0
        return int(patches // processor.merge_size**2)

    @cached_property
    def _usual(self) -> int:
        return self._preprocessed(torch.zeros(3, 448, 448, dtype=torch.uint8)).num_tokens

    def grid(self, image: ImageInputs) -> np.ndarray:
        """(rows, columns) of an image's parts: which of its merged visual tokens shows each (`Family.grid`)."""
        return self.family.grid(self.core_config, image.tensors)

    def view(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageInputs],
        num_predictors: int = 0,
        latents: Sequence[LatentRun] = (),
    ) -> View:
        """Tokens of these turns.

        Args:
            images: Of the whole conversation, as the turns' image parts count them.
            num_predictors: Predictor tokens that stand where the text holds `PREDICTOR_MARK`; the view then ends with
                the last turn's end.
            latents: What the latent tokens in the text are fed with, in order.

        Raises:
            ViewError: the chat template refuses or rewrites turns, or text holds tokens that only it may write.
        """
        self._refuse_control_tokens(turns)
        rendered, starts, stops = self._render(turns)
        shown = _shown(turns)
        here = images_of_view(images, shown)
        text, shift = self._expand(rendered, here)
        ids, spans, predictors = self._tokenize(text, num_predictors)
        supervised, ends = np.zeros(len(ids), bool), list[int]()
        for turn, start, stop in zip(turns, shift(starts), shift(stops), strict=True):
            said = _tokens_between(text, spans, start, stop)
            ends.append(int(said[-1]) if len(said) else ends[-1] if ends else 0)
            supervised[said] = turn.supervised
        ids, supervised, predictors = (array[: ends[-1] + 1] for array in (ids, supervised, predictors))
        if turns[-1].role == "assistant" and int(ids[-1]) not in self.special:
            ends[-1] += 1
            ids = np.append(ids, self.tokenizer.eos_token_id)
            supervised, predictors = np.append(supervised, turns[-1].supervised), np.append(predictors, -1)
        visual = self._visual(ids, here)
        slots = np.zeros(len(ids), bool) if self.latent_id is None else ids == self.latent_id
        if slots.sum() != sum(len(latent.groups) for latent in latents):
            raise ViewError("a text holds the objective's own token for latents")
        return View(ids, supervised & ~slots, predictors, visual, shown, tuple(ends), tuple(latents), slots)

    def prompt(self, turns: Sequence[Turn], images: Sequence[ImageInputs]) -> View:
        """Tokens of these turns and of what an answer begins with: what a model goes on from.

        Raises:
            ViewError: as above.
        """
        self._refuse_control_tokens(turns)
        shown = _shown(turns)
        here = images_of_view(images, shown)
        text, _ = self._expand(self._template([_message(turn) for turn in turns], add_generation_prompt=True), here)
        ids, _, predictors = self._tokenize(text, 0)
        none = np.zeros(len(ids), bool)
        return View(ids, none, predictors, self._visual(ids, here), shown, (len(ids) - 1,), (), none)

    def _visual(self, ids: np.ndarray, images: Sequence[ImageInputs]) -> np.ndarray:
        """(T,) whether a visual token of one of these images stands there."""
        visual: np.ndarray = ids == self.family.visual_token_id(self.processor)
        if visual.sum() != sum(image.num_tokens for image in images):
            raise ViewError("a text holds the model's own token for images")
        return visual

    def _render(self, turns: Sequence[Turn]) -> tuple[str, list[int], list[int]]:
        """The conversation's text, and for each turn where it starts (an answer: after its prompt) and stops."""
        messages = [_message(turn) for turn in turns]
        texts = [self._template(messages[:count]) for count in range(1, len(turns) + 1)]
        stops = [len(text) for text in texts]
        starts = [0, *stops[:-1]]
        for number, turn in enumerate(turns):
            prompted = texts[number - 1] if number else ""
            if turn.role == "assistant":
                prompted = self._template(messages[:number], add_generation_prompt=True)
                starts[number] = len(prompted)
            if not (texts[-1].startswith(prompted) and texts[-1].startswith(texts[number])):
                raise ViewError(
                    f"the chat template writes turn {number} ({turn.role}) or what is before it in another way when the "
                    "conversation goes on, so no single text has all its turns as the model meets them"
                )
        return texts[-1], starts, stops

    def _template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        if [message["role"] for message in messages] == ["system"]:
            return ""  # some templates refuse a conversation without a user; its text is counted with the first turn
        own = {} if getattr(self.processor, "chat_template", None) else {"chat_template": self.tokenizer.chat_template}
        try:
            return str(
                self.processor.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, **own
                )
            )
        except Exception as error:  # a template that expects other content raises anything
            raise ViewError(f"the chat template refuses this conversation: {error}") from error

    def _control_tokens(self) -> list[str]:
        """The special tokens that the chat template writes itself: around turns and images, and at both ends.

        Raises:
            ViewError: it cannot write a question about an image.
        """
        turns = (Turn("user", (ImagePart(0), ".")), Turn("assistant", (".",)))
        written = self._template([_message(turn) for turn in turns], add_generation_prompt=True)
        if (count := written.count(self.family.placeholder(self.processor))) != 1:
            raise ViewError(f"the chat template writes {count} image placeholders for one image")
        special = self.tokenizer.convert_ids_to_tokens(sorted(self.special))
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token)
        return [token for token in special if token and (token in written or token in ends)]

    def _refuse_control_tokens(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            text = "\n".join(part for part in turn.parts if isinstance(part, str))
            if held := [token for token in self.control if token in text]:
                raise ViewError(f"a text of the {turn.role} holds {held[0]}, which only the chat template may write")

    def _expand(self, text: str, images: Sequence[ImageInputs]) -> tuple[str, Callable[[list[int]], list[int]]]:
        """Each image's placeholder becomes what stands for it; and how positions in the text move by that."""
        placeholder = self.family.placeholder(self.processor)
        pieces = text.split(placeholder)
        if len(pieces) != len(images) + 1:
            raise ViewError(f"{len(pieces) - 1} image placeholders for {len(images)} images: a text holds one itself")
        expanded = pieces[0]
        at, by = [0], [0]
        for piece, image in zip(pieces[1:], images, strict=True):
            at.append(at[-1] + (len(pieces[len(at) - 1]) + len(placeholder)))
            by.append(by[-1] + len(image.text) - len(placeholder))
            expanded += image.text + piece
        return expanded, lambda positions: [p + by[bisect_right(at, p) - 1] for p in positions]

    def _tokenize(self, text: str, num_predictors: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids (T,), their characters [start, stop) (T, 2), and which predictor token each is (T,), else -1."""
        pieces = text.split(PREDICTOR_MARK)
        if len(pieces) != 1 + bool(num_predictors):
            raise ViewError("a text holds U+E000, which marks the place of the predictor tokens")
        bos = self.tokenizer.bos_token
        ids, spans, predictors = self._encode(pieces[0], not (bos and text.startswith(bos)), 0)
        if num_predictors:
            place = len(pieces[0])
            after = self._encode(pieces[1], False, place + 1)
            ids = np.concatenate([ids, np.full(num_predictors, self.padding), after[0]])
            spans = np.concatenate([spans, np.tile([[place, place + 1]], (num_predictors, 1)), after[1]])
            predictors = np.concatenate([predictors, np.arange(num_predictors), after[2]])
        return ids, spans, predictors

    def _encode(self, text: str, special: bool, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        coded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = np.array(coded["input_ids"], np.int64)
        spans = np.array(coded["offset_mapping"], np.int64).reshape(-1, 2) + place
        return ids, spans, np.full(len(ids), -1)


def _shown(turns: Sequence[Turn]) -> tuple[int, ...]:
    return tuple(part.index for turn in turns for part in turn.parts if isinstance(part, ImagePart))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that a tokenizer calls special, by its attributes or where it added them."""
    added = (token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special)
    return frozenset(tokenizer.all_special_ids).union(added)


def _message(turn: Turn) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.parts]
    return {"role": turn.role, "content": content}


def _tokens_between(text: str, spans: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Indices of the tokens of these characters, without white space at the end: templates end turns with a newline,
    or with a space that belongs to the next turn's first token."""
    stop = start + len(text[start:stop].rstrip())
    return np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < stop) & (spans[:, 1] > spans[:, 0]))
