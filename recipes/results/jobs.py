"""What is compared: the list of runs, each small enough for one core and some minutes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["search", "table"]
UPDATES, BATCH_SIZE = 100, 8
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
OBJECTIVE_SEEDS, VARIANT_SEEDS = 5, 3
OPENING = "Answer:"
DIRECT = "pearl, direct branch"
ENCODER = "timm:local-dir:runs/results/encoder"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        objective: None: the base model, untrained.
        like: The variant whose learning rate it takes; itself where it is searched for.
        mode: How the model answers; `opening` as in `pearl-eval run`.
        trained_as: The variant whose models it asks, where it trains none of its own.
        stages: Options of further trainings, each from the model before; updates are divided among all.
    """

    name: str
    objective: str | None
    like: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: Literal["direct", "tools", "latent"] = "direct"
    opening: str = ""
    trained_as: str = ""
    stages: tuple[Mapping[str, Any], ...] = ()
    seeds: int = VARIANT_SEEDS


def _pearl(name: str, **options: Any) -> Variant:
    return Variant(f"pearl, {name}", "pearl", like="pearl", options=options, opening=OPENING)


def _direct(name: str, like: str = DIRECT, seeds: int = VARIANT_SEEDS, **options: Any) -> Variant:
    """Learns the answer straight after the question too, and answers so."""
    return Variant(name, "pearl", like=like, options={"direct_weight": 1.0, **options}, seeds=seeds)


VARIANTS = (
    Variant("base", None, seeds=1),
    Variant("sft-answer", "sft-answer", seeds=OBJECTIVE_SEEDS),
    Variant("sft", "sft", opening=OPENING, seeds=OBJECTIVE_SEEDS),
    Variant("tools", "sft", mode="tools", trained_as="sft"),
    Variant("lvr", "lvr", mode="latent", seeds=OBJECTIVE_SEEDS),
    Variant("mirage", "mirage", options={"stage": 1}, stages=({"stage": 2},), mode="latent", seeds=OBJECTIVE_SEEDS),
    Variant("pearl", "pearl", opening=OPENING, seeds=OBJECTIVE_SEEDS),
    _pearl("published token", nextlat_token="published"),
    _pearl("without JEPA", jepa=False),
    _pearl("without NextLat", nextlat=False),
    _pearl("K = 1", num_predictor_tokens=1),
    _pearl("K = 16", num_predictor_tokens=16),
    _pearl("step targets", targets="steps"),
    _pearl("external encoder", target_encoder=ENCODER),
    _direct(DIRECT, like="", seeds=OBJECTIVE_SEEDS),
    _direct("pearl, direct branch, step targets", targets="steps"),
    _direct("sft and sft-answer", jepa=False, nextlat=False),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training (none for the base) and one evaluation, on `val` while searching, else on `test`."""

    variant: Variant
    rate: float
    seed: int
    phase: Phase

    @property
    def name(self) -> str:
        words = self.variant.name.replace(", ", "-").replace(" = ", "").replace(" ", "-")
        return f"{self.phase}-{words}-{self.rate:g}-{self.seed}"


def variant(name: str) -> Variant:
    return next(one for one in VARIANTS if one.name == name)


def searches() -> Iterator[Job]:
    """The same four learning rates for each objective, one seed."""
    for one in VARIANTS:
        if one.objective and not one.like and not one.trained_as:
            yield from (Job(one, rate, 0, "search") for rate in RATES)


def table(rates: Mapping[str, float]) -> Iterator[Job]:
    """All rows, seed by seed, so that a table that was stopped early has all rows; `rates`: of each objective."""
    for seed in range(OBJECTIVE_SEEDS):
        for one in VARIANTS:
            if seed < one.seeds:
                rate = rates[one.like or one.trained_as or one.name] if one.objective else 0.0
                yield Job(one, rate, seed, "table")
