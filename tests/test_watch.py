"""The collapse watch on embeddings made for it, and early answers on a model whose head is rigged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pearl.records import EncodedImage, Trajectory
from pearl.trainer.answers import _options, answer_accuracy
from pearl.trainer.conversation import Conversation
from pearl.trainer.packing import Example
from pearl.trainer.preparation import Prepared, prepare
from pearl.trainer.watch import CollapseWatch, effective_rank, retrieval, spread
from tests.runs import OPTIONS, config, data_file, logged, rows, run


def random(count: int, width: int = 32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def test_the_effective_rank_counts_the_dimensions_in_use() -> None:
    around_zero = torch.cat([torch.eye(8), -torch.eye(8)])
    assert effective_rank(around_zero) == pytest.approx(8)
    assert effective_rank(torch.cat([torch.eye(8)[:2], -torch.eye(8)[:2]])) == pytest.approx(2)
    line = torch.arange(10.0)[:, None] * torch.ones(4)
    assert effective_rank(line) == pytest.approx(1)
    assert effective_rank(around_zero + 1000) == pytest.approx(8, rel=1e-3)
    assert effective_rank(torch.ones(10, 4)) == pytest.approx(1)


def test_spread_is_the_mean_distance_of_two() -> None:
    assert spread(torch.eye(5)) == pytest.approx(1)
    assert spread(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert spread(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(2)
    assert spread(3 * torch.tensor([[1.0, 0], [1, 1]])) == pytest.approx(1 - 2**-0.5)


def test_retrieval_is_how_often_the_own_target_is_nearest() -> None:
    target = random(10)
    assert retrieval(5 * target, target) == 1
    assert retrieval(target + 100, target - 100) == 1
    assert retrieval(target.roll(1, 0), target) == 0
    half = torch.cat([target[:5], -target[5:]])
    assert retrieval(half, target) == pytest.approx(0.5)


def watched(predicted: Tensor, target: Tensor) -> CollapseWatch:
    watch = CollapseWatch()
    for pair in zip(predicted.split(4), target.split(4), strict=True):
        watch.add(*pair)
    return watch


def test_figures_come_when_there_are_enough_and_look_at_the_last() -> None:
    assert watched(random(4), random(4)).figures() == {}
    watch = watched(torch.ones(200, 32), torch.ones(200, 32))
    for part in random(64).split(4):
        watch.add(part, part)
    figures = watch.figures()
    assert figures["retrieval"] == 1
    assert figures["retrieval_chance"] == pytest.approx(1 / 64)
    assert figures["predicted_spread"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("predicted", "target", "said"),
    [
        (random(16), random(16), None),
        (torch.ones(16, 32), random(16), "the predicted embeddings are nearly all the same"),
        (random(16), torch.ones(16, 32) + 1e-4 * random(16), "the target embeddings are nearly all the same"),
        (torch.ones(16, 32), torch.ones(16, 32), "the predicted and target embeddings are nearly all the same"),
        (torch.eye(2, 32).repeat(32, 1), random(64), "the predicted embeddings differ in one direction only"),
        (torch.eye(2, 32).repeat(8, 1), random(16), None),
    ],
)
def test_a_collapse_is_told(predicted: Tensor, target: Tensor, said: str | None) -> None:
    watch = watched(predicted, target)
    warning = watch.warning(watch.figures())
    assert warning is None if said is None else (warning or "").startswith(said)


def test_a_run_logs_the_watch_and_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trajectories that are all the same have targets that are."""
    same = data_file(tmp_path, [replace(rows(1)[0], id=f"row-{number}") for number in range(16)])
    run(same, tmp_path / "out", max_steps=4, batch_size=8)
    assert capsys.readouterr().err.count("warning: the predicted and target embeddings are nearly all the same") == 1
    assert logged(tmp_path / "out", "target_spread")[0] < 1e-3  # later they differ from what they were
    for side in ("predicted", "target"):
        assert len(logged(tmp_path / "out", f"{side}_rank")) == len(logged(tmp_path / "out", f"{side}_spread")) == 4
    assert logged(tmp_path / "out", "retrieval_chance")[0] == 1 / 8


def test_without_figures_there_is_no_warning() -> None:
    assert CollapseWatch().warning({"loss": 1.0}) is None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Its head is not tied to its embeddings."""
    folder = tmp_path_factory.mktemp("answers")
    return prepare(config(data_file(folder), folder / "out", "internvl"))


def accuracy(prepared: Prepared, trajectories: list[Trajectory]) -> dict[str, float]:
    return answer_accuracy(prepared.learner, prepared.packer, prepared.encoder, prepared.template, trajectories)


@pytest.mark.parametrize("favourite", "ABC")
def test_the_likeliest_option_counts(prepared: Prepared, favourite: str) -> None:
    """One option's token gets the highest logit everywhere, whatever the state."""
    asked = [replace(one, choices=tuple("ABC"), answer="ABC"[number % 3]) for number, one in enumerate(rows(7))]
    (token,) = prepared.encoder.tokenizer(favourite)["input_ids"]
    head = prepared.learner.base.get_output_embeddings()
    original = head.forward
    head.forward = lambda states: original(states) + 1e3 * F.one_hot(torch.tensor(token), head.out_features)
    prepared.learner.train()
    try:
        found = accuracy(prepared, asked)
    finally:
        head.forward = original
    assert found["answer_accuracy"] == pytest.approx({"A": 3, "B": 2, "C": 2}[favourite] / 7)
    assert found["answer_chance"] == pytest.approx(1 / 3)
    assert found["answers"] == 7
    assert prepared.learner.training


def test_questions_without_options_are_not_asked(prepared: Prepared) -> None:
    open_question = replace(rows()[0], choices=())
    other_answer = replace(rows()[1], answer="above")
    broken = replace(rows()[2], image=EncodedImage(b"no image"))
    assert accuracy(prepared, [open_question, other_answer, broken]) == {}
    found = accuracy(prepared, [open_question, rows()[3], replace(rows()[4], choices=OPTIONS[:2], answer="left")])
    assert found["answers"] == 2
    assert found["answer_chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_options_are_scored_as_if_each_stood_alone(prepared: Prepared) -> None:
    """The one forward over all options gives each the likelihood that it has as the only answer."""
    learner, encoder, one = prepared.learner.eval(), prepared.encoder, rows()[2]
    with torch.no_grad():
        states = learner.states(prepared.packer([_options(one, encoder, prepared.template)]))
        together = [states.next_token(str(number)).item() for number in range(3)]
        alone = []
        for option in OPTIONS:
            conversation = Conversation(replace(one, answer=option), prepared.template)
            images = (encoder.image(one.image),)
            view = encoder.view((*conversation.question(), conversation.direct()), images)
            states = learner.states(prepared.packer([Example("", images, {"answer": view})]))
            alone.append(states.next_token("answer").item())
    assert together == pytest.approx(alone, abs=1e-4)
