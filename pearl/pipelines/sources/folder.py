"""`folder:DIR`: images without annotation, asked about what a tool alone can tell: nearness, text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pearl.pipelines.sources.base import Item, Source, SourceError, SourceOptions, listing_hash, read_image
from pearl.randomness import generator
from pearl.records import Sample

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Folder(Source):
    """One sample an image and askable skill. The answers come from the tools' readings, as the license says nothing
    of the images they are marked unknown."""

    name = "folder"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        self.folder = Path(argument)
        self.options = options
        self.skills = [s for s, tool in (("relative depth", "depth"), ("text", "ocr")) if tool in options.tools]
        if not argument or not self.folder.is_dir():
            raise SourceError(f"folder: {argument or '(nothing)'} is no folder; use --source folder:DIR")
        if not self.skills:
            raise SourceError("images without annotation need the tool depth or ocr: --tools depth,ocr")

    def items(self) -> Iterator[Item]:
        found = False
        for name in self._names():
            found = True
            yield from (Item(f"{name}#{skill}", {"image": name, "skill": skill}) for skill in self.skills)
        if not found:
            raise SourceError(f"{self.folder} holds no image ({', '.join(EXTENSIONS)})")

    def _names(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                yield path.relative_to(self.folder).as_posix()

    def read(self, item: Item) -> Sample:
        image = read_image(self.folder, item.record["image"], self.options.max_pixels)
        skill = item.record["skill"]
        rng = generator("folder", self.options.seed, hashlib.sha256(image.data).hexdigest())
        if skill == "relative depth":
            first, second = rng.uniform(0.1, 0.9, 2), rng.uniform(0.1, 0.9, 2)
            places = [f"({x:.2f}, {y:.2f})" for x, y in (first, second)]
            question = (
                f"Which point is closer to the camera, A at {places[0]} or B at {places[1]}"
                " (fractions of the width and height)?"
            )
            points = [[round(float(v), 2) for v in point] for point in (first, second)]
            choices: tuple[str, ...] = ("A", "B")
            query: dict[str, Any] = {"points": points, "names": ["A", "B"]}
        else:
            question, choices, query = "What text can be read in the picture?", (), {}
        return Sample(item.key, image, question, choices, "", (), skill, self.name, "unknown", query)

    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "folder": self.folder.name,
            "images": listing_hash(self.folder, self._names()),
            "seed": self.options.seed,
            "skills": self.skills,
        }
