"""What is compared: the list of runs, each small enough for one core and some minutes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recipes.results.encoder import FOLDER

Phase = Literal["search", "table"]
SEARCH_UPDATES, UPDATES, MORE_UPDATES, BATCH_SIZE = 100, 200, 800, 8
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
OBJECTIVE_SEEDS, VARIANT_SEEDS = 5, 3
OPENING = "Answer:"
DIRECT = "pearl, direct branch"
STEPS = f"{DIRECT}, step targets"
CONTROL = "sft and sft-answer"
"""What is left of it without JEPA and NextLat."""
FEWER, MORE = ", fewer data", ", more data"
ENCODER = f"timm:local-dir:{FOLDER}"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        objective: None: the base model, untrained.
        like: The variant whose learning rate it takes; none where it is searched for.
        mode: How the model answers; `opening` as in `pearl-eval run`.
        trained_as: The variant whose models it asks, at a learning rate of its own search.
        stages: Options of further trainings, each from the model before; updates are divided among all.
        data: The trajectories that it trains on (`data.PARTS`), for so many `updates` in the table.
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
    data: str = "train"
    updates: int = UPDATES


def _direct(name: str, like: str = DIRECT, seeds: int = VARIANT_SEEDS, data: str = "train", **options: Any) -> Variant:
    """Learns the answer straight after the question too, and answers so."""
    return Variant(name, "pearl", like, {"direct_weight": 1.0, **options}, seeds=seeds, data=data)


def _fewer(name: str, like: str = DIRECT + FEWER, seeds: int = VARIANT_SEEDS, **options: Any) -> Variant:
    """As `_direct`, of `fewer` trajectories."""
    return _direct(name + FEWER, like, seeds, "fewer", **options)


def _more(one: Variant) -> Variant:
    """The same, of `more` trajectories, as often each; one seed, all at the rate of `sft-answer`."""
    return replace(one, name=one.name + MORE, like="sft-answer", seeds=1, data="more", updates=MORE_UPDATES)


VARIANTS = (
    Variant("base", None, seeds=1),
    Variant("sft-answer", "sft-answer", seeds=OBJECTIVE_SEEDS),
    Variant("sft", "sft", opening=OPENING, seeds=OBJECTIVE_SEEDS),
    Variant("lvr", "lvr", mode="latent", seeds=OBJECTIVE_SEEDS),
    Variant("mirage", "mirage", options={"stage": 1}, stages=({"stage": 2},), mode="latent", seeds=OBJECTIVE_SEEDS),
    Variant(
        "mirage, vlm_weight = 1", "mirage", "lvr", {"stage": 1, "vlm_weight": 1.0}, stages=({"stage": 2},), mode="latent",
        seeds=1,
    ),
    Variant("pearl", "pearl", opening=OPENING, seeds=OBJECTIVE_SEEDS),
    Variant("pearl, without JEPA", "pearl", "pearl", {"jepa": False}, opening=OPENING),
    Variant("pearl, without NextLat", "pearl", "pearl", {"nextlat": False}, opening=OPENING),
    _direct(DIRECT, like="", seeds=OBJECTIVE_SEEDS),
    _direct(f"{DIRECT}, published token", nextlat_token="published"),
    _direct(f"{DIRECT}, without JEPA", jepa=False),
    _direct(f"{DIRECT}, without NextLat", nextlat=False),
    _direct(CONTROL, jepa=False, nextlat=False),
    _direct(f"{DIRECT}, K = 1", num_predictor_tokens=1),
    _direct(f"{DIRECT}, K = 16", num_predictor_tokens=16),
    _direct(STEPS, targets="steps"),
    _direct(f"{DIRECT}, external encoder", target_encoder=ENCODER),
    _direct(f"{STEPS}, infonce", targets="steps", jepa_distance="infonce"),
    Variant("tools", "sft", mode="tools", opening=OPENING, trained_as="sft", seeds=OBJECTIVE_SEEDS),
    Variant(f"sft-answer{FEWER}", "sft-answer", seeds=OBJECTIVE_SEEDS, data="fewer"),
    _fewer(DIRECT, like="", seeds=OBJECTIVE_SEEDS),
    _fewer(CONTROL, seeds=OBJECTIVE_SEEDS, jepa=False, nextlat=False),
    _fewer(STEPS, targets="steps"),
    _fewer(f"{STEPS}, infonce", targets="steps", jepa_distance="infonce"),
    _more(Variant("sft-answer", "sft-answer")),
    _more(_direct(DIRECT)),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training (none for the base) and one evaluation, on `val` while searching, else on `test`."""

    variant: Variant
    rate: float
    seed: int
    phase: Phase

    @property
    def updates(self) -> int:
        return SEARCH_UPDATES if self.phase == "search" else self.variant.updates

    @property
    def name(self) -> str:
        words = self.variant.name.replace(", ", "-").replace(" = ", "").replace(" ", "-")
        return f"{self.phase}-{words}-{self.rate:g}-{self.seed}"


BESIDE = (
    (DIRECT, 1e-4, 1), ("mirage", 3e-4, 1),
    (f"sft-answer{FEWER}", 1e-4, 3), (DIRECT + FEWER, 1e-4, 3), (CONTROL + FEWER, 1e-4, 3),
)  # fmt: skip
"""Beside the table: rates that tied in the search with those that were taken, or came next, and how many seeds."""


def variant(name: str) -> Variant:
    return next(one for one in VARIANTS if one.name == name)


def searches() -> Iterator[Job]:
    """The same learning rates for each objective (of fewer data anew), one seed; and the base."""
    for one in VARIANTS:
        if not one.like:
            yield from (Job(one, rate, 0, "search") for rate in (RATES if one.objective else (0.0,)))


def beside(rates: Mapping[str, float]) -> Iterator[Job]:
    """Those of `BESIDE` that are not in the table."""
    for name, rate, seeds in BESIDE:
        one = variant(name)
        if rates.get(one.like or name) != rate:
            yield from (Job(one, rate, seed, "table") for seed in range(seeds))


def table(rates: Mapping[str, float]) -> Iterator[Job]:
    """All rows that have a rate, seed by seed, so that a table that was stopped early has all; `rates`: by objective."""
    for seed in range(OBJECTIVE_SEEDS):
        for one in VARIANTS:
            rate = rates.get(one.like or one.name)
            if seed < one.seeds and rate is not None:
                yield Job(one, rate, seed, "table")
