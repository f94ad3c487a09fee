from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pearl.errors import PearlError
from pearl.records import Trajectory
from pearl.trainer.config import ConfigError
from pearl.trainer.conversation import Conversation, load_template
from pearl.trainer.families import FAMILIES as KNOWN
from pearl.trainer.learner import Learner
from pearl.trainer.objectives.base import Objective
from pearl.trainer.objectives.lvr import Lvr
from pearl.trainer.objectives.mirage import Mirage
from pearl.trainer.objectives.pearl import DynamicsHead, Pearl, distance
from pearl.trainer.objectives.sft import Sft, SftAnswer
from pearl.trainer.packing import Batch, Packer
from pearl.trainer.preparation import prepare
from tests import latents, plain
from tests.plain import Tiny, conversation, picture, step, tiny, trajectories, trajectory
from tests.runs import config, data_file, model
from tests.tiny_vlms import FAMILIES


def batch(t: Tiny, objective: Objective, given: list[Trajectory], template: str = "pearl") -> Batch:
    made = []
    for one in given:
        talk = Conversation(one, load_template(template))
        made.append(objective.example(talk, [t.encoder.image(image) for image in talk.images], t.encoder))
    return Packer(t.family, t.vlm.config, t.encoder.padding)(made)


def learner(t: Tiny, objective: Objective) -> Learner:
    torch.manual_seed(0)
    return Learner(t.vlm, t.family, objective.losses(t.hidden_size))


def gradient(term: Tensor, of: Any) -> Tensor | None:
    (found,) = torch.autograd.grad(term, of, allow_unused=True, retain_graph=True)
    return None if found is None or not found.any() else found


# sft


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("objective", "view"), [(Sft(), "full"), (SftAnswer(), "direct")])
def test_sft_is_the_models_own_loss(name: str, objective: Objective, view: str) -> None:
    t, given = tiny(name), trajectories()[3]
    messages = conversation(given, view)
    inputs, learned = plain.inputs_of(t, messages), plain.forward(t, messages).supervised
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, learned] = inputs["input_ids"][0, learned]
    model, made = learner(t, objective), batch(t, objective, [given])
    assert model.losses.counts(made) == {"vlm": len(learned)}
    mean = model(made)["vlm"] / len(learned)
    assert mean.item() == pytest.approx(t.vlm(**inputs, labels=labels).loss.item(), abs=1e-5)


def test_sft_learns_the_answer_alone_where_the_template_says_so() -> None:
    t, given = tiny("qwen2_5_vl"), [trajectory(step("I look.", picture(1)))]
    counts = [
        learner(t, Sft()).losses.counts(batch(t, Sft(), given, name))["vlm"] for name in ("pearl", "published-lvr")
    ]
    assert counts[1] == len(t.processor.tokenizer("<answer> left </answer><|im_end|>")["input_ids"]) < counts[0]


def test_sft_answer_needs_no_images_of_tools() -> None:
    made = batch(tiny("llava"), SftAnswer(), trajectories())
    assert len(made.images["pixel_values"]) == len(trajectories())


# pearl: its options


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, {"vlm": 1, "jepa": 0.2, "nextlat": 0.2, "nextlat_token": 0.2}),
        ({"lambda_": 0.0}, {"vlm": 1, "jepa": 0, "nextlat": 0, "nextlat_token": 0}),
        ({"jepa": False, "lambda_": 0.5}, {"vlm": 1, "nextlat": 0.5, "nextlat_token": 0.5}),
        ({"nextlat": False}, {"vlm": 1, "jepa": 0.2}),
        ({"jepa": False, "nextlat": False}, {"vlm": 1}),
        ({"nextlat": False, "direct_weight": 2.0}, {"vlm": 1, "jepa": 0.2, "direct": 2}),
    ],
)
def test_terms_and_weights(options: dict[str, Any], terms: dict[str, float]) -> None:
    t, objective = tiny("qwen2_5_vl"), Pearl(**options)
    model, made = learner(t, objective), batch(tiny("qwen2_5_vl"), objective, trajectories()[:2])
    assert model.losses.weights == terms
    assert model(made).keys() == model.losses.counts(made).keys() == terms.keys()
    assert (model.losses.predictors is not None) == ("jepa" in terms)
    assert (made.target_rows is not None) == ("jepa" in terms)


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_predictor_tokens(count: int) -> None:
    t, objective = tiny("gemma3"), Pearl(num_predictor_tokens=count, nextlat=False)
    model, made = learner(t, objective), batch(t, objective, trajectories()[:2])
    assert made.main.predictor_of.tolist() == [*range(count), *range(count)]
    found = gradient(model(made)["jepa"], model.losses.predictors)
    assert found is not None
    assert found.shape == (count, t.hidden_size)
    assert found.any(-1).all()  # each of them has a part in the predicted embedding


@pytest.mark.parametrize(("count", "pairs"), [(1, 5), (3, 12), (5, 15), (8, 15)])
def test_steps_and_predictor_tokens_meet_as_far_as_both_go(count: int, pairs: int) -> None:
    """There are 0, 1, 2, 3, 4 and 5 steps; tokens beyond them are learned by nobody."""
    t, objective = tiny("qwen2_5_vl"), Pearl(targets="steps", num_predictor_tokens=count)
    model, made = learner(t, objective), batch(t, objective, trajectories())
    assert model.losses.counts(made)["jepa"] == pairs
    assert len(made.places["target"].marks["target"]) == pairs
    found = gradient(model(made)["jepa"], model.losses.predictors)
    assert found is not None
    assert found.any(-1).tolist() == [number < 5 for number in range(count)]


@pytest.mark.parametrize("kind", ["cosine", "smooth-l1", "l2", "mse"])
def test_distances(kind: Any) -> None:
    predicted, target = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    expected = [plain.distance(p, t, kind).item() for p, t in zip(predicted, target, strict=True)]
    assert distance(predicted, target, kind).tolist() == pytest.approx(expected)
    assert distance(target, target, kind).tolist() == pytest.approx([0] * 5, abs=1e-6)


def test_a_contrastive_distance_is_the_surprise_at_finding_ones_own() -> None:
    predicted, target = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    near = [[(1 - plain.distance(p, t, "cosine").item()) / 0.1 for t in target] for p in predicted]
    expected = [math.log(sum(map(math.exp, row))) - row[number] for number, row in enumerate(near)]
    assert distance(predicted, target, "infonce").tolist() == pytest.approx(expected)
    shared = 100 * torch.ones(7)
    assert distance(target + shared, target + shared, "cosine").max() < 1e-4
    assert distance(target + shared, target + shared, "infonce").min() > 1  # alike, and so not told apart
    assert distance(predicted[:1], target[:1], "infonce").tolist() == [0]


def test_the_dynamics_head_has_three_layers_as_wide_as_the_model() -> None:
    head = DynamicsHead(6)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if "weight" in name}
    assert shapes == {
        "norm.weight": (12,),
        "layers.0.weight": (6, 12),
        "layers.2.weight": (6, 6),
        "layers.4.weight": (6, 6),
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_predictor_tokens": 0}, "at least one predictor token"),
        ({"lambda_": -1.0}, "cannot be negative"),
        ({"direct_weight": -0.1}, "cannot be negative"),
        ({"jepa": False, "targets": "steps"}, "there is none with jepa=False"),
        ({"jepa": False, "target_encoder": "timm:test_vit"}, "there is none with jepa=False"),
        ({"targets": "steps", "target_encoder": "timm:test_vit"}, "leave out targets=steps"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PearlError, match=said):
        Pearl(**options)


# pearl: what learns from what


def test_the_target_gives_no_gradient() -> None:
    """Only what the source view says is learned from its term, not the words of the steps."""
    t, objective = tiny("idefics3"), Pearl(nextlat=False)
    model = learner(t, objective)
    states = model.states(batch(t, objective, trajectories()[:3]))
    assert not states.targets.requires_grad
    predicted, target = model.losses.embeddings(states)  # type: ignore[operator]
    assert predicted.requires_grad
    assert not target.requires_grad
    held = gradient(model.losses(states)["jepa"], t.vlm.get_input_embeddings().weight)
    assert held is not None
    said = set(states.batch.places["source"].ids.tolist())
    assert set(held.any(-1).nonzero()[:, 0].tolist()) <= said


def test_the_head_learns_from_words_and_not_from_predicted_states() -> None:
    t = tiny("idefics3")  # whose head is not tied to its embeddings
    model = learner(t, Pearl(direct_weight=1))
    terms = model(batch(t, Pearl(direct_weight=1), trajectories()[:3]))
    learns = {name: gradient(term, t.vlm.get_output_embeddings().weight) is not None for name, term in terms.items()}
    assert learns == {"vlm": True, "jepa": False, "nextlat": False, "nextlat_token": False, "direct": True}


def test_what_nextlat_teaches() -> None:
    t = tiny("idefics3")
    model = learner(t, Pearl())
    terms = model(batch(t, Pearl(), trajectories()[:3]))
    head = model.losses.dynamics.layers[4].weight  # type: ignore[union-attr, index]
    for name in ("nextlat", "nextlat_token"):
        assert gradient(terms[name], head) is not None
        assert gradient(terms[name], t.vlm.get_input_embeddings().weight) is not None
        assert gradient(terms[name], model.losses.predictors) is None


# pearl: sums and counts


def test_counts() -> None:
    t, given = tiny("qwen2_5_vl"), trajectories()
    turns = sum(len(one.steps) + 1 for one in given)
    words = sum(len(view.supervised) for view in (plain.forward(t, conversation(one, "full")) for one in given))
    answers = sum(len(plain.forward(t, conversation(one, "direct")).supervised) for one in given)
    for which, ahead in (("next", words - turns), ("published", words)):
        objective = Pearl(direct_weight=1, nextlat_token=which)  # type: ignore[arg-type]
        assert learner(t, objective).losses.counts(batch(t, objective, given)) == {
            "vlm": words, "jepa": len(given), "nextlat": words, "nextlat_token": ahead, "direct": answers,
        }  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "llava_onevision", "gemma3"])
def test_a_batch_in_parts_sums_to_the_whole(name: str) -> None:
    t, objective, given = tiny(name), Pearl(direct_weight=1, targets="steps"), trajectories()
    model = learner(t, objective)
    whole, *parts = [batch(t, objective, some) for some in (given, given[:1], given[1:4], given[4:])]
    counts, sums = model.losses.counts(whole), model(whole)
    for term, total in sums.items():
        assert counts[term] == sum(model.losses.counts(part)[term] for part in parts)
        assert sum(model(part)[term].item() for part in parts) == pytest.approx(total.item(), rel=1e-5)


OBJECTIVES: tuple[Objective, ...] = (
    Sft(), SftAnswer(), Pearl(), Pearl(targets="steps", direct_weight=1), Lvr(), Mirage(), Mirage(stage=2),
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_objective_takes_a_step(name: str, objective: Objective) -> None:
    """The gradient's direction makes the loss smaller."""
    t = latents.tiny(name, type(objective))
    learns, made = t.learner(objective), t.batch(objective, trajectories()[1:4])
    weights, counts = learns.losses.weights, learns.losses.counts(made)

    def loss() -> Tensor:
        return torch.stack([weights[name] * total / counts[name] for name, total in learns(made).items()]).sum()

    before = loss()
    parameters = list(learns.parameters())
    found = torch.autograd.grad(before, parameters, allow_unused=True)
    size = torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt()
    with torch.no_grad():
        for parameter, g in zip(parameters, found, strict=True):
            if g is not None:
                parameter.sub_(0.01 * g / size)
        after = loss().item()
    assert after < before.item() - 0.005 * size.item()


def test_boxes_on_images_of_an_unknown_family_are_refused_before_any_work(tmp_path: Path) -> None:
    settings = json.loads((model("llava") / "config.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, "model_type": "llava_next"}))
    base, out = str(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(ConfigError, match=f"where those of {base} lie is not known; it can train {', '.join(KNOWN)}"):
        prepare(config(data_file(tmp_path), out, objective="lvr", model=base))
    assert not out.exists()
