"""Trajectories that a planner decides: several tries at each sample, of which the shortest right one is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pearl.pipelines.config import GenerateConfig
from pearl.pipelines.endpoint.config import EndpointConfig
from pearl.pipelines.errors import ConfigError
from pearl.pipelines.experts import Case, Expertise
from pearl.pipelines.experts.planner import Planner, PlannerSettings, Transcript
from pearl.pipelines.rollout import Refusal, Rollout
from pearl.pipelines.run_directory import RunDirectory
from pearl.records import Sample, Trajectory
from pearl.tools import Toolbox

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PlannerConfig(GenerateConfig):
    """As `GenerateConfig`, where a model behind an endpoint decides the steps."""

    planner: PlannerSettings

    expert: ClassVar[str] = "planner"

    def particulars(self) -> dict[str, Any]:
        return {"planner": self.as_json()["planner"]}


@dataclass(frozen=True)
class DiscardedTry:
    """A try that was not kept: for study.

    Attributes:
        number: The try, from 0.
        reason: Why not: that of a refusal, or that it is right but not the shortest.
        transcript: The model's replies and what it was told, without images.
    """

    key: str
    source: str
    skill: str
    number: int
    reason: str
    detail: str
    transcript: Transcript


class PlannerCrew:
    """A planner with the threads that its requests are sent from. One for all shards of a worker."""

    def __init__(
        self, config: PlannerConfig, endpoint: EndpointConfig, directory: RunDirectory, toolbox: Toolbox
    ) -> None:
        from pearl.pipelines.endpoint.client import Client  # its packages are an extra
        from pearl.pipelines.endpoint.ledger import Ledger
        from pearl.pipelines.endpoint.replies import ReplyCache

        folder = Path(endpoint.cache) if endpoint.cache else directory.replies
        self.settings = config.planner
        self.client = Client(endpoint, ReplyCache(folder), Ledger(directory.ledger, endpoint.budget))
        max_pixels = config.source_options.max_pixels
        self.planner = Planner(config.planner, self.client.ask, toolbox, config.seed, max_pixels)
        self.threads = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="planner")

    def together(self, moves: Sequence[Callable[[], T]]) -> list[T]:
        """Does all at once, as many as there are threads; the first exception stops those that have not begun."""
        futures = [self.threads.submit(move) for move in moves]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done() and (error := future.exception()):
                    raise error
            return [future.result() for future in futures]
        except BaseException:
            self.client.stop()
            for future in futures:
                future.cancel()
            wait(futures)
            raise


class PlannerRollout(Rollout):
    """A rollout whose experts wait for a server: those of one round wait together.

    Attributes:
        set_aside: What was tried and not kept.
    """

    def __init__(self, crew: PlannerCrew, toolbox: Toolbox, config: GenerateConfig) -> None:
        name = f"{config.expert}:{crew.settings.model}"
        super().__init__(toolbox, config.seed, config.image_format, config.source_options.max_pixels, name)
        self.crew = crew
        self.set_aside: list[DiscardedTry] = []

    def run(self, samples: Sequence[tuple[str, Sample]]) -> list[Trajectory | Refusal]:
        outcomes: dict[str, list[Trajectory | Refusal]] = {identity: [] for identity, _ in samples}
        talks: dict[str, list[Transcript]] = {identity: [] for identity, _ in samples}
        for number in range(self.crew.settings.tries):
            remaining = [one for one in samples if not _settled(outcomes[one[0]])]
            for (identity, _), outcome, talk in zip(remaining, *self._try(remaining, number), strict=True):
                outcomes[identity].append(outcome)
                talks[identity].append(talk)
        chosen = {identity: _best(tried) for identity, tried in outcomes.items()}
        for identity, sample in samples:
            self._put_aside(sample, outcomes[identity], talks[identity], chosen[identity])
        return [chosen[identity] for identity, _ in samples]

    def _try(
        self, samples: Sequence[tuple[str, Sample]], number: int
    ) -> tuple[list[Trajectory | Refusal], list[Transcript]]:
        """What becomes of try `number` at these samples, and what was said."""
        talks: list[Transcript] = [[] for _ in samples]
        # by identity: a Sample holds mappings and cannot be hashed
        talk_of = {id(sample): talk for (_, sample), talk in zip(samples, talks, strict=True)}

        def start(case: Case) -> Expertise:
            return self.crew.planner.solve(case, number, talk_of[id(case.sample)])

        self.start = start  # each try starts the experts anew, with its number
        return super().run(samples), talks

    def _together(self, moves: Sequence[Callable[[], T]]) -> list[T]:
        with self.timings.of("planner"):
            return self.crew.together(moves)

    def _put_aside(
        self, sample: Sample, tried: Sequence[Trajectory | Refusal], talks: Sequence[Transcript], chosen: object
    ) -> None:
        for number, (outcome, talk) in enumerate(zip(tried, talks, strict=True)):
            if isinstance(outcome, Refusal):
                reason, detail = outcome.reason, outcome.detail
            elif outcome is not chosen:
                reason, detail = "right, but longer", f"{len(outcome.steps)} steps"
            else:
                continue
            self.set_aside.append(DiscardedTry(sample.key, sample.source, sample.skill, number, reason, detail, talk))


def open_crew(
    config: GenerateConfig, endpoint: EndpointConfig | None, directory: RunDirectory, toolbox: Toolbox
) -> PlannerCrew | None:
    """The planner of a run; None where programs decide the steps."""
    check_endpoint(config, endpoint)
    if not isinstance(config, PlannerConfig) or endpoint is None:
        return None
    return PlannerCrew(config, endpoint, directory, toolbox)


def check_endpoint(config: GenerateConfig, endpoint: EndpointConfig | None) -> None:
    """Finds out before any work whether a planner could be asked.

    Raises:
        ConfigError: there is a planner without an endpoint, or an endpoint without a planner.
        RunError: a package or the key is missing.
    """
    if isinstance(config, PlannerConfig) != (endpoint is not None):
        raise ConfigError("a planner and an endpoint belong together: --expert planner --endpoint URL --model NAME")
    if endpoint is not None:
        endpoint.check()


def _settled(tried: Sequence[Trajectory | Refusal]) -> bool:
    """Another try could bring nothing better: one step is the least, and a bad image stays one."""
    if not tried:
        return False
    last = tried[-1]
    return last.step == 0 if isinstance(last, Refusal) else len(last.steps) == 1


def _best(tried: Sequence[Trajectory | Refusal]) -> Trajectory | Refusal:
    """The shortest trajectory; without one the refusal that needs attention, else one for the commonest reason."""
    right = [outcome for outcome in tried if isinstance(outcome, Trajectory)]
    if right:
        return min(right, key=lambda trajectory: len(trajectory.steps))
    refused = [outcome for outcome in tried if isinstance(outcome, Refusal)]
    reasons = Counter(outcome.reason for outcome in refused)
    return max(refused, key=lambda outcome: (outcome.quarantined, reasons[outcome.reason]))
