"""`photos`: six photographs that ship with the package, with hand-drawn boxes and questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pearl
from pearl.pipelines.sources.base import SourceError, SourceOptions
from pearl.pipelines.sources.coco import Coco

FOLDER = Path(pearl.__file__).parent / "assets" / "photos"
LICENSES = {
    "astronaut.png": "public domain",
    "rocket.jpg": "public domain",
    "coffee.png": "CC0-1.0",
    "chelsea.png": "CC0-1.0",
    "china.jpg": "CC-BY-2.0",
    "flower.jpg": "CC-BY-2.0",
}


class Photos(Coco):
    name = "photos"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        if argument:
            raise SourceError(f"photos takes no argument, but got {argument!r}")
        shipped = replace(options, images=str(FOLDER), questions=str(FOLDER / "questions.jsonl"))
        super().__init__(str(FOLDER / "instances.json"), shipped)
        self.licenses = LICENSES
