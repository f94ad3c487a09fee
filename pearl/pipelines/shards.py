"""Making one shard: read its samples, roll out, check, encode, write, mark as done. The unit of work of every engine."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pearl.files import file_hash
from pearl.images import HARD_MAX_PIXELS, ImageError, header
from pearl.parquet import TrajectoryWriter
from pearl.pipelines.config import GenerateConfig, trajectory_id
from pearl.pipelines.endpoint.config import EndpointConfig
from pearl.pipelines.errors import Rejected, RunError
from pearl.pipelines.planner_rollout import PlannerRollout, open_crew
from pearl.pipelines.replay import pictures
from pearl.pipelines.rollout import LOCKSTEP, Refusal, Rollout
from pearl.pipelines.run_directory import RunDirectory, whole, write_json, write_lines
from pearl.pipelines.sources import BadRecord, Item, SourceError, annotators_of
from pearl.records import EncodedImage, Region, Sample, Trajectory
from pearl.scenes.render import RendererUnavailable
from pearl.tools import ToolUnavailable

MAX_PIXELS_IN_FLIGHT = 40_000_000
"""Decoded originals that a worker holds at once: large photographs roll out in smaller groups."""


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to know of a run: small, and the same for all its shards."""

    config: GenerateConfig
    fingerprint: str
    out: str
    total: int
    endpoint: EndpointConfig | None = None

    def directory(self) -> RunDirectory:
        return RunDirectory(Path(self.out), self.config.source_options.split)


class ShardMaker:
    """Makes shards. Holds what is costly to open: the sources and the tools with their models."""

    def __init__(self, task: ShardTask) -> None:
        limit_threads()
        self.task = task
        self.directory = task.directory()
        self.sources = task.config.open_sources()
        self.toolbox = task.config.open_toolbox()
        for source in self.sources:
            source.adopt(self.toolbox)
        self.crew = open_crew(task.config, task.endpoint, self.directory, self.toolbox)
        self.annotated: dict[str, tuple[Region, ...]] = {}

    def make(self, number: int, culprits: Collection[int] = ()) -> dict[str, Any]:
        """Makes shard `number` and returns its marker; `culprits` are ordinals that killed workers, to be quarantined.

        Raises:
            RunError: the machine or a model failed.
        """
        rollout = self._rollout()
        counts = _Counts()
        target = self.directory.shard(number, self.task.total)
        made_by = {"fingerprint": self.task.fingerprint, "config": self.task.config.as_json()}
        annotations: list[dict[str, Any]] = []
        self.annotated.clear()
        with whole(target) as partial, TrajectoryWriter(partial, made_by) as writer:
            for outcome in self._outcomes(rollout, number, culprits):
                counts.add(outcome)
                if isinstance(outcome, Trajectory):
                    annotations += self._machine_made(outcome)
                    with rollout.timings.of("write"):
                        writer.write(outcome)
            with rollout.timings.of("write"):
                writer.close()
        write_lines(self.directory.refused(number), map(asdict, counts.refusals))
        if annotations:
            write_lines(self.directory.annotations(number), annotations)
        if isinstance(rollout, PlannerRollout):
            write_lines(self.directory.tries(number), map(asdict, rollout.set_aside))
        marker = {
            "shard": number,
            "fingerprint": self.task.fingerprint,
            "sha256": file_hash(target),
            "bytes": target.stat().st_size,
            "peak_memory_mb": _peak_memory_mb(),
            "seconds": {name: round(seconds, 4) for name, seconds in rollout.timings.seconds.items()},
            **counts.as_json(),
        }
        if rollout.differences:
            write_lines(self.directory.differences(number), map(asdict, rollout.differences))
            marker["reexecuted"] = dict(Counter(difference.outcome for difference in rollout.differences))
        if self.crew:
            self.crew.client.settle()
        write_json(self.directory.marker(number), marker)
        pa.default_memory_pool().release_unused()
        return marker

    def _machine_made(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        """The regions that tools annotated in a trajectory's image, with their scores."""
        if regions := self.annotated.get(trajectory.id):
            yield {"id": trajectory.id, "image": trajectory.image.path, "regions": list(map(asdict, regions))}

    def probe(self, number: int, ordinals: Collection[int]) -> None:
        """Rolls out some samples of a shard and keeps nothing: finds out whether they kill the worker."""
        everything = {ordinal for ordinal, _, _ in self.directory.planned(number)}
        for _ in self._outcomes(self._rollout(), number, everything - set(ordinals), silent=True):
            pass

    def first_outcomes(self, each: int) -> dict[int, list[Trajectory | Refusal]]:
        """What becomes of the first `each` samples of every source, by the source's number."""
        first: dict[int, list[tuple[int, int, Item]]] = defaultdict(list)
        for number in range(self.task.total):
            for planned in self.directory.planned(number):
                if len(first[planned[1]]) < each:
                    first[planned[1]].append(planned)
        return {source: list(self._rolled(self._rollout(), planned)) for source, planned in first.items()}

    def _rollout(self) -> Rollout:
        config = self.task.config
        if self.crew:
            return PlannerRollout(self.crew, self.toolbox, config)
        max_pixels = config.source_options.max_pixels
        return Rollout(self.toolbox, config.seed, config.image_format, max_pixels, config.expert, config.start_expert)

    def _outcomes(
        self, rollout: Rollout, number: int, culprits: Collection[int], silent: bool = False
    ) -> Iterator[Trajectory | Refusal]:
        """The outcomes of a shard in the plan's order; `silent` leaves the culprits out instead of refusing them."""
        planned = list(self.directory.planned(number))
        if silent:
            planned = [one for one in planned if one[0] not in culprits]
        yield from self._rolled(rollout, planned, culprits)

    def _rolled(
        self, rollout: Rollout, planned: Iterable[tuple[int, int, Item]], culprits: Collection[int] = ()
    ) -> Iterator[Trajectory | Refusal]:
        """Reads and rolls out, as many samples together as `LOCKSTEP` and `MAX_PIXELS_IN_FLIGHT` allow."""
        group: list[tuple[str, Sample] | Refusal] = []
        pixels = 0
        for ordinal, source, item in planned:
            if ordinal in culprits:
                name, detail = self.sources[source].name, "every process that worked on this sample was killed"
                group.append(Refusal(item.key, name, "", "the worker died", detail, quarantined=True))
            else:
                group.append(self._read(rollout, source, item))
            pixels += _pixels(group[-1])
            if len(group) == LOCKSTEP or pixels > MAX_PIXELS_IN_FLIGHT:
                yield from _flown(rollout, group)
                group, pixels = [], 0
        yield from _flown(rollout, group)

    def _read(self, rollout: Rollout, number: int, item: Item) -> tuple[str, Sample] | Refusal:
        source = self.sources[number]
        try:
            if item.problem is not None:
                raise BadRecord(item.problem)
            with rollout.timings.of("read"):
                sample = source.read(item)
            _check_text(sample)
            name = f"{number}/{source.name}"  # two sources of one kind may hold the same keys and images
            identity = trajectory_id(self.task.fingerprint, name, item.key, sample.image.data)
            if annotators_of(sample.source):
                self.annotated[identity] = sample.regions
            return identity, sample
        except BadRecord as error:
            return Refusal(item.key, source.name, "", "bad input", str(error))
        except Rejected as error:
            return Refusal(item.key, source.name, "", error.reason, error.detail)
        except (SourceError, RendererUnavailable, ToolUnavailable, MemoryError) as error:
            raise RunError(str(error) or "out of memory") from error
        except Exception as error:  # a reader's bug is this record's alone
            return Refusal(item.key, source.name, "", type(error).__name__, str(error), quarantined=True)


def _flown(rollout: Rollout, group: list[tuple[str, Sample] | Refusal]) -> Iterator[Trajectory | Refusal]:
    try:
        rolled = iter(rollout.run([one for one in group if not isinstance(one, Refusal)]))
    except (ToolUnavailable, MemoryError) as error:
        raise RunError(str(error) or "out of memory") from error
    yield from (one if isinstance(one, Refusal) else next(rolled) for one in group)


def _pixels(read: tuple[str, Sample] | Refusal) -> int:
    if isinstance(read, Refusal):
        return 0
    return sum(map(_size, pictures(read[1])))


def _size(image: EncodedImage) -> int:
    try:
        width, height = header(image.data, HARD_MAX_PIXELS)
    except ImageError:
        return 0
    return width * height


def _check_text(sample: Sample) -> None:
    """Refuses text that no file can hold: lone surrogates, from JSON escapes or from file names of another encoding.

    Raises:
        BadRecord
    """
    regions = [text for region in sample.regions for text in (region.label, *region.attributes.values())]
    path = sample.image.path or ""
    for text in (sample.question, sample.answer, sample.license, path, *sample.choices, *regions):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"{text!r} is not valid Unicode: {error.reason}") from error


class _Counts:
    def __init__(self) -> None:
        self.refusals: list[Refusal] = []
        self.kept: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.tools: Counter[str] = Counter()

    def add(self, outcome: Trajectory | Refusal) -> None:
        if isinstance(outcome, Refusal):
            self.refusals.append(outcome)
            return
        self.kept[outcome.skill] += 1
        self.steps[str(len(outcome.steps))] += 1
        self.tools["+".join(sorted({step.call.tool for step in outcome.steps}))] += 1

    def as_json(self) -> dict[str, Any]:
        rejected = Counter(refusal.reason for refusal in self.refusals if not refusal.quarantined)
        quarantined = sum(refusal.quarantined for refusal in self.refusals)
        kept = sum(self.kept.values())
        return {
            "planned": kept + len(self.refusals),
            "kept": kept,
            "rejected": dict(rejected),
            "quarantined": quarantined,
            "skills": dict(self.kept),
            "steps": dict(self.steps),
            "tools": dict(self.tools),
        }


def _peak_memory_mb() -> float:
    """The most memory that this process has held so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def limit_threads() -> None:
    """One thread a worker: more of them on a busy machine are slower, not faster."""
    import cv2

    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that is imported later, with the first model
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
