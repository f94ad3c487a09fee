"""Drives many experts in lockstep: all pending calls of one tool run as one batch."""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pearl.images import ImageError, ImageFormat, Picture, decode, encode
from pearl.pipelines.checks import check_observation, check_trajectory
from pearl.pipelines.errors import Rejected, RunError
from pearl.pipelines.experts import EXPERT, Case, Conclusion, Expertise, solve
from pearl.pipelines.experts.base import Act
from pearl.pipelines.experts.voice import Voice
from pearl.pipelines.replay import Difference, Recalled, difference
from pearl.randomness import generator
from pearl.records import EncodedImage, Observation, Sample, Step, ToolCall, Trajectory
from pearl.tools import Toolbox, ToolResult, ToolUnavailable

T = TypeVar("T")
LOCKSTEP = 32
"""How many samples are in flight; bounds the decoded images in memory."""


@dataclass(frozen=True)
class Refusal:
    """A sample that gave no trajectory: rejected (a bad record, or by an expert or a check), or quarantined (a fault)."""

    key: str
    source: str
    skill: str
    reason: str
    detail: str = ""
    quarantined: bool = False
    step: int = 0
    tool: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""


class Timings:
    """Seconds by activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, activity: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - begin


class _Flight:
    """One sample on its way: its expert, the images so far, the steps taken."""

    def __init__(self, identity: str, sample: Sample, pixels: np.ndarray, expertise: Expertise) -> None:
        self.identity, self.sample, self.expertise = identity, sample, expertise
        self.pictures: list[Picture | None] = [Picture(pixels, sample.depth)]
        self.taken: list[tuple[Act, ToolResult]] = []
        self.act: Act | None = None

    def start(self) -> Conclusion | None:
        return self._advance(None)

    def receive(self, result: ToolResult) -> Conclusion | None:
        """Hands over the result of the pending act; a conclusion when the expert is done.

        A refused call that the expert gets over is no step.
        """
        assert self.act is not None
        if not result.failed:
            check_observation(result)
        self.taken.append((self.act, result))
        self.pictures.append(None if result.pixels is None else Picture(result.pixels))
        conclusion = self._advance(result)
        if result.failed:
            del self.taken[-1], self.pictures[-1]
        return conclusion

    def _advance(self, result: ToolResult | None) -> Conclusion | None:
        try:
            self.act = next(self.expertise) if result is None else self.expertise.send(result)
        except StopIteration as stop:
            conclusion: Conclusion = stop.value
            return conclusion
        return None

    def refusal(self, error: Exception) -> Refusal:
        call = self.act.call if self.act else ToolCall("", {})
        known = isinstance(error, Rejected)
        return Refusal(
            key=self.sample.key,
            source=self.sample.source,
            skill=self.sample.skill,
            reason=error.reason if isinstance(error, Rejected) else type(error).__name__,
            detail=error.detail if isinstance(error, Rejected) else str(error),
            quarantined=not known,
            step=len(self.taken) + 1,
            tool=call.tool,
            arguments=dict(call.arguments),
            traceback="" if known else "".join(traceback.format_exception(error)[-4:]),
        )


def _moved(flight: _Flight, result: ToolResult | Exception | None) -> Conclusion | Exception | None:
    """The expert's answer to a result: a conclusion, what went wrong with this sample alone, or None if it goes on."""
    try:
        if isinstance(result, Exception):
            raise result
        return flight.start() if result is None else flight.receive(result)
    except (RunError, ToolUnavailable, MemoryError):
        raise
    except Exception as error:  # whatever a tool or an expert raises is this sample's alone
        return error


class Rollout:
    """Turns samples into trajectories.

    Args:
        toolbox: What the experts may use.
        seed: Decides, together with a sample's id, everything that is random.
        image_format: How tool images are stored; each tool's own format when None.
        max_pixels: Larger images are refused.
        expert: Who decides the steps; recorded with each trajectory.
        start: Starts the expert for a sample.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        seed: int,
        image_format: ImageFormat | None,
        max_pixels: int,
        expert: str = EXPERT,
        start: Callable[[Case], Expertise] = solve,
    ) -> None:
        self.toolbox, self.seed, self.image_format, self.max_pixels = toolbox, seed, image_format, max_pixels
        self.expert, self.start = expert, start
        self.timings = Timings()
        self.differences: list[Difference] = []

    def run(self, samples: Sequence[tuple[str, Sample]]) -> list[Trajectory | Refusal]:
        """One outcome a sample, in order; `samples` are pairs of trajectory id and sample.

        Raises:
            RunError: a model or the machine failed, not a sample.
        """
        outcomes: dict[str, Trajectory | Refusal] = {}
        flights = []
        for identity, sample in samples:
            flight = self._launch(identity, sample)
            if isinstance(flight, Refusal):
                outcomes[identity] = flight
            else:
                flights.append(flight)
        pending = self._round(flights, [None] * len(flights), outcomes)
        while pending:
            pending = self._round(pending, self._execute(pending), outcomes)
        return [outcomes[identity] for identity, _ in samples]

    def _launch(self, identity: str, sample: Sample) -> _Flight | Refusal:
        try:
            with self.timings.of("decode"):
                pixels = decode(sample.image.data, self.max_pixels)
            case = Case(sample, self.toolbox.names, Voice(generator("expert", self.seed, identity)))
            return _Flight(identity, sample, pixels, self.start(case))
        except ImageError as error:
            return Refusal(sample.key, sample.source, sample.skill, "bad input", f"{sample.image.path}: {error}")
        except Rejected as error:
            return Refusal(sample.key, sample.source, sample.skill, error.reason, error.detail)
        except Exception as error:
            trace = "".join(traceback.format_exception(error)[-4:])
            reason = type(error).__name__
            return Refusal(sample.key, sample.source, sample.skill, reason, str(error), True, traceback=trace)

    def _round(
        self,
        flights: Sequence[_Flight],
        results: Sequence[ToolResult | Exception | None],
        outcomes: dict[str, Trajectory | Refusal],
    ) -> list[_Flight]:
        """Advances each flight by one act; those that go on. The outcomes of the others are recorded."""
        moves = [partial(_moved, flight, result) for flight, result in zip(flights, results, strict=True)]
        moved = self._together(moves)
        return [flight for flight, end in zip(flights, moved, strict=True) if not self._landed(flight, end, outcomes)]

    def _together(self, moves: Sequence[Callable[[], T]]) -> list[T]:
        """What the experts of one round do, each on its own."""
        return [move() for move in moves]

    def _landed(
        self, flight: _Flight, end: Conclusion | Exception | None, outcomes: dict[str, Trajectory | Refusal]
    ) -> bool:
        """Whether a flight has ended, after its outcome is recorded."""
        if end is None:
            return False
        try:
            if isinstance(end, Exception):
                raise end
            with self.timings.of("encode"):
                trajectory = self._record(flight, end)
            check_trajectory(trajectory)
            self.differences += self._compared(flight)
            outcomes[flight.identity] = trajectory
        except (RunError, ToolUnavailable, MemoryError):
            raise
        except Exception as error:  # whatever a tool or an expert raises is this sample's alone
            outcomes[flight.identity] = flight.refusal(error)
        return True

    def _execute(self, flights: Sequence[_Flight]) -> list[ToolResult | Exception]:
        """The pending calls' results, those of one tool as one batch."""
        results: dict[str, ToolResult | Exception] = {}
        by_tool: dict[str, list[_Flight]] = defaultdict(list)
        for flight in flights:
            assert flight.act is not None
            if isinstance(flight.act, Recalled) and not flight.act.again:
                results[flight.identity] = self._recall(flight.act.observation)
            else:
                by_tool[flight.act.call.tool].append(flight)
        for tool, group in by_tool.items():
            with self.timings.of(tool):
                for flight, result in zip(group, self._batch(group), strict=True):
                    results[flight.identity] = result
        return [results[flight.identity] for flight in flights]

    def _batch(self, flights: Sequence[_Flight]) -> Sequence[ToolResult | Exception]:
        """A batch that fails as a whole is run call by call, so that only the culprit fails."""
        try:
            return self.toolbox.execute([(f.act.call, f.pictures) for f in flights if f.act])
        except (ToolUnavailable, RunError):
            raise
        except Exception as error:
            if len(flights) == 1:
                return [error]
            return [result for flight in flights for result in self._batch([flight])]

    def _recall(self, recorded: Observation) -> ToolResult | Exception:
        """What a tool once gave, as if it gave it now."""
        try:
            with self.timings.of("decode"):
                pixels = None if recorded.image is None else decode(recorded.image.data, self.max_pixels)
        except ImageError as error:
            name = recorded.image.path if recorded.image else None
            return Rejected("bad input", f"{name}: {error}")
        return ToolResult(recorded.text, pixels)

    def _compared(self, flight: _Flight) -> Iterator[Difference]:
        """What came of the calls that were recorded and are carried out again."""
        for number, (act, result) in enumerate(flight.taken, start=1):
            if isinstance(act, Recalled) and act.again:
                yield difference(flight.sample.key, number, act, result, self.max_pixels)

    def _observation(self, act: Act, result: ToolResult) -> Observation:
        if isinstance(act, Recalled) and not act.again:
            return act.observation
        return Observation(result.text, self._encoded(act.call.tool, result))

    def _record(self, flight: _Flight, conclusion: Conclusion) -> Trajectory:
        sample = flight.sample
        return Trajectory(
            id=flight.identity,
            image=sample.image,
            question=sample.question,
            choices=sample.choices,
            answer=conclusion.answer,
            steps=tuple(
                Step(act.thought, self._call(act), self._observation(act, result)) for act, result in flight.taken
            ),
            conclusion=conclusion.thought,
            expert=self.expert,
            skill=sample.skill,
            source=sample.source,
            license=sample.license,
            seed=self.seed,
        )

    def _call(self, act: Act) -> ToolCall:
        return act.call if isinstance(act, Recalled) else self.toolbox.normal(act.call)

    def _encoded(self, tool: str, result: ToolResult) -> EncodedImage | None:
        if result.pixels is None:
            return None
        return EncodedImage(encode(result.pixels, self.image_format or self.toolbox[tool].image_format))
