"""What the tools that run a model share: the device, and what identifies a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pearl.tools.base import ToolUnavailable


def default_device(device: str | None = None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def import_transformers() -> Any:
    """The module transformers, with torchvision made importable and without progress bars for every loaded model."""
    from pearl.torch_setup import prepare_torchvision

    prepare_torchvision()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def model_fingerprint(model: str) -> Mapping[str, Any]:
    """The content hash of a folder's weights and configuration, or the resolved commit of a Hub id.

    Raises:
        ToolUnavailable: neither a folder nor a checkpoint that the Hub (or its local cache) knows.
    """
    folder = Path(model)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json")):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return {"sha256": digest.hexdigest()}
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(model, "config.json")
    except Exception as error:  # many kinds: offline, not found, bad id
        raise ToolUnavailable(f"{model!r} is neither a folder nor a checkpoint that the Hub gives: {error}") from error
    return {"model": model, "revision": Path(config).parent.name}
