"""Whether the model's own view would do: what a crop of it is worth, and what visual tokens hold of the object.

The crops of the trajectories are cut anew from the picture as the model is given it, so that they show nothing that it
was not shown; and a linear probe reads the answer from the visual token in which the object lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pearl.evaluation.embeddings import answers_read
from pearl.evaluation.gain import Gain, GainMeter, by_skill, measure_gains
from pearl.evaluation.insides import Insides
from pearl.evaluation.statistics import bootstrap_interval
from pearl.evaluation.subject import Subject
from pearl.images import Picture, decode, encode
from pearl.records import EncodedImage, Step, Trajectory
from pearl.tools.toolbox import Toolbox
from pearl.trainer.conversation import load_template
from pearl.trainer.objectives.lvr import regions
from recipes.results.data import SKILLS, TOOLS


def own_view(trajectory: Trajectory, side: int) -> Trajectory:
    """The same trajectory, its crops cut from the picture after it was shrunk to `side` pixels and enlarged again."""
    whole = Image.fromarray(decode(trajectory.image.data))
    shown = whole.resize((side, side), Image.Resampling.BICUBIC).resize(whole.size, Image.Resampling.BICUBIC)
    steps, pictures, toolbox = list[Step](), [Picture(np.asarray(shown))], Toolbox(TOOLS)
    for step in trajectory.steps:
        [result] = toolbox.execute([(step.call, pictures)])
        assert result.pixels is not None, result.text
        pictures.append(Picture(result.pixels))
        image = EncodedImage(encode(result.pixels, "png"))
        steps.append(replace(step, observation=replace(step.observation, image=image)))
    return replace(trajectory, steps=tuple(steps))


def crops_of_views(models: Mapping[str, tuple[str, int]], trajectories: Sequence[Trajectory]) -> str:
    """The probability of the right answer among the options; of each model its place, and its view's side in pixels."""
    lines = [
        "| | | trajectories | image alone | after the crop | after a crop of its own view |",
        "|---|---|---|---|---|---|",
    ]
    for name, (place, side) in models.items():
        meter = GainMeter(Subject.load(place), load_template("pearl"))
        cut = [own_view(one, side) for one in trajectories]
        tables = [
            by_skill([gain for _, gain in measure_gains(meter, shown) if isinstance(gain, Gain)])
            for shown in (trajectories, cut)
        ]
        for given, own in zip(*tables, strict=True):
            if given.skill in SKILLS:
                values = " | ".join(f"{value:.2f}" for value in (given.before, given.after, own.after))
                lines.append(f"| {name} | {given.skill} | {given.count} | {values} |")
    return "\n".join(lines)


def tokens_read(models: Mapping[str, str], trajectories: Sequence[Trajectory]) -> str:
    """How often the answer can be read from the visual token at the middle of the object, and from the mean of all."""
    titles = [f"{skill}: {where}" for skill in SKILLS for where in ("at the object", "whole image")]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, place in models.items():
        insides = Insides.of(Subject.load(place))
        tokens = [object_and_mean(insides, one) for one in trajectories]
        cells = list[str]()
        for skill in SKILLS:
            asked = [(one, pair) for one, pair in zip(trajectories, tokens, strict=True) if one.skill == skill]
            for side in range(2):
                right = answers_read(torch.stack([pair[side] for _, pair in asked]), [one for one, _ in asked])
                found = bootstrap_interval(right)
                cells.append(f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
