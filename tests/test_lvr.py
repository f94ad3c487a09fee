from __future__ import annotations

import copy
import random
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pearl.errors import PearlError
from pearl.records import Box, Trajectory
from pearl.trainer.families import FAMILIES, tiled
from pearl.trainer.objectives.lvr import Lvr, regions, visual_tokens
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

torch.set_num_threads(1)

SIZES = ((64, 48), (40, 80), (96, 64), (64, 64), (200, 60))
HEADS = ("none", "simple", "glu")
LOSSES = ("mse", "mae", "cosine")
MIDDLE = [0.26, 0.3, 0.7, 0.6]


def three() -> list[Trajectory]:
    """Of different images, questions and numbers of regions."""
    return [
        trajectory(step("crop", 1, image=0, box=MIDDLE)),
        trajectory(step("depth", 2, boxes=[[0.3, 0, 0.5, 0.4], [0.6, 0.5, 1, 1]]), seed=3, size=(40, 80)),
        trajectory(
            step("zoom", 4, image=0, box=[0.2, 0.2, 0.8, 1.0]),
            step("crop", 5, image=1, box=[0.5, 0, 1, 0.5]),
            seed=6,
            question="Is the cup, which stands on the table, red?",
        ),
    ]


# regions


def test_boxes_of_steps_are_regions_in_their_order() -> None:
    steps = trajectory(step("depth", 1, boxes=[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]), step("crop", 2, box=MIDDLE)).steps
    assert regions(steps) == [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), tuple(MIDDLE)]


def test_a_box_on_a_crop_of_a_crop_is_one_on_the_original() -> None:
    steps = trajectory(
        step("crop", 1, image=0, box=[0.5, 0.0, 1.0, 0.5]),
        step("zoom", 2, image=1, box=[0.0, 0.5, 0.5, 1.0]),
        step("highlight", 3, image=2, boxes=[[0.5, 0.5, 1.0, 1.0]]),
    ).steps
    assert regions(steps) == [(0.5, 0.0, 1.0, 0.5), (0.5, 0.25, 0.75, 0.5), (0.625, 0.375, 0.75, 0.5)]


@pytest.mark.parametrize(
    "last",
    [
        step("crop", 2, image=1, box=MIDDLE),  # of a depth map
        step("crop", 2, image=2, box=MIDDLE),  # of what is not there yet
        step("crop", 2, image=-1, box=MIDDLE),
        step("crop", 2, image=0.0, box=MIDDLE),
        step("crop", 2, box=[0.5, 0.5, 0.4, 0.6]),
        step("crop", 2, box=[10, 20, 30, 40]),
        step("crop", 2, box=[0.1, 0.2, 0.3]),
        step("crop", 2, box="left"),
        step("crop", 2, box=[0.1, float("nan"), 0.3, 0.4]),
        step("crop", 2, boxes=None),
        step("ocr", text="12"),
    ],
)
def test_boxes_that_cannot_be_placed_are_left_out(last: Any) -> None:
    assert regions(trajectory(step("depth", 1), last).steps) == []


def test_a_refused_crop_shows_nothing() -> None:
    assert len(regions(trajectory(step("crop", None, box=MIDDLE), step("crop", 1, image=1, box=MIDDLE)).steps)) == 1


# from boxes to visual tokens


@pytest.mark.parametrize(
    ("box", "grid", "tokens"),
    [
        ((0, 0, 1, 1), (2, 3), [0, 1, 2, 3, 4, 5]),
        ((0, 0, 0.5, 0.5), (2, 2), [0]),
        ((0.5, 0.5, 1, 1), (2, 2), [3]),
        ((0.49, 0, 0.51, 0.01), (2, 2), [0, 1]),
        ((0.999, 0.999, 1, 1), (3, 5), [14]),
        ((0.25, 0.25, 0.26, 0.26), (4, 4), [5]),
        ((0.24, 0.24, 0.25, 0.25), (4, 4), [0]),
        ((0, 0.4, 1, 0.6), (3, 3), [3, 4, 5]),
        ((0.3, 0, 0.4, 1), (3, 3), [0, 1, 3, 4, 6, 7]),
    ],
)
def test_hand_made_boxes(box: Box, grid: tuple[int, int], tokens: list[int]) -> None:
    assert visual_tokens(box, tiled(1, 1, *grid)).tolist() == tokens


def test_tokens_are_those_whose_cell_the_box_overlaps() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        rows, columns = (int(side) for side in generator.integers(1, 14, 2))
        x0, x1 = sorted(int(x) for x in generator.choice(1025, 2, replace=False))
        y0, y1 = sorted(int(y) for y in generator.choice(1025, 2, replace=False))
        overlapped = [
            row * columns + column
            for row in range(rows)
            for column in range(columns)
            if max(Fraction(column, columns), Fraction(x0, 1024))
            < min(Fraction(column + 1, columns), Fraction(x1, 1024))
            and max(Fraction(row, rows), Fraction(y0, 1024)) < min(Fraction(row + 1, rows), Fraction(y1, 1024))
        ]
        assert (
            visual_tokens((x0 / 1024, y0 / 1024, x1 / 1024, y1 / 1024), tiled(1, 1, rows, columns)).tolist()
            == overlapped
        )


def test_tokens_are_those_of_the_patch_grid_after_its_merge() -> None:
    """The paper's rule: floor and ceil on the patch grid, then pairs of patches in both directions."""
    generator = np.random.default_rng(1)
    for _ in range(500):
        rows, columns = (int(side) for side in generator.integers(1, 40, 2))
        left, right = np.sort(generator.random(2))
        top, bottom = np.sort(generator.random(2))
        (c0, c1), (r0, r1) = (
            (int(np.floor(low * 2 * count)) // 2, (int(np.ceil(high * 2 * count)) + 1) // 2)
            for low, high, count in ((left, right, columns), (top, bottom, rows))
        )
        expected = [row * columns + column for row in range(r0, r1) for column in range(c0, c1)]
        assert visual_tokens((left, top, right, bottom), tiled(1, 1, rows, columns)).tolist() == expected


def test_what_the_image_processor_cuts_off_has_no_tokens() -> None:
    shown = (0.25, 0.0, 0.75, 1.0)
    assert visual_tokens((0, 0, 0.25, 1), tiled(1, 1, 2, 2), shown).tolist() == []
    assert visual_tokens((0, 0, 0.5, 0.5), tiled(1, 1, 2, 2), shown).tolist() == [0]
    assert visual_tokens((0.6, 0.6, 0.9, 0.9), tiled(1, 1, 2, 2), shown).tolist() == [3]


def test_tiles_follow_each_other_row_by_row() -> None:
    assert tiled(1, 2, 2, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert tiled(2, 1, 1, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("family", "size"), list(product(FAMILIES, SIZES)))
def test_the_tokens_of_a_box_show_what_is_in_it(family: str, size: tuple[int, int]) -> None:
    """A box that is a little lighter than the rest changes, of all visual tokens that a vision tower without layers
    gives for the image's parts, most the one that is to show it."""
    model, (width, height) = tiny(family, Lvr), size
    whole = model.encoder.image(trajectory(size=size).image)
    grid, (x, y, far_x, far_y) = model.encoder.grid(whole), whole.shown
    assert len(set(grid.flat)) == grid.size <= whole.num_tokens
    assert grid.max() < whole.num_tokens
    rows, columns = grid.shape
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    tower = without_layers(model)
    dark = seen(model, tower, torch.zeros(3, height, width, dtype=torch.uint8))
    assert len(dark) == whole.num_tokens
    for row, column in random.Random(0).sample(cells, min(16, len(cells))):
        box = (
            x + (far_x - x) * column / columns, y + (far_y - y) * row / rows,
            x + (far_x - x) * (column + 1) / columns, y + (far_y - y) * (row + 1) / rows,
        )  # fmt: skip
        left, right, top, bottom = (
            round(v) for v in (box[0] * width, box[2] * width, box[1] * height, box[3] * height)
        )
        pixels = torch.zeros(3, height, width, dtype=torch.uint8)
        pixels[:, top : max(bottom, top + 1), left : max(right, left + 1)] = 30
        changed = (seen(model, tower, pixels) - dark).norm(dim=-1)
        middle = [0.9 * box[i] + 0.1 * box[(i + 2) % 4] for i in range(4)]
        (token,) = visual_tokens((middle[0], middle[1], middle[2], middle[3]), grid, whole.shown)
        assert token == grid[row, column] == grid.flat[int(changed[grid.flatten()].argmax())]


OUTWARD = ("out_proj", "projection_layer", "proj", "fc2", "linear_fc2", "down_proj")
"""Of a vision tower's layers, what adds to the tokens' states."""


def without_layers(model: Tiny) -> Any:
    """The model, whose visual tokens show their own pixels and no others: the vision tower's layers add nothing."""
    core = copy.deepcopy(model.vlm.model)
    for part in model.family.vision_parts:
        for name, module in core.get_submodule(part).named_modules():
            *owners, last = name.split(".")
            if last in OUTWARD and {"blocks", "layers", "layer"} & set(owners):
                torch.nn.init.zeros_(module.weight)
                module.bias = None
    return core


@torch.no_grad()
def seen(model: Tiny, core: Any, pixels: torch.Tensor) -> torch.Tensor:
    inputs = model.family.preprocess(model.encoder.processor, pixels)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return model.family.visual(core, model.family.collate_images([tensors])).tokens


# the view


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_stands_behind_its_regions(family: str) -> None:
    model = tiny(family, Lvr)
    example = model.example(Lvr(), three()[1])
    view = view_of(example)
    runs = [len(latent.groups) for latent in view.latents]
    tokenizer = model.encoder.tokenizer
    said = tokenizer.decode(view.ids[np.flatnonzero(view.supervised)[0] :])
    lines = "".join("<|lvr_start|>" + "<|lvr|>" * count + "<|lvr_end|>" for count in runs)
    assert said.strip().startswith(f"{lines}\nleft")
    assert len(runs) == 2
    learned = [tokenizer.convert_ids_to_tokens(int(token)) for token in view.ids[view.supervised]]
    assert "<|lvr|>" not in learned
    assert learned.count("<|lvr_start|>") == learned.count("<|lvr_end|>") == 2
    assert (view.images, len(example.images)) == ((0,), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_fed_are_the_original_images_tokens_inside_the_regions(family: str) -> None:
    model, objective = tiny(family, Lvr), Lvr()
    batch = model.batch(objective, three())
    fed = model.learner(objective).states(batch).latents
    expected = []
    for each in three():
        example = model.example(objective, each)
        whole = visual_tokens_of(model.vlm, model.family, example, 0)
        grid = model.encoder.grid(example.images[0])
        for box in regions(each.steps):
            expected.append(whole[visual_tokens(box, grid, example.images[0].shown)])
    torch.testing.assert_close(fed, torch.cat(expected), rtol=1e-5, atol=1e-5)


# losses


def plain_lvr(model: Tiny, learner: Any, objective: Lvr, each: Trajectory) -> dict[str, torch.Tensor]:
    """The summed terms of one trajectory, written from the paper."""
    example = model.example(objective, each)
    view, head = view_of(example), learner.losses.head
    latents = visual_tokens_of(learner.vlm, model.family, example, 0)
    latents = latents[np.concatenate([group for latent in view.latents for group in latent.groups])]
    states = plain_states(learner.vlm, model.family, example, latents)
    before, target = states[np.flatnonzero(view.latent_slots) - 1], latents.detach()
    if objective.head == "simple":
        first, second = head.layers[0], head.layers[2]
        normal = (before - before.mean(-1, keepdim=True)) / (before.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        before = F.gelu((normal * head.norm.weight + head.norm.bias) @ first.weight.T + first.bias)
        before = before @ second.weight.T + second.bias
    elif objective.head == "glu":
        gate = before @ head.gate.weight.T + head.gate.bias
        before = gate * torch.sigmoid(gate) * (before @ head.up.weight.T + head.up.bias)
        before = before @ head.down.weight.T + head.down.bias
    if objective.loss == "cosine":
        cosine = (before * target).sum(-1) / before.norm(dim=-1) / target.norm(dim=-1)
        regression = 1 - cosine
    else:
        regression = ((before - target).abs() ** (2 if objective.loss == "mse" else 1)).mean(-1)
    return {"vlm": plain_next_token(learner.vlm, example, states), "lvr": regression.sum()}


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_and_gradients_are_those_of_the_paper(family: str) -> None:
    model, objective = tiny(family, Lvr), Lvr()
    learner = model.learner(objective)
    batch = model.batch(objective, three())
    terms, counts = learner(batch), learner.losses.counts(batch)
    singles = [plain_lvr(model, learner, objective, each) for each in three()]
    views = [view_of(model.example(objective, each)) for each in three()]
    assert counts["lvr"] == sum(int(view.latent_slots.sum()) for view in views)
    assert counts["vlm"] == sum(int(view.supervised.sum()) for view in views)
    for name, term in terms.items():
        torch.testing.assert_close(term, torch.stack([single[name] for single in singles]).sum(), rtol=1e-5, atol=1e-6)
    weights = learner.losses.weights
    assert weights == {"vlm": 1.0, "lvr": 0.1}

    def loss(of: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([weights[name] * of[name] / counts[name] for name in of]).sum()

    found = gradients(learner, loss(terms))
    assert_same(found, gradients(learner, torch.stack([loss(single) for single in singles]).sum()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_and_loss_is_as_written_and_learns(head: Any, loss: Any) -> None:
    model, objective = tiny("qwen2_5_vl", Lvr), Lvr(head=head, loss=loss)
    learner = model.learner(objective)
    batch = model.batch(objective, three()[:1])
    terms = learner(batch)
    expected = plain_lvr(model, learner, objective, three()[0])
    torch.testing.assert_close(terms["lvr"], expected["lvr"], rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    start = float(terms["lvr"].detach())
    for _ in range(3):
        optimizer.zero_grad()
        learner(batch)["lvr"].backward()
        trained = list(learner.losses.parameters())
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)
        assert bool(trained) == (head != "none")
        optimizer.step()
    assert float(learner(batch)["lvr"].detach()) < start


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_is_the_sum_of_its_trajectories(head: Any) -> None:
    model, objective = tiny("qwen3_vl", Lvr), Lvr(head=head)
    learner = model.learner(objective)

    def total(trajectories: list[Trajectory]) -> torch.Tensor:
        return torch.stack(list(learner(model.batch(objective, trajectories)).values())).sum()

    together = gradients(learner, total(three()))
    apart = gradients(learner, torch.stack([total([each]) for each in three()]).sum())
    assert_same(together, apart)


def test_what_is_watched_is_what_is_to_meet() -> None:
    model, objective = tiny("qwen2_5_vl", Lvr), Lvr(loss="mae")
    learner = model.learner(objective)
    term = learner(model.batch(objective, three()))["lvr"]
    assert learner.losses.watched is not None
    predicted, target = learner.losses.watched
    torch.testing.assert_close((predicted - target).abs().mean(-1).sum(), term.detach())


# refusals


def test_a_trajectory_without_regions_is_refused() -> None:
    with pytest.raises(ViewError, match="lvr needs regions, and no step has a box"):
        tiny("qwen2_5_vl", Lvr).example(Lvr(), trajectory(step("ocr", text="12")))


def test_regions_that_the_model_does_not_see_are_no_regions() -> None:
    edge = trajectory(step("crop", 1, box=[0.0, 0.0, 0.05, 1.0]))
    assert view_of(tiny("qwen2_5_vl", Lvr).example(Lvr(), edge)).latents
    with pytest.raises(ViewError, match="no step has a box"):
        tiny("llava", Lvr).example(Lvr(), edge)


def test_a_text_with_the_latent_token_is_refused() -> None:
    asked = trajectory(step("crop", 1, box=MIDDLE), question="What does <|lvr|> mean?")
    with pytest.raises(ViewError, match="the objective's own token for latents"):
        tiny("qwen2_5_vl", Lvr).example(Lvr(), asked)


@pytest.mark.parametrize("options", [{"head": "mlp"}, {"loss": "l2"}, {"weight": -0.1}])
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(PearlError, match="lvr"):
        Lvr(**options)
