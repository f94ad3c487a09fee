"""What fills up the last batches of several processes counts for nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from pearl.torch_setup import prepare_torchvision
from pearl.trainer.data import GroupedOrder, with_stand_ins
from pearl.trainer.learner import Learner
from pearl.trainer.objectives.base import Objective
from pearl.trainer.objectives.lvr import Lvr
from pearl.trainer.objectives.mirage import Mirage
from pearl.trainer.objectives.pearl import Pearl
from pearl.trainer.objectives.sft import Sft, SftAnswer
from pearl.trainer.preparation import prepare
from tests.latents import step, tiny, trajectory
from tests.runs import config, data_file, rows
from tests.tiny_vlms import build_tiny_encoder

prepare_torchvision()
from accelerate.data_loader import BatchSamplerShard  # noqa: E402

torch.set_num_threads(1)
ENCODER = "a tiny encoder's folder"
BOX = [0.2, 0.2, 0.8, 0.8]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Sft, {}),
        (SftAnswer, {}),
        (Pearl, {"direct_weight": 0.5}),
        (Pearl, {"jepa_distance": "l2", "targets": "steps"}),
        (Pearl, {"jepa_distance": "smooth-l1", "nextlat_token": "published"}),
        (Pearl, {"jepa_distance": "mse", "target_encoder": ENCODER}),
        (Pearl, {"jepa_distance": "infonce", "targets": "steps"}),
        *((Lvr, {"head": head}) for head in ("none", "simple", "glu")),
        (Mirage, {"stage": 1}),
        (Mirage, {"stage": 2}),
    ],
    ids=str,
)
def test_a_silent_example_adds_nothing_to_any_term(
    kind: type[Objective], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = str(build_tiny_encoder(tmp_path))
    objective = kind(**{name: folder if value == ENCODER else value for name, value in options.items()})
    model = tiny("qwen2_5_vl", type(objective))
    learner = model.learner(objective)
    given = [
        trajectory(step("crop", 1, box=BOX)),
        trajectory(step("crop", 2, box=BOX), step("depth", 3), seed=4, question="Is the cup on the table red?"),
    ]
    examples = [model.example(objective, one) for one in given]
    silent = [example.silent() for example in examples]
    alone, beside, nothing = (model.packer(some) for some in (examples, [*examples, *silent], silent))

    counts, terms, watched = learner.losses.counts(alone), learner(alone), learner.losses.watched
    assert all(counts.values())
    assert learner.losses.counts(beside) == counts
    assert learner.losses.counts(nothing) == dict.fromkeys(counts, 0)
    for name, term in learner(beside).items():
        torch.testing.assert_close(term, terms[name])
    for found, expected in zip(learner.losses.watched or (), watched or (), strict=True):
        torch.testing.assert_close(found, expected)

    zeros = learner(nothing)
    assert zeros == dict.fromkeys(terms, 0)
    gradients = gradients_of(learner, zeros)
    assert not any(gradient.any() for gradient in gradients.values())
    assert gradients.keys() == gradients_of(learner, terms).keys()  # processes exchange those of the same weights
    assert all(len(side) == 0 for side in learner.losses.watched or ())


def gradients_of(learner: Learner, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    learner.zero_grad()
    torch.stack([*terms.values()]).sum().backward()
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 13, 24, 30])
def test_every_process_has_full_batches_and_nothing_counts_twice(count: int, batch_size: int, processes: int) -> None:
    order = GroupedOrder([row % 3 for row in range(count)], batch_size, 0, batch_size * processes)
    for indices in (order, with_stand_ins(range(count), order.multiple)):
        batches = BatchSampler(indices, batch_size, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, number)) for number in range(processes)]
        assert {len(batch) for shard in shards for batch in shard} == {batch_size}
        assert {len(shard) for shard in shards} == {-(-count // order.multiple)}
        drawn = [*chain.from_iterable(chain.from_iterable(shards))]
        assert sorted(index for index in drawn if index >= 0) == list(range(count))
        assert len(indices) == len(drawn)


def test_one_process_has_no_stand_ins() -> None:
    assert len(GroupedOrder([1] * 13, 4, 0)) == 13
    assert sorted(GroupedOrder([1] * 13, 4, 0)) == with_stand_ins(range(13), 1) == list(range(13))


def test_a_stand_in_is_its_row_without_a_word(tmp_path: Path) -> None:
    made = rows(3)
    made[1] = replace(made[1], image=replace(made[1].image, data=b"no image"))
    examples = prepare(config(data_file(tmp_path, made), tmp_path / "out")).training
    for row in range(3):
        real, silent = examples[row], examples[-1 - row]
        assert silent.example.id == real.example.id
        assert len(silent.example) == len(real.example)
        assert not any(view.supervised.any() for view in silent.example.views.values())
        assert silent.refused == ()
