"""Latent Visual Reasoning: before it answers, the model looks again at the regions that matter (arXiv 2509.24251).

`L = L_VLM + λ L_LVR`. Each region stands between question and answer as `<|lvr_start|>`, one `<|lvr|>` for each visual
token `v` of the image inside it, `<|lvr_end|>`. Teacher forcing: `v_p` is fed at the `<|lvr|>` in position p, and the
state before it is to become it, `L_LVR = d(head(h[p−1]), v_p)`; at inference `head(h[p−1])` is fed in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from pearl.boxes import as_box, out_of
from pearl.errors import PearlError
from pearl.records import Box, Step
from pearl.trainer.conversation import Conversation, Turn
from pearl.trainer.objectives.base import Losses, Objective, States
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import ImageInputs, LatentRun, ViewEncoder, ViewError

CROPS = frozenset({"crop", "zoom"})
"""Tools whose output shows the box that they were given and nothing else."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

Head = Literal["none", "simple", "glu"]
Distance = Literal["mse", "mae", "cosine"]


@dataclass(frozen=True)
class Lvr(Objective):
    """Settings.

    Attributes:
        weight: λ.
        head: What turns a state into a visual token: nothing, a two-layer MLP, or a gated linear unit.
        loss: The distance d.
    """

    name: ClassVar[str] = "lvr"
    special_tokens: ClassVar[tuple[str, ...]] = ("<|lvr_start|>", "<|lvr|>", "<|lvr_end|>")
    latent_token: ClassVar[str] = "<|lvr|>"
    needs_grids: ClassVar[bool] = True
    step_words: ClassVar[bool] = False
    step_images: ClassVar[bool] = False
    weight: float = 0.1
    head: Head = "none"
    loss: Distance = "mse"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise PearlError("the weight of lvr's regression cannot be negative")
        for name, known in (("head", get_args(Head)), ("loss", get_args(Distance))):
            if (value := getattr(self, name)) not in known:
                raise PearlError(f"lvr has no {name} {value!r}; it has {', '.join(known)}")

    def example(self, conversation: Conversation, images: Sequence[ImageInputs], encoder: ViewEncoder) -> Example:
        grid = encoder.grid(images[0])
        looks = [visual_tokens(box, grid, images[0].shown) for box in regions(conversation.trajectory.steps)]
        latents = [LatentRun(0, tuple(look[:, None])) for look in looks if len(look)]
        if not latents:
            raise ViewError("lvr needs regions, and no step has a box on the original image or on a crop of it")
        start, token, end = self.special_tokens
        words = "".join(start + token * len(latent.groups) + end for latent in latents)
        answer = Turn("assistant", (f"{words}\n{conversation.direct().parts[0]}",), True)
        view = encoder.view((*conversation.question(), answer), images, latents=latents)
        return Example(conversation.trajectory.id, tuple(images[:1]), {"latent": view})

    def losses(self, hidden_size: int) -> Losses:
        return LvrLosses(self, hidden_size)


class LvrLosses(Losses):
    def __init__(self, settings: Lvr, hidden_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.weights = {"vlm": 1.0, "lvr": settings.weight}
        self.head = {"none": nn.Identity, "simple": SimpleHead, "glu": GluHead}[settings.head](hidden_size)

    def counts(self, batch: Batch) -> dict[str, int]:
        view = batch.places["latent"]
        return {"vlm": len(view.supervised), "lvr": len(view.latents)}

    def forward(self, states: States) -> dict[str, Tensor]:
        before = states.of("latent", states.batch.places["latent"].latents - 1)
        predicted, target = self.head(before).float(), states.latents.detach().float()
        self.watched = predicted.detach(), target
        regression = distance(predicted, target, self.settings.loss)
        return {"vlm": states.next_token("latent"), "lvr": regression.sum()}


class SimpleHead(nn.Module):
    """LayerNorm, then two linear layers of width H with a GELU between them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, state: Tensor) -> Tensor:
        """(N, H) → (N, H)."""
        predicted: Tensor = self.layers(self.norm(state.to(self.norm.weight.dtype)))
        return predicted


class GluHead(nn.Module):
    """`down(SiLU(gate(h)) · up(h))`, 4 H wide. (The published code takes the language model's own MLP width.)"""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, 4 * hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, state: Tensor) -> Tensor:
        """(N, H) → (N, H)."""
        state = state.to(self.gate.weight.dtype)
        predicted: Tensor = self.down(F.silu(self.gate(state)) * self.up(state))
        return predicted


def distance(predicted: Tensor, target: Tensor, kind: Distance) -> Tensor:
    """(N, H), (N, H) → (N,)."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1)
    error = F.mse_loss if kind == "mse" else F.l1_loss
    return error(predicted, target, reduction="none").mean(-1)


def regions(steps: Sequence[Step]) -> list[Box]:
    """The boxes that the steps look at, in their order, as boxes of the original image.

    A box on a crop (of a crop …) is one on the original; boxes on other tools' images are left out, and so are
    malformed ones, which stand in calls that were refused.
    """
    found: list[Box] = []
    frames: list[Box | None] = [WHOLE]
    for step in steps:
        image = step.call.arguments.get("image", 0)
        frame = frames[image] if isinstance(image, int) and 0 <= image < len(frames) else None
        boxes = [] if frame is None else [out_of(frame, box) for box in _boxes(step.call.arguments)]
        is_crop = step.call.tool in CROPS and step.observation.image is not None
        frames.append(boxes[0] if is_crop and boxes else None)
        found += boxes
    return found


def visual_tokens(box: Box, grid: np.ndarray, shown: Box = WHOLE) -> np.ndarray:
    """The merged visual tokens that a box touches, row by row; none if it lies where the image is cut off.

    The paper takes floor and ceil on the patch grid and then merges 2×2: together floor and ceil on the merged grid.

    Args:
        grid: (rows, columns) which token shows each part.
        shown: The part of the image that they show.
    """
    (left, top, right, bottom), (x, y, far_x, far_y) = box, shown
    columns = _touched((left - x) / (far_x - x), (right - x) / (far_x - x), grid.shape[1])
    rows = _touched((top - y) / (far_y - y), (bottom - y) / (far_y - y), grid.shape[0])
    tokens: np.ndarray = grid[np.ix_(rows, columns)].reshape(-1)
    return tokens


def _touched(low: float, high: float, count: int) -> np.ndarray:
    return np.arange(max(0, math.floor(low * count)), min(count, math.ceil(high * count)))


def _boxes(arguments: Mapping[str, Any]) -> list[Box]:
    given = arguments.get("boxes", [arguments.get("box")])
    many = given if isinstance(given, list | tuple) else []
    return [box for one in many if (box := as_box(one))]
