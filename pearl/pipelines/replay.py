"""Trajectories that others recorded, played again by the rollout: their observations are kept, or made anew.

`RecordedSample` is a sample that brings its steps along, and `replay` the expert that takes them. A step whose
observation is not recorded is carried out by the tools of the run; so is one that is to be carried out `again`, and
then what the record shows is compared with what the tool shows now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pearl.images import ImageError, decode
from pearl.pipelines.errors import Rejected
from pearl.pipelines.experts.base import Act, Case, Conclusion, Expertise
from pearl.records import EncodedImage, Observation, Sample, ToolCall
from pearl.tools.base import ToolResult

EXPERT = "recorded"
SAME_WITHIN = 6.0
"""Mean absolute difference, in levels of 0..255: JPEG files of the same pixels differ by less."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step of a recorded trajectory.

    Attributes:
        observation: What the call gave; None where it was not recorded, so that the call has to be carried out.
        again: The call is carried out although its observation is recorded.
    """

    thought: str
    call: ToolCall
    observation: Observation | None = None
    again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSample(Sample):
    """A sample with the steps that somebody took, and the thought that concluded them."""

    steps: tuple[RecordedStep, ...]
    conclusion: str


@dataclass(frozen=True)
class Recalled(Act):
    """An act whose observation was recorded: it is not carried out, unless `again`."""

    observation: Observation
    again: bool = False


@dataclass(frozen=True)
class Difference:
    """How a recorded call came out when it was carried out again.

    Attributes:
        outcome: `as recorded`, `another size`, `other pixels` or `no image`.
        detail: Both sizes, or the mean absolute difference in levels of 0..255.
    """

    key: str
    step: int
    tool: str
    outcome: str
    detail: str = ""


def replay(case: Case) -> Expertise:
    """The expert that takes the recorded steps.

    Raises:
        Rejected: the sample was not recorded, or a tool refused a call that is carried out now.
    """
    sample = case.sample
    if not isinstance(sample, RecordedSample):
        raise Rejected("nothing is recorded for this sample")
    return _steps(sample)


def _steps(sample: RecordedSample) -> Expertise:
    for step in sample.steps:
        if step.observation is None:
            result = yield Act(step.thought, step.call)
        else:
            result = yield Recalled(step.thought, step.call, step.observation, step.again)
        if result.failed:
            raise Rejected("the tool refused the call", result.text)
    return Conclusion(sample.conclusion, sample.answer)


def pictures(sample: Sample) -> Iterator[EncodedImage]:
    """The images that a sample brings along: its own, and those of recorded observations."""
    yield sample.image
    for step in sample.steps if isinstance(sample, RecordedSample) else ():
        if step.observation is not None and step.observation.image is not None:
            yield step.observation.image


def texts(sample: RecordedSample) -> Iterator[str]:
    """All text of the recorded steps, with their arguments as JSON."""
    for step in sample.steps:
        yield from (step.thought, step.call.tool, json.dumps(step.call.arguments, ensure_ascii=False))
        if step.observation is not None:
            yield from (step.observation.text, (step.observation.image and step.observation.image.path) or "")
    yield sample.conclusion


def difference(key: str, number: int, act: Recalled, result: ToolResult, max_pixels: int) -> Difference:
    """Compares what step `number` of the sample `key` shows now with what is recorded."""
    tool, recorded = act.call.tool, act.observation.image
    if recorded is None or result.pixels is None:
        which = "recorded" if recorded is None else "now"
        return Difference(key, number, tool, "no image", which)
    try:
        before = decode(recorded.data, max_pixels)
    except ImageError as error:
        return Difference(key, number, tool, "no image", f"recorded: {error}")
    if before.shape != result.pixels.shape:
        sizes = [f"{pixels.shape[1]}×{pixels.shape[0]}" for pixels in (before, result.pixels)]
        return Difference(key, number, tool, "another size", f"{sizes[0]} recorded, {sizes[1]} now")
    levels = float(np.abs(before.astype(np.int16) - result.pixels).mean())
    outcome = "as recorded" if levels <= SAME_WITHIN else "other pixels"
    return Difference(key, number, tool, outcome, f"{levels:.2f}")
