"""What the visual tokens hold of the object that is asked about, as a linear probe reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pearl.evaluation.embeddings import probe_accuracy
from pearl.evaluation.insides import Insides
from pearl.evaluation.statistics import Estimate, bootstrap_interval
from pearl.evaluation.subject import Subject
from pearl.records import Trajectory
from pearl.trainer.objectives.lvr import regions

KINDS = ("colour", "shape")
"""What is asked for, a word of the question."""


def tokens_read(models: Mapping[str, str], trajectories: Sequence[Trajectory]) -> dict[str, dict[str, Estimate]]:
    """By model, how often the answer can be read from the visual token at the middle of the object, and from the mean
    of all."""
    found = dict[str, dict[str, Estimate]]()
    for name, place in models.items():
        insides = Insides.of(Subject.load(place))
        tokens = [object_and_mean(insides, one) for one in trajectories]
        found[name] = {}
        for kind in KINDS:
            asked = [(one, pair) for one, pair in zip(trajectories, tokens, strict=True) if kind in one.question]
            for side, where in enumerate(("at the object", "whole image")):
                right = probe_accuracy(torch.stack([pair[side] for _, pair in asked]), [one for one, _ in asked])
                found[name][f"{kind}: {where}"] = bootstrap_interval(right)
    return found


@torch.no_grad()
def object_and_mean(insides: Insides, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """(H,) the merged visual token at the middle of the box that was looked at last, and the mean of the image's."""
    image = insides.encoder.image(trajectory.image)
    inputs = {name: tensor.to(insides.subject.model.device) for name, tensor in image.tensors.items()}
    tokens = insides.family.visual(insides.subject.model.model, inputs).tokens.float().cpu()
    left, top, right, bottom = regions(trajectory.steps)[-1]
    grid = insides.encoder.grid(image)
    rows, columns = grid.shape
    token = grid[int((top + bottom) / 2 * rows), int((left + right) / 2 * columns)]
    return tokens[token], tokens.mean(0)
