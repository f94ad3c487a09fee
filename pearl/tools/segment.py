"""Segment: the object inside a box, by GrabCut, or by a SAM-type model of transformers where one is named."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from pydantic import Field

from pearl.boxes import pixel_box
from pearl.images import Picture
from pearl.records import Box
from pearl.tools.base import BoxArgument, PictureTool, ToolArguments, ToolError, ToolResult, ToolUnavailable, as_text
from pearl.tools.models import default_device, import_transformers, model_fingerprint, model_folder

GRABCUT = "grabcut"
LARGEST_SIDE = 768
"""GrabCut's cost grows with the pixels; larger images are shrunk for it."""


class SegmentArguments(ToolArguments):
    box: BoxArgument = Field(description="the box around the object: [x0, y0, x1, y1] in 0..1 of the image")


class Segment(PictureTool):
    """Segments.

    Args:
        model: `grabcut` (built in), or a folder or Hub id that `AutoModelForMaskGeneration` loads (SAM types).
        device: `cpu`, `cuda`, …; a GPU when there is one, if not given.
    """

    name = "segment"
    description = (
        "Cuts out the object inside a box: everything else is greyed out; tells what share of the image it covers."
    )
    Arguments = SegmentArguments

    def __init__(self, model: str = GRABCUT, device: str | None = None) -> None:
        self.model = model
        self.device = device

    def fingerprint(self) -> Mapping[str, Any]:
        return {"model": GRABCUT} if self.model == GRABCUT else model_fingerprint(self.model)

    def apply(self, picture: Picture, arguments: SegmentArguments) -> ToolResult:
        mask = self.mask(picture, arguments.box)
        grey = (0.35 * picture.pixels + 0.65 * 128).astype(np.uint8)
        pixels = np.where(mask[..., None], picture.pixels, grey)
        share = float(mask.mean())
        text = f"Segmented the object in {as_text(arguments.box)} of image {arguments.image}: it covers {share:.1%} of the image."
        return ToolResult(text, pixels, {"share": share})

    def mask(self, picture: Picture, within: Box) -> np.ndarray:
        """The pixels of the object inside a box, bool (H, W).

        Raises:
            ToolError: the box is too small, or nothing stands out in it.
            ToolUnavailable: the model does not load.
        """
        box = pixel_box(within, picture.width, picture.height)
        if box[2] - box[0] < 4 or box[3] - box[1] < 4:
            raise ToolError(f"the box is only {box[2] - box[0]}×{box[3] - box[1]} pixels; at least 4×4 are needed")
        mask = _grabcut(picture.pixels, box) if self.model == GRABCUT else self._prompted(picture.pixels, box)
        if not mask.any():
            raise ToolError(f"no object stands out in {as_text(within)}")
        return mask

    def _prompted(self, pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        import torch

        processor, network = self._loaded
        inputs = processor(images=pixels, input_boxes=[[list(map(float, box))]], return_tensors="pt").to(network.device)
        with torch.inference_mode():
            output = network(**inputs, multimask_output=False)
        names = ("original_sizes", "reshaped_input_sizes")  # SAM 1 and SAM-HQ need both, SAM 2 has the first alone
        masks = processor.post_process_masks(output.pred_masks.cpu(), *(inputs[n].cpu() for n in names if n in inputs))
        return np.asarray(masks[0].reshape(-1, *pixels.shape[:2])[0] > 0)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch

        transformers = import_transformers()

        folder = model_folder(self.model)
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            network = transformers.AutoModelForMaskGeneration.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ToolUnavailable(f"segment: {self.model!r} is no SAM-type checkpoint: {error}") from error
        return processor, network.to(default_device(self.device)).eval()


def _grabcut(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    left, top, right, bottom = (round(side * scale) for side in box)
    rectangle = (left, top, max(2, right - left), max(2, bottom - top))
    if rectangle[2] >= small.shape[1] and rectangle[3] >= small.shape[0]:
        raise ToolError("the box is the whole image; nothing outside it says what the background looks like")
    state = np.zeros(small.shape[:2], np.uint8)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(
        np.ascontiguousarray(small[..., ::-1]), state, rectangle, background, foreground, 4, cv2.GC_INIT_WITH_RECT
    )
    mask = np.isin(state, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
