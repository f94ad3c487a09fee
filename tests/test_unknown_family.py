"""Families that nothing is known about: tried on an example, then trained with a row for each view, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pearl.parquet import write_trajectories
from pearl.trainer.config import ConfigError, TrainConfig
from pearl.trainer.models import ModelError, load
from pearl.trainer.objectives.pearl import Pearl
from pearl.trainer.preparation import prepare
from pearl.trainer.train import train
from tests.plain import picture, step, trajectory
from tests.runs import config, data_file
from tests.tiny_vlms import build_tiny_vlm


@pytest.mark.parametrize("family", ["vipllava", "recurrent_llava", "windowed_llava"])
def test_what_works_as_usual_is_trained_on_separate_rows(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "steps.parquet"
    write_trajectories(data, [trajectory(step("I look.", picture(i)), image=picture(9 + i)) for i in range(4)])
    model = str(build_tiny_vlm(family, tmp_path / "tiny"))
    config = TrainConfig(data=str(data), model=model, out=str(tmp_path / "run"), max_steps=1, eval_fraction=0)
    report = train(config, progress=False)
    assert report.last["loss_jepa"] > 0
    assert "each view has a row of its own" in capfd.readouterr().err


def test_latents_of_the_models_own_are_refused_where_its_mask_is_not_known(tmp_path: Path) -> None:
    model = str(build_tiny_vlm("vipllava", tmp_path / "tiny"))
    settings = config(data_file(tmp_path), tmp_path / "run", model=model, objective="mirage")
    prepare(settings)
    with pytest.raises(ConfigError, match=r"how .*tiny masks these is not known; they can be trained in qwen2_5_vl, "):
        prepare(replace(settings, objective_options={"stage": 2}))


def test_a_window_that_its_configuration_says_in_the_old_way_is_kept(tmp_path: Path) -> None:
    model = str(build_tiny_vlm("windowed_llava", tmp_path / "tiny"))
    settings = config(data_file(tmp_path), tmp_path / "run", model=model, objective="sft")
    prepared = prepare(settings)
    longest = prepared.training[int(np.argmax(prepared.lengths))].example
    view, batch = longest.views["full"], prepared.packer([longest])
    assert len(view) > 100
    ids = torch.from_numpy(view.ids)[None]
    labels = torch.where(torch.from_numpy(view.supervised)[None], ids, -100)
    with torch.no_grad():
        ours = prepared.learner.eval()(batch)["vlm"] / prepared.learner.losses.counts(batch)["vlm"]
        theirs = prepared.learner.base(input_ids=ids, labels=labels, **batch.images).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("pixtral", "'llava', which cannot be trained here"),
        ("scaled", "'hyperclovax_vision_v2', whose logits are not its head's alone"),
    ],
)
def test_what_would_be_trained_wrongly_is_refused_before_any_work(family: str, said: str, tmp_path: Path) -> None:
    model = str(build_tiny_vlm(family, tmp_path))
    with pytest.raises(ModelError, match=said):
        load(TrainConfig(data="", model=model), Pearl())


def test_positions_of_its_own_are_found_before_any_work(tmp_path: Path) -> None:
    model = str(build_tiny_vlm("qwen2_vl", tmp_path))
    with pytest.raises(ModelError, match="'qwen2_vl', whose positions or images work in a way of their own"):
        load(TrainConfig(data="", model=model), Pearl())
