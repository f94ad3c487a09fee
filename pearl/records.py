"""The words of the project: sample, tool call, observation, step, trajectory. It imports nothing of the project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
"""`[x0, y0, x1, y1]` in 0..1 of an image; y grows downwards."""

Point = tuple[float, float]
"""`[x, y]` in 0..1 of an image; y grows downwards."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image file's bytes, with the name it had (None for an image that a tool made)."""

    data: bytes = field(repr=False)
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """Something annotated in an image. `attributes` are what else is known of it: colour, shape, …"""

    label: str
    box: Box
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with a question.

    Attributes:
        key: Unique within its source.
        choices: The options, empty for an open question.
        answer: The right answer; empty where only a tool can tell (the expert then answers from what it read).
        regions: What is annotated in the image.
        skill: What the question asks for, which decides the expert.
        query: The question in machine-readable form, for the expert; its keys belong to the skill, and its numbers
            are indices into `regions`.
        depth: Metric depth (H, W) in metres along the optical axis, float32, where the source has a sensor.
    """

    key: str
    image: EncodedImage
    question: str
    choices: tuple[str, ...]
    answer: str
    regions: tuple[Region, ...]
    skill: str
    source: str
    license: str
    query: Mapping[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool's name and its arguments, which are JSON values. `arguments["image"]` names the image that the tool
    looks at: 0 is the original, i the output of step i."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a tool returned, as it is recorded: text, and an image where the tool makes one."""

    text: str
    image: EncodedImage | None = None


@dataclass(frozen=True, slots=True)
class Step:
    thought: str
    call: ToolCall
    observation: Observation


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A sample, the steps that an expert took, the concluding thought, the answer: one row of a dataset."""

    id: str
    image: EncodedImage
    question: str
    choices: tuple[str, ...]
    answer: str
    steps: tuple[Step, ...]
    conclusion: str
    expert: str
    skill: str
    source: str
    license: str
    seed: int
