"""Mirage, Machine Mental Imagery: the model thinks in a few latent tokens where tools showed images (arXiv 2506.17218).

After each thought stand `<|latent_start|>`, k times `<|latent_pad|>`, `<|latent_end|>` in place of the call and of the
image that its tool made: that image's visual tokens, in raster order, in k stretches of which each gives its mean `z`.

- Stage 1 ties the latents to the images: `L = γ L_VLM + (1 − mean cos(h[p−1], z_p))`, with `z_p` fed at position p.
- Stage 2 lets them go: `L = L_VLM`, with the model's own state `h[p−1]` fed at position p, as at inference. The images
  are not needed; the words after a latent train it through the recurrence, whose gradients are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pearl.errors import PearlError
from pearl.trainer.conversation import Conversation, Turn
from pearl.trainer.objectives.base import Losses, Objective, States
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import ImageInputs, LatentRun, ViewEncoder, ViewError


@dataclass(frozen=True)
class Mirage(Objective):
    """Settings.

    Attributes:
        stage: 1, or 2, which starts from a model of stage 1.
        num_latents: k, for each image.
        vlm_weight: γ, in stage 1.
    """

    name: ClassVar[str] = "mirage"
    special_tokens: ClassVar[tuple[str, ...]] = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
    latent_token: ClassVar[str] = "<|latent_pad|>"
    step_images: ClassVar[bool] = False
    stage: Literal[1, 2] = 1
    num_latents: int = 4
    vlm_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise PearlError(f"mirage has stages 1 and 2, not {self.stage!r}")
        if self.num_latents < 1:
            raise PearlError("mirage needs at least one latent token for each image")
        if self.vlm_weight < 0:
            raise PearlError("the weight of mirage's next-token loss cannot be negative")

    def example(self, conversation: Conversation, images: Sequence[ImageInputs], encoder: ViewEncoder) -> Example:
        start, token, end = self.special_tokens
        words, latents = list[str](), list[LatentRun]()
        for step, image in zip(conversation.trajectory.steps, conversation.of_step, strict=True):
            words.append(step.thought.strip())
            if image is not None:
                words.append(start + token * self.num_latents + end)
                latents.append(self._latent(image, images[image]))
        if not latents:
            raise ViewError("mirage needs images that tools made, and no step has one")
        said = "\n".join([*filter(None, words), str(conversation.conclusion().parts[0])])
        turns = (*conversation.question(), Turn("assistant", (said,), True))
        view = encoder.view(turns, images, latents=latents)
        used = images if self.stage == 1 else images[:1]
        return Example(conversation.trajectory.id, tuple(used), {"latent": view})

    def _latent(self, index: int, image: ImageInputs) -> LatentRun:
        if self.stage == 2:
            return LatentRun(0, (np.empty(0, np.int64),) * self.num_latents)
        if image.num_tokens < self.num_latents:
            raise ViewError(f"an image has {image.num_tokens} visual tokens, too few for {self.num_latents} latents")
        return LatentRun(index, tuple(np.array_split(np.arange(image.num_tokens), self.num_latents)))

    def losses(self, hidden_size: int) -> Losses:
        return MirageLosses(self)


class MirageLosses(Losses):
    def __init__(self, settings: Mirage) -> None:
        super().__init__()
        self.recurrent = settings.stage == 2
        self.weights = {"vlm": 1.0} if self.recurrent else {"vlm": settings.vlm_weight, "latent": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        view = batch.places["latent"]
        counts = {"vlm": len(view.supervised), "latent": len(view.latents)}
        return {name: counts[name] for name in self.weights}

    def forward(self, states: States) -> dict[str, Tensor]:
        terms = {"vlm": states.next_token("latent")}
        if not self.recurrent:
            before = states.of("latent", states.batch.places["latent"].latents - 1)
            predicted, target = before.float(), states.latents.detach().float()
            self.watched = predicted.detach(), target
            terms["latent"] = (1 - F.cosine_similarity(predicted, target, dim=-1)).sum()
        return terms
