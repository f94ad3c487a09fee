"""`pearl-train`: what it shows, and what it says of input that it cannot use: one line, exit code 1, no traceback."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from torch._utils import ExceptionWrapper
from typer.testing import CliRunner, Result

from pearl.cli.gen import app as gen
from pearl.cli.train import app
from pearl.errors import PearlError
from pearl.parquet import DataError, schema, write_trajectories
from pearl.records import EncodedImage, ToolCall, Trajectory
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.learner import Learner
from pearl.trainer.models import place_of
from pearl.trainer.packing import Batch
from pearl.trainer.run_directory import checkpoints
from pearl.trainer.train import _explained, train
from tests.hub_server import TOKEN, HubServer
from tests.runs import (
    ENVIRONMENT,
    config,
    data_file,
    encoder,
    flags,
    logged,
    model,
    on_two_processes,
    pearl_train,
    poisoned_model_and_data,
    rows,
)

prepare_torchvision()

SHORT = ("--max-steps", "2", "--batch-size", "2", "--eval-fraction", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_file(tmp_path_factory.mktemp("data"))


def invoke(data: Path | str, out: Path, *more: str | Path, base: Path | None = None) -> Result:
    """A short run of the command in this process; later options win."""
    given = ("--data", data, "--model", base or model(), "--out", out, *SHORT, *more)
    return CliRunner().invoke(app, [str(one) for one in given])


def refused(data: Path | str, out: Path, *more: str | Path, base: Path | None = None) -> str:
    """The one line that it says."""
    result = invoke(data, out, *more, base=base)
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not (out / "model").exists()
    return line


# data


def text_file(path: Path) -> None:
    path.write_text("id,question\n")


def another_table(path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), path)


def another_version(path: Path) -> None:
    metadata = {**(schema().metadata or {}), b"pearl": b'{"schema_version": 99}'}
    pq.write_table(pa.Table.from_pylist([], schema().with_metadata(metadata)), path)


def no_rows(path: Path) -> None:
    write_trajectories(path, [])


def cut(path: Path) -> None:
    write_trajectories(path, rows(3))
    path.write_bytes(path.read_bytes()[:2000])


def damaged(path: Path) -> None:
    write_trajectories(path, rows(3))
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (text_file, "is not a readable Parquet file"),
        (another_table, "holds no Pearl trajectories"),
        (another_version, "has trajectory schema version 99"),
        (no_rows, "holds no trajectory"),
        (cut, "is not a readable Parquet file"),
        (damaged, "is damaged"),
    ],
)
def test_a_file_that_holds_no_trajectories(tmp_path: Path, made: Callable[[Path], None], said: str) -> None:
    made(tmp_path / "traj.parquet")
    assert said in refused(tmp_path / "traj.parquet", tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere.parquet", "empty/", "empty/*.parquet"])
def test_data_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    assert "no Parquet file at" in refused(f"{tmp_path}/{name}", tmp_path / "out")


def with_image(one: Trajectory, image: bytes) -> Trajectory:
    return replace(one, image=EncodedImage(image))


def test_a_broken_image_is_left_out_and_named(tmp_path: Path) -> None:
    good = rows()
    broken = [with_image(good[3], b"no image"), with_image(good[5], good[5].image.data[:100])]
    data = data_file(tmp_path, [*good[:3], *broken, *good[6:]])
    result = invoke(data, tmp_path / "out", "--max-steps", "6", "--log-steps", "6")
    assert result.exit_code == 0, result.output
    assert "2 trajectories were left out: see" in result.stdout
    told = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert {one["id"] for one in told} == {"row-03", "row-05"}
    assert all("image 0" in one["reason"] for one in told)


def test_texts_of_no_encoding_and_ids_given_twice_are_left_out_and_named(tmp_path: Path) -> None:
    broken = [with_image(one, b"no image") for one in rows(2)]
    odd: list[dict[str, Any]] = [{"boxes": 5}, {"query": "HALF"}]
    boxes, query = (
        replace(one, steps=(replace(one.steps[0], call=ToolCall("find", arguments)), *one.steps[1:]))
        for one, arguments in zip(rows(12)[9:11], odd, strict=True)
    )
    data = data_file(tmp_path, [*rows(8), boxes, query, replace(broken[0], id="twice"), replace(broken[1], id="twice")])
    written = pq.read_table(data).to_pylist()
    half = written[9]["steps"][0]
    half["arguments"] = half["arguments"].replace("HALF", "\\ud800")  # of a pair, which JSON can say and UTF-8 cannot
    pq.write_table(pa.Table.from_pylist(written, schema()), data)
    result = invoke(data, tmp_path / "out", "--max-steps", "6", "--log-steps", "6")
    assert result.exit_code == 0, result.output
    assert "3 trajectories were left out: see" in result.stdout
    told = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert sorted((one["id"], one["row"]) for one in told) == [("row-10", 9), ("twice", 10), ("twice", 11)]
    assert next(one["reason"] for one in told if one["id"] == "row-10").startswith("TypeError: ")


def test_too_long_trajectories_are_left_out_and_named(data: Path, tmp_path: Path) -> None:
    result = invoke(data, tmp_path / "out", "--max-steps", "6", "--max-tokens", "150", "--data-workers", "1")
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert 1 <= len(told) < 12
    assert f"{len(told)} trajectories were left out" in result.stdout
    assert all("more than --max-tokens 150" in one["reason"] for one in told)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_data_of_which_nothing_can_be_used(data: Path, tmp_path: Path, workers: str) -> None:
    result = invoke(data, tmp_path / "out", "--max-tokens", "5", "--data-workers", workers)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: 12 trajectories in a row cannot be used; the last: row-")
    assert "Traceback" not in result.stderr


# what to train


@pytest.mark.parametrize("workers", [[], ["--num-workers", "1"]], ids=["here", "on Ray"])
@pytest.mark.parametrize("options", [["--objective", "sfT"], ["-O", "lambda=1"], ["--template", "haiku"]])
def test_a_slip_of_the_pen_leaves_no_folder(data: Path, tmp_path: Path, options: list[str], workers: list[str]) -> None:
    options = [*options, *workers]
    refused(data, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective", "sfT"], "there is no objective 'sfT'; there are: pearl, sft, sft-answer"),
        (["-O", "lambda=1"], "objective pearl: unknown lambda; there are direct_weight"),
        (
            ["-O", "jepa_distance=foo"],
            "jepa_distance is 'foo'; expected 'cosine', 'smooth-l1', 'l2', 'mse' or 'infonce'",
        ),
        (["-O", "lambda_=much"], "lambda_ is 'much'; expected a valid number"),
        (["--num-predictor-tokens", "0"], "at least one predictor token"),
        (["--lambda", "-1"], "cannot be negative"),
        (["-O", "lambda_"], "expected name=value"),
        (["--objective", "sft", "--lambda", "0.1"], "objective sft: unknown lambda_; there are none"),
        (["--template", "haiku"], "no template 'haiku'"),
        (["--batch-size", "0"], "batch_size must be positive"),
        (["--max-steps", "-3"], "max_steps must be positive"),
        (["--eval-fraction", "1"], "eval_fraction must be at least 0 and below 1"),
        (["--weight-decay", "-1"], "weight_decay must not be negative"),
        (["--learning-rate", "nan"], "learning_rate is nan; expected a finite number"),
        (["--epochs", "inf"], "epochs is inf; expected a finite number"),
        (["--lambda", "nan"], "lambda_ is nan; expected a finite number"),
        (["--seed", "4294967296"], "seed must be below 2**32"),
        (["--freeze", "language", "--tune", "full", "--objective", "mirage"], "mirage has tokens of its own"),
        (["--freeze", "eyes"], "the parts are vision, projector, language"),
        (["--freeze", "vision,projector,language"], "nothing of the model is left to train"),
        (["--attention", "flash_attention_2"], "attention is 'flash_attention_2'; expected 'sdpa' or 'eager'"),
        (["--min-pixels", "9000", "--max-pixels", "100"], "min_pixels is above max_pixels"),
        (["--config", "nowhere.json"], "cannot be read as settings"),
        (["--use-gpu"], "--use-gpu is about workers of Ray: say how many, --num-workers N"),
        (["--address", "auto"], "--address is about workers of Ray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_cannot_be_used(data: Path, tmp_path: Path, options: list[str], said: str) -> None:
    assert said in refused(data, tmp_path / "out", *options)


@pytest.mark.parametrize(
    "options", [["--jepa-distance", "foo"], ["--precision", "fp8"], ["--batch-size", "two"], ["--num-workers", "0"]]
)
def test_values_that_an_option_does_not_take(data: Path, tmp_path: Path, options: list[str]) -> None:
    result = invoke(data, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert f"Invalid value for '{options[0]}'" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as settings"),
        ("[]", "is not a JSON object"),
        ('{"data": "x", "batchsize": 2, "epoch": 1}', "unknown batchsize, epoch; there are accumulation"),
        ('{"data": "x", "batch_size": "2"}', "batch_size is '2'; expected a valid integer"),
        ('{"data": "x", "tune": "some"}', "tune is 'some'; expected 'auto', 'full' or 'lora'"),
        ('{"data": "x", "freeze": "vision"}', "freeze is 'vision'; expected a valid tuple"),
        ('{"data": "x", "objective_options": 3}', "objective_options is 3; expected a valid dictionary"),
    ],
)
def test_a_settings_file_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    result = CliRunner().invoke(app, ["--config", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert said in line
    assert str(path) in line


def test_without_data_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: say what to train on: --data traj.parquet")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pearl-gen` makes of the photographs."""
    path = tmp_path_factory.mktemp("generated") / "traj.parquet"
    flags = ["--source", "photos", "--tools", "crop", "--engine", "local", "--out", str(path)]
    made = CliRunner().invoke(gen, ["trajectories", *flags], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    return path


@pytest.mark.parametrize("objective", ["sft", "sft-answer", "lvr", "mirage"])
def test_each_objective_trains_the_built_in_model_into_a_folder_of_its_own(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--data", str(generated), "--objective", objective, "--max-steps", "1", "--warmup", "0"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert f"1 updates; the model: runs/{objective}/model" in result.stdout
    assert changed_weights(tmp_path / "runs" / objective / "model") == {"visual", "model"}


def changed_weights(trained: Path) -> set[str]:
    """The parts of vlm-nano that are no longer what they were."""
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(place_of(None)), trained))
    same = {name for name in before if torch.equal(before[name], after[name].to(before[name].dtype))}
    return {name.split(".")[0] for name in before.keys() - same}


def test_without_an_objective_it_is_pearl(generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--data", str(generated), "--max-steps", "1", "--warmup", "0"]
    assert "the model: runs/pearl/model" in CliRunner().invoke(app, given).stdout
    assert changed_weights(tmp_path / "runs/pearl/model") == {"visual", "model"}
    assert "error: runs/pearl holds a run already" in CliRunner().invoke(app, given).stderr


def test_an_option_of_zero_counts(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"data": str(data), "seed": 3, "warmup": 0.5, "objective_options": {"lambda_": 0.7}}))
    more = ["--config", str(path), "--seed", "0", "--warmup", "0", "--lambda", "0"]
    assert invoke(data, tmp_path / "out", *more).exit_code == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert (settings["seed"], settings["warmup"], settings["objective_options"]) == (0, 0.0, {"lambda_": 0.0})


def test_options_of_a_file_that_names_no_objective_are_of_the_one_that_is_named(data: Path, tmp_path: Path) -> None:
    options, of_pearl = tmp_path / "options.json", tmp_path / "pearl.json"
    options.write_text(json.dumps({"objective_options": {"num_latents": 3}}))
    of_pearl.write_text(json.dumps({"objective": "pearl", "objective_options": {"lambda_": 0.7}}))
    for path, expected in ((options, {"num_latents": 3}), (of_pearl, {})):
        out = tmp_path / path.stem
        assert invoke(data, out, "--config", str(path), "--objective", "mirage", "--max-steps", "1").exit_code == 0
        assert json.loads((out / "config.json").read_text())["settings"]["objective_options"] == expected


# models


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's folder to spoil."""
    shutil.copytree(model(), tmp_path / "base")
    return tmp_path / "base"


def changed_config(base: Path, **changes: Any) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, **changes}))


def without_template(base: Path) -> None:
    (base / "chat_template.jinja").unlink()


def without_processor(base: Path) -> None:
    (base / "processor_config.json").unlink()
    (base / "chat_template.jinja").unlink()


def as_pickle(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def emptied(base: Path) -> None:
    for file in base.iterdir():
        file.unlink()


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def lacking_weights(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["visual.merger.mlp.0.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def cut_weights(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])


def other_shapes(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["visual.merger.mlp.0.weight"] = torch.zeros(3, 3)
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def broken_config(base: Path) -> None:
    (base / "config.json").write_text("{")


def text_only(base: Path) -> None:
    changed_config(base, model_type="qwen2")


def unheard_of(base: Path) -> None:
    changed_config(base, model_type="perl")


def odd_config(base: Path) -> None:
    changed_config(base, text_config=3)


def odd_processor(base: Path) -> None:
    (base / "processor_config.json").write_text("[]")


def template_of_text(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")


def template_without_images(base: Path) -> None:
    text = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    (base / "chat_template.jinja").write_text(text)


def quantized(base: Path) -> None:
    changed_config(base, quantization_config={"quant_method": "awq", "bits": 4})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_template, "has no chat template"),
        (without_processor, "cannot be loaded"),
        (as_pickle, "has its weights as pickle (pytorch_model.bin), which may run code"),
        (emptied, "cannot be loaded"),
        (without_weights, "cannot be loaded"),
        (lacking_weights, "lacks 1 of its model's weights, such as model.visual.merger.mlp.0.weight"),
        (cut_weights, "cannot be loaded"),
        (other_shapes, "cannot be loaded"),
        (broken_config, "cannot be loaded"),
        (text_only, "is of the family 'qwen2', which is no vision-language model"),
        (unheard_of, "cannot be loaded"),
        (quantized, "has quantized weights"),
        (odd_config, "cannot be loaded"),
        (odd_processor, "cannot be loaded"),
        (template_of_text, "the chat template refuses this conversation: can only concatenate str"),
        (template_without_images, "the chat template writes 0 image placeholders for one image"),
    ],
)
def test_a_model_that_cannot_be_trained(
    data: Path, tmp_path: Path, base: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(base)
    assert said in refused(data, tmp_path / "out", base=base)
    assert not list(tmp_path.rglob("*.arrow"))  # before the data are copied


def test_a_model_that_is_not_there(data: Path, tmp_path: Path) -> None:
    assert "nobody/nothing cannot be loaded (there is no such folder)" in refused(
        data, tmp_path / "out", base=Path("nobody/nothing")
    )


def test_pickle_weights_are_read_when_they_are_allowed(data: Path, tmp_path: Path, base: Path) -> None:
    as_pickle(base)
    assert invoke(data, tmp_path / "out", "--allow-pickle", base=base).exit_code == 0


def test_pixel_limits_of_a_family_without_them(data: Path, tmp_path: Path) -> None:
    said = refused(data, tmp_path / "out", "--max-pixels", "9999", base=model("gemma3"))
    assert "its image processor takes no max_pixels" in said


@pytest.mark.filterwarnings("error:.*min_pixels.*:FutureWarning")
def test_pixel_limits_are_the_saved_models_own(data: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    result = invoke(data, tmp_path / "out", "--min-pixels", "1568", "--max-pixels", "3136")
    assert result.exit_code == 0, result.output
    processor = AutoProcessor.from_pretrained(tmp_path / "out" / "model")
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (1568, 3136)
    shown = processor.image_processor(images=[np.zeros((300, 300, 3), np.uint8)], return_tensors="pt")
    assert 1568 <= int(shown["image_grid_thw"][0].prod()) * processor.image_processor.patch_size**2 <= 3136
    said = refused(data, tmp_path / "none", "--min-pixels", "99999999")
    assert "images of at least 99,999,999 and at most" in said


# runs


def test_an_out_that_is_a_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file, not a folder" in refused(data, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "qwen2_5_vl"}'])
def test_an_out_that_is_something_else(data: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").write_text(content)
    assert "holds a config.json of something else" in refused(data, out)
    assert (out / "config.json").read_text() == content
    assert (out / "checkpoints").exists()


def test_checkpoints_of_others_stay(data: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "checkpoints" / "checkpoint-500"
    theirs.mkdir(parents=True)
    assert "holds something else (checkpoints): give another --out" in refused(data, tmp_path / "out")
    assert theirs.exists()


def test_an_out_with_another_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(data, out).exit_code == 0
    again = invoke(data, out)
    assert again.exit_code == 1
    assert "holds a run already: give another --out, or --resume" in again.stderr
    other = invoke(data, out, "--resume", "--learning-rate", "0.5", "--objective", "sft")
    assert other.exit_code == 1
    assert "had other settings: learning_rate: 0.0001 → 0.5; objective: pearl → sft; give another --out" in other.stderr
    assert invoke(data, out, "--resume", "--data-workers", "1").exit_code == 0


def test_a_hub_that_is_not_reached_is_told_before_any_work(data: Path, tmp_path: Path) -> None:
    assert "me/mine cannot be made on the Hub: " in refused(data, tmp_path / "out", "--push-to-hub", "me/mine")
    assert "is no name cannot be made" in refused(data, tmp_path / "out", "--push-to-hub", "this is no name")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path / "home")
        yield server


def test_the_model_goes_to_a_private_repository_with_its_card(data: Path, tmp_path: Path, hub: HubServer) -> None:
    for method, part in (("POST", "preupload"), ("POST", "objects/batch"), ("PUT", "/lfs/")):
        hub.disturb(method, part, "drop")
    result = invoke(data, tmp_path / "out", "--push-to-hub", "me/mine")
    assert result.exit_code == 0, result.output
    assert not hub.mend()
    repository = hub.repositories["model", "me/mine"]
    folder = tmp_path / "out" / "model"
    pushed = {path: blob.data for path, blob in repository.files.items() if path != ".gitattributes"}
    here = (path for path in folder.rglob("*") if path.is_file())
    assert pushed == {path.relative_to(folder).as_posix(): path.read_bytes() for path in here}
    assert {"README.md", "model.safetensors", "objective/weights.safetensors"} <= pushed.keys()
    assert ModelCard(pushed["README.md"].decode()).data["pipeline_tag"] == "image-text-to-text"
    assert repository.private
    assert TOKEN not in result.output


def test_no_folder_of_this_machine_is_published(data: Path, tmp_path: Path, hub: HubServer) -> None:
    """And what `pearl-eval` reads again is found, as long as it is on this machine."""
    template, target = tmp_path / "words.json", f"timm:local-dir:{encoder()}"
    words = json.loads((files("pearl.trainer") / "templates" / "pearl.json").read_text())
    template.write_text(json.dumps({**words, "system": "/no_think and/or look"}))
    more = ("--eval-data", data, "--template", template, "--target-encoder", target, "--push-to-hub", "me/mine")
    result = invoke(data, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "model"
    pushed = {path: blob.data for path, blob in hub.repositories["model", "me/mine"].files.items()}
    assert pushed["README.md"] == (folder / "README.md").read_bytes()
    places = [str(place).encode() for place in (tmp_path, data.parent, model(), encoder())]
    assert not [path for path, content in pushed.items() if any(place in content for place in places)]
    training = json.loads(pushed["training_config.json"])
    assert training["template"] == json.loads((folder / "training_config.json").read_text())["template"]
    assert training["template"]["system"] == "/no_think and/or look"
    settings = training["settings"]
    names = (settings["data"], settings["out"], settings["model"], settings["template"])
    assert names == (data.name, "out", model().name, "words.json")
    assert settings["objective_options"]["target_encoder"] == f"timm:local-dir:{encoder().name}"
    here = json.loads((folder / "training_config.json").read_text())["settings"]
    assert here["objective_options"]["target_encoder"] == target
    assert {name: value for name, value in here.items() if settings[name] != value}.keys() == {"objective_options"}


def test_a_public_repository_is_not_taken(data: Path, tmp_path: Path, hub: HubServer) -> None:
    HfApi().create_repo("me/seen", private=False)
    assert "me/seen is on the Hub already, and public" in refused(data, tmp_path / "out", "--push-to-hub", "me/seen")
    assert hub.repositories["model", "me/seen"].files.keys() == {".gitattributes"}


def test_a_hub_that_refuses_the_model_is_told_before_any_work(data: Path, tmp_path: Path, hub: HubServer) -> None:
    assert "them/theirs cannot be made on the Hub: " in refused(data, tmp_path / "out", "--push-to-hub", "them/theirs")


def test_a_model_that_does_not_arrive_stays_in_its_folder(data: Path, tmp_path: Path, hub: HubServer) -> None:
    hub.disturb("POST", "/commit/", 500)
    result = invoke(data, tmp_path / "out", "--push-to-hub", "me/mine")
    assert result.exit_code == 1
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'out' / 'model'} is made, but the Hub does not take it as me/mine: ")
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    hub.mend()
    again = invoke(data, tmp_path / "out", "--push-to-hub", "me/mine", "--resume")
    assert again.exit_code == 0, again.output
    weights = hub.repositories["model", "me/mine"].files["model.safetensors"].data
    assert weights == (tmp_path / "out" / "model" / "model.safetensors").read_bytes()


def test_a_mistake_does_not_occupy_the_out(data: Path, tmp_path: Path) -> None:
    refused(data, tmp_path / "out", base=Path("nobody/nothing"))
    assert invoke(data, tmp_path / "out").exit_code == 0


@pytest.fixture
def poisoned(tmp_path: Path) -> tuple[Path, Path]:
    return poisoned_model_and_data(tmp_path)


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_a_loss_that_is_no_number_stops_with_a_checkpoint_and_the_culprit(
    tmp_path: Path, poisoned: tuple[Path, Path], batch_size: str
) -> None:
    base, data = poisoned
    out = tmp_path / "out"
    result = invoke(data, out, "--batch-size", batch_size, "--max-steps", "12", base=base)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "error: the loss is NaN or infinite in step " in last
    assert ", on row-07. --resume goes on from the weights before it (" in last
    step = int(last.partition("in step ")[2].partition(",")[0])
    saved = out / "checkpoints" / f"checkpoint-{step - 1}"
    assert str(saved) in last
    assert (saved / "complete").exists()
    assert not (out / "model").exists()


@pytest.mark.slow
def test_all_processes_stop_at_a_loss_that_is_no_number(tmp_path: Path, poisoned: tuple[Path, Path]) -> None:
    base, data = poisoned
    settings = config(data, tmp_path / "out", model=str(base), batch_size=1, max_steps=12, save_steps=0)
    ended = subprocess.run(on_two_processes(settings), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    said = re.findall(r"error: the (.*) is NaN or infinite in step \d+, on (.*)\. --resume goes on", ended.stderr)
    assert set(said) == {("loss", "row-07")}  # the other process, whose own losses were numbers, says so too
    (saved,) = checkpoints(tmp_path / "out")
    weights = load_file(saved / "trained.safetensors")
    assert [name for name, weight in weights.items() if not weight.isfinite().all()] == [
        "vlm.model.text_model.embed_tokens.weight"
    ]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("no cup:\nnone at all"), (PearlError, "no cup:\nnone at all")),
        (RuntimeError("an odd shape"), (RuntimeError, "Caught RuntimeError in DataLoader worker process 0")),
    ],
)
def test_errors_of_data_workers_are_told_whole(error: Exception, said: tuple[type[Exception], str]) -> None:
    try:
        raise error
    except Exception:
        caught = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(said[0]) as raised, _explained():
        caught.reraise()
    assert str(raised.value).startswith(said[1])
    assert "died" not in str(raised.value)


def test_too_little_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(Learner, "forward", forward)
    result = invoke(data, tmp_path / "out")
    assert result.exit_code == 1
    assert "error: memory does not suffice: lower --batch-size" in result.stderr.splitlines()[-1]


def test_what_memory_sufficed_for_is_kept_and_gone_on_with_as_advised(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    size = ["--objective", "sft", "--max-steps", "5", "--batch-size", "4", "--eval-fraction", "0"]
    assert invoke(data, whole, *size).exit_code == 0
    forward, calls = Learner.forward, count()

    def third(self: Learner, batch: Batch) -> Any:
        if next(calls) == 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "forward", third)
        assert "memory does not suffice" in invoke(data, out, *size).stderr.splitlines()[-1]
    assert [one.name for one in checkpoints(out)] == ["checkpoint-3"]
    assert "batch_size: 4 → 2" in refused(data, out, *size, "--resume", "--batch-size", "2")
    lower = ["--batch-size", "1", "--accumulation", "4", "--gradient-checkpointing"]
    assert invoke(data, out, *size, "--resume", *lower).exit_code == 0
    assert logged(out) == pytest.approx(logged(whole), rel=1e-4)


# what it shows


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_bar_with_the_losses(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(data, tmp_path / "out", eval_fraction=0.4)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    train(settings)
    shown = screen.getvalue()
    lines = [line for line in re.split("[\r\n]+", shown.replace("\x1b[A", "")) if line.strip()]
    bars = [line for line in lines if "/4 [" in line]
    assert re.search(r"100%.* 4/4 \[.*, loss [\d.]+ \(vlm [\d.]+, jepa [\d.]+, .*\), retrieval [\d.]+\]", bars[-1])
    assert any(line.startswith("evaluating") for line in bars)
    others = [line for line in lines if line not in bars]
    assert others[0].startswith("trained parameters: ")
    assert others[-1].startswith("step 4/4 held out: loss ")
    assert len(others) == 6
    assert capsys.readouterr().out == ""


def test_elsewhere_the_real_command_writes_short_lines(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "out", max_steps=4, log_steps=2, eval_fraction=0.4)
    ended = pearl_train(*flags(settings))
    assert ended.returncode == 0
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("trained parameters: 174,240 of 174,240")
    assert [line.split()[0] for line in lines[1:5]] == ["vision", "projector", "language", "objective"]
    number = r"[\d.e-]+"
    terms = rf"loss {number} \(vlm {number}, jepa {number}, nextlat {number}, nextlat token {number}\)"
    expected = [rf"step {n}/4 {terms}" for n in (1, 2, 4)] + [rf"step 4/4 held out: {terms}, answers .*"]
    assert len(lines) == 5 + len(expected), ended.stderr
    for line, pattern in zip(lines[5:], expected, strict=True):
        assert re.fullmatch(rf"{pattern}(, retrieval {number})?", line), line
    assert f"4 updates; the model: {tmp_path}/out/model" in ended.stdout
    events = list((tmp_path / "out" / "tensorboard").iterdir())
    assert [file.name.startswith("events") for file in events] == [True]
    assert f"tensorboard --logdir {tmp_path}/out/tensorboard" in ended.stdout


def test_a_dry_run_shows_sizes_and_an_example_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    result = invoke(data, tmp_path / "out", "--dry-run", "--tune", "lora", "--freeze", "vision")
    assert result.exit_code == 0
    assert re.search(r"vision +0 of", result.stdout)
    assert "as LoRA adapters" in result.stdout
    assert "12 trajectories, 0 held out; 2 updates" in result.stdout
    assert re.search(r"the first has \d+ tokens in its row \(full \d+, source \d+, target \d+\)", result.stdout)
    assert re.search(
        r"a forward of the first trajectories: \d+ rows of \d+ tokens, \d+% of them padding", result.stdout
    )
    assert all(f"\n\n{view}:\n" in result.stdout for view in ("full", "source", "target"))
    assert result.stdout.count("Where is cup 0?") == 2  # the target view is of the steps alone
    assert "【It is there." in result.stdout
    assert "visual tokens⟩" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cache"}


@pytest.mark.parametrize(("options", "updates"), [(["--epochs", "2"], 6), (["--accumulation", "2"], 2)])
def test_a_dry_run_counts_the_updates_of_a_run(data: Path, tmp_path: Path, options: list[str], updates: int) -> None:
    given = ["--data", str(data), "--model", str(model()), "--batch-size", "5", "--eval-fraction", "0", *options]
    shown = CliRunner().invoke(app, [*given, "--dry-run", "--out", str(tmp_path / "dry")]).stdout
    assert f"; {updates} updates" in shown
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "out")]).stdout
    assert f"{updates} updates; the model" in done


def test_a_dry_run_counts_the_updates_of_several_processes(data: Path, tmp_path: Path) -> None:
    given = ["--data", str(data), "--model", str(model()), "--batch-size", "2", "--eval-fraction", "0", "--dry-run"]
    for workers, updates in ((1, 6), (2, 3), (5, 2)):
        shown = CliRunner().invoke(app, [*given, "--num-workers", str(workers), "--out", str(tmp_path / "out")]).stdout
        assert f"; {updates} updates" in shown


@pytest.mark.parametrize("module", ["torch", "ray", "transformers", "datasets", "pyarrow", "PIL"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, pearl.cli.train; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
