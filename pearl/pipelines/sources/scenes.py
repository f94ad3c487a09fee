"""`scenes`: rendered with MuJoCo, with exact boxes and depth. Needs the package `mujoco`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pearl.pipelines.sources.base import BadRecord, Item, Source, SourceError, SourceOptions
from pearl.records import Sample
from pearl.scenes.layout import SPLITS
from pearl.scenes.questions import FAMILIES, USUAL
from pearl.scenes.samples import NoFittingScene, scene_sample


class Scenes(Source):
    name = "scenes"

    def __init__(self, argument: str, options: SourceOptions) -> None:
        if argument:
            raise SourceError(
                f"scenes takes no argument, but got {argument!r}; use --count, --seed, --split, --size, --skill"
            )
        if options.split not in SPLITS:
            raise SourceError(f"--split {options.split}: there are {', '.join(SPLITS)}")
        if unknown := [skill for skill in options.skills if skill not in FAMILIES]:
            raise SourceError(f"--skill {', '.join(unknown)}: scenes have {', '.join(FAMILIES)}")
        self.options, self.skills = options, options.skills or USUAL

    def items(self) -> Iterator[Item]:
        o = self.options
        return (Item(f"{o.split}/{o.seed}/{index:07d}", {"index": index}) for index in range(o.count))

    def read(self, item: Item) -> Sample:
        o, index = self.options, item.record["index"]
        try:
            sample, _ = scene_sample(o.split, o.seed, index, o.size, o.image_format, self.skills)  # type: ignore[arg-type]
        except NoFittingScene as error:
            raise BadRecord(str(error)) from error
        return sample

    def fingerprint(self) -> Mapping[str, Any]:
        try:
            renderer = version("mujoco")
        except PackageNotFoundError:
            raise SourceError("rendered scenes need MuJoCo: pip install -e '.[scenes]', or mujoco") from None
        o = self.options
        return {
            "split": o.split, "seed": o.seed, "size": o.size, "skills": sorted(self.skills), "format": o.image_format,
            "mujoco": renderer,
        }  # fmt: skip
