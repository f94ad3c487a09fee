"""Results as people read them: Markdown tables, and one self-contained HTML page.

The page needs no server and no network. Its template is `report.html`; what models said is shown as text and never as
markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pearl.evaluation.records import Prediction, Question
from pearl.evaluation.results import StoredResults
from pearl.evaluation.statistics import Comparison, Estimate, Score, Summary
from pearl.files import whole_file
from pearl.pages import Images, embeddable_json, template

_SCORE_COLUMNS = (
    "benchmark", "model", "mode", "questions", "accuracy", "macro", "pairs", "unparsed", "prompt tokens", "new tokens",
    "calls", "invalid calls", "seconds",
)  # fmt: skip
_COMPARISON_COLUMNS = ("benchmark", "first", "second", "difference", "first only", "second only", "p")

Run = tuple[str, str]
"""Model and mode."""


def write_summary(summary: Summary, folder: Path) -> None:
    """Writes `summary.json`, all of it, and `summary.md`, two tables."""
    with whole_file(folder / "summary.json") as partial:
        partial.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / "summary.md") as partial:
        partial.write_text(markdown(summary), encoding="utf-8")


def markdown(summary: Summary) -> str:
    """The scores and the comparisons as tables; accuracies in percent with their 95% intervals."""
    scores = _table(_SCORE_COLUMNS, map(_score_cells, summary.scores))
    if not summary.comparisons:
        return scores
    return f"{scores}\n{_table(_COMPARISON_COLUMNS, map(_comparison_cells, summary.comparisons))}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _score_cells(score: Score) -> list[str]:
    return [
        score.benchmark,
        score.model,
        score.mode,
        str(score.questions),
        _percent(score.accuracy),
        _percent(score.macro),
        _percent(score.pairs) if score.pairs else "",
        f"{100 * score.unparsed:.1f}",
        f"{score.prompt_tokens:.0f}",
        f"{score.new_tokens:.1f}",
        f"{score.calls:.2f}",
        ", ".join(f"{kind} {count}" for kind, count in score.faults.items()),
        f"{score.seconds:.2f}",
    ]


def _comparison_cells(comparison: Comparison) -> list[str]:
    return [
        comparison.benchmark,
        " · ".join(comparison.first),
        " · ".join(comparison.second),
        _percent(comparison.difference, sign="+"),
        str(comparison.first_only),
        str(comparison.second_only),
        "<0.001" if comparison.p < 0.001 else f"{comparison.p:.3f}",
    ]


def _percent(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (f"{100 * one:{sign}.1f}" for one in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def write_report(
    results: StoredResults,
    summary: Summary,
    questions: Mapping[tuple[str, str], Question],
    out: Path,
    limit: int = 200,
    title: str = "Evaluation",
) -> int:
    """Writes the page, which appears whole or not at all.

    It shows at most `limit` of the questions that some runs answered rightly and others wrongly, spread evenly over
    the benchmarks; of a benchmark with one run, those that it answered wrongly.

    Args:
        results: As `read_results` gives them.
        summary: Of the same predictions.
        questions: By benchmark and id. A question that is missing is shown without its words and pictures.
        out: The page's file.
        limit: Pictures make the page large.
        title: Its heading.

    Returns:
        The number of questions shown.
    """
    runs = list(dict.fromkeys((key.model, key.mode) for key in results.predictions))
    differing = _differing(results)
    shown = _spread(differing, limit)
    before_images, before_data, after_data = template("pearl.evaluation", "report.html")
    with whole_file(out) as partial, partial.open("w", encoding="utf-8", newline="\n") as page:
        page.write(before_images.replace("{{title}}", html.escape(title)))
        images = Images(page)
        rows = [_row(one, questions.get((one[0].benchmark, one[0].question)), runs, images) for one in shown]
        data = {
            "runs": runs,
            "benchmarks": _benchmarks(results, summary, questions, runs),
            "setup": asdict(results.setup),
            "sittings": results.sittings,
            "differing": len(differing),
            "images": images.table,
            "rows": rows,
        }
        page.write(before_data)
        page.write(embeddable_json(data))
        page.write(after_data)
    return len(shown)


def _differing(results: StoredResults) -> list[list[Prediction]]:
    """All predictions of each question worth a look, by benchmark and category."""
    order = list(results.setup.benchmarks)
    asked: dict[tuple[str, str], list[Prediction]] = {}
    for rows in results.predictions.values():
        for row in rows:
            asked.setdefault((row.benchmark, row.question), []).append(row)
    differing = [rows for rows in asked.values() if 0 < sum(not row.correct for row in rows) < max(2, len(rows))]
    return sorted(differing, key=lambda rows: (order.index(rows[0].benchmark), rows[0].category))


def _spread(items: Sequence[list[Prediction]], limit: int) -> list[list[Prediction]]:
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _row(
    predictions: Sequence[Prediction], question: Question | None, runs: Sequence[Run], images: Images
) -> dict[str, Any]:
    first = predictions[0]
    return {
        "benchmark": first.benchmark,
        "category": first.category,
        "id": first.question,
        "prompt": question.prompt if question else "",
        "options": question.options if question else (),
        "answer": first.answer,
        "images": [images.add(image) for image in question.images] if question else (),
        "replies": [_reply(one, runs) for one in predictions],
    }


def _reply(prediction: Prediction, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "run": runs.index((prediction.model, prediction.mode)),
        "choice": prediction.choice,
        "correct": prediction.correct,
        **asdict(prediction.reply),
    }


def _benchmarks(
    results: StoredResults, summary: Summary, questions: Mapping[tuple[str, str], Question], runs: Sequence[Run]
) -> list[dict[str, Any]]:
    names = dict.fromkeys(score.benchmark for score in summary.scores)
    return [
        {
            "name": name,
            "chance": _chance([one for one in questions.values() if one.benchmark == name and one.options]),
            "scores": [
                {**asdict(score), "run": runs.index((score.model, score.mode))}
                for score in summary.scores
                if score.benchmark == name
            ],
            "comparisons": [
                {**asdict(one), "first": runs.index(one.first), "second": runs.index(one.second)}
                for one in summary.comparisons
                if one.benchmark == name
            ],
        }
        for name in names
    ]


def _chance(questions: Sequence[Question]) -> dict[str, float]:
    """By category, the accuracy of one who guesses among the options."""
    shares: dict[str, list[float]] = {}
    for question in questions:
        shares.setdefault(question.category, []).append(1 / len(question.options))
    return {category: sum(values) / len(values) for category, values in shares.items()}
