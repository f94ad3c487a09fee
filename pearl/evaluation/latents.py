"""Evidence about latents: does the answer need them, do they hold what the tool would have shown, have they collapsed?

For `lvr` and `mirage` the latents are those that the model makes while it answers; for `pearl`, which answers without
any, the predicted embedding is asked the same as far as it can be. A *control* is what the model had before it made a
latent: evidence counts only where a latent does better than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pearl.errors import PearlError
from pearl.evaluation.benchmarks.trajectories import question_of
from pearl.evaluation.embeddings import Probe, Retrieval, measure_probe, measure_retrieval
from pearl.evaluation.insides import Insides, objective_of
from pearl.evaluation.modes.latent import Change, Decoded, LatentDecoder
from pearl.evaluation.records import Question
from pearl.evaluation.scoring import choice_of
from pearl.evaluation.statistics import Estimate, bootstrap_interval
from pearl.evaluation.subject import Subject, enough_memory
from pearl.images import ImageError
from pearl.records import Trajectory
from pearl.trainer.conversation import Conversation, Template
from pearl.trainer.learner import Learner
from pearl.trainer.objectives.base import Losses, Objective
from pearl.trainer.objectives.mirage import Mirage, MirageLosses
from pearl.trainer.objectives.pearl import Pearl, PearlLosses
from pearl.trainer.packing import Example
from pearl.trainer.views import ViewError
from pearl.trainer.watch import effective_rank, spread

Row = tuple[Tensor, Tensor, Tensor]
"""An embedding, its target and its control, (H,) each."""
QUOTAS = (0, 1, 2, 4, 8, 16)
RUNS = 1 + 5 + len(QUOTAS)
"""How often each question is answered: plainly, with latents replaced, and with other numbers of them."""


class NoLatents(PearlError, ValueError):
    """A model that makes too few latents for anything to be told from them."""


@dataclass(frozen=True)
class Replaced:
    """What became of the answers when latents were replaced: accuracy, and the share of answers that changed."""

    accuracy: Estimate
    changed: Estimate


@dataclass(frozen=True)
class Compared:
    """Embeddings beside their targets.

    Attributes:
        count: How many.
        distance: Mean 1 − cosine between embedding and target; `distance_control`: between control and target.
        ranks: Effective rank of embeddings and targets; `spreads`: their mean cosine distance from each other.
    """

    count: int
    distance: float
    distance_control: float
    ranks: tuple[float, float]
    spreads: tuple[float, float]

    @classmethod
    def of(cls, embeddings: Tensor, targets: Tensor, control: Tensor) -> Self:
        """(N, H) each."""
        return cls(
            len(embeddings),
            float((1 - F.cosine_similarity(embeddings, targets)).mean()),
            float((1 - F.cosine_similarity(control, targets)).mean()),
            (effective_rank(embeddings), effective_rank(targets)),
            (spread(embeddings), spread(targets)),
        )


@dataclass(frozen=True)
class Evidence:
    """
    Attributes:
        questions: How many were asked; `left_out`: how many could not be, by reason.
        embeddings: One an answer, its mean latent, where it made any; or what `pearl` predicted.
        retrieval: Of these, by the number of candidates.
        answers: What can be read from these; None where no two trajectories have the same answer.
        latents: One by one, each beside what training would have fed in the same place of the same run; latents in
            places that training would not have had are left out. None for `pearl`.
        accuracy: Through the model's own latents; None for `pearl`, which makes none.
        replaced: By what latents were replaced with; "oracle": what training would have fed, from the tool's output, in
            runs as long as training's. Where these leave an answer as it is, latents are not used; where they alone
            mend it, the model's own are not good enough.
        by_quota: Accuracy by the number of latents in a run.
    """

    model: str
    objective: str
    questions: int
    left_out: dict[str, int]
    embeddings: Compared
    retrieval: dict[int, Retrieval]
    answers: Probe | None = None
    latents: Compared | None = None
    accuracy: Estimate | None = None
    replaced: dict[str, Replaced] = field(default_factory=dict)
    by_quota: dict[int, Estimate] = field(default_factory=dict)


def latent_evidence(
    subject: Subject,
    trajectories: Sequence[Trajectory],
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: bool = False,
) -> Evidence:
    """A trajectory that the objective cannot use, or without options to score by, is left out and counted.

    Raises:
        NoLatents: fewer than two trajectories gave a latent.
        SubjectError: out of memory.
        PearlError: the model was not trained by `pearl-train`, or with an objective that has no latents.
    """
    objective, losses = objective_of(subject)
    if isinstance(objective, Mirage):  # its second stage is given no tool's image, which is what is asked about here
        objective = replace(objective, stage=1)
        losses = MirageLosses(objective)
    assert subject.training is not None  # else it has no objective
    template = subject.training.template
    predicts = isinstance(objective, Pearl)
    decoder = None if predicts else LatentDecoder(subject)
    insides = Insides.of(subject) if decoder is None else decoder.insides
    usable, left_out = _usable(insides, objective, template, trajectories, with_options=not predicts)
    if isinstance(objective, Pearl):
        bar = tqdm([example for _, example in usable], subject.name, unit="trajectory", disable=not progress)
        judged = _predicted(insides, objective, losses, bar)
        return _evidence(subject, objective, usable, left_out, judged)
    assert decoder is not None
    questions = [question_of(one, template, "trajectories") for one, _ in usable]
    with tqdm(total=RUNS * len(usable), desc=subject.name, unit="answer", disable=not progress) as bar:
        prompts = [decoder.example(question) for question in questions]
        trial = _Trial(decoder, questions, prompts, batch_size, max_new_tokens, bar)
        plain = trial.run()
        learner = decoder.insides.learner(losses)
        oracles = [_Oracle.of(learner, decoder.insides, example) for _, example in usable]
        judged, singly = _made(plain, oracles)
        found = _evidence(subject, objective, usable, left_out, judged)
        replaced = {name: trial.compared(plain, trial.run(change)) for name, change in _changes(plain)}
        given = trial.run(_Change([oracle.latents for oracle in oracles]), [oracle.runs for oracle in oracles])
        replaced["oracle"] = trial.compared(plain, given)
        runs = {quota: trial.with_quota(quota).run() for quota in QUOTAS}
    replaced["removed"] = trial.compared(plain, runs[0])
    by_quota = {quota: trial.accuracy(one) for quota, one in runs.items()}
    return replace(
        found,
        latents=Compared.of(*_columns(singly)) if singly else None,
        accuracy=trial.accuracy(plain),
        replaced=replaced,
        by_quota=by_quota,
    )


def _usable(
    insides: Insides, objective: Objective, template: Template, trajectories: Sequence[Trajectory], with_options: bool
) -> tuple[list[tuple[Trajectory, Example]], dict[str, int]]:
    """Those that can be asked, with the objective's views of them; how many cannot, by reason."""
    usable, left_out = list[tuple[Trajectory, Example]](), Counter[str]()
    for one in trajectories:
        if with_options and one.answer not in one.choices:
            left_out["its answer is not one of its options"] += 1
            continue
        conversation = Conversation(one, template)
        try:
            images = [insides.encoder.image(image) for image in conversation.images]
            usable.append((one, objective.example(conversation, images, insides.encoder)))
        except (ImageError, ViewError) as error:
            left_out[str(error)] += 1
    return usable, dict(left_out)


@dataclass(frozen=True)
class _Trial:
    """The same questions, answered again and again."""

    decoder: LatentDecoder
    questions: Sequence[Question]
    examples: Sequence[Example]
    batch_size: int
    max_new_tokens: int
    bar: Any

    def with_quota(self, quota: int) -> _Trial:
        return replace(self, decoder=self.decoder.with_quota(quota))

    def run(self, change: _Change | None = None, quotas: Sequence[Sequence[int]] | None = None) -> list[Decoded]:
        decoded = list[Decoded]()
        for start in range(0, len(self.questions), self.batch_size):
            batch = slice(start, start + self.batch_size)
            feed = None if change is None else change.starting_at(start)
            runs = None if quotas is None else quotas[batch]
            decoded += self.decoder.decode(self.examples[batch], self.max_new_tokens, feed, runs)
            self.bar.update(len(self.examples[batch]))
        return decoded

    def choices(self, decoded: Sequence[Decoded]) -> list[int | None]:
        return [choice_of(one.text, q, "strict") for one, q in zip(decoded, self.questions, strict=True)]

    def accuracy(self, decoded: Sequence[Decoded]) -> Estimate:
        return bootstrap_interval(
            [choice == q.answer for choice, q in zip(self.choices(decoded), self.questions, strict=True)]
        )

    def compared(self, plain: Sequence[Decoded], other: Sequence[Decoded]) -> Replaced:
        pairs = zip(self.choices(plain), self.choices(other), strict=True)
        return Replaced(self.accuracy(other), bootstrap_interval([before != after for before, after in pairs]))


@dataclass(frozen=True)
class _Change:
    """What stands in for latents: for each question those that are fed, in order, over and over."""

    instead: Sequence[Tensor]

    def starting_at(self, start: int) -> Change:
        def change(latents: Tensor, rows: Sequence[int], which: Sequence[int]) -> Tensor:
            chosen = [self.instead[start + row] for row in rows]
            return torch.stack([own[index % len(own)] for own, index in zip(chosen, which, strict=True)])

        return change


def _changes(plain: Sequence[Decoded]) -> Iterator[tuple[str, _Change]]:
    """Noise has the latents' own mean and variance in each dimension; another's are those of the next question."""
    made = [one.latents for one in plain]
    every = torch.cat(made)
    if not len(every):
        return
    mean, deviation = every.mean(0), every.std(0)
    generator = torch.Generator().manual_seed(0)

    def noise(latents: Tensor) -> Tensor:
        drawn = torch.randn(max(len(latents), 1), len(mean), generator=generator).to(mean.device)
        return mean + deviation * drawn

    others = [*made[1:], made[0]]
    yield "noise", _Change([noise(own) for own in made])
    yield "zeros", _Change([torch.zeros_like(mean)[None]] * len(made))
    yield "the mean", _Change([mean[None]] * len(made))
    yield "another's", _Change([own if len(own) else mean[None] for own in others])


@dataclass(frozen=True)
class _Judged:
    """Embeddings, targets and controls, (N, H) each, and of which of the trajectories each is, (N,).

    Raises:
        NoLatents: fewer than two trajectories gave one.
    """

    rows: Sequence[Row]
    owners: Sequence[int]

    def __post_init__(self) -> None:
        if len(set(self.owners)) < 2:
            raise NoLatents("fewer than two trajectories gave a latent: nothing can be told from them")


def _columns(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H) each."""
    embeddings, targets, control = (torch.stack(column).float().cpu() for column in zip(*rows, strict=True))
    return embeddings, targets, control


@dataclass(frozen=True)
class _Oracle:
    """What the objective would have fed for one trajectory, from the tools' output.

    Attributes:
        latents: (N, H); `runs`: how many in each run.
        image: (H,) the mean of the question's image's visual tokens.
    """

    latents: Tensor
    runs: tuple[int, ...]
    image: Tensor

    @classmethod
    @enough_memory("a single trajectory")
    @torch.no_grad()
    def of(cls, learner: Learner, insides: Insides, example: Example) -> Self:
        batch = insides.batch([example])
        visual = insides.family.visual(learner.base.model, batch.images).tokens
        whole = visual[: example.images[0].num_tokens]
        runs = tuple(len(latent.groups) for latent in example.views["latent"].latents)
        return cls(learner.states(batch).latents, runs, whole.float().mean(0))


def _made(plain: Sequence[Decoded], oracles: Sequence[_Oracle]) -> tuple[_Judged, list[Row]]:
    """The mean latent of each answer, that of the oracle's, and, as control, the mean of the whole image's visual
    tokens; and the same of the latents one by one."""
    rows, owners, single = list[Row](), list[int](), list[Row]()
    for owner, (one, oracle) in enumerate(zip(plain, oracles, strict=True)):
        if not len(one.latents):
            continue
        rows.append((one.latents.float().mean(0), oracle.latents.float().mean(0), oracle.image))
        owners.append(owner)
        for made, fed in zip(one.latents.split(one.runs), oracle.latents.split(oracle.runs), strict=False):
            single += [(latent, target, oracle.image) for latent, target in zip(made, fed, strict=False)]
    return _Judged(rows, owners), single


@enough_memory("a single trajectory")
@torch.no_grad()
def _predicted(insides: Insides, objective: Pearl, losses: Losses, examples: Iterable[Example]) -> _Judged:
    """Predicted and target embeddings, and as control the state before the first predictor token."""
    if not objective.jepa or not isinstance(losses, PearlLosses):
        raise PearlError(f"{insides.subject.name} was trained without L_JEPA, so it predicts no embedding")
    learner = insides.learner(losses)
    rows, owners = list[Row](), list[int]()
    for owner, example in enumerate(examples):
        batch = insides.batch([example])
        states = learner.states(batch)
        first = int(np.flatnonzero(example.views["source"].predictors >= 0)[0])
        before = states.of("source", torch.tensor([first - 1], device=states.main.device))
        if objective.target_encoder is not None:
            before = losses.projection(before.to(losses.projection.weight.dtype))
        for predicted, target in zip(*losses.embeddings(states), strict=True):
            rows.append((predicted, target, before[0]))
            owners.append(owner)
    return _Judged(rows, owners)


def _evidence(
    subject: Subject,
    objective: Objective,
    usable: Sequence[tuple[Trajectory, Example]],
    left_out: dict[str, int],
    judged: _Judged,
) -> Evidence:
    embeddings, targets, control = _columns(judged.rows)
    asked = [usable[owner][0] for owner in judged.owners]
    return Evidence(
        model=subject.name,
        objective=objective.name,
        questions=len(usable),
        left_out=left_out,
        embeddings=Compared.of(embeddings, targets, control),
        retrieval=measure_retrieval(embeddings, control, targets, asked),
        answers=measure_probe(embeddings, control, targets, asked),
    )  # fmt: skip
