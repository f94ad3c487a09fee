"""Pearl: predict the embedding of what the tools would have shown (arXiv 2604.08065).

`L = L_VLM + λ (L_JEPA + L_NextLat)`. From image and question alone (source view), K predictor tokens predict the state
that the model reaches on the trajectory without the question (target view, stop-gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.trainer.conversation import Conversation
from pearl.trainer.objectives.base import Losses, Objective, States
from pearl.trainer.objectives.encoders import FrozenEncoder, preprocessing, stack_pixels
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import PREDICTOR_MARK, ImageInputs, View, ViewEncoder

Distance = Literal["cosine", "smooth-l1", "l2", "mse", "infonce"]
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Pearl(Objective):
    """Settings.

    Attributes:
        lambda_: λ, the weight of both further terms.
        num_predictor_tokens: K.
        jepa_distance: Of predicted and target embedding. (The paper's text says SmoothL1; its authors say that the
            published numbers came from cosine.) "infonce", which the paper does not have, is the surprise at finding
            its own target among all of the forward: what these have in common counts for nothing.
        jepa: Whether there is an `L_JEPA`.
        nextlat: Whether there is an `L_NextLat`.
        nextlat_token: Which token the predicted next state must predict: the one after it ("next"), or the one that
            the dynamics head was given ("published", as the published code does).
        targets: "trajectory": the state at the end of the target view. "steps": predictor token k meets the state at
            the end of observation k; tokens beyond the steps have no target, and steps beyond K none either.
        target_encoder: A frozen image encoder (`timm:NAME`, a folder or Hub id) in place of the target view: predictor
            token k, through a projection, meets the pooled embedding of the k-th tool image. Not beside `targets`
            "steps".
        direct_weight: Weight of a further next-token loss on the answer straight after the question; 0: none.
    """

    name: ClassVar[str] = "pearl"
    lambda_: float = 0.2
    num_predictor_tokens: int = 4
    jepa_distance: Distance = "cosine"
    jepa: bool = True
    nextlat: bool = True
    nextlat_token: Literal["next", "published"] = "next"
    targets: Literal["trajectory", "steps"] = "trajectory"
    target_encoder: str | None = None
    direct_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.num_predictor_tokens < 1:
            raise PearlError("pearl needs at least one predictor token")
        if self.lambda_ < 0 or self.direct_weight < 0:
            raise PearlError("the weights of pearl's terms cannot be negative")
        if not self.jepa and (self.target_encoder is not None or self.targets != "trajectory"):
            raise PearlError("targets and target_encoder say what L_JEPA predicts; there is none with jepa=False")
        if self.target_encoder is not None and self.targets != "trajectory":
            raise PearlError("a target_encoder takes the place of other targets: leave out targets=steps")
        if self.target_encoder is not None:
            preprocessing(self.target_encoder)

    @property
    def least_batch(self) -> int:
        return 2 if self.jepa and self.jepa_distance == "infonce" else 1

    def example(self, conversation: Conversation, images: Sequence[ImageInputs], encoder: ViewEncoder) -> Example:
        views = {"full": encoder.view(conversation.full(), images)}
        extras = {}
        if self.jepa:
            question = conversation.question(PREDICTOR_MARK)
            source = encoder.view(question, images, num_predictors=self.num_predictor_tokens)
            if self.target_encoder is None:
                target = encoder.view(conversation.full(asked=False), images)
                views["source"], views["target"] = self._paired(source, target, conversation)
            else:
                shown = [conversation.images[index] for index in conversation.of_step if index is not None]
                predictors = _predictors(source)[: len(shown)]
                views["source"] = source.marked(predicted=predictors)
                extras["encoder_pixels"] = stack_pixels(self.target_encoder, shown[: len(predictors)])
        if self.direct_weight:
            views["direct"] = encoder.view((*conversation.question(), conversation.direct()), images)
        return Example(conversation.trajectory.id, tuple(images), views, frozenset({"target"} & views.keys()), extras)

    def _paired(self, source: View, target: View, conversation: Conversation) -> tuple[View, View]:
        """The views with the tokens marked whose states are to meet."""
        if self.targets == "trajectory":
            return source.marked(predicted=source.ends[-1:]), target.marked(target=target.ends[-1:])
        observations = target.ends[len(conversation.question()) + 1 : -1 : 2]
        predicted = _predictors(source)
        count = min(len(predicted), len(observations))
        return source.marked(predicted=predicted[:count]), target.marked(target=observations[:count])

    def losses(self, hidden_size: int) -> Losses:
        return PearlLosses(self, hidden_size)


def _predictors(source: View) -> list[int]:
    return [int(token) for token in np.flatnonzero(source.predictors >= 0)]


class PearlLosses(Losses):
    def __init__(self, settings: Pearl, hidden_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.weights = {"vlm": 1.0}
        if settings.jepa:
            self.weights["jepa"] = settings.lambda_
            self.predictors = nn.Parameter(torch.randn(settings.num_predictor_tokens, hidden_size) * 0.02)
        if settings.jepa and settings.target_encoder is not None:
            self.encoder = FrozenEncoder(settings.target_encoder)
            self.projection = nn.Linear(hidden_size, self.encoder.width)
        if settings.nextlat:
            self.weights |= dict.fromkeys(("nextlat", "nextlat_token"), settings.lambda_)
            self.dynamics = DynamicsHead(hidden_size)
        if settings.direct_weight:
            self.weights["direct"] = settings.direct_weight

    def counts(self, batch: Batch) -> dict[str, int]:
        full = batch.places["full"]
        counts = {"vlm": len(full.supervised)}
        if self.settings.jepa:
            counts["jepa"] = len(batch.places["source"].marks["predicted"])
        if self.settings.nextlat:
            counts |= {"nextlat": len(full.supervised), "nextlat_token": len(self._token_positions(batch))}
        if self.settings.direct_weight:
            counts["direct"] = len(batch.places["direct"].supervised)
        return counts

    def forward(self, states: States) -> dict[str, Tensor]:
        terms = {"vlm": states.next_token("full")}
        if self.settings.jepa:
            predicted, target = self.watched = self.embeddings(states)
            terms["jepa"] = distance(predicted.float(), target.float(), self.settings.jepa_distance).sum()
        if self.settings.nextlat:
            terms |= self._nextlat(states)
        if self.settings.direct_weight:
            terms["direct"] = states.next_token("direct")
        return terms

    def embeddings(self, states: States) -> tuple[Tensor, Tensor]:
        """Predicted and target embeddings, (N, H) each; the target without gradients."""
        places = states.batch.places
        predicted = states.of("source", places["source"].marks["predicted"])
        if self.settings.target_encoder is None:
            return predicted, states.target("target", places["target"].marks["target"])
        projected: Tensor = self.projection(predicted.to(self.projection.weight.dtype))
        return projected, self.encoder(states.batch.extras["encoder_pixels"])

    def _nextlat(self, states: States) -> dict[str, Tensor]:
        """`ĥ[t+1] = h[t] + MLP(LayerNorm([h[t]; e[t+1]]))` meets `h[t+1]`, and predicts the token after t+1."""
        full = states.batch.places["full"]
        ahead = self.dynamics(states.of("full", full.supervised - 1), states.inputs("full", full.supervised))
        reached = states.of("full", full.supervised).detach()
        drift = F.smooth_l1_loss(ahead.float(), reached.float(), reduction="none").mean(-1)
        tokens = self._token_positions(states.batch)
        after = full.ids[tokens + 1 if self.settings.nextlat_token == "next" else tokens]
        logits = states.frozen_head(ahead[torch.searchsorted(full.supervised, tokens)]).float()
        return {"nextlat": drift.sum(), "nextlat_token": F.cross_entropy(logits, after, reduction="sum")}

    def _token_positions(self, batch: Batch) -> Tensor:
        full = batch.places["full"]
        return full.followed if self.settings.nextlat_token == "next" else full.supervised


class DynamicsHead(nn.Module):
    """The step from a state to the next, given the next token's embedding: three linear layers of width H, GELU."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * hidden_size)
        self.layers = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """(N, H) and (N, H) → (N, H)."""
        step: Tensor = self.layers(self.norm(torch.cat([state, embedding], dim=-1).to(self.norm.weight.dtype)))
        return state + step


def distance(predicted: Tensor, target: Tensor, kind: Distance) -> Tensor:
    """(N, H), (N, H) → (N,). InfoNCE is that of van den Oord et al., arXiv 1807.03748, with cosines as CLIP has it."""
    if kind == "infonce":
        near = F.normalize(predicted, dim=-1) @ F.normalize(target, dim=-1).T / TEMPERATURE
        return F.cross_entropy(near, torch.arange(len(near), device=near.device), reduction="none")
    if kind == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1)
    if kind == "smooth-l1":
        return F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
    if kind == "l2":
        norm: Tensor = torch.linalg.vector_norm(predicted - target, dim=-1)
        return norm
    return F.mse_loss(predicted, target, reduction="none").mean(-1)
