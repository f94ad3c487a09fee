"""Do embeddings collapse? How many dimensions they use, how far apart they are, whether each finds its own target."""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 64
LEAST_SPREAD = 1e-3
"""Of targets or predictions: below it there is a warning."""
LEAST_RANK = 2.0
"""Likewise of their effective rank, when the window is full."""


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007) of (N, H), centred: 1 to N − 1."""
    centred = (embeddings - embeddings.mean(0)).double()
    gram = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()))


def spread(embeddings: Tensor) -> float:
    """The mean cosine distance of two of the embeddings (N, H): 0 when all are the same."""
    unit = F.normalize(embeddings.double(), dim=-1)
    count = len(unit)
    return float((count**2 - unit.sum(0).square().sum()) / max(count * (count - 1), 1))


def likeness(predicted: Tensor, target: Tensor) -> Tensor:
    """The cosines (N, N) of each prediction with each target, both centred: what all share says nothing of which is
    which."""
    ours, theirs = (F.normalize(side.double() - side.double().mean(0), dim=-1) for side in (predicted, target))
    return ours @ theirs.T


def retrieval(predicted: Tensor, target: Tensor) -> float:
    """How often the target most like a prediction is its own, among these N; chance is 1 / N."""
    nearest = likeness(predicted, target).argmax(1)
    return float((nearest == torch.arange(len(nearest))).double().mean())


class CollapseWatch:
    """Measures over the last `WINDOW` pairs of predicted and target embeddings; small batches alone say little."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=WINDOW)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """(N, H) each."""
        self._pairs.extend(zip(predicted.detach(), target.detach(), strict=True))

    def figures(self) -> dict[str, float]:
        if len(self._pairs) < 8:
            return {}
        predicted, target = (torch.stack(side).float().cpu() for side in zip(*self._pairs, strict=True))
        return {
            "predicted_rank": effective_rank(predicted),
            "target_rank": effective_rank(target),
            "predicted_spread": spread(predicted),
            "target_spread": spread(target),
            "retrieval": retrieval(predicted, target),
            "retrieval_chance": 1 / len(predicted),
        }

    def warning(self, figures: dict[str, float]) -> str | None:
        """What to tell the user, if the embeddings are all but the same, or differ in one direction only."""
        if "predicted_spread" not in figures:
            return None
        flat = [side for side in ("predicted", "target") if figures[f"{side}_spread"] < LEAST_SPREAD]
        if flat:
            return (
                f"the {' and '.join(flat)} embeddings are nearly all the same: they have collapsed, or not yet parted"
            )
        full = len(self._pairs) == WINDOW
        thin = [side for side in ("predicted", "target") if full and figures[f"{side}_rank"] < LEAST_RANK]
        if thin:
            return f"the {' and '.join(thin)} embeddings differ in one direction only: they have collapsed"
        return None
