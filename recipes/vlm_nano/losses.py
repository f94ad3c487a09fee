"""What each stage of vlm-nano's training minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.vlm_nano.batches import Batch, Crops, places
from recipes.vlm_nano.network import Language, Sight, say
from recipes.vlm_nano.things import FEATURES, KINDS, LEVELS, MEASURES, PRESENT, SIDE

NOISE = 0.1
NEAR_METRES = 1.0
SPEECH_SHARE, READING_SHARE, MEASURE_SHARE, IMITATION_SHARE = 0.3, 0.2, 0.5, 0.1
IMPORTANCE = {"colour": 1.0, "shape": 3.0, "material": 1.0}


@dataclass(frozen=True)
class Result:
    """`parts` are what is reported; `correct` is 1 for every answer that was right, 0 for others; `families` (same
    shape) says whose it was."""

    loss: Tensor
    parts: dict[str, Tensor]
    correct: Tensor | None = None
    families: Tensor | None = None


class Pupil(nn.Module):
    """The model with what only its training needs: true visual tokens, and heads that read what is seen."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        width, seen = model.config.text_config.hidden_size, model.config.vision_config.hidden_size
        self.model, self.noise = model, NOISE
        self.things = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.read_token = nn.Linear(width, FEATURES + LEVELS)
        self.read_crop = nn.Linear(width, sum(KINDS))
        self.read_patch = nn.Linear(seen, KINDS[0] + KINDS[1] + 3)
        self.read_measures = nn.Linear(width, len(MEASURES) * LEVELS)
        self.sight = Sight(model.model.visual)
        self.language = Language(model.model.language_model)
        self.grid = nn.Buffer(torch.from_numpy(places(SIDE, SIDE))[None], persistent=False)

    def look(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """States by patch, visual tokens of the images, and those of the crops."""
        assert batch.images is not None
        states, tokens = self.sight(batch.images, self.grid.expand(len(batch.images), -1, -1), None)
        return states, tokens, self.sight(batch.crops, batch.crop_places, batch.crop_real)[1]

    def objects_loss(self, batch: Batch) -> Result:
        """Answers from true visual tokens, made a little uncertain; those without an object are not seen."""
        return self._answers(batch, self._true_tokens(batch), None, batch.cells[..., PRESENT] == 0, measuring=False)

    def places_loss(self, batch: Batch) -> Result:
        """The same, and by its middle the language model is to know where things are and how far."""
        return self._answers(batch, self._true_tokens(batch), None, batch.cells[..., PRESENT] == 0)

    def cells_loss(self, batch: Batch) -> Result:
        """Answers from true visual tokens among many that say nothing."""
        return self._answers(batch, self._true_tokens(batch), None)

    def _true_tokens(self, batch: Batch) -> Tensor:
        tokens: Tensor = self.things(batch.cells)
        return tokens + self.noise * tokens.detach().std() * torch.randn_like(tokens)

    def crops_loss(self, batch: Crops) -> Result:
        """What a crop shows, read from the mean of its tokens."""
        tokens = self.sight(batch.patches, batch.places, None)[1]
        loss, parts = crop_loss(self.read_crop(tokens.mean(1)).float(), batch.kinds)
        return Result(loss, parts)

    def sight_loss(self, batch: Batch) -> Result:
        """Visual tokens as the true ones would be, and states from which the picture can be read."""
        states, tokens, crops = self.look(batch)
        with torch.no_grad():
            truth = self.things(batch.cells).float()
        imitation = imitation_loss(tokens, truth, batch.cells)
        reading, parts = self._reading(batch, states, tokens, crops)
        loss = 2 * imitation + reading
        if batch.more is not None:
            others = self.crops_loss(batch.more)
            loss, parts = loss + 2 * others.loss, {**parts, **{f"more {k}": v for k, v in others.parts.items()}}
        return Result(loss, {"imitation": imitation, **parts})

    def joint_loss(self, batch: Batch) -> Result:
        """Answers from pictures, which must stay readable and near the true tokens; or from true tokens, where the
        batch has no pictures."""
        if batch.images is None:
            told = self.cells_loss(batch)
            return Result(told.loss, {f"told {name}": value for name, value in told.parts.items()})
        states, tokens, crops = self.look(batch)
        answers = self._answers(batch, tokens, crops)
        reading, parts = self._reading(batch, states, tokens, crops)
        imitation = imitation_loss(tokens, self.things(batch.cells).float(), batch.cells)
        return Result(
            answers.loss + READING_SHARE * reading + IMITATION_SHARE * imitation,
            {**answers.parts, "imitation": imitation, **parts}, answers.correct, answers.families,
        )  # fmt: skip

    heads_loss = closer_loss = joint_loss

    def _answers(
        self, batch: Batch, tokens: Tensor, crops: Tensor | None, hidden: Tensor | None = None, measuring: bool = True
    ) -> Result:
        """What is said, and what the language model knows of places and depths by its middle."""
        said = say(self.model, self.language, batch.rows, tokens, crops, hidden)
        loss, parts = said.answers + SPEECH_SHARE * said.speech, {"answers": said.answers}
        if said.speech > 0:
            parts["speech"] = said.speech
        if measuring:
            read = self.read_measures(F.rms_norm(said.middle, said.middle.shape[-1:])).float()
            measures, known = measure_loss(read, batch)
            loss, parts = loss + MEASURE_SHARE * measures, {**parts, **known}
        return Result(loss, parts, said.right, said.families)

    def _reading(self, batch: Batch, states: Tensor, tokens: Tensor, crops: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        by_token = token_loss(self.read_token(tokens).float(), batch)
        by_patch = patch_loss(self.read_patch(states).float(), batch.patches)
        assert batch.crop_real is not None
        assert batch.crop_kinds is not None
        real = batch.crop_real[:, ::4, None].float()
        by_crop = crop_loss(self.read_crop((crops * real).sum(1) / real.sum(1)).float(), batch.crop_kinds)
        return by_token[0] + by_patch[0] + by_crop[0], {**by_token[1], **by_patch[1], **by_crop[1]}


def imitation_loss(tokens: Tensor, truth: Tensor, cells: Tensor) -> Tensor:
    """How far visual tokens are from the true ones, in units of their variance."""
    there = cells[..., PRESENT] > 0
    error = (tokens.float() - truth).square().mean(-1) / torch.maximum(
        truth[there].var(), tokens[there].float().var()
    ).detach()
    return error[there].mean() + 0.5 * error[~there].mean()


def measure_loss(read: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Where the object is that a visual token shows, and how far away, each as one of `LEVELS`: what a model has as
    such classes it comes to say, what it has as a number it does not."""
    there = batch.cells[..., PRESENT] > 0
    logits, label = read[there].view(-1, len(MEASURES), LEVELS), batch.levels[there]
    right = (logits.argmax(-1) == label).float().mean(0)
    loss = F.cross_entropy(logits.flatten(0, 1), label.flatten())
    return loss, {"known place": right[:4].mean(), "known depth": right[4]}


def token_loss(read: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Is an object centred here; if so, of which kinds, where exactly, how large, how far (as a number and a level)?"""
    cells = batch.cells
    there = cells[..., PRESENT] > 0
    present = F.binary_cross_entropy_with_logits(read[..., PRESENT], cells[..., PRESENT], pos_weight=_like(read, 3.0))
    got, truth = read[there], cells[there]
    loss, parts, start = 4 * present, dict[str, Tensor](), 1
    for name, count in zip(("colour", "shape", "material"), KINDS, strict=True):
        logits, label = got[:, start : start + count], truth[:, start : start + count].argmax(-1)
        loss = loss + IMPORTANCE[name] * F.cross_entropy(logits, label)
        parts[f"seen {name}"] = (logits.argmax(-1) == label).float().mean()
        start += count
    found = ((read[..., PRESENT] > 0) & there).sum() / ((read[..., PRESENT] > 0) | there).sum()
    loss = loss + 2 * F.smooth_l1_loss(got[:, start:FEATURES], truth[:, start:])
    far, level = got[:, FEATURES:], batch.levels[there][:, -1]
    loss = loss + F.cross_entropy(far, level)
    parts["seen depth"] = (far.argmax(-1) == level).float().mean()
    return loss, {"found": found, **parts}


def crop_loss(read: Tensor, kinds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Colour, shape and material of the object that a crop shows."""
    loss, parts, start = read.sum() * 0, dict[str, Tensor](), 0
    there = kinds[:, 0] >= 0
    if not there.any():
        return loss, parts
    for index, (name, count) in enumerate(zip(("colour", "shape", "material"), KINDS, strict=True)):
        logits, label = read[there, start : start + count], kinds[there, index]
        loss = loss + IMPORTANCE[name] * F.cross_entropy(logits, label)
        parts[f"crop {name}"] = (logits.argmax(-1) == label).float().mean()
        start += count
    return loss, parts


def patch_loss(read: Tensor, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Colour and shape of the object in each patch (or none), and the logarithm of its depth."""
    colours, shapes = KINDS[0] + 1, KINDS[1] + 1
    colour, shape = (patches[..., k].long() + 1 for k in (0, 1))
    weights = torch.where(colour > 0, 3.0, 1.0)

    def named(logits: Tensor, label: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    depth = torch.log(patches[..., 2] / NEAR_METRES)
    far = (weights * (read[..., -1] - depth).abs()).sum() / weights.sum()
    loss = named(read[..., :colours], colour) + named(read[..., colours : colours + shapes], shape) + far
    return loss, {"patch depth": far}


def _like(tensor: Tensor, value: float) -> Tensor:
    return torch.full((), value, device=tensor.device, dtype=tensor.dtype)
