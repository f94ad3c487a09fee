"""Writes the table: `python -m recipes.results.table`, from what `work.py` measured, into docs/results.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from pearl.evaluation.statistics import Estimate
from recipes.results.jobs import CONTROL, DIRECT, FEWER, RATES, STEPS, VARIANTS, Job, searches, table
from recipes.results.work import result, searched_rates

PAGE = Path("docs/results.md")
DRAWS = 4000
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}
"""Student's 97.5% quantile by the number of seeds; fewer say nothing of their spread."""
TRAINED = "test"
BENCHMARKS = {TRAINED: "trained skill", "scenes": "scenes"}
"""As they are called in results, and in the tables."""
OTHERS = ("sft-answer", "sft", "tools", "lvr", "mirage", CONTROL)
BASELINES = ("sft-answer", "sft", "lvr", "mirage")
OF_FEWER = (f"sft-answer{FEWER}", CONTROL + FEWER)
COMPARED = {
    "pearl": OTHERS,
    DIRECT: OTHERS,
    STEPS: OTHERS,
    f"{STEPS}, infonce": ("sft-answer", STEPS),
    DIRECT + FEWER: OF_FEWER,
    STEPS + FEWER: OF_FEWER,
    CONTROL + FEWER: OF_FEWER[:1],
}


def rows() -> list[tuple[Job, list[dict[str, Any]]]]:
    """Of each variant with results: its first job, and the results of its seeds in their order."""
    found: dict[str, tuple[Job, list[dict[str, Any]]]] = {}
    for job in table(searched_rates()):
        if (measured := result(job)) is not None:
            found.setdefault(job.variant.name, (job, []))[1].append(measured)
    return [found[one.name] for one in VARIANTS if one.name in found]


def markdown(found: Sequence[tuple[Job, list[dict[str, Any]]]]) -> str:
    """Accuracies in percent: their mean over seeds, with its 95% t interval; of all else the mean on the trained skill."""
    lines = [
        f"| | seeds | learning rate | val | {' | '.join(BENCHMARKS.values())} | no answer | calls | refused | prompt tokens | new tokens | seconds a question |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job, results in found:
        cells = [
            job.variant.name, str(len(results)), f"{job.rate:g}" if job.rate else "",
            *(_spread(_of(results, name, "accuracy")) for name in ("val", *BENCHMARKS)),
            f"{100 * np.mean(_of(results, TRAINED, 'unparsed')):.1f}", f"{np.mean(_of(results, TRAINED, 'calls')):.2f}",
            f"{np.mean([_refused(one['benchmarks'][TRAINED]) for one in results]):.2f}",
            *(f"{np.mean(_of(results, TRAINED, name)):.2f}" for name in ("prompt tokens", "new tokens")),
            f"{np.mean(_of(results, TRAINED, 'seconds')):.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    chosen = [sentence for data in ("train", "fewer") if (sentence := _chosen(found, data))]
    return "\n".join([*lines, "", *_by_category(found), "", "\n\n".join(chosen), "", *_differences(found)])


def _refused(score: dict[str, Any]) -> float:
    """Calls a question that were refused: malformed, with bad arguments, too many."""
    return float(sum(score["faults"].values()) / score["questions"])


def _by_category(found: Sequence[tuple[Job, list[dict[str, Any]]]]) -> list[str]:
    first = found[0][1][0]["benchmarks"]
    names = [(benchmark, category) for benchmark in BENCHMARKS for category in first[benchmark]["categories"]]
    titles = [f"{BENCHMARKS[benchmark]}: {category}" for benchmark, category in names]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(names)}"]
    for job, results in found:
        cells = [
            _spread([one["benchmarks"][benchmark]["categories"][name] for one in results]) for benchmark, name in names
        ]
        lines.append(f"| {job.variant.name} | {' | '.join(cells)} |")
    return lines


def _chosen(found: Sequence[tuple[Job, list[dict[str, Any]]]], data: str) -> str:
    """Of what learned from these data the best form of `pearl` and the best of what it is compared with, both by `val`,
    and their difference on test."""
    by_name = {job.variant.name: results for job, results in found if job.variant.data == data}
    val = {name: float(np.mean(_of(results, "val", "accuracy"))) for name, results in by_name.items()}
    forms = [name for name in val if name.startswith("pearl")]
    others = [name for name in val if name.removesuffix(FEWER) in BASELINES]
    if not (forms and others):
        return ""
    ours, theirs = max(forms, key=val.__getitem__), max(others, key=val.__getitem__)
    found_in = [differences(_right(by_name[ours], name), _right(by_name[theirs], name)) for name in BENCHMARKS]
    if not len(found_in[0]):
        return ""
    cells = [_percent(paired(difference)) for difference in found_in]
    return (
        f"By `val` the best form of `pearl` is `{ours}` ({100 * val[ours]:.1f}) and the best of the others is `{theirs}` "
        f"({100 * val[theirs]:.1f}). Their difference (seeds that both have: {len(found_in[0])}) is {cells[0]} on the "
        f"trained skill and {cells[1]} on scenes."
    )


def _right(results: Sequence[dict[str, Any]], benchmark: str) -> dict[int, np.ndarray]:
    """By seed, (questions,) of 0 and 1."""
    return {one["seed"]: np.array([*map(int, one["benchmarks"][benchmark]["right"])]) for one in results}


def _differences(found: Sequence[tuple[Job, list[dict[str, Any]]]]) -> list[str]:
    """Of every row and the base, and of forms of `pearl` and the others, on the same questions and seeds."""
    names = [job.variant.name for job, _ in found]
    compared = [(name, "base") for name in names[1:] if "base" in names]
    compared += [(ours, name) for ours, others in COMPARED.items() for name in others if {ours, name} <= {*names}]
    right = {(job.variant.name, name): _right(results, name) for job, results in found for name in BENCHMARKS}
    lines = [f"| | seeds | {' | '.join(BENCHMARKS.values())} |", f"|---|---|{'---|' * len(BENCHMARKS)}"]
    for ours, theirs in compared:
        found_in = [differences(right[ours, n], right[theirs, n], fixed=theirs == "base") for n in BENCHMARKS]
        if seeds := len(found_in[0]):
            cells = [_percent(paired(difference)) for difference in found_in]
            lines.append(f"| {ours} − {theirs} | {seeds} | {' | '.join(cells)} |")
    return lines


def searched() -> str:
    """Accuracies on `val` by learning rate, in percent."""
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in RATES)} |", f"|---|{'---|' * len(RATES)}"]
    cells: dict[str, list[str]] = {}
    for job in searches():
        measured = result(job)
        said = f"{100 * measured['benchmarks']['val']['accuracy']:.1f}" if measured else ""
        cells.setdefault(job.variant.name, []).extend([said] * (1 if job.rate else len(RATES)))
    return "\n".join([*lines, *(f"| {name} | {' | '.join(found)} |" for name, found in cells.items())])


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


def _of(results: Sequence[dict[str, Any]], benchmark: str, name: str) -> list[float]:
    return [float(one["benchmarks"][benchmark][name]) for one in results]


def _spread(values: Sequence[float]) -> str:
    if len(values) not in STUDENT:
        return f"{100 * np.mean(values):.1f}"
    half = STUDENT[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{100 * np.mean(values):.1f} ± {100 * half:.1f}"


def _percent(one: Estimate) -> str:
    interval = f" ({100 * one.low:+.1f} to {100 * one.high:+.1f})" if one.low < one.high else ""
    return f"{100 * one.value:+.1f}{interval}"


def put(page: Path, part: str, text: str) -> None:
    """Replaces a part of a page, between its marks; a page without them gets them at its end."""
    begin, end = (f"<!-- {part}: {which} -->" for which in ("begin", "end"))
    there = page.read_text() if page.exists() else "# Results\n"
    if begin not in there:
        there += f"\n{begin}{end}\n"
    before, after = there.split(begin)[0], there.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def write(page: Path) -> None:
    put(page, "search", searched())
    put(page, "table", markdown(rows()))
    print(json.dumps({job.variant.name: len(results) for job, results in rows()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    write(parser.parse_args().page)


if __name__ == "__main__":
    main()
