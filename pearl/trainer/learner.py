"""The model that is trained: a vision-language model, and beside it what the objective learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pearl.trainer.families import Attention, Family, Visual
from pearl.trainer.objectives.base import Losses, States
from pearl.trainer.packing import Batch, Rows


class Learner(nn.Module):
    """One forward of a batch: vision tower once, rows once, target views on their cache.

    Args:
        vlm: A model of transformers with a head, or the same under PEFT.
    """

    def __init__(self, vlm: nn.Module, family: Family, losses: Losses) -> None:
        super().__init__()
        self.vlm, self.family, self.losses = vlm, family, losses

    @property
    def base(self) -> Any:
        """The model of transformers, without PEFT's wrapper (its adapters sit in the layers)."""
        vlm: Any = self.vlm
        return vlm.get_base_model() if hasattr(vlm, "get_base_model") else vlm

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of each term of the objective."""
        terms: dict[str, Tensor] = self.losses(self.states(batch))
        return terms

    def states(self, batch: Batch) -> States:
        core = self.base.model
        visual = self.family.visual(core, batch.images)
        cache = self._empty_cache() if batch.reuse and batch.after is not None else None
        embeds, latents = self._embeds(batch.main, visual)
        main = self._run(batch.main, embeds, visual, Attention.among(batch.main.tokens), cache)
        after = main.new_empty(0)
        if batch.after is not None:
            with torch.no_grad():
                attention = Attention.among(batch.after.tokens, batch.main.tokens if batch.reuse else None)
                embeds, _ = self._embeds(batch.after, visual)
                after = self._run(batch.after, embeds, visual, attention, cache)
        embed = self.base.get_input_embeddings()
        return States(batch, main, after, latents, embed, self.base.get_output_embeddings())

    def _run(self, rows: Rows, embeds: Tensor, visual: Visual, attention: Attention, cache: Any) -> Tensor:
        states = self.family.run(
            self.base.model, embeds, rows.positions, attention, visual, rows.visual_at, rows.visual_of, cache
        )
        return states.flatten(0, 1)

    def _embeds(self, rows: Rows, visual: Visual) -> tuple[Tensor, Tensor]:
        """What is fed (R, T, H): words, visual tokens, predictor tokens, latents; and the latents alone (L, H)."""
        embeds: Tensor = self.base.get_input_embeddings()(rows.ids)
        flat = embeds.flatten(0, 1)
        flat = flat.index_copy(0, rows.visual_at, visual.tokens[rows.visual_of].to(flat.dtype))
        if self.losses.predictors is not None and len(rows.predictor_at):
            flat = flat.index_copy(0, rows.predictor_at, self.losses.predictors[rows.predictor_of].to(flat.dtype))
        latents = flat.new_zeros(len(rows.latent_at), flat.shape[-1])
        if len(rows.latent_at):
            latents = latents.index_reduce(
                0, rows.latent_group, visual.tokens[rows.latent_source].to(flat.dtype), "mean", include_self=False
            )
            flat = flat.index_copy(0, rows.latent_at, latents)
        return flat.view_as(embeds), latents

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()
