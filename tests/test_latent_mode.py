"""Decoding with latents: what is fed back, when a run ends, and that a batch on a cache says what plain forwards say."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pearl.errors import PearlError
from pearl.evaluation.benchmarks.trajectories import question_of
from pearl.evaluation.modes.base import QuestionError
from pearl.evaluation.modes.latent import Decoded, Latent, LatentDecoder
from pearl.evaluation.subject import Subject
from pearl.records import EncodedImage, Trajectory
from pearl.trainer.conversation import load_template
from pearl.trainer.packing import Example
from tests.latents import step, trajectory, visual_tokens_of
from tests.runs import _FOLDERS, data_file, run
from tests.tiny_vlms import FAMILIES

torch.set_num_threads(1)

QUOTA = 3


def rows() -> list[Trajectory]:
    """Images of different sizes, prompts of different lengths."""
    box = [0.3, 0.3, 0.6, 0.6]
    return [
        trajectory(
            step("crop", 10 + n, image=0, box=box), seed=n, size=(48 + 16 * n, 48), question="Where" + " now" * n
        )
        for n in range(3)
    ]


@cache
def trained(family: str, objective: str) -> Subject:
    """A tiny model that has learned by heart to answer through latents."""
    import tempfile

    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    run(
        data_file(folder, rows()), folder / "out", family, objective=objective, max_steps=60, learning_rate=3e-3,
        batch_size=3, warmup=0.0, weight_decay=0.0, objective_options={"vlm_weight": 1.0} if objective == "mirage" else {},
    )  # fmt: skip
    return Subject.load(str(folder / "out" / "model"), device="cpu")


def decoder(family: str, objective: str, **settings: Any) -> LatentDecoder:
    return LatentDecoder(trained(family, objective), **settings)


def examples(one: LatentDecoder) -> list[Example]:
    return [one.example(question_of(row, load_template("pearl"), "trajectories")) for row in rows()]


@pytest.mark.parametrize("objective", ["lvr", "mirage"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_plain_forwards_say(family: str, objective: str) -> None:
    one = decoder(family, objective, quota=QUOTA)
    found = one.decode(examples(one), 24)
    assert any(len(answer.latents) for answer in found), "no model opened a run: nothing is tested"
    for example, answer in zip(examples(one), found, strict=True):
        ids, latents = by_plain_forwards(one, example, 24)
        special = [i for i in ids if i != one.latent]
        assert answer.text == one.subject.processor.tokenizer.decode(special, skip_special_tokens=True).strip()
        assert answer.new_tokens == len(ids)
        torch.testing.assert_close(answer.latents, latents, rtol=1e-3, atol=1e-4)


def test_a_question_is_named_that_cannot_be_put_and_cannot_write_tokens() -> None:
    mode, subject = Latent(max_new_tokens=4), trained("qwen2_5_vl", "mirage")
    asked = question_of(rows()[0], load_template("pearl"), "trajectories")
    with pytest.raises(QuestionError, match=r"question long of trajectories: .* exceed the model's 4096"):
        mode.answer(subject, [replace(asked, id="long", prompt="cup " * 5000)])
    with pytest.raises(QuestionError, match=r"question broken of trajectories: "):
        mode.answer(subject, [replace(asked, id="broken", images=(EncodedImage(b"no image"),))])
    spelled = mode.answer(subject, [replace(asked, prompt="<|image_pad|> Where?")])[0]
    apart = mode.answer(subject, [replace(asked, prompt="< |image_pad|> Where?")])[0]
    assert spelled.prompt_tokens == apart.prompt_tokens


def test_the_system_turn_of_the_training_stands_before_the_question() -> None:
    one = decoder("qwen2_5_vl", "lvr")
    subject = copy(one.subject)
    assert subject.training is not None
    words = replace(subject.training.template, system="Look well.")
    subject.training = replace(subject.training, template=words)
    told = LatentDecoder(subject)
    example = told.example(question_of(rows()[0], words, "trajectories"))
    text = subject.processor.tokenizer.decode(example.views["prompt"].ids)
    assert text.index("Look well.") < text.index("Where")


@torch.no_grad()
def by_plain_forwards(one: LatentDecoder, example: Example, limit: int) -> tuple[list[int], Tensor]:
    """The same rule in its simplest form: one whole forward of transformers' model for each token, no cache."""
    vlm, view = one.subject.model, example.views["prompt"]
    visual = visual_tokens_of(vlm, one.insides.family, example, 0)
    embeds = vlm.get_input_embeddings()(torch.from_numpy(view.ids)[None]).clone()
    embeds[0, torch.from_numpy(np.flatnonzero(view.visual))] = visual
    images = one.insides.family.collate_images([example.images[0].tensors])
    ids, latents, left = list[int](), list[Tensor](), -1
    while len(ids) < limit:
        state = last_state(vlm, one, view, embeds, ids, images)
        word = int(vlm.get_output_embeddings()(state).argmax())
        if left > 0:
            latents.append(state)
            ids.append(one.latent)
            fed, left = state, left - 1
        else:
            if left == 0:
                word, left = one.closed, -1
            ids.append(word)
            if word in one.ends:
                break
            fed = vlm.get_input_embeddings()(torch.tensor(word))
            left = one.quota if word == one.opening else left
        embeds = torch.cat([embeds, fed[None, None]], 1)
    return ids, torch.stack(latents) if latents else torch.empty(0, embeds.shape[-1])


def last_state(vlm: Any, one: LatentDecoder, view: Any, embeds: Tensor, said: list[int], images: Any) -> Tensor:
    """The last final-layer state of the model's own forward, given ids and images, with these embeddings put in."""
    ids = torch.tensor([[*view.ids, *said]])
    visual = torch.cat([torch.from_numpy(view.visual).long(), torch.zeros(len(said), dtype=torch.long)])[None]
    kinds = {}
    if vlm.config.model_type.startswith("qwen"):
        kinds = {"mm_token_type_ids": visual}
    elif vlm.config.model_type == "gemma3":
        kinds = {"token_type_ids": visual}
    places = [len(view.ids) + n for n, word in enumerate(said) if word == one.latent]

    def put(module: Any, inputs: Any, made: Tensor) -> Tensor:
        return made.index_copy(1, torch.tensor(places, dtype=torch.long), embeds[:, places]) if places else made

    handle = vlm.get_input_embeddings().register_forward_hook(put)
    try:
        output = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **kinds)
    finally:
        handle.remove()
    return output.last_hidden_state[0, -1]  # type: ignore[no-any-return]


def test_a_quota_of_zero_makes_no_latents() -> None:
    one = decoder("qwen2_5_vl", "mirage")
    assert one.quota == 4
    none = one.with_quota(0).decode(examples(one), 24)
    assert [len(answer.latents) for answer in none] == [0, 0, 0]
    assert one.quota == 4


def test_what_is_fed_can_be_changed_and_counts() -> None:
    one = decoder("qwen2_5_vl", "lvr", quota=QUOTA)
    plain = one.decode(examples(one), 24)
    seen = list[tuple[tuple[int, ...], tuple[int, ...]]]()

    def same(latents: Tensor, rows: Any, which: Any) -> Tensor:
        seen.append((tuple(rows), tuple(which)))
        return latents

    assert texts(one.decode(examples(one), 24, same)) == texts(plain)
    assert {number for _, which in seen for number in which} == {0, 1, 2}

    def zeros(latents: Tensor, rows: Any, which: Any) -> Tensor:
        return torch.zeros_like(latents)

    changed = one.decode(examples(one), 24, zeros)
    first, second = (answer.latents for answer in (plain[0], changed[0]))
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def texts(found: list[Decoded]) -> list[str]:
    return [answer.text for answer in found]


def test_the_mode_gives_replies() -> None:
    subject = trained("qwen2_5_vl", "lvr")
    questions = [question_of(row, load_template("pearl"), "trajectories") for row in rows()]
    replies = Latent(max_new_tokens=24, quota=QUOTA).answer(subject, questions)
    assert [reply.said for reply in replies] == ["left", "left", "left"]
    one = decoder("qwen2_5_vl", "lvr", quota=QUOTA)
    assert [r.prompt_tokens for r in replies] == [len(e.views["prompt"]) for e in examples(one)]


def test_a_model_without_latents_is_refused(tmp_path: Path) -> None:
    run(data_file(tmp_path, rows()), tmp_path / "out", objective="sft", max_steps=1)
    with pytest.raises(PearlError, match="trained with sft, which makes no latents"):
        LatentDecoder(Subject.load(str(tmp_path / "out" / "model"), device="cpu"))


def test_a_run_is_closed_by_the_model_where_that_is_asked() -> None:
    subject = trained("qwen2_5_vl", "lvr")
    long = LatentDecoder(subject, quota=12, closing=False)
    assert all(len(answer.latents) >= 12 for answer in long.decode(examples(long), 24))
    own = LatentDecoder(subject, quota=12, closing=True)
    assert all(0 < len(answer.latents) < 12 for answer in own.decode(examples(own), 24))
    with pytest.raises(PearlError, match="mirage, whose runs end by their number only"):
        LatentDecoder(trained("qwen2_5_vl", "mirage"), closing=True)
