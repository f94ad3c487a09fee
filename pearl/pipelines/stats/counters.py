"""Counters whose memory does not grow with the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

MOST = 1e300
"""A ratio to nearly nothing may be infinite."""
BINS_PER_OCTAVE = 32
"""Bins are 2.2% wide, and so is the error of a quantile at most."""
MAX_NAME = 200


class Spread:
    """Numbers from 0 up, in logarithmic bins: bin k holds those from 2^(k/32) to 2^((k+1)/32).

    Count, mean, least and greatest are exact, and so are quantiles of whole numbers below 46. Zeros are counted by
    themselves.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole
        self.count = self.zeros = 0
        self.total = self.most = 0.0
        self.least = math.inf
        self.bins = Counter[int]()

    def add(self, value: float) -> None:
        value = min(value, MOST)
        self.count += 1
        self.total += value
        self.least = min(self.least, value)
        self.most = max(self.most, value)
        if value > 0:
            self.bins[math.floor(math.log2(value) * BINS_PER_OCTAVE)] += 1
        else:
            self.zeros += 1

    def quantile(self, share: float) -> float:
        """The value below which this share of the numbers lies; 0 when there is none."""
        wanted, passed = share * self.count, self.zeros
        if not self.count or passed >= wanted > 0:
            return 0.0
        for key, count in sorted(self.bins.items()):
            passed += count
            if passed >= wanted:
                return min(max(self._within(key), self.least), self.most)
        return self.most

    def _within(self, key: int) -> float:
        """What stands for the numbers of a bin: its middle, or the first whole number in it."""
        if self._whole:
            return float(math.ceil(2 ** (key / BINS_PER_OCTAVE) - 1e-9))
        return float(2 ** ((key + 0.5) / BINS_PER_OCTAVE))

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "zeros": self.zeros,
            "mean": self.total / self.count if self.count else 0.0,
            "least": self.least if self.count else 0.0,
            "most": self.most,
            "low": self.quantile(0.05),
            "median": self.quantile(0.5),
            "high": self.quantile(0.95),
            "bins": sorted(self.bins.items()),
        }


class Tally:
    """Counts by name. After `limit` distinct names a new one counts among the others; counts of known names are exact."""

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self.counts = Counter[str]()
        self.others = 0

    def add(self, name: object) -> None:
        text = ("" if name is None else str(name))[:MAX_NAME]
        if text in self.counts or len(self.counts) < self._limit:
            self.counts[text] += 1
        else:
            self.others += 1

    def top(self, limit: int) -> list[tuple[str, int]]:
        """The most frequent first, equals by name."""
        return sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]

    def to_json(self, limit: int = 40) -> dict[str, Any]:
        """At most `limit` names; `others` counts what is not among them, `distinct` the names."""
        top = self.top(limit)
        others = self.counts.total() + self.others - sum(count for _, count in top)
        return {"top": top, "others": others, "distinct": len(self.counts), "more": self.others > 0}


class Reservoir:
    """A uniform sample of texts (Vitter's algorithm R), the same for the same texts in the same order."""

    def __init__(self, size: int) -> None:
        self._size, self._random = size, Random(0)
        self.seen = 0
        self.kept = list[str]()

    def add(self, text: str) -> None:
        self.seen += 1
        if len(self.kept) < self._size:
            self.kept.append(text)
            return
        place = int(self._random.random() * self.seen)
        if place < self._size:
            self.kept[place] = text

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)
