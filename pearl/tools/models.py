"""What the tools that run a model share: the device, and where a checkpoint lies and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
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
    folder = model_folder(model)
    if folder == Path(model):
        digest = hashlib.sha256()
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json")):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return {"sha256": digest.hexdigest()}
    return {"model": model, "revision": folder.name}


def model_folder(model: str) -> Path:
    """The folder of a checkpoint: the one that is named, or the snapshot of a Hub id, downloaded if need be.

    A Hub id is resolved once a process, so that what is loaded is what the fingerprint names.

    Raises:
        ToolUnavailable: neither a folder nor a checkpoint that the Hub (or its local cache) knows.
    """
    return Path(model) if Path(model).is_dir() else _snapshot(model)


@lru_cache(maxsize=16)
def _snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # many kinds: offline, not found, bad id
        raise ToolUnavailable(f"{model!r} is neither a folder nor a checkpoint that the Hub gives: {error}") from error
