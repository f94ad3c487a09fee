"""A frozen image encoder of another kind as the target: the pooled embedding of each tool's output image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.images import decode
from pearl.records import EncodedImage
from pearl.torch_setup import prepare_torchvision

TIMM, LOCAL = "timm:", "timm:local-dir:"


class EncoderError(PearlError, ValueError):
    """An encoder that cannot be used; the message says why."""


@cache
def preprocessing(name: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side in pixels, mean and standard deviation of an encoder's input, without its weights.

    Raises:
        EncoderError: there is no such encoder.
    """
    prepare_torchvision()
    if name.startswith(TIMM):
        try:
            with torch.device("meta"):
                found = _timm(name.removeprefix(TIMM), pretrained=False).pretrained_cfg
            return int(found["input_size"][1]), tuple(found["mean"]), tuple(found["std"])
        except Exception as error:  # a damaged folder makes timm raise anything
            raise EncoderError(f"{name}: timm has no such model: {_line(error)}") from error
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(name)
        size = getattr(processor, "crop_size", None) or processor.size
        side = size.get("height") or size.get("shortest_edge") or size.get("longest_edge")
        return int(side), tuple(processor.image_mean), tuple(processor.image_std)
    except Exception as error:  # a damaged folder, or one of something else, makes transformers raise anything
        raise EncoderError(f"{name}: no image encoder of transformers: {_line(error)}") from error


def pixels(name: str, image: EncodedImage) -> Tensor:
    """The encoder's input (3, S, S) for one image; the whole image, squeezed to a square."""
    import cv2

    side, mean, std = preprocessing(name)
    resized = cv2.resize(decode(image.data), (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    normal = (resized - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1).contiguous()


def stack_pixels(name: str, images: Sequence[EncodedImage]) -> Tensor:
    """(N, 3, S, S); N may be 0."""
    side = preprocessing(name)[0]
    return torch.stack([pixels(name, image) for image in images]) if images else torch.empty(0, 3, side, side)


class FrozenEncoder(nn.Module):
    """Pooled embeddings of images; nothing of it is trained.

    Args:
        name: `timm:NAME` (`timm:local-dir:FOLDER` is a folder of timm), or a folder or Hub id of an image encoder of
            transformers.
        pretrained: False gives random weights, for tests.

    Attributes:
        width: Of an embedding.

    Raises:
        EncoderError: its weights cannot be had.
    """

    def __init__(self, name: str, pretrained: bool = True) -> None:
        super().__init__()
        prepare_torchvision()
        self.timm = name.startswith(TIMM)
        side = preprocessing(name)[0]
        _refuse_pickle(name)
        try:
            self.model = _timm(name.removeprefix(TIMM), pretrained) if self.timm else _transformers(name)
            self.model.requires_grad_(False)
            self.eval()
            blank = torch.zeros(1, 3, side, side)
            self.width = self(blank).shape[-1]  # what configurations say of it differs by family
        except Exception as error:
            raise EncoderError(f"{name} cannot be used as an image encoder: {_line(error)}") from error

    def train(self, mode: bool = True) -> FrozenEncoder:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, width). N may be 0: then a blank image goes through, as processes that have a shard of the
        weights each must make the same forwards."""
        fed = images if len(images) else images.new_zeros(1, *images.shape[1:])
        if self.timm:
            embeddings: Tensor = self.model(fed)
            return embeddings[: len(images)]
        output: Any = self.model(pixel_values=fed)
        pooled = getattr(output, "pooler_output", None)
        states: Tensor = output.last_hidden_state.mean(1) if pooled is None else pooled
        return states.flatten(1)[: len(images)]


def _refuse_pickle(name: str) -> None:
    """
    Raises:
        EncoderError: a folder of timm has its weights as pickle only, which may run code when it is read.
    """
    folder = Path(name.removeprefix(LOCAL))
    if name.startswith(LOCAL) and not list(folder.glob("*.safetensors")):
        raise EncoderError(f"{name} has no weights as safetensors: convert them")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _timm(name: str, pretrained: bool) -> Any:
    import timm

    return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _transformers(name: str) -> Any:
    from transformers import AutoModel

    local = Path(name).is_dir()
    model: Any = AutoModel.from_pretrained(name, use_safetensors=True, local_files_only=local)
    return getattr(model, "vision_model", model)  # a two-tower model's image side
