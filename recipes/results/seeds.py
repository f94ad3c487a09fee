"""What several seeds say: intervals of a mean, and of differences paired by seed and question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from pearl.evaluation.statistics import Estimate

DRAWS = 4000
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}
"""Student's 97.5% quantile by the number of seeds; fewer say nothing of their spread."""


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% t interval of their mean, one value a seed; None of fewer than three."""
    if len(values) not in STUDENT:
        return None
    return float(STUDENT[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values)))


def differences(ours: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray], fixed: bool = False) -> np.ndarray:
    """(seeds, questions) of -1, 0 and 1, of the seeds that both have; a `fixed` model without seeds meets all of ours."""
    seeds = ours if fixed else sorted(ours.keys() & theirs.keys())
    return np.array([ours[seed] - theirs[0 if fixed else seed] for seed in seeds])


def paired(difference: np.ndarray) -> Estimate:
    """The mean of differences (seeds, questions); its 95% interval comes from drawing questions anew and, apart from
    them, what the seeds' means deviate (drawing whole cells would count their noise three times). Seeds are few: what
    they deviate is widened so that, were there no other noise, the interval would be Student's. With one or two it is
    too narrow."""
    rng = np.random.default_rng(0)
    seeds, questions = difference.shape
    of_questions, of_seeds = difference.mean(0), _widening(seeds) * (difference.mean(1) - difference.mean())
    drawn = of_questions[rng.integers(0, questions, (DRAWS, questions))].mean(1)
    drawn += of_seeds[rng.integers(0, seeds, (DRAWS, seeds))].mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(float(difference.mean()), float(low), float(high))


def _widening(seeds: int) -> float:
    """From the spread of a bootstrap's means to Student's interval."""
    if seeds not in STUDENT:
        return 1.0
    return float(STUDENT[seeds] / NormalDist().inv_cdf(0.975) * np.sqrt(seeds / (seeds - 1)))
