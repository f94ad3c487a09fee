"""What predictions come to: accuracies with bootstrap intervals, costs, and whether two models differ (McNemar's test)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from pearl.evaluation.records import Key, Prediction

CONFIDENCE = 0.95
RESAMPLES = 10_000

Values = Sequence[bool] | Sequence[float] | np.ndarray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval, in the unit of what was averaged."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    correct: Values,
    categories: Sequence[str] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of `correct` (n,) with the percentile interval of its bootstrap (Efron & Tibshirani 1993, §13.3).

    With `categories` (n,) it is the macro average, the mean of the categories' means, and each category is resampled
    by itself. Where all values are equal the interval has no width: it then says nothing about how sure the mean is.

    Raises:
        ValueError: there are no values, or not as many categories.
    """
    values = np.asarray(correct, dtype=np.float64)
    if not len(values):
        raise ValueError("no values to average")
    groups = _groups(values, categories)
    random = np.random.default_rng(seed)
    means = np.mean([_resampled_means(group, resamples, random) for group in groups], axis=0)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(np.mean([group.mean() for group in groups])), float(low), float(high))


def paired_difference(
    first: Values,
    second: Values,
    categories: Sequence[str] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of `first` − `second`, both (n,) in the same order, with its interval from resampled questions.

    `categories` as in `bootstrap_interval`.

    Raises:
        ValueError: there are no values, or the lengths differ.
    """
    difference = _of_equal_length(first, second)
    return bootstrap_interval(difference, categories, confidence=confidence, resamples=resamples, seed=seed)


def mcnemar(first: Values, second: Values) -> float:
    """Two-sided p of McNemar's exact test on `first` and `second`, both (n,) of booleans in the same order.

    Among the questions that just one of the two answered rightly, each was equally likely to be the one: a binomial
    with probability ½ (McNemar 1947, in its exact form).

    Raises:
        ValueError: the lengths differ.
    """
    difference = _of_equal_length(first, second)
    first_only, second_only = int((difference > 0).sum()), int((difference < 0).sum())
    discordant = first_only + second_only
    tail = sum(comb(discordant, count) for count in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def _of_equal_length(first: Values, second: Values) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values cannot be paired with {len(second)}")
    return np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)


def _groups(values: np.ndarray, categories: Sequence[str] | None) -> list[np.ndarray]:
    if categories is None:
        return [values]
    if len(categories) != len(values):
        raise ValueError(f"{len(values)} values have {len(categories)} categories")
    labels = np.asarray(categories)
    return [values[labels == label] for label in np.unique(labels)]


def _resampled_means(values: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Means (resamples,) of samples of the same size, drawn with replacement.

    How often each distinct value is drawn is multinomial, and a correct answer has but two values: so no indices are
    drawn, and the cost does not grow with n.
    """
    distinct, counts = np.unique(values, return_counts=True)
    drawn = random.multinomial(len(values), counts / len(values), size=resamples)
    means: np.ndarray = drawn @ distinct / len(values)
    return means


@dataclass(frozen=True, kw_only=True)
class CategoryScore:
    questions: int
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one run through a benchmark came to.

    Attributes:
        accuracy: The share of questions answered rightly, 0..1, with its 95% interval, as everywhere here.
        macro: The mean of the categories' accuracies.
        pairs: The share of pairs with both questions right; None where the benchmark has none.
        unparsed: The share of questions whose reply no option could be read from; they count as wrong.
        prompt_tokens: A question's, on average; so are `new_tokens`, `calls` and `seconds`.
        faults: How many calls were invalid, by kind.
    """

    model: str
    mode: str
    benchmark: str
    questions: int
    accuracy: Estimate
    macro: Estimate
    categories: Mapping[str, CategoryScore]
    pairs: Estimate | None
    unparsed: float
    prompt_tokens: float
    new_tokens: float
    calls: float
    faults: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the questions that both were asked.

    Attributes:
        first: Model and mode; so is `second`.
        difference: Accuracy of the first minus that of the second.
        macro_difference: The same of the macro averages.
        first_only: How many questions only the first answered rightly; `second_only` alike.
        p: Of McNemar's exact test; not corrected for the number of comparisons.
    """

    benchmark: str
    first: tuple[str, str]
    second: tuple[str, str]
    questions: int
    difference: Estimate
    macro_difference: Estimate
    first_only: int
    second_only: int
    p: float


@dataclass(frozen=True)
class Summary:
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]


def summarise(
    predictions: Mapping[Key, Sequence[Prediction]], pairs: Mapping[str, Mapping[str, str]] | None = None
) -> Summary:
    """Accuracies, costs and comparisons. A run without predictions is left out.

    Args:
        predictions: By run, each question once.
        pairs: By benchmark, the pair that a question (by its id) belongs to. A pair of which a question was not
            asked does not count.
    """
    asked = {key: rows for key, rows in predictions.items() if rows}
    comparisons = (
        _comparison(first, asked[first], second, asked[second])
        for first, second in combinations(asked, 2)
        if first.benchmark == second.benchmark
    )
    return Summary(
        tuple(_score(key, rows, (pairs or {}).get(key.benchmark)) for key, rows in asked.items()),
        tuple(one for one in comparisons if one is not None),
    )


def _score(key: Key, rows: Sequence[Prediction], pairs: Mapping[str, str] | None) -> Score:
    def average(values: Sequence[float]) -> float:
        return sum(values) / len(rows)

    correct, categories = [row.correct for row in rows], [row.category for row in rows]
    return Score(
        **key._asdict(),
        questions=len(rows),
        accuracy=bootstrap_interval(correct),
        macro=bootstrap_interval(correct, categories),
        categories={category: _category_score(rows, category) for category in sorted(set(categories))},
        pairs=_pair_accuracy(rows, pairs) if pairs else None,
        unparsed=average([row.choice is None for row in rows]),
        prompt_tokens=average([row.reply.prompt_tokens for row in rows]),
        new_tokens=average([row.reply.new_tokens for row in rows]),
        calls=average([len(row.reply.calls) for row in rows]),
        faults=dict(sorted(Counter(call.fault for row in rows for call in row.reply.calls if call.fault).items())),
        seconds=average([row.reply.seconds for row in rows]),
    )


def _category_score(rows: Sequence[Prediction], category: str) -> CategoryScore:
    correct = [row.correct for row in rows if row.category == category]
    return CategoryScore(questions=len(correct), accuracy=bootstrap_interval(correct))


def _pair_accuracy(rows: Sequence[Prediction], pairs: Mapping[str, str]) -> Estimate | None:
    sizes = Counter(pairs.values())
    right: dict[str, list[bool]] = {}
    for row in rows:
        if row.question in pairs:
            right.setdefault(pairs[row.question], []).append(row.correct)
    whole = [all(one) for pair, one in right.items() if len(one) == sizes[pair]]
    return bootstrap_interval(whole) if whole else None


def _comparison(
    first: Key, first_rows: Sequence[Prediction], second: Key, second_rows: Sequence[Prediction]
) -> Comparison | None:
    of_second = {row.question: row for row in second_rows}
    both = [(row, of_second[row.question]) for row in first_rows if row.question in of_second]
    if not both:
        return None
    firsts, seconds = [one.correct for one, _ in both], [other.correct for _, other in both]
    return Comparison(
        benchmark=first.benchmark,
        first=(first.model, first.mode),
        second=(second.model, second.mode),
        questions=len(both),
        difference=paired_difference(firsts, seconds),
        macro_difference=paired_difference(firsts, seconds, [one.category for one, _ in both]),
        first_only=sum(one and not other for one, other in zip(firsts, seconds, strict=True)),
        second_only=sum(other and not one for one, other in zip(firsts, seconds, strict=True)),
        p=mcnemar(firsts, seconds),
    )
