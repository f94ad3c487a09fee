"""Detect: things found by their names, with an open-vocabulary detector of transformers (OWLv2, Grounding DINO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pearl.drawing import draw_boxes
from pearl.images import Picture
from pearl.records import Box
from pearl.tools.base import Fraction, PictureTool, ToolArguments, ToolError, ToolResult, ToolUnavailable, as_text
from pearl.tools.models import default_device, import_transformers, model_fingerprint, model_folder

MAX_FOUND = 20

GROUNDING = ("grounding-dino", "mm-grounding-dino")

Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"\S")]


class DetectArguments(ToolArguments):
    labels: list[Name] = Field(min_length=1, max_length=10, description="what to look for, in plain words")
    threshold: Fraction = Field(default=0.2, description="the least score of what is returned")


class Detect(PictureTool):
    """Detects.

    Args:
        model: A folder or Hub id that the `zero-shot-object-detection` pipeline loads; nothing is built in.
        device: `cpu`, `cuda`, …; a GPU when there is one, if not given.
    """

    name = "detect"
    description = f"Finds things by their names: at most {MAX_FOUND} boxes with scores."
    Arguments = DetectArguments

    def __init__(self, model: str | None = None, device: str | None = None) -> None:
        self.model = model
        self.device = device

    def missing(self) -> str | None:
        if self.model is None:
            return "no model is built in: name one, for example --detect-model google/owlv2-base-patch16-ensemble"
        return None

    def fingerprint(self) -> Mapping[str, Any]:
        return {} if self.model is None else model_fingerprint(self.model)

    def apply(self, picture: Picture, arguments: DetectArguments) -> ToolResult:
        found = self.find(picture, arguments.labels, arguments.threshold)[:MAX_FOUND]
        names = ", ".join(arguments.labels)
        if not found:
            return ToolResult(f"Found no {names} in image {arguments.image}.", picture.pixels, {"found": []})
        listed = "\n".join(f"{one['label']} {as_text(one['box'])} ({one['score']:.2f})" for one in found)
        drawn = draw_boxes(picture.pixels, [one["box"] for one in found])
        return ToolResult(f"Found in image {arguments.image}:\n{listed}", drawn, {"found": found})

    def find(self, picture: Picture, labels: Sequence[str], threshold: float) -> list[dict[str, Any]]:
        """All that is found with at least this score, best first, as `label`, `box` and `score`.

        Raises:
            ToolError: a label is too long for the model.
            ToolUnavailable: the model does not load.
        """
        from PIL import Image

        asked = {self._query(name): name for name in labels}
        raw = self._pipeline(Image.fromarray(picture.pixels), candidate_labels=list(asked), threshold=threshold)
        best = sorted(raw, key=lambda one: -one["score"])
        found = [_detection({**one, "label": asked[one["label"]]}, picture) for one in best]
        return [one for one in found if one["box"][0] < one["box"][2] and one["box"][1] < one["box"][3]]

    def _query(self, name: str) -> str:
        """The name as the model was trained to read it.

        Raises:
            ToolError: it has too many tokens for the model.
        """
        config = self._pipeline.model.config
        query = f"{name.lower().strip(' .')}." if config.model_type in GROUNDING else name
        limit = config.text_config.max_position_embeddings
        if len(self._pipeline.tokenizer.tokenize(query)) > limit - 2:  # the start and end tokens are added
            raise ToolError(f"the label {name!r} is too long for this detector; use fewer words")
        return query

    @cached_property
    def _pipeline(self) -> Any:
        import torch

        transformers = import_transformers()

        if self.model is None:
            raise ToolUnavailable(f"detect: {self.missing()}")
        folder = model_folder(self.model)
        try:
            return transformers.pipeline(
                "zero-shot-object-detection",
                model=str(folder),
                trust_remote_code=False,
                device=default_device(self.device),
                dtype=torch.float32,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, KeyError) as error:
            raise ToolUnavailable(f"detect: {self.model!r} is no open-vocabulary detector: {error}") from error


def _detection(raw: Mapping[str, Any], picture: Picture) -> dict[str, Any]:
    size = np.array([picture.width, picture.height, picture.width, picture.height])
    corners = np.array([raw["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")]) / size
    x0, y0, x1, y1 = (float(value) for value in np.clip(corners, 0, 1))
    box: Box = (x0, y0, x1, y1)
    return {"label": str(raw["label"]), "box": box, "score": float(raw["score"])}
