"""The trained model as others load it: merged safetensors, the processor, a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pearl import __version__
from pearl.errors import PearlError
from pearl.trainer.models import merged, quiet_transformers
from pearl.trainer.run_directory import write_json

if TYPE_CHECKING:
    from pearl.trainer.train import Prepared


def save_model(prepared: Prepared, folder: Path, figures: dict[str, float]) -> None:
    """Leaves a plain checkpoint of the base architecture; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = merged(prepared.learner.vlm)
    with quiet_transformers():
        model.to(prepared.loaded.stored_dtype).save_pretrained(partial)
    prepared.loaded.processor.save_pretrained(partial)
    (partial / "README.md").write_text(card(prepared, figures), encoding="utf-8")
    write_json(partial / "training_config.json", {"version": __version__, "settings": prepared.config.to_json()})
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def open_repository(repo: str) -> None:
    """Makes a private repository on the Hub, or finds it: before a run, so that its end does not fail.

    Raises:
        PearlError: the Hub is not reached, or refuses.
    """
    from huggingface_hub import HfApi

    with _explained(f"{repo} cannot be made on the Hub"):
        HfApi().create_repo(repo, private=True, exist_ok=True)


def upload(folder: Path, repo: str) -> None:
    """Puts the model there.

    Raises:
        PearlError: as above; the model stays in its folder.
    """
    from huggingface_hub import HfApi

    with _explained(f"{folder} is made, but the Hub does not take it as {repo}"):
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Trained with pearl-vlm")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise PearlError(f"{what}: {' '.join(str(error).split())}") from error


def card(prepared: Prepared, figures: dict[str, float]) -> str:
    """A model card with the resolved settings."""
    config = prepared.config
    base = config.model or "vlm-nano"
    hub = f"base_model: {base}\n" if config.model and not Path(config.model).exists() else ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(figures.items()))
    measured = f"## Measured on what was held out\n\n| | |\n|---|---|\n{rows}\n\n" if figures else ""
    settings = json.dumps(config.to_json(), indent=2)
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
{hub}tags:
- pearl
- {config.objective}
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
