"""The model that is trained: a vision-language model, and beside it what the objective learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.trainer.families import Attention, Family, Tokens, Visual
from pearl.trainer.objectives.base import Losses, States
from pearl.trainer.packing import Batch, Rows


class Learner(nn.Module):
    """One forward of a batch: vision tower once, rows once, target views on their cache.

    Args:
        vlm: A model of transformers with a head, or the same under PEFT.

    Attributes:
        in_step: Whether all processes run the model's layers as often as the one that needs it most: where each has a
            shard of the weights, every run waits for the others'.
    """

    def __init__(self, vlm: nn.Module, family: Family, losses: Losses) -> None:
        super().__init__()
        self.vlm, self.family, self.losses = vlm, family, losses
        self.in_step = False

    @property
    def base(self) -> Any:
        """The model of transformers, without PEFT's wrapper (its adapters sit in the layers)."""
        vlm: Any = self.vlm
        return vlm.get_base_model() if hasattr(vlm, "get_base_model") else vlm

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers, by which accelerate shards; models name some that they do not have."""
        present = {type(module).__name__ for module in self.modules()}
        return sorted(present.intersection(self.base._no_split_modules or ()))

    def tie_weights(self) -> None:
        """Called by accelerate, whose sharding separates input embeddings and head."""
        self.base.tie_weights()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of each term of the objective."""
        terms: dict[str, Tensor] = self.losses(self.states(batch))
        return terms

    def states(self, batch: Batch) -> States:
        """Runs a batch: the final-layer states of its rows, then, without gradients, those of the target views' rows.

        Raises:
            PearlError: a cache is needed, and gradient checkpointing would drop it.
        """
        core = self.base.model
        visual = self.family.visual(core, batch.images)
        embeds, latents = self._embeds(batch.main, visual)
        cache = self._empty_cache("target views behind the trunk") if batch.cached_tokens else None
        if self.losses.recurrent:
            main = self._recurrent(batch.main, embeds, visual)
            latents = main[batch.main.latent_at - 1]
        else:
            main = self._run(batch.main, embeds, visual, Attention.among(batch.main.tokens), cache)
        targets = main.new_empty(0)
        if (rows := batch.target_rows) is not None:
            cached = None
            if cache is not None:
                cache.crop(batch.cached_tokens - batch.main.ids.shape[1])
                cached = batch.main.tokens.first(batch.cached_tokens)
            with torch.no_grad():
                attention = Attention.among(rows.tokens, cached)
                targets = self._run(rows, self._embeds(rows, visual)[0], visual, attention, cache)
        return States(batch, main, targets, embeds.flatten(0, 1), latents, self.base.get_output_embeddings())

    def _run(self, rows: Rows, embeds: Tensor, visual: Visual, attention: Attention, cache: Any) -> Tensor:
        states = self.family.run(
            self.base.model, embeds, rows.positions, attention, visual, rows.visual_at, rows.visual_of, cache
        )
        return states.flatten(0, 1)

    def _recurrent(self, rows: Rows, embeds: Tensor, visual: Visual) -> Tensor:
        """States (R·T, H) where each latent token of a trunk is fed with the state before it.

        Rows are run in pieces, each on the cache of those before it, cut before every latent token: together one
        forward of all tokens, in as many parts as the row with the most latents has, plus one. It is exact, and so
        are the gradients: they flow back through the latents and the cache, as in Coconut (arXiv 2412.06769).
        """
        cache = self._empty_cache("latents that the model makes itself")
        flat, row = embeds.flatten(0, 1), torch.arange(len(embeds), device=embeds.device)
        states, order = list[Tensor](), list[Tensor]()
        before: Tensor | None = None
        seen: Tokens | None = None
        pieces = list(_pieces(rows))
        missing = _most(len(pieces), flat.device) - len(pieces) if self.in_step else 0
        for piece in pieces:
            fed = flat[piece.at]
            if before is not None:
                fed = torch.cat([before[:, None].to(fed.dtype), fed[:, 1:]], dim=1)
            attention = Attention.among(piece.tokens, seen)
            made = self.family.run(
                self.base.model, fed, piece.positions, attention, visual, piece.visual_at, piece.visual_of, cache
            )
            before = made[row, piece.inside.sum(1) - 1]
            states.append(made[piece.inside])
            order.append(piece.at[piece.inside])
            seen = piece.tokens if seen is None else _beside(seen, piece.tokens)
        for _ in range(missing):
            states[0] = states[0] + 0 * self._idle(rows, embeds, visual).sum()
        return torch.cat(states)[torch.cat(order).argsort()]

    def _idle(self, rows: Rows, embeds: Tensor, visual: Visual) -> Tensor:
        """A forward of one token whose result nobody needs: this process makes as many as the others (`in_step`)."""
        first = Tokens(*(getattr(rows.tokens, field.name)[:1, :1] for field in fields(Tokens)))
        none = rows.visual_at[:0]
        return self.family.run(
            self.base.model, embeds[:1, :1], rows.positions[:, :1, :1], Attention.among(first), visual, none, none, None
        )

    def _embeds(self, rows: Rows, visual: Visual) -> tuple[Tensor, Tensor]:
        """What is fed (R, T, H): words, visual tokens, predictor tokens, latents; and the latents alone (L, H)."""
        embeds: Tensor = self.base.get_input_embeddings()(rows.ids)
        flat = embeds.flatten(0, 1)
        flat = flat.index_copy(0, rows.visual_at, visual.tokens[rows.visual_of].to(flat.dtype))
        if self.losses.predictors is not None and len(rows.predictor_at):
            flat = flat.index_copy(0, rows.predictor_at, self.losses.predictors[rows.predictor_of].to(flat.dtype))
        latents = self._latents(rows, visual).to(flat.dtype)
        if len(latents):
            flat = flat.index_copy(0, rows.latent_at, latents)
        return flat.view_as(embeds), latents

    def _latents(self, rows: Rows, visual: Visual) -> Tensor:
        """The mean of each latent token's visual tokens, (L, H) in fp32; zeros where it has none."""
        sums = visual.tokens.new_zeros(len(rows.latent_at), visual.tokens.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, rows.latent_group, visual.tokens[rows.latent_source].float())
        return sums / torch.bincount(rows.latent_group, minlength=len(sums)).clamp(min=1)[:, None]

    def _empty_cache(self, purpose: str) -> Any:
        from transformers import DynamicCache

        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            raise PearlError(f"gradient checkpointing keeps no keys and values, which {purpose} need; turn it off")
        return DynamicCache()


def _most(count: int, device: torch.device) -> int:
    """The largest of all processes' counts."""
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


@dataclass(frozen=True)
class _Piece:
    """W tokens of each of R rows, fewer where `inside` is not set: the rest is padding.

    Attributes:
        at: (R, W) flat indices into the rows that it is a piece of.
        inside: (R, W).
        positions: (D, R, W).
        visual_at, visual_of: As in `Rows`.
    """

    at: Tensor
    inside: Tensor
    tokens: Tokens
    positions: Tensor
    visual_at: Tensor
    visual_of: Tensor


def _pieces(rows: Rows) -> Iterator[_Piece]:
    """The rows, cut before each latent token. A row with fewer latents than another is all padding in the end."""
    count, length = rows.ids.shape
    device = rows.ids.device
    latent = torch.zeros(count * length, dtype=torch.int64, device=device)
    latent[rows.latent_at] = 1
    visual = torch.full((count * length,), -1, device=device)
    visual[rows.visual_at] = rows.visual_of
    number = latent.view(count, length).cumsum(1)
    widths = torch.stack([(number == piece).sum(1) for piece in range(int(number.max()) + 1)])
    start = torch.arange(count, device=device) * length
    for width, longest in zip(widths, widths.max(1).values.tolist(), strict=True):
        along = torch.arange(longest, device=device)
        inside = along < width[:, None]
        at = (start[:, None] + along).clamp(max=count * length - 1)
        of = visual[at].masked_fill(~inside, -1).flatten()
        visual_at = (of >= 0).nonzero()[:, 0]
        tokens = Tokens(*(getattr(rows.tokens, field.name).flatten()[at] for field in fields(Tokens)))
        tokens.branch.masked_fill_(~inside, -1)
        yield _Piece(at, inside, tokens, rows.positions.flatten(1)[:, at], visual_at, of[visual_at])
        start = start + width


def _beside(before: Tokens, after: Tokens) -> Tokens:
    return Tokens(*(torch.cat([getattr(t, field.name) for t in (before, after)], dim=1) for field in fields(Tokens)))
