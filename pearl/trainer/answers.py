"""Early answer accuracy: which of a question's options the model finds likeliest, straight after image and question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from pearl.records import Trajectory
from pearl.trainer.conversation import Conversation, Template
from pearl.trainer.learner import Learner
from pearl.trainer.packing import Example, Packer
from pearl.trainer.views import ViewEncoder


@torch.no_grad()
def answer_accuracy(
    learner: Learner, packer: Packer, encoder: ViewEncoder, template: Template, trajectories: Sequence[Trajectory]
) -> dict[str, float]:
    """The share of questions with options whose right option has the highest probability, and that of chance.

    The options are branches of one tree behind the question: one forward a question.
    """
    asked = [t for t in trajectories if t.answer in t.choices and len(t.choices) > 1]
    if not asked:
        return {}
    device = next(learner.parameters()).device
    was_training = learner.training
    learner.eval()
    right = 0
    for trajectory in asked:
        places = packer([_options(trajectory, encoder, template)]).to(device)
        states = learner.states(places)
        scores = []
        for number in range(len(trajectory.choices)):
            place = places.places[str(number)]
            logits = states.head(states.of(str(number), place.supervised - 1)).float()
            scores.append(-F.cross_entropy(logits, place.ids[place.supervised], reduction="sum").item())
        right += trajectory.choices[scores.index(max(scores))] == trajectory.answer
    learner.train(was_training)
    chance = sum(1 / len(trajectory.choices) for trajectory in asked) / len(asked)
    return {"answer_accuracy": right / len(asked), "answer_chance": chance, "answers": float(len(asked))}


def _options(trajectory: Trajectory, encoder: ViewEncoder, template: Template) -> Example:
    images = [encoder.image(trajectory.image)]
    views = {}
    for number, choice in enumerate(trajectory.choices):
        conversation = Conversation(replace(trajectory, answer=choice), template)
        views[str(number)] = encoder.view((*conversation.question(), conversation.direct()), images)
    return Example(trajectory.id, tuple(images), views)
