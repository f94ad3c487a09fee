"""What embeddings hold: whether each finds its own target among others, and whether its answer can be read from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from pearl.evaluation.statistics import Estimate, bootstrap_interval
from pearl.records import Trajectory
from pearl.trainer.watch import likeness

CANDIDATES = (2, 16, 128)
RIDGES = tuple(10.0**power for power in range(-3, 3))


@dataclass(frozen=True)
class Retrieval:
    """How often the target most like an embedding (`likeness`) is its own, among candidates; of the control likewise.
    Intervals are from trajectories drawn anew."""

    embedding: Estimate
    control: Estimate
    chance: float


@dataclass(frozen=True)
class Probe:
    """How often the answer can be read (`probe_accuracy`) from an embedding, the control and the target.

    Attributes:
        judged: Of how many trajectories: those whose answer another one has too.
    """

    embedding: Estimate
    control: Estimate
    target: Estimate
    chance: float
    judged: int


def measure_retrieval(
    embeddings: Tensor, control: Tensor, targets: Tensor, asked: Sequence[Trajectory]
) -> dict[int, Retrieval]:
    """By the number of candidates, as far as there are so many.

    Args:
        embeddings, control, targets: (N, H).
        asked: (N,) the trajectory of each.
    """
    trajectories = len({one.id for one in asked})
    return {
        count: Retrieval(
            bootstrap_interval(retrieval_rates(embeddings, targets, asked, count)),
            bootstrap_interval(retrieval_rates(control, targets, asked, count)),
            1 / count,
        )
        for count in CANDIDATES
        if count <= trajectories
    }


def retrieval_rates(embeddings: Tensor, targets: Tensor, asked: Sequence[Trajectory], count: int) -> np.ndarray:
    """For each trajectory, how often the target most like one of its embeddings (`likeness`) is that one's own, among
    `count` targets: its own and others of other trajectories, any of which are equally likely to be drawn; (T,).
    """
    near, ids = likeness(embeddings, targets).numpy(), np.array([one.id for one in asked])
    shares = list[float]()
    for own, (row, of) in enumerate(zip(near, ids, strict=True)):
        others = row[ids != of]
        farther = int((others < row[own]).sum())
        shares.append(comb(farther, count - 1) / comb(len(others), count - 1))
    return _by_trajectory(shares, ids)


def measure_probe(embeddings: Tensor, control: Tensor, targets: Tensor, asked: Sequence[Trajectory]) -> Probe | None:
    """As `measure_retrieval`; None where no two trajectories have the same answer."""
    counts = [len(options) for options in _options(asked) if options]
    if not counts:
        return None
    embedding, before, target = (probe_accuracy(side, asked) for side in (embeddings, control, targets))
    return Probe(
        bootstrap_interval(embedding),
        bootstrap_interval(before),
        bootstrap_interval(target),
        chance=fmean(1 / count for count in counts),
        judged=len(target),
    )


def probe_accuracy(embeddings: Tensor, asked: Sequence[Trajectory]) -> np.ndarray:
    """For each trajectory, how often its answer is what a linear probe (Alain & Bengio, arXiv 1610.01644) reads from one
    of its embeddings: ridge regression of answers, with an intercept, on the other trajectories' embeddings, with the
    ridge of the least error; the option is chosen whose value lies highest above its mean there.

    Returns:
        (T,), without trajectories whose answer, or whose other options, no other has.
    """
    kinds = sorted({(one.skill, one.answer) for one in asked})
    truth = torch.tensor([[kind == (one.skill, one.answer) for kind in kinds] for one in asked]).double()
    groups = [torch.tensor(rows) for rows in _rows_of(asked).values()]
    centred = embeddings.double() - embeddings.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T / centred.square().sum(1).mean().clamp(min=1e-12))
    missed = [_left_out(values, vectors, ridge, truth, groups) for ridge in RIDGES]
    guess = truth - min(missed, key=lambda one: float(one.square().sum()))
    for rows in groups:
        guess[rows] -= (truth.sum(0) - truth[rows].sum(0)) / max(len(truth) - len(rows), 1)
    right, ids = list[bool](), list[str]()
    for one, row, options in zip(asked, guess.tolist(), _options(asked), strict=True):
        if options:
            said = dict(zip(kinds, row, strict=True))
            right.append(max((said[one.skill, option], option) for option in options)[1] == one.answer)
            ids.append(one.id)
    return _by_trajectory(right, np.array(ids))


def _left_out(values: Tensor, vectors: Tensor, ridge: float, truth: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """(N, C) what ridge regression misses of the truth when a row's own group is left out, in closed form; `values` and
    `vectors` are of the centred kernel."""
    hat = (vectors * (values / (values + ridge))) @ vectors.T + 1 / len(truth)  # the intercept is fitted anew as well
    missed = truth - hat @ truth
    for rows in groups:
        own = torch.eye(len(rows)).double() - hat[rows][:, rows]
        missed[rows] = torch.linalg.solve(own, missed[rows])
    return missed


def _rows_of(asked: Sequence[Trajectory]) -> dict[str, list[int]]:
    rows = defaultdict[str, list[int]](list)
    for number, one in enumerate(asked):
        rows[one.id].append(number)
    return rows


def _by_trajectory(values: Sequence[float], ids: np.ndarray) -> np.ndarray:
    """The mean of each trajectory's."""
    _, places = np.unique(ids, return_inverse=True)
    means: np.ndarray = np.bincount(places, values) / np.bincount(places)
    return means


def _options(asked: Sequence[Trajectory]) -> list[list[str]]:
    """For each trajectory its options that are the answer of another of its skill; none where its own answer is not among
    them, or nothing else is."""
    answered = defaultdict[tuple[str, str], set[str]](set)
    for one in asked:
        answered[one.skill, one.answer].add(one.id)
    known = [[option for option in one.choices if answered[one.skill, option] - {one.id}] for one in asked]
    return [
        options if one.answer in options and len(options) > 1 else [] for one, options in zip(asked, known, strict=True)
    ]
