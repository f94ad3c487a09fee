"""The benchmarks that there are: ours, and those of other packages under the entry-point group `pearl.benchmarks`."""

from __future__ import annotations

from pearl.evaluation.benchmarks.base import Benchmark, BenchmarkError
from pearl.evaluation.records import Scoring
from pearl.plugins import Plugins

BENCHMARKS = Plugins(
    "benchmark",
    "pearl.benchmarks",
    {
        "vstar": "pearl.evaluation.benchmarks.vstar:VStar",
        "mmvp": "pearl.evaluation.benchmarks.mmvp:Mmvp",
        "blink": "pearl.evaluation.benchmarks.blink:Blink",
        "scenes": "pearl.evaluation.benchmarks.scenes:Scenes",
        "trajectories": "pearl.evaluation.benchmarks.trajectories:Trajectories",
    },
    "pearl.evaluation.benchmarks.base:Benchmark",
    BenchmarkError,
)


def benchmark_names() -> list[str]:
    """Built-in benchmarks, then those of installed packages."""
    return BENCHMARKS.names()


def open_benchmark(spec: str, scoring: Scoring = "strict", count: int | None = None) -> Benchmark:
    """A benchmark by its name, or by `name=PLACE` where it lies elsewhere than usual; the rest as `Benchmark` takes it.

    Raises:
        BenchmarkError: there is none of that name, or its package does not load, or it refuses what it is given.
    """
    name, given, place = spec.partition("=")
    if given and not place:
        raise BenchmarkError(f"{spec!r} names no place; write {name}=FOLDER, {name}=ORG/NAME or {name}")
    found: type[Benchmark] = BENCHMARKS.find(name)
    return found(place or None, scoring, count)
