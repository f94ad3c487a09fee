"""Decoding with latents: where its objective put latent tokens, the model is fed its own states.

LVR (arXiv 2509.24251, section 3.3) and Mirage (arXiv 2506.17218): after the token that opens a run of latents, the
final-layer state (through LVR's head, where it has one) is the next input embedding, again and again, until the run's
quota is used up; then the token that closes it is given. LVR may also close a run itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.evaluation.insides import Insides, objective_of
from pearl.evaluation.modes.base import DecodingMode, QuestionError, too_long
from pearl.evaluation.records import Question, Reply
from pearl.evaluation.subject import Subject, enough_memory
from pearl.images import ImageError
from pearl.trainer.conversation import ImagePart, Turn
from pearl.trainer.families import Attention, Tokens
from pearl.trainer.objectives.lvr import Lvr
from pearl.trainer.objectives.mirage import Mirage
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import ViewError

LVR_QUOTA = 8
Change = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""What is fed instead of latents (N, H), given whose they are (N indices into the batch) and which of theirs (N)."""


@dataclass(frozen=True)
class Decoded:
    """What was decoded for one question.

    Attributes:
        text: Without special tokens.
        latents: (L, H) as the model made them, before any change; `runs`: how many in each run.
        new_tokens: Latents included.
    """

    text: str
    latents: Tensor
    runs: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


@dataclass
class _Answer:
    """One row's state: what it said, its latents, how many in each run, and whether it is inside of one.

    Attributes:
        quota: Latents in a run; `quotas`: in its first runs, where they differ.
    """

    quota: int
    quotas: Sequence[int]
    ids: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    inside: bool = False
    done: bool = False

    @property
    def run_is_full(self) -> bool:
        run = len(self.runs) - 1
        return self.runs[run] >= (self.quotas[run] if run < len(self.quotas) else self.quota)


class LatentDecoder:
    """Greedy decoding of a model that was trained with `lvr` or `mirage`.

    Args:
        quota: Latents in a run; by default as many as Mirage was trained with, or 8 for LVR.
        closing: LVR's `<|lvr_end|>` closes a run before its quota is used up.

    Raises:
        PearlError: the model was trained otherwise, what LVR's head learned is missing, or Mirage's runs are to close.
    """

    def __init__(self, subject: Subject, quota: int | None = None, closing: bool = False) -> None:
        objective, losses = objective_of(subject)
        if not isinstance(objective, Lvr | Mirage):
            raise PearlError(f"{subject.name} was trained with {objective.name}, which makes no latents")
        self.subject, self.objective = subject, objective
        if closing and not isinstance(objective, Lvr):
            raise PearlError(f"{subject.name} was trained with {objective.name}, whose runs end by their number only")
        self.closing = closing
        self.head: nn.Module = getattr(losses, "head", nn.Identity()).to(subject.model.device)
        self.quota = quota if quota is not None else getattr(objective, "num_latents", LVR_QUOTA)
        self.insides = Insides.of(subject, objective.latent_token)
        tokenizer = subject.processor.tokenizer
        self.opening, self.latent, self.closed = tokenizer.convert_tokens_to_ids(list(objective.special_tokens))
        ends = subject.model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def with_quota(self, quota: int) -> LatentDecoder:
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "quota": quota}
        return other

    def example(self, question: Question) -> Example:
        """What the model goes on from."""
        images = [self.insides.encoder.image(image) for image in question.images]
        before = self.subject.training.template.system if self.subject.training else ""
        turns = [Turn("system", (before,))] if before else []
        shown = [ImagePart(number) for number in range(len(images))]
        turns.append(Turn("user", (*shown, self.subject.plain(question.prompt))))
        view = self.insides.encoder.prompt(turns, images)
        return Example(question.id, tuple(images), {"prompt": view})

    @torch.no_grad()
    def decode(
        self,
        examples: Sequence[Example],
        max_new_tokens: int,
        change: Change | None = None,
        quotas: Sequence[Sequence[int]] | None = None,
    ) -> list[Decoded]:
        """The answers to a batch of prompts; keys and values are kept, so each new token costs one token's forward.

        Args:
            quotas: For each prompt those of its first runs, where they are not all alike.

        Raises:
            SubjectError: out of memory.
        """
        answers = [_Answer(self.quota, of) for of in quotas or [()] * len(examples)]
        with enough_memory(f"{len(examples)} questions at once: lower --batch-size"):
            return self._decode(examples, answers, max_new_tokens, change)

    def _decode(
        self, examples: Sequence[Example], answers: Sequence[_Answer], max_new_tokens: int, change: Change | None
    ) -> list[Decoded]:
        walk = _Walk(self, self.insides.batch(list(examples)))
        for _ in range(max_new_tokens):
            fed = self._next(answers, walk.state, change)
            if all(answer.done for answer in answers):
                break
            walk.step(fed)
        decode = self.subject.processor.tokenizer.decode
        return [
            Decoded(
                decode([i for i in answer.ids if i != self.latent], skip_special_tokens=True).strip(),
                torch.stack(answer.latents) if answer.latents else walk.state.new_zeros(0, walk.state.shape[-1]),
                tuple(answer.runs),
                len(example.views["prompt"]),
                len(answer.ids),
            )
            for answer, example in zip(answers, examples, strict=True)
        ]

    def _next(self, answers: Sequence[_Answer], state: Tensor, change: Change | None) -> Tensor:
        """What each row is fed next (R, H), and the rows' states after it."""
        words = self.subject.model.get_output_embeddings()(state).argmax(-1).tolist()
        made = self.head(state).to(state.dtype)
        thinking = list[int]()
        for row, (answer, word) in enumerate(zip(answers, words, strict=True)):
            if answer.done:
                continue
            if answer.inside and not answer.run_is_full and not (self.closing and word == self.closed):
                answer.latents.append(made[row])
                answer.runs[-1] += 1
                answer.ids.append(self.latent)
                thinking.append(row)
                continue
            if answer.inside:
                word, answer.inside = self.closed, False
            answer.ids.append(word)
            answer.done = word in self.ends
            if word == self.opening:
                answer.runs.append(0)
                answer.inside = True
        last = torch.tensor([answer.ids[-1] for answer in answers], device=state.device)
        fed: Tensor = self.subject.model.get_input_embeddings()(last)
        if thinking:
            which = [len(answers[row].latents) - 1 for row in thinking]
            latents = made[thinking] if change is None else change(made[thinking], thinking, which)
            fed = fed.index_copy(0, torch.tensor(thinking, device=state.device), latents.to(fed.dtype))
        return fed


class _Walk:
    """A batch of prompts on a growing cache. `state` (R, H): the last token's final-layer state in each row."""

    def __init__(self, decoder: LatentDecoder, batch: Batch) -> None:
        from transformers import DynamicCache

        self.core: Any = decoder.subject.model.model
        self.family, self.cache = decoder.insides.family, DynamicCache()
        rows = batch.main
        self.visual = self.family.visual(self.core, batch.images)
        embeds: Tensor = self.core.get_input_embeddings()(rows.ids)
        flat = embeds.flatten(0, 1)
        flat = flat.index_copy(0, rows.visual_at, self.visual.tokens[rows.visual_of].to(flat.dtype))
        attention = Attention.among(rows.tokens)
        states = self.family.run(
            self.core, flat.view_as(embeds), rows.positions, attention, self.visual, rows.visual_at, rows.visual_of,
            self.cache,
        )  # fmt: skip
        last = (rows.tokens.branch >= 0).sum(1) - 1
        every = torch.arange(len(last), device=last.device)
        self.state: Tensor = states[every, last]
        self.seen, self.order = rows.tokens, last
        self.positions = rows.positions[:, every, last]

    def step(self, fed: Tensor) -> None:
        """One more token in each row, fed with these embeddings (R, H)."""
        self.order, self.positions = self.order + 1, self.positions + 1
        zero = torch.zeros_like(self.order)[:, None]
        tokens = Tokens(branch=zero, prefix=zero, order=self.order[:, None], block=zero - 1)
        none = zero.new_zeros(0)
        states = self.family.run(
            self.core, fed[:, None], self.positions[:, :, None], Attention.among(tokens, self.seen), self.visual,
            none, none, self.cache,
        )  # fmt: skip
        self.state = states[:, 0]
        self.seen = Tokens(
            *(torch.cat([getattr(self.seen, n), getattr(tokens, n)], 1) for n in ("branch", "prefix", "order", "block"))
        )


class Latent(DecodingMode):
    """Answers through latents, as the model's objective had them.

    Args:
        quota, closing: As in `LatentDecoder`.
    """

    name = "latent"

    def __init__(self, max_new_tokens: int = 128, quota: int | None = None, closing: bool = False) -> None:
        self.max_new_tokens, self.quota, self.closing = max_new_tokens, quota, closing
        self._decoder: LatentDecoder | None = None

    def check(self, subject: Subject) -> None:
        self._of(subject)

    def leave(self) -> None:
        self._decoder = None

    def _of(self, subject: Subject) -> LatentDecoder:
        if self._decoder is None or self._decoder.subject is not subject:
            self._decoder = LatentDecoder(subject, self.quota, self.closing)
        return self._decoder

    def answer(self, subject: Subject, questions: Sequence[Question]) -> list[Reply]:
        begin = time.perf_counter()
        decoder = self._of(subject)
        limit = max(question.max_new_tokens or self.max_new_tokens for question in questions)
        decoded = decoder.decode([self._example(decoder, question, limit) for question in questions], limit)
        seconds = (time.perf_counter() - begin) / len(questions)
        return [Reply(one.text, (one.text,), one.prompt_tokens, one.new_tokens, seconds) for one in decoded]

    def _example(self, decoder: LatentDecoder, question: Question, limit: int) -> Example:
        try:
            example = decoder.example(question)
        except (ImageError, ViewError) as error:
            raise QuestionError(question, str(error)) from error
        tokens, most = len(example.views["prompt"]), decoder.subject.max_positions
        if most is not None and tokens + limit > most:
            raise too_long(decoder.subject, question, tokens, limit)
        return example
