"""What an expert is: a generator that yields a thought with a tool call, receives what the tool gave, and in the end
returns a conclusion. It may branch on what a tool showed."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from pearl.images import HARD_MAX_PIXELS, header
from pearl.pipelines.errors import Rejected, Unsolvable
from pearl.pipelines.experts.voice import Voice
from pearl.records import Box, Region, Sample, ToolCall
from pearl.tools.base import ToolResult
from pearl.tools.zoom import MAX_SIDE


@dataclass(frozen=True)
class Act:
    """A thought and the call that it leads to."""

    thought: str
    call: ToolCall


@dataclass(frozen=True)
class Conclusion:
    thought: str
    answer: str


Steps = Generator[Act, ToolResult, ToolResult]
Expertise = Generator[Act, ToolResult, Conclusion]


class Case:
    """A sample with the tools that may be used on it, the voice that speaks, and the steps taken so far."""

    def __init__(self, sample: Sample, tools: frozenset[str], voice: Voice) -> None:
        self.sample, self.tools, self.voice = sample, tools, voice
        self.query = sample.query
        self.steps = 0

    def act(self, thought: str, tool: str, **arguments: Any) -> Steps:
        """Takes one step. The image it makes has the number `steps` afterwards.

        Raises:
            Rejected: the tool refused the call.
        """
        result = yield Act(thought, ToolCall(tool, arguments))
        self.steps += 1
        if result.failed:
            raise Rejected("the tool refused the call", result.text)
        return result

    def needs(self, *tools: str) -> None:
        """Raises Unsolvable unless one of `tools` is allowed."""
        if not self.tools.intersection(tools):
            raise Unsolvable(f"needs {' or '.join(tools)}")

    def fits_zoom(self, box: Box) -> bool:
        """Whether `zoom` takes the box: of a large picture it may have too many pixels already."""
        width, height = header(self.sample.image.data, HARD_MAX_PIXELS)
        return max((box[2] - box[0]) * width, (box[3] - box[1]) * height) < MAX_SIDE - 2

    def region(self, index: int) -> Region:
        return self.sample.regions[index]

    @property
    def targets(self) -> list[int]:
        """The regions that the question is about.

        Raises:
            Unsolvable: it names none.
        """
        targets = list(self.query.get("targets", ()))
        if not targets:
            raise Unsolvable("no annotated region says where to look")
        return targets

    @property
    def names(self) -> list[str]:
        """What the question calls its targets: by their labels, with numbers where several share one; without a label
        that would give the answer away."""
        if self.query.get("names"):
            return list(self.query["names"])
        told = _words(self.sample.answer) - _words(self.sample.question)
        labels = [self.region(i).label for i in self.targets]
        labels = ["place in question" if _words(label) & told else label for label in labels]
        return [
            f"the {label}" if labels.count(label) == 1 else f"{label} {labels[: place + 1].count(label)}"
            for place, label in enumerate(labels)
        ]

    def conclude(self, *findings: str, answer: str | None = None) -> Conclusion:
        """Findings, then the answer (the annotated one unless another is given)."""
        final = self.sample.answer if answer is None else answer
        return Conclusion(" ".join([*findings, self.voice.say("answer", answer=final)]), final)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
