"""The trained model's folder: merged safetensors, the processor, a model card, and what `pearl-eval` reads again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from pearl import __version__
from pearl.errors import PearlError
from pearl.paths import without_folders
from pearl.trainer.conversation import Template
from pearl.trainer.models import BUILT_IN, load_trained_state, merged, quiet_transformers, trained_state
from pearl.trainer.objectives.base import Losses, Objective
from pearl.trainer.objectives.registry import make_objective
from pearl.trainer.preparation import Prepared
from pearl.trainer.run_directory import write_json

MODEL_SETTINGS = "training_config.json"
OBJECTIVE_WEIGHTS = "objective/weights.safetensors"
"""What the objective learned beside the model: nothing that the model needs, but evidence about latents does. In a folder
of its own, since servers such as vLLM take every safetensors file beside the settings for the model's weights."""
READ_AGAIN = "objective_options"
"""The one setting whose paths are kept whole: `pearl-eval` needs the target encoder. In others only the last part is."""


@dataclass(frozen=True)
class Training:
    """What a model's folder says of its training: its objective with its options, and the words around trajectories."""

    objective: str
    options: dict[str, Any]
    template: Template


def save_model(prepared: Prepared, folder: Path, figures: dict[str, float]) -> None:
    """Leaves a plain checkpoint of the base architecture; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = merged(prepared.learner.vlm)
    with quiet_transformers():
        model.to(prepared.loaded.stored_dtype).save_pretrained(partial)
    prepared.loaded.processor.save_pretrained(partial)
    if learned := trained_state(prepared.learner.losses):
        (partial / OBJECTIVE_WEIGHTS).parent.mkdir()
        save_file(learned, partial / OBJECTIVE_WEIGHTS)
    (partial / "README.md").write_text(card(prepared, figures), encoding="utf-8")
    settings = prepared.config.to_json()
    settings = {**without_folders(settings), READ_AGAIN: settings[READ_AGAIN]}
    training = {"version": __version__, "settings": settings, "template": asdict(prepared.template)}
    write_json(partial / MODEL_SETTINGS, training)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def read_training(path: Path) -> Training:
    """What `save_model` wrote into `MODEL_SETTINGS`.

    Raises:
        PearlError: the file is not what `save_model` wrote.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["settings"]
        return Training(str(settings["objective"]), dict(settings[READ_AGAIN]), Template(**found["template"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PearlError(f"{path} is not what pearl-train wrote: {error!r}") from error


def load_objective(training: Training, weights: Path | None, hidden_size: int) -> tuple[Objective, Losses]:
    """A trained model's objective, with what it learned beside the model.

    Raises:
        PearlError: what the objective learned is missing or another's.
    """
    objective = make_objective(training.objective, training.options)
    losses = objective.losses(hidden_size)
    load_trained_state(losses, {} if weights is None else load_file(weights))
    return objective, losses.eval()


def card(prepared: Prepared, figures: dict[str, float]) -> str:
    """A model card with the resolved settings, without folders of this machine."""
    config = prepared.config
    base = without_folders(config.model or BUILT_IN)
    hub = f"base_model: {base}\n" if config.model and not Path(config.model).exists() else ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(figures.items()))
    measured = f"## Measured on what was held out\n\n| | |\n|---|---|\n{rows}\n\n" if figures else ""
    settings = json.dumps(without_folders(config.to_json()), indent=2)
    tags = "\n".join(f"- {tag}" for tag in dict.fromkeys(("pearl", config.objective)))
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
{hub}tags:
{tags}
---

# {Path(config.out).name}

`{base}`, trained with the objective `{config.objective}` of [Pearl](https://arxiv.org/abs/2604.08065) \
({__version__} of `pearl-vlm`). A plain checkpoint: no tools and nothing of Pearl is needed to use it.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")
```

{measured}## Settings

```json
{settings}
```
"""
