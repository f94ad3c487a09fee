"""FSDP 2 and DeepSpeed through accelerate's own launcher. They shard on accelerators only; here CPUs pass for some."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pearl.torch_setup import prepare_torchvision
from pearl.trainer.config import ConfigError, TrainConfig
from pearl.trainer.learner import Learner
from pearl.trainer.models import part_of
from pearl.trainer.objectives.sft import Sft
from pearl.trainer.run_directory import checkpoints
from pearl.trainer.sharding import fit_deepspeed, keep_in_step
from pearl.trainer.train import train
from tests.plain import tiny
from tests.runs import (
    ENVIRONMENT,
    config,
    data_file,
    flags,
    logged,
    merged_weights,
    poisoned_model_and_data,
    rows,
    trained_weights,
)
from tests.tiny_vlms import FAMILIES

prepare_torchvision()
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy  # noqa: E402

PASSING_FOR = """
import os
from accelerate import state
from accelerate.utils import DistributedType
made = state.PartialState.__init__
def init(self, cpu=False, **options):
    if cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        made(self, False, **{**options, "backend": "gloo"})
        return
    made(self, cpu, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU
state.PartialState.__init__ = init
from pearl.cli.train import main
main()
"""
TWO = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy"]
DEEPSPEED = ["--use_deepspeed", "--zero_stage"]
with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install -e '.[deepspeed]'"
)


def launch(settings: TrainConfig, *sharding: str) -> subprocess.CompletedProcess[str]:
    script = Path(settings.out).with_suffix(".py")
    script.write_text(PASSING_FOR)
    command = [sys.executable, "-m", "accelerate.commands.launch", *TWO, *sharding, str(script), *flags(settings)]
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tune", "sharding", "optimizer"),
    [
        ("full", [*FSDP, "NO_WRAP"], "optimizer_0/__*_0.distcp"),
        ("lora", [*FSDP, "TRANSFORMER_BASED_WRAP"], "optimizer_0/__*_0.distcp"),
        pytest.param("lora", [*DEEPSPEED, "1"], "global_step4/zero_*_optim_states.pt", marks=with_deepspeed),
        pytest.param("full", [*DEEPSPEED, "2"], "global_step4/zero_*_optim_states.pt", marks=with_deepspeed),
        pytest.param("full", [*DEEPSPEED, "3"], "global_step4/zero_*_optim_states.pt", marks=with_deepspeed),
    ],
)
def test_sharded_weights_are_trained_saved_and_resumed(
    tmp_path: Path, tune: str, sharding: list[str], optimizer: str
) -> None:
    data, held = data_file(tmp_path, rows(13)), data_file(tmp_path, rows(5), "held.parquet")
    one = config(data, tmp_path / "one", tune=tune, lora_dropout=0.0, batch_size=4, eval_data=str(held), accumulation=2)
    train(replace(one, learning_rate=1e-3), False)
    two = replace(one, out=str(tmp_path / "two"), batch_size=2, learning_rate=1e-3, save_steps=2, eval_steps=2)
    ended = launch(two, *sharding)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in ("loss", "loss_jepa", "loss_nextlat_token", "grad_norm"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4), name
    assert_close(tmp_path)

    last = checkpoints(tmp_path / "two")[-1]
    assert len([*last.glob(optimizer)]) == 2  # of each process its own
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "two" / "model")
    ended = launch(replace(two, resume=True), *sharding)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "step 3/4" in ended.stderr
    assert "step 2/4" not in ended.stderr
    assert_close(tmp_path)


@pytest.mark.slow
@with_deepspeed
@pytest.mark.parametrize(("stage", "precision"), [("1", "bf16"), ("2", "fp32"), ("3", "bf16")])
def test_deepspeed_stops_at_a_loss_that_is_no_number(tmp_path: Path, stage: str, precision: str) -> None:
    base, data = poisoned_model_and_data(tmp_path)
    settings = config(data, tmp_path / "out", model=str(base), batch_size=1, max_steps=12, precision=precision)
    ended = launch(settings, *DEEPSPEED, stage)
    assert ended.returncode == 1
    assert re.search(
        r"error: the loss is NaN or infinite in step \d+, on row-07. --resume goes on from the weights before it",
        ended.stderr,
    )
    weights = trained_weights(tmp_path / "out")
    assert [name for name, weight in weights.items() if not weight.isfinite().all()] == [
        "vlm.model.text_model.embed_tokens.weight"
    ]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "sharding",
    [[*FSDP, "TRANSFORMER_BASED_WRAP"], pytest.param([*DEEPSPEED, "3"], marks=with_deepspeed)],
)
def test_latents_that_the_model_makes_itself_are_as_many_forwards_in_every_process(
    tmp_path: Path, sharding: list[str]
) -> None:
    data, held = data_file(tmp_path, rows(13)), data_file(tmp_path, rows(5), "held.parquet")
    one = config(
        data, tmp_path / "one", objective="mirage", objective_options={"stage": 2}, batch_size=4, eval_data=str(held),
        learning_rate=1e-3,
    )  # fmt: skip
    train(one, False)
    ended = launch(replace(one, out=str(tmp_path / "two"), batch_size=2), *sharding)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in ("loss", "loss_vlm", "grad_norm"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4), name
    assert_close(tmp_path)


def assert_close(folder: Path) -> None:
    for weights in (merged_weights, trained_weights):
        expected, found = weights(folder / "one"), weights(folder / "two")
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_language_and_vision_are_found_in_every_family(name: str) -> None:
    t = tiny(name)
    learner = Learner(t.vlm, t.family, Sft().losses(t.hidden_size))
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap", fsdp_version=2)
    wrapped = fsdp2_prepare_auto_wrap_policy(plugin, learner)
    assert wrapped is not None
    parts = {part_of(n, t.family) for n, module in t.vlm.named_modules() if wrapped(module)}
    assert parts == {"vision", "language"}


def test_fsdp_1_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="under FSDP 1 is not supported; FSDP 2 is: accelerate launch"):
        train(config(tmp_path / "nowhere", tmp_path / "out"))


def test_forwards_that_differ_between_processes_are_refused() -> None:
    for name, differs in (("llava", False), ("llava_onevision", True)):
        t = tiny(name)
        learner = Learner(t.vlm, t.family, Sft().losses(t.hidden_size))
        with pytest.raises(ConfigError, match="images of this family take") if differs else nullcontext():
            keep_in_step(learner)
        assert learner.in_step is not differs


def test_settings_of_the_run_count_in_deepspeeds_configuration() -> None:
    plugin = DeepSpeedPlugin(
        hf_ds_config={"zero_optimization": {"stage": 3}, "gradient_clipping": 5.0, "bf16": {"enabled": True}}
    )
    fit_deepspeed(plugin.deepspeed_config)
    auto = {"enabled": "auto"}
    assert plugin.deepspeed_config.items() >= {"gradient_clipping": "auto", "bf16": auto, "fp16": auto}.items()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"optimizer": {"type": "Adam"}}, "has a section 'optimizer': leave it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler': leave it out"),
        ({"zero_optimization": {"stage": 0}}, "ZeRO 0 shards nothing: --zero_stage 1, 2 or 3"),
        ({"zero_optimization": {}}, "ZeRO 0 shards nothing"),
    ],
)
def test_configurations_of_deepspeed_that_do_not_work_are_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fit_deepspeed({"zero_optimization": {"stage": 2}, **section})
