"""Depth: how near everything is, by a monocular depth estimation model of transformers, or by the sample's sensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import Field

from pearl.boxes import pixel_box
from pearl.images import Picture
from pearl.tools.base import (
    MAX_REGIONS,
    BoxArgument,
    PointArgument,
    Tool,
    ToolArguments,
    ToolResult,
    ToolUnavailable,
    refused,
)
from pearl.tools.models import default_device, import_transformers, model_fingerprint, model_folder

DEPTH_NANO = Path(__file__).parent.parent / "assets" / "depth-nano"
BUILT_IN, SENSOR = "depth-nano", "sensor"
METRIC_ARCHITECTURES = ("zoedepth", "glpn", "depth_pro")
MAX_ASPECT = 16
"""Processors keep the aspect ratio; a narrower picture would be shrunk to less than one patch."""
MARGIN, SURE = 0.02, 0.08
"""Readings nearer to each other than the first say nothing (they are given to two decimals); the second is the margin
where no annotation confirms them."""


class DepthArguments(ToolArguments):
    boxes: list[BoxArgument] = Field(
        default=[], max_length=MAX_REGIONS, description="regions whose relative depth is asked"
    )
    points: list[PointArgument] = Field(
        default=[], max_length=MAX_REGIONS, description="points whose relative depth is asked"
    )


class Depth(Tool):
    """Estimates depth.

    Args:
        model: `depth-nano` (built in), `sensor` (the sample's own depth), a folder, or a Hub id of any checkpoint that
            `AutoModelForDepthEstimation` loads.
        device: `cpu`, `cuda`, …; a GPU when there is one, if not given.
        batch_size: Pictures of one size that go through the model together.
    """

    name = "depth"
    description = (
        "Estimates how near everything in an image is: a map (bright is near) and, for the asked boxes and points,"
        " numbers from 0 (farthest) to 1 (nearest)."
    )
    Arguments = DepthArguments

    def __init__(self, model: str = BUILT_IN, device: str | None = None, batch_size: int = 8) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size

    @property
    def _location(self) -> str:
        return str(DEPTH_NANO) if self.model == BUILT_IN else self.model

    def missing(self) -> str | None:
        if self.model == BUILT_IN and not (DEPTH_NANO / "model.safetensors").exists():
            return "the built-in weights are not there; make them with recipes/depth_nano, or name a --depth-model"
        return None

    def fingerprint(self) -> Mapping[str, Any]:
        return {"model": self.model} if self.model == SENSOR else model_fingerprint(self._location)

    def run(self, pictures: Sequence[Picture], arguments: Sequence[DepthArguments]) -> list[ToolResult]:
        return [
            refused(self._why_none(picture, one.image)) if nearness is None else _result(nearness, one)
            for picture, nearness, one in zip(pictures, self.estimate(pictures), arguments, strict=True)
        ]

    def estimate(self, pictures: Sequence[Picture]) -> list[np.ndarray | None]:
        """Nearness maps, uint8 (H, W), 255 is nearest; None for a picture that can have none."""
        if self.model == SENSOR:
            return [None if p.depth is None else nearness_of_metric(p.depth) for p in pictures]
        estimated = self._estimate([p.pixels for p in pictures if not _is_too_narrow(p)])
        return [None if _is_too_narrow(p) else next(estimated) for p in pictures]

    def _why_none(self, picture: Picture, image: int) -> str:
        if self.model == SENSOR:
            return f"image {image} has no sensor depth; only the original image can have it"
        return f"image {image} is {picture.width}×{picture.height}, longer than {MAX_ASPECT}:1; take a part of it"

    def _estimate(self, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Nearness maps (H, W), uint8, each of its image's size; images of one shape share batches."""
        maps: dict[int, np.ndarray] = {}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(index)
        for indices in by_shape.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                for index, nearness in zip(batch, self._forward([images[i] for i in batch]), strict=True):
                    maps[index] = nearness
        yield from (maps[i] for i in range(len(images)))

    def _forward(self, images: list[np.ndarray]) -> list[np.ndarray]:
        import torch

        processor, network = self._loaded
        inputs = processor(images=images, return_tensors="pt").to(network.device, network.dtype)
        with torch.inference_mode():
            predicted = network(**inputs).predicted_depth.float()
        height, width = images[0].shape[:2]
        predicted = torch.nn.functional.interpolate(
            predicted[:, None], (height, width), mode="bicubic", align_corners=False
        )[:, 0]
        values = predicted.cpu().numpy()
        if self._is_metric:
            return [nearness_of_metric(depth) for depth in values]
        return [_quantised(nearness) for nearness in values]

    @property
    def _is_metric(self) -> bool:
        config = self._loaded[1].config
        return getattr(config, "depth_estimation_type", None) == "metric" or config.model_type in METRIC_ARCHITECTURES

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch

        transformers = import_transformers()

        if reason := self.missing():
            raise ToolUnavailable(f"depth: {reason}")
        folder = model_folder(self._location)
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            network = transformers.AutoModelForDepthEstimation.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ToolUnavailable(f"depth: {self.model!r} is no depth estimation checkpoint: {error}") from error
        return processor, network.to(default_device(self.device)).eval()


def nearness_of_metric(depth: np.ndarray) -> np.ndarray:
    """Metric depth in metres (inf in the sky) as nearness, uint8.

    What a sensor gives where it read nothing (0, negative, NaN) gets nearness 0 and does not count for the scale.
    """
    valid = depth > 0
    nearness = np.zeros(depth.shape, np.uint8)
    if valid.any():
        nearness[valid] = _quantised(1.0 / np.maximum(depth[valid].astype(np.float32), 1e-3))
    return nearness


def _quantised(nearness: np.ndarray) -> np.ndarray:
    """0..255 between the 1st and 99.5th percentile. Readings are taken from this, so the last bits of a device's
    arithmetic do not reach the data."""
    low, high = np.percentile(nearness, (1.0, 99.5))
    levels: np.ndarray = np.clip(np.rint((nearness - low) * (255.0 / max(high - low, 1e-6))), 0, 255)
    return levels.astype(np.uint8)


def _is_too_narrow(picture: Picture) -> bool:
    return max(picture.width, picture.height) > MAX_ASPECT * min(picture.width, picture.height)


def _result(nearness: np.ndarray, arguments: DepthArguments) -> ToolResult:
    boxes = [read_box(nearness, box) for box in arguments.boxes]
    points = [read_point(nearness, point) for point in arguments.points]
    readings = [f"region {i + 1}: {value:.2f}" for i, value in enumerate(boxes)]
    readings += [f"point {i + 1}: {value:.2f}" for i, value in enumerate(points)]
    text = f"Depth map of image {arguments.image}; bright is near."
    if readings:
        text += f" Nearness from 0 (farthest) to 1 (nearest): {'; '.join(readings)}."
    coloured = cv2.cvtColor(cv2.applyColorMap(nearness, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return ToolResult(text, coloured, {"boxes": boxes, "points": points})


def read_box(nearness: np.ndarray, box: Sequence[float]) -> float:
    """The nearness of what fills a box: the 70th percentile over its middle, since what is behind an object is farther."""
    height, width = nearness.shape
    x0, y0, x1, y1 = box
    inset_x, inset_y = 0.15 * (x1 - x0), 0.15 * (y1 - y0)
    left, top, right, bottom = pixel_box((x0 + inset_x, y0 + inset_y, x1 - inset_x, y1 - inset_y), width, height)
    return round(float(np.percentile(nearness[top:bottom, left:right], 70)) / 255, 3)


def read_point(nearness: np.ndarray, point: Sequence[float]) -> float:
    """The median nearness within a small window around a point."""
    height, width = nearness.shape
    reach = max(1, round(min(height, width) / 128))
    x, y = min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1)
    window = nearness[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
    return round(float(np.median(window)) / 255, 3)
