"""A frozen image encoder as Pearl's target."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pearl.evaluation.latents import latent_evidence
from pearl.evaluation.subject import Subject
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.conversation import Conversation, load_template
from pearl.trainer.learner import Learner
from pearl.trainer.model_folder import OBJECTIVE_WEIGHTS
from pearl.trainer.objectives.encoders import EncoderError, FrozenEncoder, pixels, preprocessing, stack_pixels
from pearl.trainer.objectives.pearl import Pearl
from pearl.trainer.packing import Packer
from pearl.trainer.train import train
from tests.plain import picture, step, tiny, trajectory
from tests.runs import config, data_file, encoder, logged, model, rows
from tests.tiny_vlms import build_tiny_encoder

prepare_torchvision()
from transformers import TrainerCallback  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_encoder(tmp_path_factory.mktemp("dinov2")))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t"])
def test_the_width_is_that_of_what_comes_out(name: str) -> None:
    frozen = FrozenEncoder(f"timm:{name}", pretrained=False)
    statistics = {key: value.clone() for key, value in frozen.state_dict().items()}
    side = preprocessing(f"timm:{name}")[0]
    assert frozen(torch.rand(2, 3, side, side)).shape == (2, frozen.width)
    assert all(torch.equal(value, statistics[key]) for key, value in frozen.state_dict().items())


def test_predictor_tokens_meet_the_embeddings_of_the_tool_images(folder: str) -> None:
    vlm = tiny("qwen2_5_vl")
    objective = Pearl(target_encoder=folder, num_predictor_tokens=2, nextlat=False)
    several = [
        trajectory(step("One.", picture(1)), step("Two.", None), step("Three.", picture(2)), step("Four.", picture(3))),
        trajectory(step("Only one.", picture(4))),
        trajectory(),
    ]
    examples = []
    for one in several:
        talk = Conversation(one, load_template("pearl"))
        examples.append(objective.example(talk, [vlm.encoder.image(image) for image in talk.images], vlm.encoder))
    batch = Packer(vlm.family, vlm.vlm.config, vlm.encoder.padding)(examples)
    torch.manual_seed(0)
    learner = Learner(vlm.vlm, vlm.family, objective.losses(vlm.hidden_size))
    states = learner.states(batch)
    terms = learner.losses(states)
    assert learner.losses.counts(batch)["jepa"] == 3
    assert "target" not in batch.places

    losses: Any = learner.losses
    source = batch.places["source"]
    at = source.at[source.marks["predicted"]]
    shown = torch.stack([pixels(folder, picture(number)) for number in (1, 2, 4)])
    expected = 1 - F.cosine_similarity(losses.projection(states.main[at]), losses.encoder(shown))
    torch.testing.assert_close(terms["jepa"], expected.sum())
    terms["jepa"].backward()
    assert losses.projection.weight.grad is not None
    assert all(parameter.grad is None for parameter in losses.encoder.parameters())


def test_the_encoder_stays_as_it_is_in_training(folder: str) -> None:
    encoder = FrozenEncoder(folder).train()
    assert not encoder.model.training
    assert encoder(torch.zeros(2, 3, 28, 28)).shape == (2, encoder.width)


def test_a_batch_without_tool_images_has_no_embeddings(folder: str) -> None:
    for name in (folder, f"timm:local-dir:{encoder()}"):
        made, forwards = FrozenEncoder(name), list[Any]()
        made.model.register_forward_hook(lambda *of, seen=forwards: seen.append(of))
        assert made(stack_pixels(name, [])).shape == (0, made.width)
        assert len(forwards) == 1  # as in processes whose batch has some


def test_an_encoder_of_timm() -> None:
    assert preprocessing("timm:resnet10t.c3_in1k")[0] == 176
    encoder = FrozenEncoder("timm:resnet10t", pretrained=False)
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 512) == (1, encoder.width)


def test_a_damaged_folder_of_timm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="timm has no such model: 'architecture'"):
        preprocessing(f"timm:local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["timm:no_such_model", "/no/such/folder"])
def test_an_encoder_that_is_not_there_is_said_before_any_work(name: str) -> None:
    with pytest.raises(EncoderError, match=r"no_such_model|no/such/folder"):
        Pearl(target_encoder=name)


def test_a_model_of_another_kind_and_pickles_are_no_encoders(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="cannot be used as an image encoder"):
        FrozenEncoder(str(model()))
    shutil.copytree(encoder(), tmp_path / "timm")
    (tmp_path / "timm" / "model.safetensors").rename(tmp_path / "timm" / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="has no weights as safetensors"):
        FrozenEncoder(f"timm:local-dir:{tmp_path / 'timm'}")


def test_a_folder_of_timm_gives_what_its_model_gives() -> None:
    import timm

    name = f"timm:local-dir:{encoder()}"
    side, mean, std = preprocessing(name)
    assert (side, mean, std) == (160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    model: Any = timm.create_model("test_vit", checkpoint_path=str(encoder() / "model.safetensors")).eval()
    shown = pixels(name, picture(1))[None]
    expected = model.forward_head(model.forward_features(shown), pre_logits=True)
    torch.testing.assert_close(FrozenEncoder(name)(shown), expected)


class Stop(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_with_an_encoder_is_resumed_saved_and_read_again(tmp_path: Path) -> None:
    """One of its updates has no tool image."""
    data, options = data_file(tmp_path), {"target_encoder": f"timm:local-dir:{encoder()}", "num_predictor_tokens": 2}
    whole = config(data, tmp_path / "whole", objective_options=options, save_steps=2)
    train(whole, progress=False)
    assert logged(tmp_path / "whole", "loss_jepa")[0] > 0
    stopped = replace(whole, out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        train(stopped, False, [Stop()])
    train(replace(stopped, resume=True), progress=False)
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "model" / OBJECTIVE_WEIGHTS) for name in ("whole", "out"))
    assert {name.partition(".")[0] for name in first} == {"predictors", "projection", "dynamics"}
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    for dtype in ("fp32", "bf16"):
        model = Subject.load(str(tmp_path / "out" / "model"), device="cpu", dtype=dtype)
        assert 0 < latent_evidence(model, rows()).embeddings.distance < 2
