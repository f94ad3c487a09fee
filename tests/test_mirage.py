from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pearl.errors import PearlError
from pearl.records import Step, Trajectory
from pearl.trainer.learner import Learner
from pearl.trainer.objectives.mirage import Mirage
from pearl.trainer.packing import Packer
from pearl.trainer.views import ViewError
from tests.latents import (
    Tiny,
    assert_same,
    gradients,
    plain_next_token,
    plain_states,
    step,
    tiny,
    trajectory,
    view_of,
    visual_tokens_of,
)
from tests.tiny_vlms import FAMILIES

torch.set_num_threads(1)

BOX = [0.2, 0.2, 0.8, 0.8]


def three() -> list[Trajectory]:
    """Of different lengths and numbers of images."""
    return [
        trajectory(step("crop", 1, thought="First the cup.", box=BOX)),
        trajectory(
            step("crop", 2, box=BOX), step("ocr", text="12", thought="Now the sign."), step("depth", 3),
            seed=4, question="Is the cup, which stands on the table, red?",
        ),
        trajectory(step("depth", 5, thought=""), seed=6, size=(40, 80)),
    ]  # fmt: skip


def learner_and_batch(model: Tiny, objective: Mirage, trajectories: Sequence[Trajectory]) -> tuple[Learner, Any]:
    return model.learner(objective), model.batch(objective, trajectories)


# the view


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_thought_is_followed_by_the_latents_of_its_image(family: str, stage: Any) -> None:
    model = tiny(family, Mirage)
    view = view_of(model.example(Mirage(stage=stage, num_latents=1), three()[1]))
    tokenizer = model.encoder.tokenizer
    said = tokenizer.decode(view.ids[np.flatnonzero(view.supervised)[0] :]).strip()
    run = "<|latent_start|><|latent_pad|><|latent_end|>"
    assert said.startswith(f"I look.\n{run}\nNow the sign.\nI look.\n{run}\nThe cup stands at the left.\nAnswer: left")
    learned = [tokenizer.convert_ids_to_tokens(int(token)) for token in view.ids[view.supervised]]
    assert "<|latent_pad|>" not in learned
    assert learned.count("<|latent_start|>") == learned.count("<|latent_end|>") == 2
    assert view.images == (0,)


def test_an_empty_thought_leaves_no_empty_line() -> None:
    model = tiny("qwen2_5_vl", Mirage)
    view = view_of(model.example(Mirage(), three()[2]))
    said = model.encoder.tokenizer.decode(view.ids)
    assert "assistant\n<|latent_start|>" in said


@pytest.mark.parametrize(("tokens", "latents"), [(4, 4), (5, 4), (11, 4), (12, 4), (9, 1), (7, 3)])
def test_visual_tokens_are_split_in_raster_order(tokens: int, latents: int) -> None:
    """Into contiguous stretches of nearly equal length, with none left over."""
    objective, image = Mirage(num_latents=latents), tiny("qwen2_5_vl", Mirage).encoder.image(three()[0].image)
    object.__setattr__(image, "num_tokens", tokens)
    groups = objective._latent(1, image).groups
    assert np.concatenate(groups).tolist() == list(range(tokens))
    lengths = [len(group) for group in groups]
    assert len(lengths) == latents
    assert max(lengths) - min(lengths) <= 1


def test_the_vision_tower_sees_what_is_needed_only() -> None:
    model = tiny("qwen2_5_vl", Mirage)
    shown = [len(model.batch(Mirage(stage=stage), three()[1:2]).images["image_grid_thw"]) for stage in (1, 2)]
    assert shown == [3, 1]


# stage 1


def plain_latents(model: Tiny, vlm: Any, objective: Mirage, each: Trajectory) -> Tensor:
    """(L, H): means over stretches of each image's visual tokens."""
    example = model.example(objective, each)
    means = []
    for latent in view_of(example).latents:
        tokens = visual_tokens_of(vlm, model.family, example, latent.image)
        first, more = divmod(len(tokens), objective.num_latents)
        start = 0
        for number in range(objective.num_latents):
            stop = start + first + (number < more)
            means.append(tokens[start:stop].mean(0))
            start = stop
    return torch.stack(means)


def plain_stage_1(model: Tiny, vlm: Any, objective: Mirage, each: Trajectory) -> dict[str, Tensor]:
    example = model.example(objective, each)
    latents = plain_latents(model, vlm, objective, each)
    states = plain_states(vlm, model.family, example, latents)
    before, target = states[np.flatnonzero(view_of(example).latent_slots) - 1], latents.detach()
    cosine = (before * target).sum(-1) / before.norm(dim=-1) / target.norm(dim=-1)
    return {"vlm": plain_next_token(vlm, example, states), "latent": (1 - cosine).sum()}


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_1_is_as_the_paper_says(family: str) -> None:
    model, objective = tiny(family, Mirage), Mirage(num_latents=3)
    learner, batch = learner_and_batch(model, objective, three())
    torch.testing.assert_close(
        learner.states(batch).latents,
        torch.cat([plain_latents(model, learner.vlm, objective, each) for each in three()]),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    terms, counts = learner(batch), learner.losses.counts(batch)
    singles = [plain_stage_1(model, learner.vlm, objective, each) for each in three()]
    assert counts["latent"] == 3 * 4
    for name, term in terms.items():
        torch.testing.assert_close(term, torch.stack([single[name] for single in singles]).sum(), rtol=1e-5, atol=1e-6)
    weights = learner.losses.weights
    assert weights == {"vlm": 0.1, "latent": 1.0}

    def loss(of: dict[str, Tensor]) -> Tensor:
        return torch.stack([weights[name] * of[name] / counts[name] for name in of]).sum()

    found = gradients(learner, loss(terms))
    assert_same(found, gradients(learner, torch.stack([loss(single) for single in singles]).sum()))


# stage 2


def slow_stage_2(model: Tiny, vlm: Any, objective: Mirage, each: Trajectory) -> tuple[Tensor, Tensor]:
    """The latents (L, H), each the last state of all that is before it, and the summed next-token loss."""
    example = model.example(objective, each)
    latents = torch.empty(0, vlm.config.get_text_config().hidden_size)
    for slot in np.flatnonzero(view_of(example).latent_slots):
        states = plain_states(vlm, model.family, example, latents, int(slot))
        latents = torch.cat([latents, states[-1:]])
    return latents, plain_next_token(vlm, example, plain_states(vlm, model.family, example, latents))


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_2_feeds_what_a_slow_loop_appends(family: str) -> None:
    model, objective = tiny(family, Mirage), Mirage(stage=2, num_latents=2)
    learner, batch = learner_and_batch(model, objective, three())
    with torch.no_grad():
        states = learner.states(batch)
        slow = [slow_stage_2(model, learner.vlm, objective, each) for each in three()]
        torch.testing.assert_close(states.latents, torch.cat([one[0] for one in slow]), rtol=1e-4, atol=1e-4)
        terms = learner.losses(states)
    assert list(terms) == list(learner.losses.weights) == list(learner.losses.counts(batch)) == ["vlm"]
    torch.testing.assert_close(terms["vlm"], torch.stack([one[1] for one in slow]).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_stage_2_has_the_whole_gradient_through_its_latents(family: str) -> None:
    model, objective = tiny(family, Mirage), Mirage(stage=2, num_latents=3)
    learner, batch = learner_and_batch(model, objective, three())
    found = gradients(learner, learner(batch)["vlm"])
    slow = torch.stack([slow_stage_2(model, learner.vlm, objective, each)[1] for each in three()]).sum()
    assert_same(found, gradients(learner, slow))


def test_stage_2_takes_rows_without_latents() -> None:
    """As for the answers that the loop asks for between steps."""
    from pearl.trainer.objectives.sft import SftAnswer

    model = tiny("qwen2_5_vl", Mirage)
    batch = model.batch(SftAnswer(), three())
    states = [model.learner(Mirage(stage=stage)).states(batch).main for stage in (1, 2)]
    torch.testing.assert_close(*states)


def test_gradient_checkpointing_is_refused_where_a_cache_is_needed() -> None:
    model = tiny("qwen2_5_vl", Mirage)
    for stage in (1, 2):
        learner, batch = learner_and_batch(model, Mirage(stage=stage), three())
        learner.train()
        learner.base.gradient_checkpointing_enable({"use_reentrant": False})
        if stage == 1:
            learner(batch)["vlm"].backward()
        else:
            with pytest.raises(PearlError, match="gradient checkpointing keeps no keys and values"):
                learner(batch)


# both


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_is_the_sum_of_its_trajectories(stage: Any) -> None:
    model, objective = tiny("internvl", Mirage), Mirage(stage=stage)
    learner = model.learner(objective)

    def total(trajectories: list[Trajectory]) -> Tensor:
        return torch.stack(list(learner(model.batch(objective, trajectories)).values())).sum()

    together = gradients(learner, total(three()))
    assert_same(together, gradients(learner, torch.stack([total([each]) for each in three()]).sum()))


@pytest.mark.parametrize("stage", [1, 2])
def test_rows_of_a_tree_and_plain_rows_are_the_same(stage: Any) -> None:
    model, objective = tiny("smolvlm", Mirage), Mirage(stage=stage)
    learner = model.learner(objective)
    examples = [model.example(objective, each) for each in three()]
    plain = Packer(model.family, model.vlm.config, model.encoder.padding, tree=False, multiple=1)
    torch.testing.assert_close(learner(plain(examples)), learner(model.packer(examples)))


@pytest.mark.parametrize("stage", [1, 2])
def test_it_learns(stage: Any) -> None:
    model, objective = tiny("llava", Mirage), Mirage(stage=stage)
    learner, batch = learner_and_batch(model, objective, three())
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        terms, counts = learner(batch), learner.losses.counts(batch)
        losses.append({name: float(term.detach()) for name, term in terms.items()})
        optimizer.zero_grad()
        weights = learner.losses.weights
        torch.stack([weights[name] * terms[name] / counts[name] for name in terms]).sum().backward()
        optimizer.step()
    assert all(losses[-1][name] < losses[0][name] for name in losses[0])


def test_only_stage_1_looks_at_the_tools_images() -> None:
    model = tiny("qwen2_5_vl", Mirage)

    def terms(stage: Any, seed: int) -> dict[str, Tensor]:
        objective = Mirage(stage=stage)
        made: Step = step("crop", seed, box=BOX)
        found: dict[str, Tensor] = model.learner(objective)(model.batch(objective, [trajectory(made)]))
        return found

    assert not torch.equal(terms(1, 1)["latent"], terms(1, 2)["latent"])
    assert torch.equal(terms(2, 1)["vlm"], terms(2, 2)["vlm"])


# refusals


@pytest.mark.parametrize("stage", [1, 2])
def test_a_trajectory_without_images_is_refused(stage: Any) -> None:
    with pytest.raises(ViewError, match="mirage needs images that tools made, and no step has one"):
        tiny("qwen2_5_vl", Mirage).example(Mirage(stage=stage), trajectory(step("ocr", text="12")))


def test_an_image_with_too_few_visual_tokens_is_refused() -> None:
    with pytest.raises(ViewError, match="4 visual tokens, too few for 5 latents"):
        tiny("gemma3", Mirage).example(Mirage(num_latents=5), three()[0])


def test_a_text_with_the_latent_token_is_refused() -> None:
    said = step("crop", 1, thought="Think <|latent_pad|>.", box=BOX)
    with pytest.raises(ViewError, match="the objective's own token for latents"):
        tiny("qwen2_5_vl", Mirage).example(Mirage(), trajectory(said))


@pytest.mark.parametrize("options", [{"stage": 3}, {"num_latents": 0}, {"vlm_weight": -1.0}])
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(PearlError, match="mirage"):
        Mirage(**options)
