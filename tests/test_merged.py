"""What a run leaves: a plain checkpoint that transformers loads where there is no Pearl, with what was learned in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pearl.trainer.model_folder import OBJECTIVE_WEIGHTS
from pearl.trainer.models import load_trained_state
from pearl.trainer.preparation import prepare
from tests.plain import opened, picture
from tests.runs import ENVIRONMENT, config, data_file, merged_weights, model, run, trained_weights
from tests.tiny_vlms import FAMILIES

CASES = [(family, tune) for family in FAMILIES for tune in ("full", "lora")]

# What any user of transformers would write, in a process that refuses to import Pearl; for each folder of the list in
# the first argument, it compares with the logits that lie beside the model. The first lines are only for a torchvision
# that was built for CUDA, as in Pearl's own test environment.
PLAIN = """
import json, sys, torch
class NoPearl:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pearl":
            raise ImportError("there is no Pearl here")
sys.meta_path.insert(0, NoPearl())
torch.set_num_threads(1)
library = torch.library.Library("torchvision", "FRAGMENT")
try:
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except RuntimeError:
    pass
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
found = {}
for folder in json.loads(sys.argv[1]):
    model, report = AutoModelForImageTextToText.from_pretrained(folder + "/model", output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder + "/model")
    image = {"type": "image", "image": Image.open(folder + "/image.png")}
    ask = [{"role": "user", "content": [image, {"type": "text", "text": "Where is the cup?"}]}]
    inputs = processor.apply_chat_template(
        ask, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    learner = torch.load(folder + "/logits.pt")
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    found[folder] = {
        "difference": (logits - learner["logits"]).abs().max().item(),
        "inputs": torch.equal(inputs["input_ids"], learner["input_ids"]),
        "generated": made.shape[1] - inputs["input_ids"].shape[1],
        "odd": sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]),
    }
assert "pearl" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """For each family, all weights and adapters: a finished run, and the logits of what it trained."""
    made = {}
    for family, tune in CASES:
        out = made[family, tune] = tmp_path_factory.mktemp(f"{family}-{tune}") / "out"
        run(data, out, family, tune=tune, max_steps=2)
        learner = prepare(config(data, out / "again", family, tune=tune)).learner
        load_trained_state(learner, trained_weights(out))
        keep_logits(learner.eval().base, family, out)
    return made


def keep_logits(base: Any, family: str, out: Path) -> None:
    from transformers import AutoProcessor

    image = opened(picture(7, 44, 36))
    image.save(out / "image.png")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Where is the cup?"}]
    inputs = AutoProcessor.from_pretrained(model(family)).apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = base(**inputs).logits
    torch.save({"logits": logits, "input_ids": inputs["input_ids"]}, out / "logits.pt")


@pytest.fixture(scope="module")
def loaded(runs: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folders = json.dumps([str(out) for out in runs.values()])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    ended = subprocess.run(
        [sys.executable, "-c", PLAIN, folders], cwd=elsewhere, env=ENVIRONMENT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize(("family", "tune"), CASES)
def test_the_model_loads_without_pearl_and_says_what_was_learned(
    runs: dict[tuple[str, str], Path], loaded: dict[str, dict[str, Any]], family: str, tune: str
) -> None:
    found = loaded[str(runs[family, tune])]
    assert found["difference"] < (1e-5 if tune == "full" else 1e-3)
    assert found["inputs"]
    assert 1 <= found["generated"] <= 3
    assert not found["odd"]


@pytest.mark.parametrize(("family", "tune"), CASES)
def test_the_model_has_the_base_models_weights_and_they_moved(
    runs: dict[tuple[str, str], Path], family: str, tune: str
) -> None:
    before, after = load_file(model(family) / "model.safetensors"), merged_weights(runs[family, tune])
    assert {n: (w.shape, w.dtype) for n, w in before.items()} == {n: (w.shape, w.dtype) for n, w in after.items()}
    assert sum(not torch.equal(weight, after[name]) for name, weight in before.items()) > 10


def test_the_models_folder_is_complete(runs: dict[tuple[str, str], Path]) -> None:
    folder = runs["qwen2_5_vl", "lora"] / "model"
    base = {path.name for path in model().iterdir()}
    assert {path.name for path in folder.iterdir()} == base | {
        "README.md",
        "training_config.json",
        "objective",
    }
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]  # what vLLM loads
    assert (folder / OBJECTIVE_WEIGHTS).is_file()
    card = (folder / "README.md").read_text()
    settings = json.loads((folder / "training_config.json").read_text())["settings"]
    assert settings["tune"] == "lora"
    assert settings["objective_options"]["num_predictor_tokens"] == 4
    assert json.dumps(settings, indent=2) in card
    assert "library_name: transformers" in card
    assert card.count("\n- pearl\n") == 1
