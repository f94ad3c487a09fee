"""Writes the table: `python -m recipes.results.table`, from what `work.py` measured, into docs/results.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pearl.evaluation.statistics import Estimate
from recipes.results.jobs import CONTROL, DIRECT, FEWER, MORE, RATES, STEPS, VARIANTS, Job, beside, searches, table
from recipes.results.plot import draw
from recipes.results.seeds import differences, half_width, paired
from recipes.results.work import result, searched_rates

PAGE = Path("docs/results.md")
TRAINED = "test"
BENCHMARKS = {TRAINED: "trained skill", "scenes": "scenes"}
"""As they are called in results, and in the tables."""
OTHERS = ("sft-answer", "sft", "tools", "lvr", "mirage", CONTROL)
BASELINES = ("sft-answer", "sft", "lvr", "mirage")
OF_FEWER = (f"sft-answer{FEWER}", CONTROL + FEWER)
PARTS = ("published token", "without JEPA", "without NextLat", "K = 1", "K = 16", "external encoder")
COMPARED = {
    "pearl": OTHERS,
    **{f"pearl, without {part}": ("pearl", "sft") for part in ("JEPA", "NextLat")},
    DIRECT: OTHERS,
    STEPS: OTHERS,
    **{f"{DIRECT}, {part}": (DIRECT,) for part in PARTS},
    f"{STEPS}, infonce": ("sft-answer", STEPS),
    DIRECT + FEWER: OF_FEWER,
    STEPS + FEWER: OF_FEWER,
    f"{STEPS}, infonce{FEWER}": OF_FEWER,
    CONTROL + FEWER: OF_FEWER[:1],
    DIRECT + MORE: (f"sft-answer{MORE}",),
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
    parts = [lines, _by_category(found), ["\n\n".join(chosen)], _differences(found), _beside()]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _beside() -> list[str]:
    """Runs at other rates than the table's."""
    found = dict[tuple[str, float], list[dict[str, Any]]]()
    for job in beside(searched_rates()):
        if (measured := result(job)) is not None:
            found.setdefault((job.variant.name, job.rate), []).append(measured)
    lines = ["| at another rate | seeds | learning rate | val | trained skill | scenes |", "|---|---|---|---|---|---|"]
    for (name, rate), results in found.items():
        cells = [_spread(_of(results, benchmark, "accuracy")) for benchmark in ("val", *BENCHMARKS)]
        lines.append(f"| {name} | {len(results)} | {rate:g} | {' | '.join(cells)} |")
    if not found:
        return []
    fewer = {name: results for (name, _), results in found.items() if name.endswith(FEWER)}
    pairs = [(ours, name) for ours, others in COMPARED.items() for name in others if {ours, name} <= fewer.keys()]
    return [*lines, "", *_compared(fewer, pairs)] if pairs else lines


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
    by_name = {job.variant.name: results for job, results in found}
    compared = [(name, "base") for name in list(by_name)[1:] if "base" in by_name]
    compared += [(ours, name) for ours, others in COMPARED.items() for name in others if {ours, name} <= by_name.keys()]
    return _compared(by_name, compared)


def _compared(by_name: Mapping[str, list[dict[str, Any]]], pairs: Sequence[tuple[str, str]]) -> list[str]:
    right = {(one, name): _right(results, name) for one, results in by_name.items() for name in BENCHMARKS}
    lines = [f"| | seeds | {' | '.join(BENCHMARKS.values())} |", f"|---|---|{'---|' * len(BENCHMARKS)}"]
    for ours, theirs in pairs:
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


def _of(results: Sequence[dict[str, Any]], benchmark: str, name: str) -> list[float]:
    return [float(one["benchmarks"][benchmark][name]) for one in results]


def _spread(values: Sequence[float]) -> str:
    half = half_width(values)
    return f"{100 * np.mean(values):.1f}" + (f" ± {100 * half:.1f}" if half else "")


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
    found = rows()
    put(page, "search", searched())
    put(page, "table", markdown(found))
    right = {
        title: {job.variant.name: _of(results, benchmark, "accuracy") for job, results in found}
        for benchmark, title in BENCHMARKS.items()
    }
    draw(right, page.parent / "images" / "results.png")
    print(json.dumps({job.variant.name: len(results) for job, results in found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    write(parser.parse_args().page)


if __name__ == "__main__":
    main()
