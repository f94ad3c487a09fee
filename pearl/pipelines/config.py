"""What is to be generated, and the fingerprint of everything that decides its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from pearl.images import ImageFormat
from pearl.parquet import SCHEMA_VERSION
from pearl.pipelines.errors import ConfigError
from pearl.pipelines.experts import EXPERT, Case, Expertise, solve
from pearl.pipelines.sources import Source, SourceOptions, open_source
from pearl.tools import Toolbox

BYTE_CHANGING = ("pearl-vlm", "numpy", "pillow", "opencv-python-headless", "torch", "transformers", "pyarrow")

READ_BY = {
    "skills": ("--skill", {"scenes"}), "images": ("--images", {"coco"}), "questions": ("--questions", {"coco"}),
    "columns": ("--columns", {"parquet", "hf"}),
}  # fmt: skip
"""Options that only some of the sources read."""


@dataclass(frozen=True)
class GenerateConfig:
    """Everything that decides the data: two runs of the same configuration give the same bytes.

    Attributes:
        sources: `kind` or `kind:argument`, see `pearl.pipelines.sources`.
        tools: The tools that the experts may use.
        tool_settings: Constructor arguments by tool.
        shard_size: Samples planned a shard; 128, or fewer in a small run, when None.
        image_format: How tool images are stored; each tool's own when None.
    """

    sources: tuple[str, ...] = ("photos", "scenes")
    source_options: SourceOptions = field(default_factory=SourceOptions)
    tools: tuple[str, ...] = ("crop", "depth")
    tool_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    shard_size: int | None = None
    image_format: ImageFormat | None = None

    expert: ClassVar[str] = EXPERT
    """Who decides the steps; recorded with each trajectory."""

    def __post_init__(self) -> None:
        if not self.tools:
            raise ConfigError("no tools: name at least one")
        if self.shard_size is not None and self.shard_size < 1:
            raise ConfigError(f"shard size {self.shard_size}: at least 1")
        if len(set(self.sources)) != len(self.sources):
            raise ConfigError(f"a source stands twice: {', '.join(self.sources)}")
        self._refuse_idle_options()

    def _refuse_idle_options(self) -> None:
        """
        Raises:
            ConfigError: an option is given that none of the sources reads.
        """
        kinds = {spec.partition(":")[0] for spec in self.sources}
        if self.source_options.annotation.annotators and "folder" not in kinds:
            raise ConfigError("--annotate is for images without annotation: --source folder:DIR")
        for name, (option, readers) in READ_BY.items():
            if getattr(self.source_options, name) and not kinds & readers:
                raise ConfigError(
                    f"{option} is read by {' and '.join(sorted(readers))}, and the source is {', '.join(sorted(kinds))}"
                )

    def open_sources(self) -> list[Source]:
        return [open_source(spec, self.source_options) for spec in self.sources]

    def open_toolbox(self) -> Toolbox:
        return Toolbox(self.tools, self.tool_settings)

    def start_expert(self, case: Case) -> Expertise:
        """The expert for a sample, started.

        Raises:
            Rejected: there is none.
        """
        return solve(case)

    def particulars(self) -> dict[str, Any]:
        """What decides the data beside what every configuration has; for the recipe."""
        return {}

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def recipe(config: GenerateConfig) -> dict[str, Any]:
    """What decides every trajectory's content: configuration, inputs, model revisions, versions.

    Raises:
        SourceError: an input cannot be read.
        ToolUnavailable: a model is not there.
    """
    return {
        "sources": [{"source": s.name, **s.fingerprint()} for s in config.open_sources()],
        "tools": config.open_toolbox().fingerprint(),
        "settings": {tool: dict(settings) for tool, settings in config.tool_settings.items()},
        "expert": config.expert,
        **config.particulars(),
        "seed": config.seed,
        "image_format": config.image_format,
        "schema_version": SCHEMA_VERSION,
        "versions": {package: _version(package) for package in BYTE_CHANGING},
    }


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe, in hexadecimal digits; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def trajectory_id(fingerprint: str, source: str, key: str, image: bytes) -> str:
    """32 hexadecimal digits from the recipe, the source's key and the image's content."""
    content = hashlib.sha256(image).hexdigest()
    return hashlib.sha256(f"{fingerprint}\0{source}\0{key}\0{content}".encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
