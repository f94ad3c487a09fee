"""How much each step of a trajectory helps: the right answer's log-odds with what the tool showed, over the image alone.

A model is asked for the answer straight after the question, and again after each observation. Where tool images add
nothing, training on them can teach nothing: the gain makes that a property of a dataset that can be read and filtered.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pearl.errors import PearlError
from pearl.evaluation.insides import Insides
from pearl.evaluation.subject import Subject, enough_memory
from pearl.files import whole_file
from pearl.images import ImageError
from pearl.parquet import to_row
from pearl.records import Trajectory
from pearl.trainer.conversation import Conversation, ImagePart, Template, Turn
from pearl.trainer.objectives.sft import NextToken
from pearl.trainer.packing import Batch, Example
from pearl.trainer.views import View, ViewError

SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("skill", pa.string()), ("tools", pa.list_(pa.string())),
        ("log_odds", pa.list_(pa.float64())), ("log_odds_without_image", pa.list_(pa.float64())),
        ("gain", pa.float64()), ("image_gain", pa.float64()),
    ]
)  # fmt: skip


class GainError(PearlError, ValueError):
    """A trajectory whose gain cannot be measured; the message says why."""


@dataclass(frozen=True)
class Gain:
    """One trajectory's.

    Attributes:
        tools: Of its K steps.
        log_odds: (K + 1) of the right answer among the options: from the image alone, then after each step.
        without_image: (K) after each step, but without that step's image: what the words alone give.
    """

    id: str
    skill: str
    tools: tuple[str, ...]
    log_odds: tuple[float, ...]
    without_image: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Of all steps together."""
        return self.log_odds[-1] - self.log_odds[0]

    @property
    def image_gain(self) -> float:
        """Of the step whose image gives most beyond its words."""
        return max(with_it - without for with_it, without in zip(self.log_odds[1:], self.without_image, strict=True))


class GainMeter:
    """Measures with one model, whose words are a template's."""

    def __init__(self, subject: Subject, template: Template) -> None:
        self.insides, self.template = Insides.of(subject), template
        self.learner = self.insides.learner(NextToken(""))

    @torch.no_grad()
    def measure(self, trajectory: Trajectory) -> Gain:
        """
        Raises:
            GainError: it has no steps, or no options with the answer among them.
            SubjectError: out of memory.
            ImageError, ViewError: it cannot be shown to the model.
        """
        if not trajectory.steps:
            raise GainError("it has no steps")
        if trajectory.answer not in trajectory.choices or len(trajectory.choices) < 2:
            raise GainError("its answer is not one of at least two options")
        conversation = Conversation(trajectory, self.template)
        images = [self.insides.encoder.image(image) for image in conversation.images]
        asked, steps = conversation.question(), conversation.steps()
        prefixes = {str(count): (*asked, *steps[: 2 * count]) for count in range(len(trajectory.steps) + 1)}
        for number in range(len(trajectory.steps)):
            seen = (*asked, *steps[: 2 * number + 1], _without_image(steps[2 * number + 1]))
            prefixes[f"{number}-"] = seen
        views = dict[str, View]()
        for name, turns in reversed(prefixes.items()):
            for index, answer in enumerate(self._answers(trajectory)):
                views[f"{name} {index}"] = self.insides.encoder.view((*turns, answer), images)
        longest = f"{len(trajectory.steps)} 0"
        ordered = {longest: views[longest], **views}
        with enough_memory(f"trajectory {trajectory.id} alone: leave it out, or measure on --device cpu"):
            batch = self.insides.batch([Example(trajectory.id, tuple(images), ordered)])
            odds = self._log_odds(batch, trajectory, list(prefixes))
        return Gain(
            trajectory.id,
            trajectory.skill,
            tuple(step.call.tool for step in trajectory.steps),
            tuple(odds[str(count)] for count in range(len(trajectory.steps) + 1)),
            tuple(odds[f"{number}-"] for number in range(len(trajectory.steps))),
        )

    def _answers(self, trajectory: Trajectory) -> Iterator[Turn]:
        for choice in trajectory.choices:
            yield Conversation(replace(trajectory, answer=choice), self.template).direct()

    def _log_odds(self, batch: Batch, trajectory: Trajectory, prefixes: Sequence[str]) -> dict[str, float]:
        states = self.learner.states(batch)
        right, options = trajectory.choices.index(trajectory.answer), range(len(trajectory.choices))
        found = {}
        for prefix in prefixes:
            scores = torch.stack([-states.next_token(f"{prefix} {index}") for index in options]).double()
            others = torch.cat([scores[:right], scores[right + 1 :]])
            found[prefix] = float(scores[right] - others.logsumexp(0))
        return found


def _without_image(turn: Turn) -> Turn:
    words = tuple(part for part in turn.parts if not isinstance(part, ImagePart))
    return Turn(turn.role, words or ("(no image)",), turn.supervised)


def measure_gains(meter: GainMeter, trajectories: Iterable[Trajectory]) -> Iterator[tuple[Trajectory, Gain | str]]:
    """Each trajectory with its gain, or with why it has none."""
    for trajectory in trajectories:
        try:
            yield trajectory, meter.measure(trajectory)
        except (GainError, ImageError, ViewError) as error:
            yield trajectory, str(error)


def measure_gains_resumably(
    meter: GainMeter, trajectories: Iterable[Trajectory], journal: Path, asked: Mapping[str, Any], resume: bool
) -> Iterator[tuple[Trajectory, Gain | str]]:
    """As `measure_gains`, each written to a journal at once; what stands there from a stopped measurement is not
    measured again. `asked` says what is measured with what, as JSON values.

    Raises:
        GainError: the journal is there and `resume` is not set, or it is of another measurement or of other
            trajectories.
    """
    if journal.exists() and not resume:
        raise GainError(f"{journal} holds a measurement that was stopped: resume it, or remove the file")
    *lines, cut_off = journal.read_bytes().split(b"\n") if journal.exists() else [b""]
    first = json.dumps(asked, sort_keys=True)
    if lines and lines[0].decode() != first:
        raise GainError(f"{journal} is of another measurement: {lines[0].decode()}; now {first}")
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab") as file:
        file.truncate(file.tell() - len(cut_off))
        if not lines:
            file.write(first.encode() + b"\n")
        rows = iter(trajectories)
        for number, line in enumerate(lines[1:]):
            written, trajectory = json.loads(line), next(rows, None)
            if trajectory is None:
                return
            if _digest(trajectory) != written["digest"]:
                raise GainError(
                    f"{journal} is of other trajectories: number {number} was {written['id']} and is {trajectory.id} "
                    "now, or what it holds has changed; remove the file to begin anew"
                )
            yield trajectory, _of_json(written)
        for trajectory, found in measure_gains(meter, rows):
            value = {"id": trajectory.id, "reason": found} if isinstance(found, str) else asdict(found)
            file.write(json.dumps({**value, "digest": _digest(trajectory)}).encode() + b"\n")
            file.flush()
            yield trajectory, found


def _digest(trajectory: Trajectory) -> str:
    return hashlib.sha256(repr(to_row(trajectory)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _of_json(value: Mapping[str, Any]) -> Gain | str:
    if "reason" in value:
        return str(value["reason"])
    tools, log_odds, without_image = (tuple(value[name]) for name in ("tools", "log_odds", "without_image"))
    return Gain(value["id"], value["skill"], tools, log_odds, without_image)


def write_gains(gains: Sequence[Gain], path: Path) -> None:
    """As Parquet, one row a trajectory; the file is there whole or not at all."""
    rows = [
        {
            "id": one.id, "skill": one.skill, "tools": list(one.tools), "log_odds": list(one.log_odds),
            "log_odds_without_image": list(one.without_image), "gain": one.gain, "image_gain": one.image_gain,
        }
        for one in gains
    ]  # fmt: skip
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), partial)


@dataclass(frozen=True)
class SkillGain:
    """Means by skill: count, probability of the right answer from the image alone, in the end but without the last
    step's image, and in the end; both gains, and the share of trajectories that gain at most 0."""

    skill: str
    count: int
    before: float
    words: float
    after: float
    gain: float
    image_gain: float
    useless: float


def by_skill(gains: Sequence[Gain]) -> list[SkillGain]:
    rows = []
    for skill in [*sorted({one.skill for one in gains}), "all"]:
        chosen = [one for one in gains if skill in (one.skill, "all")]
        rows.append(
            SkillGain(
                skill,
                len(chosen),
                _mean(_probability(one.log_odds[0]) for one in chosen),
                _mean(_probability(one.without_image[-1]) for one in chosen),
                _mean(_probability(one.log_odds[-1]) for one in chosen),
                _mean(one.gain for one in chosen),
                _mean(one.image_gain for one in chosen),
                _mean(float(one.gain <= 0) for one in chosen),
            )
        )
    return rows


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0
