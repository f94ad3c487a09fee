"""Early answer accuracy: which of a question's options the model finds likeliest, straight after image and question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pearl.images import ImageError
from pearl.records import Trajectory
from pearl.trainer.conversation import Conversation, Template
from pearl.trainer.learner import Learner
from pearl.trainer.packing import Example, Packer
from pearl.trainer.views import ViewEncoder, ViewError


@torch.no_grad()
def answer_accuracy(
    learner: Learner, packer: Packer, encoder: ViewEncoder, template: Template, trajectories: Sequence[Trajectory]
) -> dict[str, float]:
    """The share of questions with options whose right option has the highest probability, and that of chance.

    The options are branches of one tree behind the question: one forward a question.
    """
    device = next(learner.parameters()).device
    was_training = learner.training
    learner.eval()
    right, chance = list[bool](), list[float]()
    for trajectory in trajectories:
        if trajectory.answer not in trajectory.choices or len(trajectory.choices) < 2:
            continue
        try:
            options = _options(trajectory, encoder, template)
        except (ImageError, ViewError):
            continue
        batch = packer([options]).to(device)
        states = learner.states(batch)
        scores = [-states.next_token(str(number)).item() for number in range(len(trajectory.choices))]
        right.append(trajectory.choices[scores.index(max(scores))] == trajectory.answer)
        chance.append(1 / len(trajectory.choices))
    learner.train(was_training)
    if not right:
        return {}
    asked = float(len(right))
    return {"answer_accuracy": sum(right) / asked, "answer_chance": sum(chance) / asked, "answers": asked}


def _options(trajectory: Trajectory, encoder: ViewEncoder, template: Template) -> Example:
    images = [encoder.image(trajectory.image)]
    views = {}
    for number, choice in enumerate(trajectory.choices):
        conversation = Conversation(replace(trajectory, answer=choice), template)
        views[str(number)] = encoder.view((*conversation.question(), conversation.direct()), images)
    return Example(trajectory.id, tuple(images), views)
