"""How good is a relative depth estimate? Scale-and-shift-free error, and which of two objects is closer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

MIN_GAP = 0.05


def abs_rel(nearness: np.ndarray, depth: np.ndarray) -> float:
    """Mean |d̂ − d| / d over finite depth, after the least-squares scale and shift in inverse depth (MiDaS, eq. 4)."""
    valid = np.isfinite(depth)
    truth, x = 1 / depth[valid].astype(np.float64), nearness[valid].astype(np.float64)
    scale, shift = np.polyfit(x, truth, 1)
    aligned = np.clip(scale * x + shift, 1e-2, None)
    return float(np.mean(np.abs(1 / aligned - depth[valid]) / depth[valid]))


@dataclass(frozen=True)
class Reading:
    """One object: true depth (m), read nearness, lowest row of its box (0..1, down), area of its box."""

    depth: float
    nearness: float
    bottom: float
    area: float


@dataclass
class PairCounts:
    """Pairs with a relative gap above 5%, and how many each rule gets right; `hard`: lower is not closer."""

    pairs: int = 0
    right: int = 0
    hard: int = 0
    hard_right: int = 0
    lower_right: int = 0
    bigger_right: int = 0
    abs_rels: list[float] = field(default_factory=list)

    def add(self, readings: Sequence[Reading], error: float) -> None:
        self.abs_rels.append(error)
        for a, b in combinations(readings, 2):
            near, far = (a, b) if a.depth < b.depth else (b, a)
            if far.depth / near.depth - 1 <= MIN_GAP:
                continue
            right, lower = near.nearness > far.nearness, near.bottom > far.bottom
            self.pairs += 1
            self.right += right
            self.hard += not lower
            self.hard_right += right and not lower
            self.lower_right += lower
            self.bigger_right += near.area > far.area

    def figures(self) -> dict[str, float]:
        return {
            "pair_accuracy": self.right / max(self.pairs, 1),
            "hard_pair_accuracy": self.hard_right / max(self.hard, 1),
            "abs_rel": float(np.mean(self.abs_rels)),
            "lower_in_the_picture": self.lower_right / max(self.pairs, 1),
            "bigger": self.bigger_right / max(self.pairs, 1),
            "pairs": self.pairs,
            "hard_pairs": self.hard,
        }
