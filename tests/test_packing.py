from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pearl.records import Trajectory
from pearl.trainer.conversation import Conversation, load_template
from pearl.trainer.families import Attention, Family
from pearl.trainer.learner import Learner
from pearl.trainer.objectives.base import Objective
from pearl.trainer.objectives.pearl import Pearl, PearlLosses
from pearl.trainer.packing import Batch, Example, Packer, Rows
from pearl.trainer.views import ImageInputs, View, images_of_view
from tests import plain
from tests.plain import Plain, Tiny, conversation, forward, tiny, trajectories
from tests.tiny_vlms import FAMILIES

SETTINGS = (
    Pearl(direct_weight=0.5),
    Pearl(jepa_distance="smooth-l1", nextlat_token="published", lambda_=0.7),
    Pearl(jepa_distance="l2", targets="steps", num_predictor_tokens=3),
    Pearl(jepa_distance="mse", targets="steps", num_predictor_tokens=6, nextlat=False),
)
LAYOUTS = ((True, True), (True, False), (False, False))


def examples(t: Tiny, objective: Objective, given: Sequence[Trajectory]) -> list[Example]:
    made = []
    for one in given:
        talk = Conversation(one, load_template("pearl"))
        made.append(objective.example(talk, [t.encoder.image(image) for image in talk.images], t.encoder))
    return made


def pack(t: Tiny, made: Sequence[Example], tree: bool = True, reuse: bool = True) -> Batch:
    return Packer(t.family, t.vlm.config, t.encoder.padding, tree, reuse)(made)


def batch(t: Tiny, objective: Objective, given: Sequence[Trajectory], tree: bool = True, reuse: bool = True) -> Batch:
    return pack(t, examples(t, objective, given), tree, reuse)


def learner(t: Tiny, objective: Objective) -> Learner:
    torch.manual_seed(0)
    return Learner(t.vlm, t.family, objective.losses(t.hidden_size))


def gradients(model: Learner, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    names = [name for name, _ in model.named_parameters()]
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def packed(model: Learner, made: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """The terms as means, and the loss."""
    sums, counts = model(made), model.losses.counts(made)
    means = {name: total / counts[name] for name, total in sums.items()}
    return means, torch.stack([model.losses.weights[name] * mean for name, mean in means.items()]).sum()


@cache
def plain_views(name: str, view: str) -> list[Plain]:
    return [forward(tiny(name), conversation(one, view)) for one in trajectories()]


def three_forwards(t: Tiny, model: Learner, settings: Pearl) -> tuple[dict[str, Tensor], Tensor]:
    """The terms, and `L_VLM + λ (L_JEPA + L_NextLat)` and the direct branch."""
    predictors = model.losses.predictors
    assert predictors is not None
    filler = t.processor.tokenizer.pad_token * len(predictors)
    source = [forward(t, conversation(one, "source", filler), predictors) for one in trajectories()]
    full, target = plain_views(t.name, "full"), plain_views(t.name, "target")
    terms = {"vlm": plain.next_token(t, full)}
    terms["jepa"] = plain.jepa(source, target, settings.jepa_distance, settings.targets)
    if settings.nextlat:
        assert isinstance(model.losses, PearlLosses)
        weights = dict(model.losses.dynamics.named_parameters())
        terms["nextlat"], terms["nextlat_token"] = plain.nextlat(t, weights, full, settings.nextlat_token)
    loss = terms["vlm"] + settings.lambda_ * sum((terms[n] for n in terms if n != "vlm"), torch.zeros(()))
    if settings.direct_weight:
        terms["direct"] = plain.next_token(t, plain_views(t.name, "direct"))
        loss = loss + settings.direct_weight * terms["direct"]
    return terms, loss


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Each parameter's gradient, in units of its own size; what is noise beside the largest is left out."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        off = float((found[name] - gradient).norm())
        assert off <= tolerance * float(gradient.norm()) + 1e-6 * largest, (name, off, float(gradient.norm()))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.jepa_distance}-{s.targets}")
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_three_forwards(name: str, settings: Pearl) -> None:
    t, model = tiny(name), learner(tiny(name), settings)
    terms, loss = three_forwards(t, model, settings)
    expected = gradients(model, loss)
    for tree, reuse in LAYOUTS if settings is SETTINGS[0] else LAYOUTS[:1]:
        means, total = packed(model, batch(t, settings, trajectories(), tree, reuse))
        assert means.keys() == terms.keys()
        for term, mean in means.items():
            assert mean.item() == pytest.approx(terms[term].item(), abs=1e-5), (term, tree, reuse)
        assert_close(gradients(model, total), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_state_is_that_of_its_view_alone(name: str) -> None:
    """Also states that no loss looks at, such as those of images."""
    t, objective = tiny(name), Pearl(direct_weight=1)
    states = learner(t, objective).states(batch(t, objective, trajectories()))
    for view in ("full", "direct", "target"):
        expected = torch.cat([each.states for each in plain_views(name, view)])
        at = states.batch.places[view].at
        found = states.targets if view == "target" else states.main
        assert len(at) == len(expected)
        assert torch.allclose(found[at[at >= 0]], expected[at >= 0], atol=1e-4), view


# what one forward costs


def hooked(module: Any, seen: list[Tensor]) -> Any:
    """Keeps what the module is given, until the handle is removed."""

    def keep(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(options["pixel_values"] if "pixel_values" in options else arguments[0])

    return module.register_forward_pre_hook(keep, with_kwargs=True)


def patches(name: str, image: ImageInputs) -> int:
    """How many rows of the vision tower's input one image makes: patches of Qwen, else tiles."""
    pixels = image.tensors["pixel_values"]
    return len(pixels if name.startswith("qwen") else pixels.reshape(-1, *pixels.shape[-3:]))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_distinct_image_goes_through_the_vision_tower_once(name: str) -> None:
    """The pictures are noise, so no two patches or tiles are alike unless they are the same one twice. Only
    LLaVA-OneVision sees an image in two ways, alone and among others."""
    t, seen = tiny(name), list[Tensor]()
    made = examples(t, Pearl(), trajectories())
    with hooked(t.vlm.model.get_submodule(t.family.vision_parts[0]), seen):
        learner(t, Pearl())(pack(t, made))
    rows = torch.cat([pixels.flatten(1) for pixels in seen])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    expected = 0
    for example in made:
        several = len(example.views["full"].images) > 1
        expected += sum(
            patches(name, image) for image in images_of_view(example.images, example.views["source"].images)
        )
        if several and example.images[0].when_several:
            expected += sum(patches(name, image.when_several or image) for image in example.images)
        elif several:
            expected += sum(patches(name, image) for image in example.images[1:])
    assert len(rows) == expected


@pytest.mark.parametrize("settings", [Pearl(), Pearl(direct_weight=1, nextlat_token="published"), Pearl(nextlat=False)])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_logits_only_where_a_label_stands(name: str, settings: Pearl) -> None:
    t, model, seen = tiny(name), learner(tiny(name), settings), list[Tensor]()
    made = batch(t, settings, trajectories())
    with hooked(t.vlm.get_output_embeddings(), seen):
        model(made)
    counts = model.losses.counts(made)
    assert sum(map(len, seen)) == sum(counts.get(term, 0) for term in ("vlm", "nextlat_token", "direct"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_holds_what_views_share_once(name: str) -> None:
    t = tiny(name)
    for example in examples(t, Pearl(direct_weight=1), trajectories()):
        made = pack(t, [example])
        full, source, target, direct = (len(example.views[n]) for n in ("full", "source", "target", "direct"))
        kept = int((made.main.tokens.branch >= 0).sum())
        assert made.target_rows is not None
        if name == "llava_onevision" and len(example.views["full"].images) > 1:  # image and question are others there
            assert kept < full + source + direct
            continue
        question = source - 4 - 4  # the predictor tokens, and at most so many that end the turn
        assert kept <= full + source + direct - 2 * question
        assert int((made.target_rows.tokens.branch >= 0).sum()) <= target - example.images[0].num_tokens


# positions


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_are_the_models_own(name: str) -> None:
    t = tiny(name)
    for example in examples(t, Pearl(direct_weight=1), trajectories()):
        made = pack(t, [example], reuse=False)
        for view, places in made.places.items():
            rows = made.target_rows if view == "target" else made.main
            assert rows is not None
            shown = [
                image.tensors["image_grid_thw"] for image in images_of_view(example.images, example.views[view].images)
            ]
            expected, _ = t.vlm.model.get_rope_index(
                torch.from_numpy(example.views[view].ids)[None],
                mm_token_type_ids=torch.from_numpy(example.views[view].visual)[None].int(),
                image_grid_thw=torch.cat(shown),
            )
            assert torch.equal(rows.positions.flatten(1)[:, places.at], expected[:, 0])


# who sees whom: any views, made by hand

IMAGE, BRACKET = 9, 8
Item = tuple[str, int]
items = st.lists(st.tuples(st.sampled_from(("text", "image", "bare image")), st.integers(0, 2)), max_size=6)


def by_hand(said: Sequence[Item], images: Sequence[ImageInputs], mark: str = "") -> View:
    """A view of text tokens and images, some of them between brackets; the last token is marked."""
    ids, shown = [7], list[int]()
    for kind, value in said:
        bracket = [BRACKET] if kind == "image" else []
        ids += [value] if kind == "text" else [*bracket, *[IMAGE] * images[value].num_tokens, *bracket]
        shown += [] if kind == "text" else [value]
    tokens = np.array(ids)
    nothing = np.zeros(len(tokens), bool)
    return View(
        ids=tokens,
        supervised=np.arange(len(tokens)) > 0,
        predictors=np.full(len(tokens), -1),
        visual=tokens == IMAGE,
        images=tuple(shown),
        ends=(len(tokens) - 1,),
        latents=(),
        latent_slots=nothing,
        marks={mark: (len(tokens) - 1,)} if mark else {},
    )


@st.composite
def made_by_hand(draw: st.DrawFn) -> Example:
    """A trunk, two branches that begin with any part of it or with nothing, and a target view."""
    images = tuple(ImageInputs({"pixel_values": torch.zeros(1)}, "", draw(st.integers(1, 4))) for _ in range(3))
    trunk = [*draw(items), ("image", 0), *draw(items)]
    views = {"trunk": by_hand(trunk, images)}
    for name in ("a", "b", "target"):
        kept = trunk[: draw(st.integers(0, len(trunk)))]
        views[name] = by_hand([*kept, *draw(items)], images, "state" if name == "target" else "")
        if draw(st.integers(0, 3)) == 3:
            views[name] = without_first(views[name])
    return Example("by hand", images, views, frozenset({"target"}))


def without_first(view: View) -> View:
    """So that it shares nothing."""
    if len(view) < 2:
        return view
    arrays = ("ids", "supervised", "predictors", "visual", "latent_slots")
    marks = {name: tuple(token - 1 for token in tokens) for name, tokens in view.marks.items()}
    return replace(view, marks=marks, **{name: getattr(view, name)[1:] for name in arrays})


@given(st.lists(made_by_hand(), min_size=1, max_size=3), st.sampled_from(LAYOUTS))
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
def test_a_token_sees_its_own_view_up_to_itself_and_nothing_else(
    given_examples: list[Example], layout: tuple[bool, bool]
) -> None:
    made = Packer(Family(), None, 0, *layout)(given_examples)
    assert made.target_rows is not None
    main, after = Attention.among(made.main.tokens), made.target_rows.tokens
    cached = Attention.among(after, made.main.tokens.first(made.cached_tokens) if made.cached_tokens else None)
    assert all(kept.ndim == 2 or kept.dtype is torch.bool for kept in vars(main).values())  # T² only of bits
    assert main.allowed.any(-1).all()
    assert cached.allowed.any(-1).all()
    for view, places in made.places.items():
        for number, example in enumerate(given_examples):
            at = places.at[places.sample == number].tolist()
            expected = example.views[view]
            if view != "target":
                check(main, made.main, at, at, expected)
                continue
            before = made.places["trunk"].at[made.places["trunk"].sample == number].tolist()[: at.count(-1)]
            columns = [place % made.main.ids.shape[1] for place in before]
            columns += [made.cached_tokens + place % made.target_rows.ids.shape[1] for place in at[len(before) :]]
            check(cached, made.target_rows, at, columns, expected)
            assert at[-1] >= 0  # where the state is asked for


def check(attention: Attention, rows: Rows, at: list[int], columns: list[int], view: View) -> None:
    """Tokens that stand `at` these flat indices (-1: in a cache) see these columns, each up to its own."""
    width = rows.ids.shape[1]
    columns = [column % attention.allowed.shape[2] for column in columns]
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], view.visual, [False]]).astype(int))).reshape(-1, 2)
    for token, place in enumerate(at):
        if place < 0:
            continue
        row, column = divmod(place, width)
        assert rows.ids[row, column] == view.ids[token]
        assert rows.positions[0, row, column] == token
        assert attention.allowed[row, column].nonzero()[:, 0].tolist() == sorted(columns[: token + 1])
        run = next((columns[a:b] for a, b in bounds.tolist() if a <= token < b), [])
        assert attention.same_image[row, column].nonzero()[:, 0].tolist() == sorted(run)


# what is odd


def assert_layouts_agree(t: Tiny, objective: Objective, made: list[Example]) -> None:
    model = learner(t, objective)
    (means, loss), *others = [packed(model, pack(t, made, *layout)) for layout in reversed(LAYOUTS)]
    for other, total in others:
        assert {n: v.item() for n, v in other.items()} == pytest.approx({n: v.item() for n, v in means.items()}, 1e-5)
        assert_close(gradients(model, total), gradients(model, loss))


@pytest.mark.parametrize("targets", ["trajectory", "steps"])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava_onevision"])
def test_without_a_question_the_target_view_is_the_trunk(name: str, targets: Any) -> None:
    objective = Pearl(targets=targets)
    given = [replace(one, question="", choices=()) for one in trajectories()[:4]]
    assert_layouts_agree(tiny(name), objective, examples(tiny(name), objective, given))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_views_that_share_nothing(name: str) -> None:
    t, objective = tiny(name), Pearl()
    made = []
    for example in examples(t, objective, trajectories()[:3]):
        views = {name: without_first(view) if name != "full" else view for name, view in example.views.items()}
        made.append(replace(example, views=views))
    assert_layouts_agree(t, objective, made)


def test_no_trajectory_with_steps_leaves_no_target() -> None:
    t, objective = tiny("qwen2_5_vl"), Pearl(targets="steps")
    model, made = learner(t, objective), batch(t, objective, trajectories()[:1])
    assert model.losses.counts(made)["jepa"] == 0
    assert model(made)["jepa"].item() == 0


def test_a_batch_moves_with_all_that_it_holds() -> None:
    t = tiny("qwen2_5_vl")
    moved = batch(t, Pearl(), trajectories()[:2]).to("meta")
    assert moved.main.ids.is_meta
    assert moved.main.tokens.branch.is_meta
    assert moved.places["source"].marks["predicted"].is_meta
    assert all(tensor.is_meta for tensor in moved.images.values())
