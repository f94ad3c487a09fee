"""Evidence about latents and gains: figures on models and embeddings of which the answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tqdm import tqdm

from pearl.errors import PearlError
from pearl.evaluation.benchmarks.trajectories import question_of
from pearl.evaluation.embeddings import _left_out, measure_probe, probe_accuracy, retrieval_rates
from pearl.evaluation.gain import (
    Gain,
    GainError,
    GainMeter,
    by_skill,
    measure_gains,
    measure_gains_resumably,
    write_gains,
)
from pearl.evaluation.insides import objective_of
from pearl.evaluation.latents import Compared, _Change, _changes, _columns, _made, _Oracle, _Trial, latent_evidence
from pearl.evaluation.latents_report import markdown, write_evidence
from pearl.evaluation.modes.latent import Decoded, LatentDecoder
from pearl.evaluation.subject import Subject, SubjectError
from pearl.records import EncodedImage, Trajectory
from pearl.trainer.conversation import Conversation, load_template
from pearl.trainer.objectives.lvr import visual_tokens
from pearl.trainer.watch import effective_rank
from tests.latents import step, trajectory, visual_tokens_of
from tests.runs import _FOLDERS, data_file, model, run
from tests.tiny_vlms import HIDDEN

torch.set_num_threads(1)
BOX = [0.3, 0.3, 0.6, 0.6]


@cache
def rows() -> tuple[Trajectory, ...]:
    made = []
    for n in range(6):
        steps = [step("crop", 20 + 3 * n + k, image=0, box=BOX) for k in range(1 + n % 2)]
        one = trajectory(*steps, seed=n, question=f"Where is cup {n}?")
        made.append(replace(one, answer=one.choices[n % 2]))
    return tuple(made)


@cache
def told_by_the_tool() -> tuple[Trajectory, ...]:
    """One picture and question; only what the tool shows tells the answer."""
    made = []
    for n in range(4):
        one = trajectory(step("crop", 20 + n % 2, image=0, box=BOX), question="What does the tool show?")
        made.append(replace(one, id=f"told {n}", answer=one.choices[n % 2], conclusion="That is what it shows."))
    return tuple(made)


@cache
def trained(objective: str, data: Callable[[], tuple[Trajectory, ...]] = rows, **options: object) -> Subject:
    import tempfile

    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    run(
        data_file(folder, data()), folder / "out", objective=objective, max_steps=60, learning_rate=3e-3, batch_size=6,
        warmup=0.0, weight_decay=0.0, objective_options=dict(options),
    )  # fmt: skip
    return Subject.load(str(folder / "out" / "model"), device="cpu")


@pytest.mark.parametrize("objective", ["lvr", "mirage"])
def test_latents_are_asked_everything(objective: str) -> None:
    options = {"vlm_weight": 1.0} if objective == "mirage" else {}
    found = latent_evidence(trained(objective, **options), rows(), batch_size=4, max_new_tokens=40)
    assert (found.questions, found.embeddings.count, found.left_out) == (6, 6, {})
    assert found.accuracy == found.by_quota[{"lvr": 8, "mirage": 4}[objective]]
    assert set(found.replaced) == {"noise", "zeros", "the mean", "another's", "oracle", "removed"}
    assert set(found.by_quota) == {0, 1, 2, 4, 8, 16}
    for one in found.replaced.values():
        assert one.changed.value >= abs(one.accuracy.value - found.accuracy.value)
    assert list(found.retrieval) == [2]
    assert found.answers is not None
    assert found.answers.judged == 6
    assert 0 <= found.embeddings.distance <= 2
    assert found.latents is not None
    assert found.latents.count > found.embeddings.count


@pytest.mark.parametrize("objective", ["lvr", "mirage"])
def test_embeddings_are_held_against_what_the_tool_showed_and_the_whole_image(objective: str) -> None:
    """Targets: of lvr the visual tokens under the boxes, of mirage those of the tools' images, in four chunks each."""
    subject = trained(objective, **({"vlm_weight": 1.0} if objective == "mirage" else {}))
    decoder = LatentDecoder(subject)
    kind, losses = objective_of(subject)
    conversations = [Conversation(one, load_template("pearl")) for one in rows()]
    encoder, family = decoder.insides.encoder, decoder.insides.family
    examples = [kind.example(one, [encoder.image(i) for i in one.images], encoder) for one in conversations]
    torch.manual_seed(0)
    said = [Decoded("", torch.randn(4, HIDDEN), (1, 3), 0, 0) for _ in examples]
    learner = decoder.insides.learner(losses)
    judged, single = _made(said, [_Oracle.of(learner, decoder.insides, example) for example in examples])
    singly = Compared.of(*_columns(single))
    assert list(judged.owners) == list(range(6))
    pairs = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    for number, (example, found) in enumerate(zip(examples, judged.rows, strict=True)):
        shown = [visual_tokens_of(subject.model, family, example, image) for image in range(len(example.images))]
        if objective == "lvr":
            under = visual_tokens((0.3, 0.3, 0.6, 0.6), encoder.grid(example.images[0]))
            fed = [list(shown[0][under])] * len(rows()[number].steps)
        else:
            fed = [[chunk.mean(0) for chunk in each.tensor_split(4)] for each in shown[1:]]
        target = torch.stack([one for run in fed for one in run]).mean(0)
        expected = said[number].latents.mean(0), target, shown[0].mean(0)
        for one, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)
        made = said[number].latents
        pairs.append((made[0], fed[0][0], expected[2]))  # of the first run, of which there is one latent
        if len(fed) == 2:
            pairs += [(made[1 + place], fed[1][place], expected[2]) for place in range(3)]
    latents, targets, control = (torch.stack(column) for column in zip(*pairs, strict=True))
    assert singly.count == len(pairs) == 6 + 3 * 3
    assert singly.distance == pytest.approx(float((1 - torch.cosine_similarity(latents, targets)).mean()), abs=1e-4)
    assert singly.distance_control == pytest.approx(
        float((1 - torch.cosine_similarity(control, targets)).mean()), abs=1e-4
    )
    assert singly.ranks == pytest.approx((effective_rank(latents), effective_rank(targets)), rel=1e-3)


def test_what_replaces_latents_is_what_the_model_is_fed() -> None:
    subject = trained("lvr")
    questions = [question_of(one, load_template("pearl"), "trajectories") for one in rows()]
    decoder = LatentDecoder(subject)
    trial = _Trial(decoder, questions, [decoder.example(one) for one in questions], 4, 40, tqdm(disable=True))
    plain, fed = trial.run(), list[torch.Tensor]()
    mark = torch.full((1, HIDDEN), 7.5)
    handle = subject.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        changed = trial.run(_Change([mark] * len(questions)))
    finally:
        handle.remove()
    marked = sum(int((embeds == 7.5).all(-1).sum()) for embeds in fed)
    assert marked == sum(len(one.latents) for one in changed) > 0
    assert [one.text for one in changed] != [one.text for one in plain] or any(
        not torch.equal(one.latents, other.latents) for one, other in zip(plain, changed, strict=True)
    )


def test_where_only_latents_tell_the_answer_the_oracles_give_it() -> None:
    """Conversations that differ in nothing but what is fed: the model's own latents cannot know, the oracle's do."""
    subject = trained("mirage", data=told_by_the_tool, vlm_weight=1.0)
    found = latent_evidence(subject, told_by_the_tool(), batch_size=4, max_new_tokens=60)
    assert found.accuracy is not None
    assert found.accuracy.value == found.replaced["noise"].accuracy.value == 0.5
    assert found.replaced["oracle"].accuracy.value == 1
    assert found.replaced["oracle"].changed.value == 0.5


def test_latents_of_a_second_stage_are_held_against_the_tools_images() -> None:
    """A stage that is given no image of a tool has the same targets as the first: these images' visual tokens."""
    learned = trained("mirage", vlm_weight=1.0)
    assert learned.training is not None
    options = {**learned.training.options, "stage": 2}
    second = copy(learned)
    second.training = replace(learned.training, options=options)
    first, again = (latent_evidence(one, rows(), batch_size=4, max_new_tokens=40) for one in (learned, second))
    assert again == first


def test_a_predicted_embedding_learned_by_heart_finds_its_own_target() -> None:
    found = latent_evidence(trained("pearl", lambda_=5.0), rows())
    assert found.accuracy is None
    assert found.retrieval[2].embedding.value > 0.9
    assert found.embeddings.distance < min(0.1, found.embeddings.distance_control)
    assert found.latents is None


def test_what_is_fed_instead_of_latents() -> None:
    torch.manual_seed(0)
    made = [torch.randn(3, 4) + 5, torch.randn(2, 4) - 5, torch.zeros(0, 4)]
    changes = dict(_changes([Decoded("", latents, (len(latents),), 0, 0) for latents in made]))
    every = torch.cat(made)
    rows, which = [0, 1, 2, 1], [0, 1, 0, 2]
    fed = {name: change.starting_at(0)(torch.empty(4, 4), rows, which) for name, change in changes.items()}
    assert torch.equal(fed["zeros"], torch.zeros(4, 4))
    assert torch.equal(fed["the mean"], every.mean(0).expand(4, 4))
    mean = every.mean(0)
    assert torch.equal(fed["another's"], torch.stack([made[1][0], mean, made[0][0], mean]))
    later = changes["another's"].starting_at(1)(torch.empty(2, 4), [0, 1], [0, 4])  # rows 1 and 2 of all
    assert torch.equal(later, torch.stack([mean, made[0][1]]))
    noise = changes["noise"].starting_at(0)
    assert torch.equal(fed["noise"], noise(torch.empty(4, 4), rows, which))  # the same in every run
    many = dict(_changes([Decoded("", every.repeat(400, 1), (2000,), 0, 0)]))["noise"].instead[0]
    assert torch.allclose(many.mean(0), mean, atol=0.5)
    assert torch.allclose(many.std(0), every.repeat(400, 1).std(0), rtol=0.1)


def test_trajectories_that_cannot_be_asked_are_left_out_and_counted() -> None:
    without_box = replace(rows()[0], id="x", steps=())
    without_options = replace(rows()[1], id="y", choices=())
    found = latent_evidence(trained("lvr"), [*rows(), without_box, without_options], max_new_tokens=40)
    assert found.questions == 6
    assert sorted(found.left_out.values()) == [1, 1]
    assert "its answer is not one of its options" in found.left_out
    assert "Left out: 1: " in markdown([found])


def test_a_model_that_predicts_nothing_is_refused(tmp_path: Path) -> None:
    run(data_file(tmp_path, rows()), tmp_path / "out", objective_options={"jepa": False}, max_steps=1)
    with pytest.raises(PearlError, match="without L_JEPA"):
        latent_evidence(Subject.load(str(tmp_path / "out" / "model"), device="cpu"), rows())
    with pytest.raises(PearlError, match=r"no training_config\.json"):
        latent_evidence(Subject.load(str(model()), device="cpu"), rows())


def test_evidence_becomes_files(tmp_path: Path) -> None:
    found = [
        latent_evidence(trained("lvr"), rows(), max_new_tokens=40),
        latent_evidence(trained("pearl", lambda_=5.0), rows()),
    ]
    write_evidence(found, tmp_path / "out")
    assert [one["objective"] for one in json.loads((tmp_path / "out" / "latents.json").read_text())] == ["lvr", "pearl"]
    assert (tmp_path / "out" / "latents.png").stat().st_size > 10_000
    assert "| removed |" in markdown(found)
    assert markdown(found).count("| the answer, read from 6 of them |") == 2


def test_retrieval_of_what_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    asked, targets = answered(200), torch.randn(200, 16, generator=generator)
    assert retrieval_rates(targets, targets, asked, 128).tolist() == [1] * 200
    assert retrieval_rates(targets + 5, targets, asked, 128).min() == 1  # what all share says nothing
    noise = torch.randn(200, 16, generator=generator)
    assert retrieval_rates(noise, targets, asked, 2).mean() == pytest.approx(0.5, abs=0.05)
    assert retrieval_rates(noise, targets, asked, 16).mean() == pytest.approx(1 / 16, abs=0.03)


def test_chance_is_what_it_says() -> None:
    """Of embeddings that know nothing, among all targets one finds its own: 128 drawn from 129 are nearly all."""
    generator = torch.Generator().manual_seed(0)
    found = [
        retrieval_rates(torch.randn(129, 8, generator=generator), torch.randn(129, 8, generator=generator), answered(129), 128)
        for _ in range(100)
    ]  # fmt: skip
    assert np.mean(found) == pytest.approx(1 / 128, rel=0.25)


def test_other_embeddings_of_a_trajectory_are_no_candidates() -> None:
    """Two alike of each trajectory: each finds a target of its trajectory, but which of the two cannot be known."""
    asked = [one for one in answered(50) for _ in range(2)]
    embeddings = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    assert retrieval_rates(embeddings, embeddings, asked, 2).tolist() == [1] * 50


def answered(count: int, choices: str = "abc", skill: str = "colour") -> list[Trajectory]:
    """Trajectories whose answers take turns."""
    return [
        replace(rows()[0], id=f"{skill} {n}", choices=tuple(choices), answer=choices[n % len(choices)], skill=skill)
        for n in range(count)
    ]


def test_answers_read_from_what_holds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    asked = answered(300)
    noise = torch.randn(300, 16, generator=generator)
    holding = noise + 20 * torch.eye(16)[torch.arange(300) % 3]
    assert probe_accuracy(holding + 100, asked).all()  # what all share says nothing
    found = measure_probe(holding, noise, holding, asked)
    assert found is not None
    assert found.judged == 300
    assert found.chance == pytest.approx(1 / 3)
    assert (found.embedding.value, found.target.value) == (1, 1)
    assert found.control.value == pytest.approx(1 / 3, abs=0.08)


@pytest.mark.parametrize(("count", "width"), [(40, 192), (120, 16), (120, 480)])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_nothing_is_read_from_noise(count: int, width: int, slope: float) -> None:
    """Also where embeddings have more dimensions than there are trajectories."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1) ** -slope
    asked, found = answered(count), list[float]()
    for _ in range(20):
        found.append(probe_accuracy(spectrum * torch.randn(count, width, generator=generator), asked).mean())
    assert np.mean(found) == pytest.approx(1 / 3, abs=0.05)


def test_the_probe_is_ridge_regression_on_the_others() -> None:
    """By augmented least squares, trajectory by trajectory."""
    generator = torch.Generator().manual_seed(0)
    asked = [one for one in answered(12) for _ in range(2)]
    embeddings = torch.randn(24, 30, generator=generator).double()
    truth = torch.eye(3).double()[torch.arange(12) % 3].repeat_interleave(2, 0)
    centred = embeddings - embeddings.mean(0)
    kernel = centred @ centred.T
    groups = [torch.tensor([2 * n, 2 * n + 1]) for n in range(12)]
    values, vectors = torch.linalg.eigh(kernel)
    missed = _left_out(values, vectors, 0.5, truth, groups)
    for rows in groups:
        others = torch.ones(24, dtype=torch.bool)
        others[rows] = False
        mean, level = embeddings[others].mean(0), truth[others].mean(0)
        ridge = torch.cat([embeddings[others] - mean, 0.5**0.5 * torch.eye(30).double()])
        slopes = torch.linalg.lstsq(ridge, torch.cat([truth[others] - level, torch.zeros(30, 3).double()])).solution
        torch.testing.assert_close(missed[rows], truth[rows] - level - (embeddings[rows] - mean) @ slopes)
    assert len(probe_accuracy(embeddings.float(), asked)) == 12


def test_an_answer_is_not_read_from_its_own_trajectory() -> None:
    """Two embeddings of each trajectory, alike, of answers that say nothing of them."""
    generator = torch.Generator().manual_seed(0)
    asked = [one for one in answered(300) for _ in range(2)]
    embeddings = torch.randn(300, 16, generator=generator).repeat_interleave(2, 0)
    assert probe_accuracy(embeddings, asked).mean() == pytest.approx(1 / 3, abs=0.08)


def test_answers_that_no_other_trajectory_has_are_not_read() -> None:
    asked = [*answered(6), replace(answered(1, "da")[0], id="alone")]
    noise = torch.randn(7, 4)
    assert len(probe_accuracy(noise, asked)) == 6
    assert measure_probe(noise[:3], noise[:3], noise[:3], answered(3)) is None
    other_skill = [*answered(3), *answered(3, skill="shape")]
    assert measure_probe(noise[:6], noise[:6], noise[:6], other_skill) is None


def test_a_gain_is_what_whole_forwards_say() -> None:
    """Of each prefix and option by itself, by transformers' own forward, against the packed tree."""
    meter = GainMeter(Subject.load(str(model()), device="cpu"), load_template("pearl"))
    one = rows()[1]
    found = meter.measure(one)
    assert found.tools == ("crop", "crop")
    assert found.log_odds == pytest.approx([plain_log_odds(meter, one, count) for count in range(3)], abs=1e-4)
    without = [plain_log_odds(meter, one, count, image=False) for count in (1, 2)]
    assert found.without_image == pytest.approx(without, abs=1e-4)
    assert found.gain == pytest.approx(found.log_odds[2] - found.log_odds[0])
    both = [found.log_odds[k + 1] - found.without_image[k] for k in range(2)]
    assert found.image_gain == pytest.approx(max(both))


@torch.no_grad()
def plain_log_odds(meter: GainMeter, one: Trajectory, count: int, *, image: bool = True) -> float:
    from PIL import Image

    subject, template = meter.insides.subject, load_template("pearl")
    scores = []
    for choice in one.choices:
        conversation = Conversation(replace(one, answer=choice), template)
        steps = conversation.steps()[: 2 * count]
        messages, pictures = [], list[EncodedImage]()
        for number, turn in enumerate((*conversation.question(), *steps, conversation.direct())):
            last = number == 2 * count and count and not image
            parts = []
            for part in turn.parts:
                if isinstance(part, str):
                    parts.append({"type": "text", "text": part})
                elif not last:
                    parts.append({"type": "image"})
                    pictures.append(conversation.images[part.index])
            messages.append({"role": turn.role, "content": parts or [{"type": "text", "text": "(no image)"}]})
        opened = [Image.open(__import__("io").BytesIO(picture.data)) for picture in pictures]
        prompt = subject.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        whole = subject.processor.apply_chat_template(messages).rstrip()
        inputs, start = (
            subject.processor(text=[text], images=[opened], return_tensors="pt") for text in (whole, prompt)
        )
        begin = start["input_ids"].shape[1]
        shares = torch.log_softmax(subject.model(**inputs).logits[0].double(), -1)
        ids = inputs["input_ids"][0]
        scores.append(float(sum(shares[t - 1, ids[t]] for t in range(begin, len(ids)))))
    right = one.choices.index(one.answer)
    others = [score for number, score in enumerate(scores) if number != right]
    return scores[right] - float(np.logaddexp.reduce(others))


def test_what_has_no_gain_is_named_and_the_rest_is_measured(tmp_path: Path) -> None:
    meter = GainMeter(Subject.load(str(model()), device="cpu"), load_template("pearl"))
    good = rows()[0]
    odd = [
        replace(good, steps=()), replace(good, choices=(), answer="left"),
        replace(good, image=EncodedImage(b"no image")), good,
    ]  # fmt: skip
    found = [gain for _, gain in measure_gains(meter, odd)]
    assert [isinstance(one, Gain) for one in found] == [False, False, False, True]
    assert found[:2] == ["it has no steps", "its answer is not one of at least two options"]
    gains = [one for one in found if isinstance(one, Gain)]
    write_gains(gains, tmp_path / "gain.parquet")
    (row,) = pq.read_table(tmp_path / "gain.parquet").to_pylist()
    assert (row["id"], row["tools"], row["gain"]) == (good.id, ["crop"], gains[0].gain)


def test_too_little_memory_is_no_fault_of_a_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = GainMeter(Subject.load(str(model()), device="cpu"), load_template("pearl"))

    def states(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(meter.learner, "states", states)
    with pytest.raises(SubjectError, match=f"out of memory with trajectory {rows()[0].id} alone"):
        next(measure_gains(meter, rows()))


def test_a_stopped_measurement_goes_on(tmp_path: Path) -> None:
    meter = GainMeter(Subject.load(str(model()), device="cpu"), load_template("pearl"))
    given, journal = [*rows(), replace(rows()[0], steps=())], tmp_path / "sub" / "gain.jsonl"
    whole = list(measure_gains(meter, given))
    stopped = measure_gains_resumably(meter, given, journal, {"model": "a"}, resume=False)
    assert [next(stopped) for _ in range(3)] == whole[:3]
    del stopped
    journal.write_bytes(journal.read_bytes() + b'{"id": "cut o')
    with pytest.raises(GainError, match="was stopped"):
        next(measure_gains_resumably(meter, given, journal, {"model": "a"}, resume=False))
    with pytest.raises(GainError, match="of another measurement"):
        next(measure_gains_resumably(meter, given, journal, {"model": "b"}, resume=True))
    only_the_rest = [one for number, one in enumerate(given) if number > 2]
    with what_is_measured(meter) as measured:
        assert list(measure_gains_resumably(meter, given, journal, {"model": "a"}, resume=True)) == whole
    assert measured == [one.id for one in only_the_rest]
    assert len(journal.read_text().splitlines()) == 1 + len(given)
    assert list(measure_gains_resumably(meter, given[:4], journal, {"model": "a"}, resume=True)) == whole[:4]
    others, edited = [given[0], *given[2:]], [given[0], replace(given[1], question="Where, then?"), *given[2:]]
    repainted = [given[0], replace(given[1], image=replace(given[1].image, data=given[0].image.data)), *given[2:]]
    for changed in (others, edited, repainted):
        with pytest.raises(GainError, match=f"number 1 was {given[1].id} and is {changed[1].id} now, or what it holds"):
            list(measure_gains_resumably(meter, changed, journal, {"model": "a"}, resume=True))


@contextmanager
def what_is_measured(meter: GainMeter) -> Iterator[list[str]]:
    """Notes the trajectories that are measured."""
    measured, measure = list[str](), meter.measure

    def noted(trajectory: Trajectory) -> Gain:
        measured.append(trajectory.id)
        return measure(trajectory)

    meter.measure = noted  # type: ignore[method-assign]
    yield measured
    del meter.measure


def test_means_by_skill() -> None:
    gains = [Gain("a", "near", ("crop",), (0.0, 2.0), (1.0,)), Gain("b", "near", ("crop",), (1.0, 1.0), (1.5,))]
    near, every = by_skill(gains)
    assert (near.skill, every.skill, near.count) == ("near", "all", 2)
    assert near.gain == 1.0
    assert near.image_gain == pytest.approx(0.25)
    assert near.useless == 0.5
    assert near.before == pytest.approx((0.5 + 1 / (1 + math.exp(-1))) / 2)
