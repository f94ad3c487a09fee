"""The training loop: what is trained and saved, the same update however it is made, killed runs, plain checkpoints."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pearl.errors import PearlError
from pearl.parquet import DataError
from pearl.records import EncodedImage
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.dry_run import dry_run
from pearl.trainer.learner import Learner
from pearl.trainer.loop import NanLoss
from pearl.trainer.models import part_of
from pearl.trainer.objectives.mirage import Mirage
from pearl.trainer.packing import Batch
from pearl.trainer.preparation import prepare
from pearl.trainer.run_directory import checkpoints, last_checkpoint
from pearl.trainer.train import MEASURED, OutOfMemory, train
from tests.runs import (
    ENVIRONMENT,
    config,
    data_file,
    half_model,
    logged,
    merged_weights,
    model,
    on_two_processes,
    rows,
    run,
    trained_weights,
)
from tests.tiny_vlms import FAMILIES

prepare_torchvision()
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback  # noqa: E402

TERMS = ("loss", "loss_vlm", "loss_jepa", "loss_nextlat", "loss_nextlat_token")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_file(tmp_path_factory.mktemp("data"))


# one update, however it is made


class Gradients(TrainerCallback):
    """Keeps the first update's, clipped."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, **rest: Any) -> None:
        if not self.first:
            self.first = {n: p.grad.clone() for n, p in rest["model"].named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def whole_batches(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Three updates of four trajectories each, in one forward; and the first gradients."""
    out, gradients = tmp_path_factory.mktemp("whole") / "out", Gradients()
    train(config(data, out, batch_size=4, max_steps=3, learning_rate=1e-3), False, [gradients])
    return out, gradients.first


@pytest.mark.parametrize("batch_size", [2, 1])
def test_accumulated_forwards_are_one_update(
    data: Path, tmp_path: Path, whole_batches: tuple[Path, dict[str, Tensor]], batch_size: int
) -> None:
    whole, gradients = whole_batches
    mine = Gradients()
    settings = config(data, tmp_path / "out", batch_size=batch_size, accumulation=4 // batch_size)
    train(replace(settings, max_steps=3, learning_rate=1e-3), False, [mine])
    for name in TERMS:
        assert logged(tmp_path / "out", name) == pytest.approx(logged(whole, name), rel=1e-4), name
    assert mine.first.keys() == gradients.keys()
    for name, gradient in mine.first.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-6)
    weights = trained_weights(whole)
    for name, weight in trained_weights(tmp_path / "out").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Though neither the 13 trajectories nor the 5 to evaluate on divide among them."""
    data, held = data_file(tmp_path, rows(13)), data_file(tmp_path, rows(5), "held.parquet")
    one = config(data, tmp_path / "one", batch_size=4, max_steps=None, learning_rate=1e-3, eval_data=str(held))
    expected = train(one, False)
    two = replace(one, out=str(tmp_path / "two"), batch_size=2)
    ended = subprocess.run(
        on_two_processes(two), env=ENVIRONMENT, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("updates; the model:") == 1
    for name in TERMS:
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4), name
    assert len(logged(tmp_path / "two")) == dry_run(two, processes=2).updates == 4
    assert evaluated(tmp_path / "two") == pytest.approx(expected.evaluation, rel=1e-4)
    weights = trained_weights(tmp_path / "one")
    for name, weight in trained_weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)


def evaluated(out: Path) -> dict[str, float]:
    (line,) = (line for line in (out / "log.jsonl").read_text().splitlines() if "eval_loss" in line)
    return {name: value for name, value in json.loads(line).items() if name.startswith(MEASURED)}


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_checkpointing_changes_no_loss(data: Path, tmp_path: Path, tune: str) -> None:
    for on in (False, True):
        run(data, tmp_path / str(on), tune=tune, lora_dropout=0.0, gradient_checkpointing=on)
    assert logged(tmp_path / "True") == pytest.approx(logged(tmp_path / "False"), rel=1e-5)


def test_gradient_checkpointing_is_refused_with_latents_of_the_models_own(data: Path, tmp_path: Path) -> None:
    own = config(data, tmp_path, objective="mirage", objective_options={"stage": 2}, gradient_checkpointing=True)
    with pytest.raises(PearlError, match="--gradient-checkpointing"):
        prepare(own)


def test_that_nothing_is_held_out_of_few_images_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config(data, tmp_path, eval_fraction=0.001))
    assert "no image is among the share of 0.001 that is held out" in capsys.readouterr().err


def test_bf16_takes_steps(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "fp32", max_steps=6)
    run(data, tmp_path / "bf16", max_steps=6, precision="bf16")
    plain, half = logged(tmp_path / "fp32"), logged(tmp_path / "bf16")
    assert half == pytest.approx(plain, rel=0.05)
    assert half != plain
    assert half[-1] < half[0] - 0.1


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_weights_are_saved_in_the_type_that_they_had(data: Path, tmp_path: Path, tune: str) -> None:
    run(data, tmp_path / "out", model=str(half_model()), tune=tune)
    assert {weight.dtype for weight in merged_weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert {weight.dtype for weight in trained_weights(tmp_path / "out").values()} == {torch.float32}


def test_frozen_weights_stay_bf16_where_they_were(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "out", model=str(half_model()), tune="lora", precision="bf16", objective="lvr")
    types = {(weight.requires_grad, weight.dtype) for weight in prepare(settings).learner.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    wholly = replace(settings, tune="full")
    assert {weight.dtype for weight in prepare(wholly).learner.parameters()} == {torch.float32}
    assert dry_run(settings).gigabytes < dry_run(replace(settings, precision="fp32")).gigabytes
    assert dry_run(settings).activations < dry_run(replace(settings, precision="fp32")).activations


@pytest.mark.parametrize(("base", "objective"), [(None, "sft"), ("vlm-nano", "sft"), ("vlm-nano", "pearl")])
def test_the_estimate_of_activations_is_near_what_a_forward_keeps(
    data: Path, tmp_path: Path, base: str | None, objective: str
) -> None:
    named = str(model()) if base is None else base
    settings = config(data, tmp_path / "out", model=named, objective=objective, precision="fp32", batch_size=4)
    prepared = prepare(settings)
    longest = prepared.training[int(np.argmax(prepared.lengths))].example
    batch, kept = prepared.packer([longest] * 4), dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {weight.untyped_storage().data_ptr() for weight in prepared.learner.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = prepared.learner(batch)
    measured = sum(size for place, size in kept.items() if place not in own) / 1e9
    assert terms["vlm"].requires_grad
    assert 0.6 * measured < dry_run(settings).activations < 1.6 * measured


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_bf16_weights_and_adapters(data: Path, tmp_path: Path, family: str) -> None:
    mixed = {
        "model": str(half_model(family)),
        "tune": "lora",
        "precision": "bf16",
        "max_steps": 2,
        "eval_fraction": 0.4,
    }
    report = run(data, tmp_path / "out", family, **mixed)
    assert report.evaluation["eval_answers"] == 3


# what is trained


class Changes(TrainerCallback):
    """Which weights a run changed."""

    def on_train_begin(self, *args: Any, **rest: Any) -> None:
        self.before = {name: weight.detach().clone() for name, weight in rest["model"].named_parameters()}

    def on_train_end(self, *args: Any, **rest: Any) -> None:
        model = rest["model"]
        self.all = set(self.before)
        self.trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self.changed = {n for n, weight in model.named_parameters() if not torch.equal(weight, self.before[n])}


@pytest.mark.parametrize(
    ("tune", "freeze"),
    [
        ("full", ()),
        ("full", ("vision",)),
        ("full", ("projector",)),
        ("full", ("language",)),
        ("lora", ()),
        ("lora", ("vision",)),
        ("lora", ("vision", "language")),
    ],
)
def test_what_is_not_frozen_is_trained_and_nothing_else(
    data: Path, tmp_path: Path, tune: str, freeze: tuple[str, ...]
) -> None:
    changes = Changes()
    train(config(data, tmp_path / "out", tune=tune, freeze=freeze, lora_dropout=0.0), False, [changes])
    assert changes.changed == changes.trained
    assert trained_weights(tmp_path / "out").keys() == changes.trained
    family = prepare(config(data, tmp_path / "other")).learner.family
    bare = {name.removeprefix("vlm.").removeprefix("base_model.model.") for name in changes.changed}
    parts = {part_of(name, family) for name in bare if not name.startswith("losses.")}
    assert parts == {"vision", "projector", "language"} - set(freeze)
    assert {name for name in changes.all if name.startswith("losses.")} <= changes.changed
    if tune == "lora":
        assert all("lora_" in name or name.startswith("losses.") for name in changes.changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_on_all_linear_layers_but_the_head(data: Path, tmp_path: Path, family: str) -> None:
    plain = prepare(config(data, tmp_path / "full", family, tune="full")).learner.base
    head = plain.get_output_embeddings()
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    learner = prepare(config(data, tmp_path / "lora", family, tune="lora")).learner
    adapted = {name.partition(".lora_A")[0] for name, _ in learner.base.named_parameters() if ".lora_A" in name}
    assert adapted == linear
    trained = {name for name, weight in learner.vlm.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)


def test_predictor_tokens_and_dynamics_head_are_in_checkpoints_only(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    own = {name for name in trained_weights(tmp_path / "out") if name.startswith("losses.")}
    assert "losses.predictors" in own
    assert sum(name.startswith("losses.dynamics.layers") for name in own) == 6
    assert merged_weights(tmp_path / "out").keys() == load_file(model() / "model.safetensors").keys()


@pytest.mark.parametrize("padded", [True, False], ids=["room in the vocabulary", "a vocabulary that grows"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_an_objectives_tokens_are_trained_and_exported(data: Path, tmp_path: Path, tune: str, padded: bool) -> None:
    base = tmp_path / "base"
    processor = AutoProcessor.from_pretrained(model())
    vlm: Any = AutoModelForImageTextToText.from_pretrained(model())
    if not padded:
        vlm.resize_token_embeddings(len(processor.tokenizer))
    vlm.save_pretrained(base)
    processor.save_pretrained(base)
    run(data, tmp_path / "out", model=str(base), tune=tune, objective="lvr")
    tokens = AutoProcessor.from_pretrained(tmp_path / "out" / "model").tokenizer
    new = tokens.convert_tokens_to_ids(["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"])
    assert new == [len(processor.tokenizer) + number for number in range(3)]
    before = vlm.get_input_embeddings().weight
    made: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    after = made.get_input_embeddings().weight
    assert len(after) == (len(before) if padded else len(tokens))
    moved = set((after[: len(before)] != before).any(1).nonzero()[:, 0].tolist()) | set(range(len(before), len(after)))
    assert set(new) <= moved
    if tune == "lora":
        assert set(new) == moved


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"], ids=["one table", "a head of its own"])
def test_adapters_leave_the_heads_rows_of_an_objectives_tokens_to_be_trained(
    data: Path, tmp_path: Path, family: str
) -> None:
    run(data, tmp_path / "out", family, tune="lora", objective="mirage")
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder).get_output_embeddings().weight
        for folder in (model(family), tmp_path / "out" / "model")
    )
    tokens = AutoProcessor.from_pretrained(tmp_path / "out" / "model").tokenizer
    start, end = tokens.convert_tokens_to_ids(["<|latent_start|>", "<|latent_end|>"])
    assert not torch.equal(after[start], after[end])
    moved = set((after[: len(before)] != before).any(1).nonzero()[:, 0].tolist())
    assert moved | {*range(len(before), len(after))} >= {start, end}
    assert moved <= set(tokens.convert_tokens_to_ids(list(Mirage.special_tokens)))


def test_a_gradient_that_is_no_number_stops_before_it_does_harm(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Learner.forward

    def poisoned(learner: Learner, batch: Batch) -> dict[str, Tensor]:
        terms = forward(learner, batch)
        if "row-05" in batch.sample_ids:
            terms["vlm"] = terms["vlm"] + (0 * next(learner.parameters()).sum()).sqrt()  # 0, with an infinite slope
        return terms

    monkeypatch.setattr(Learner, "forward", poisoned)
    with pytest.raises(
        NanLoss, match=r"the loss's gradient is NaN or infinite in step \d, on (row-05, row-\d\d|row-\d\d, row-05)\."
    ):
        run(data, tmp_path / "out", max_steps=12, save_steps=0, batch_size=1, accumulation=2)
    assert all(weight.isfinite().all() for weight in trained_weights(tmp_path / "out").values())


def test_dropout_and_data_do_not_depend_on_workers_evaluation_or_logging(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "out", tune="lora", lora_dropout=0.3, max_steps=7, eval_fraction=0.4)
    train(settings, False)
    train(replace(settings, out=str(tmp_path / "other"), data_workers=2, eval_steps=2, log_steps=3), False)
    weights = trained_weights(tmp_path / "out")
    assert all(torch.equal(weight, weights[name]) for name, weight in trained_weights(tmp_path / "other").items())


def test_evaluation_is_a_mean_over_all_that_is_held_out(data: Path, tmp_path: Path) -> None:
    """However it is cut into batches; and the losses are those of training."""
    held = data_file(tmp_path, rows()[:5], "held.parquet")
    found = []
    for batch_size in (1, 2, 5):
        settings = config(
            data, tmp_path / str(batch_size), batch_size=batch_size, eval_data=str(held), learning_rate=1e-9
        )
        found.append(train(replace(settings, max_steps=1), False).evaluation)
    for name in (f"eval_{term}" for term in TERMS):
        assert [one[name] for one in found] == pytest.approx([found[0][name]] * 3, rel=1e-5), name
    run(held, tmp_path / "out", batch_size=5, max_steps=1)
    assert logged(tmp_path / "out") == pytest.approx([found[0]["eval_loss"]], rel=1e-5)
    assert found[0]["eval_answers"] == 5
    assert found[0]["eval_answer_chance"] == pytest.approx(1 / 3)


def test_what_is_held_out_is_looked_at_before_the_training(data: Path, tmp_path: Path) -> None:
    broken = [replace(row, image=EncodedImage(b"no image")) for row in rows()[:4]]
    held = data_file(tmp_path, broken, "held.parquet")
    with pytest.raises(DataError, match="what is held out cannot be evaluated on: 4 trajectories in a row"):
        run(data, tmp_path / "out", eval_data=str(held))
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_an_evaluation_that_fails_takes_no_checkpoint_along(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(data, tmp_path / "out", eval_fraction=0.4, eval_steps=2, save_steps=2)
    run(data, tmp_path / "whole", eval_fraction=0.4, eval_steps=2, save_steps=2)

    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    for updates in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr("pearl.trainer.loop.answer_accuracy", full)
            with pytest.raises(OutOfMemory):
                train(replace(settings, resume=updates > 2), progress=False)
        assert checkpoints(tmp_path / "out")[-1].name == f"checkpoint-{updates}"
    report = train(replace(settings, resume=True), progress=False)
    assert report.steps == 4
    assert report.evaluation["eval_answers"] > 0
    whole, resumed = (last_checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert whole is not None
    assert resumed is not None
    assert (whole / "trained.safetensors").read_bytes() == (resumed / "trained.safetensors").read_bytes()
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "eval_loss" in line] == [2, 4]


def test_evaluation_goes_on_over_what_cannot_be_used(data: Path, tmp_path: Path) -> None:
    good = rows()[:4]
    held = data_file(tmp_path, [replace(good[0], image=EncodedImage(b"no image")), *good[1:]], "held.parquet")
    report = run(data, tmp_path / "out", eval_data=str(held))
    assert report.evaluation["eval_answers"] == 3
    assert report.refused == 1
