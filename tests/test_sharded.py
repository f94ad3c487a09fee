"""FSDP 2 through accelerate's own launcher. It shards on accelerators only, so here CPUs pass for some."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pearl.torch_setup import prepare_torchvision
from pearl.trainer.config import ConfigError, TrainConfig
from pearl.trainer.learner import Learner
from pearl.trainer.models import part_of
from pearl.trainer.objectives.sft import Sft
from pearl.trainer.run_directory import checkpoints
from pearl.trainer.train import train
from tests.plain import tiny
from tests.runs import ENVIRONMENT, config, data_file, flags, logged, merged_weights, rows, trained_weights
from tests.tiny_vlms import FAMILIES

prepare_torchvision()
from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy  # noqa: E402

PASSING_FOR = """
from accelerate import state
from accelerate.utils import DistributedType
made = state.PartialState.__init__
def init(self, *args, **options):
    made(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU
state.PartialState.__init__ = init
from pearl.cli.train import main
main()
"""
SHARDED = [
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--main_process_port",
    "0",
]


def launch(settings: TrainConfig, *more: str) -> subprocess.CompletedProcess[str]:
    script = Path(settings.out).with_suffix(".py")
    script.write_text(PASSING_FOR)
    command = [sys.executable, "-m", "accelerate.commands.launch", *SHARDED, *more, str(script), *flags(settings)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("tune", "wrap"), [("full", "NO_WRAP"), ("lora", "TRANSFORMER_BASED_WRAP")])
def test_sharded_weights_are_trained_saved_and_resumed(tmp_path: Path, tune: str, wrap: str) -> None:
    data, held = data_file(tmp_path, rows(13)), data_file(tmp_path, rows(5), "held.parquet")
    one = config(data, tmp_path / "one", tune=tune, lora_dropout=0.0, batch_size=4, eval_data=str(held))
    train(replace(one, learning_rate=1e-3), False)
    two = replace(one, out=str(tmp_path / "two"), batch_size=2, learning_rate=1e-3, save_steps=2, eval_steps=2)
    ended = launch(two, "--fsdp_auto_wrap_policy", wrap)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in ("loss", "loss_jepa", "loss_nextlat_token"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4), name
    assert_close(tmp_path)

    last = checkpoints(tmp_path / "two")[-1]
    assert {part.name for part in (last / "optimizer_0").iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "two" / "model")
    ended = launch(replace(two, resume=True), "--fsdp_auto_wrap_policy", wrap)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "step 3/4" in ended.stderr
    assert "step 2/4" not in ended.stderr
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


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "under DeepSpeed is not supported; FSDP 2 is: accelerate launch"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "under FSDP 1 is not supported; FSDP 2 is"),
    ],
)
def test_other_sharding_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        train(config(tmp_path / "nowhere", tmp_path / "out"))
