"""What tools' output and latents are worth: `python -m recipes.results.evidence`, after `work.py`.

Asks `pearl-eval gain` of the base and of the first seed of `sft`, on held-out trajectories, and `pearl-eval latents` of
the first seed of `lvr`, `mirage` and forms of `pearl`; measures where `tools` looks with its first calls, and what the
visual tokens hold (`seen.py`). All goes into `measured/evidence.json`, and from there as tables and curves into
docs/results.md. Models that are not below `--work` are trained again, up to nine minutes of a core each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import TypeAdapter

from pearl.boxes import intersection_over_union
from pearl.evaluation.gain import Gain, GainMeter, SkillGain, by_skill, measure_gains
from pearl.evaluation.latents import Evidence, NoLatents, latent_evidence
from pearl.evaluation.latents_report import draw, markdown
from pearl.evaluation.results import read_results, surroundings
from pearl.evaluation.statistics import Estimate
from pearl.evaluation.subject import Subject
from pearl.files import whole_file
from pearl.parquet import read_trajectories
from pearl.records import Box
from pearl.trainer.conversation import load_template
from pearl.trainer.models import BUILT_IN
from recipes.results.data import DATA
from recipes.results.jobs import DIRECT, STEPS, Job, table
from recipes.results.seen import tokens_read
from recipes.results.table import PAGE, put
from recipes.results.work import MEASURED, chosen_rates, evaluate, evaluation, result, train

ASKED = ("lvr", "mirage", "pearl", DIRECT, STEPS, f"{STEPS}, infonce", f"{DIRECT}, external encoder")
LOOKING = ("sft-answer", "sft", DIRECT, STEPS)
"""Whose visual tokens are read, beside the base's."""
TRAJECTORIES = 256
FILE = MEASURED / "evidence.json"


@dataclass(frozen=True)
class Looks:
    """Where the first calls of `tools` look.

    Attributes:
        questions: Of all seeds; `crops`: how many began with a crop that could be run.
        overlap: Their mean overlap (IoU) with the expert's first box, `half`: the share with at least 0.5, and
            `overlap_of_next`: the mean overlap with the box of the next question.
    """

    seeds: int
    questions: int
    crops: int
    overlap: float
    half: float
    overlap_of_next: float


@dataclass(frozen=True)
class Measured:
    """
    Attributes:
        gains, seen: By the model's name.
        without: Why a model is not among `latents`.
    """

    gains: Mapping[str, Sequence[SkillGain]]
    seen: Mapping[str, Mapping[str, Estimate]]
    looks: Looks
    latents: Sequence[Evidence]
    without: Mapping[str, str]
    surroundings: Mapping[str, Any]


def read() -> Measured:
    return TypeAdapter(Measured).validate_json(FILE.read_bytes())


def measure(work: Path) -> Measured:
    first = {job.variant.name: job for job in table(chosen_rates()) if job.seed == 0}
    models = {name: train(first[name], work)[0] for name in ("sft", *ASKED, *LOOKING)}
    answered = [job for job in table(chosen_rates()) if job.variant.mode == "tools" and result(job)]
    test = list(read_trajectories(DATA / "test.parquet"))
    latents, without = list[Evidence](), dict[str, str]()
    for name in ASKED:
        try:
            found = latent_evidence(Subject.load(models[name]), list(islice(test, TRAJECTORIES)))
            latents.append(replace(found, model=name))
        except NoLatents as error:
            without[name] = str(error)
    return Measured(
        {name: _gains(model) for name, model in {"base": BUILT_IN, "sft": models["sft"]}.items()},
        tokens_read({"base": BUILT_IN, **{name: models[name] for name in LOOKING}}, test),
        _looks([answers_of(job, work) for job in answered]),
        latents,
        without,
        surroundings(),
    )


def _gains(model: str) -> list[SkillGain]:
    meter = GainMeter(Subject.load(model), load_template("pearl"))
    found = measure_gains(meter, read_trajectories(DATA / "val.parquet"))
    return by_skill([gain for _, gain in found if isinstance(gain, Gain)])


def _looks(results: Sequence[Path]) -> Looks:
    expert = {one.id: one.steps[0].call.arguments["box"] for one in read_trajectories(DATA / "test.parquet")}
    asked, looked = 0, list[tuple[str, Box]]()
    for folder in results:
        for one in chain.from_iterable(read_results(folder).predictions.values()):
            if one.benchmark == "trajectories":
                asked += 1
                if one.reply.calls and one.reply.calls[0].tool == "crop" and not one.reply.calls[0].fault:
                    looked.append((one.question, json.loads(one.reply.calls[0].arguments)["box"]))
    own = [intersection_over_union(box, expert[question]) for question, box in looked]
    others = [intersection_over_union(box, expert[after]) for (_, box), (after, _) in pairwise(looked)]
    half = fmean(overlap >= 0.5 for overlap in own)
    return Looks(len(results), asked, len(looked), fmean(own), half, fmean(others))


def answers_of(job: Job, work: Path) -> Path:
    """The folder with a job's answers on `test`, asked again where only their accuracy is here."""
    folder = work / "evaluated" / job.name / "test"
    if not folder.exists():
        evaluate(evaluation(job, train(job, work)[0], work, "test"))
    return folder


def parts(found: Measured) -> dict[str, str]:
    """What is put between the page's marks."""
    picture = "![Retrieval, replaced latents, number of latents](images/latents.png)"
    without = [f"`{name}`: {reason}." for name, reason in found.without.items()]
    return {
        "gain": _gains_shown(found.gains),
        "seen": _seen_shown(found.seen),
        "boxes": _looks_shown(found.looks),
        "latents": "\n\n".join([*without, picture, markdown(found.latents).replace("## ", "### ").strip()]),
    }


def _gains_shown(gains: Mapping[str, Sequence[SkillGain]]) -> str:
    """The probability of the right answer among the options."""
    titles = (
        f"{name}: {when}"
        for name in gains
        for when in ("image alone", "after the steps, last picture hidden", "after the steps")
    )
    lines = [f"| | trajectories | {' | '.join(titles)} |", f"|---|---|{'---|' * 3 * len(gains)}"]
    for rows in zip(*gains.values(), strict=True):
        cells = " | ".join(f"{row.before:.2f} | {row.words:.2f} | {row.after:.2f}" for row in rows)
        lines.append(f"| {rows[0].skill} | {rows[0].count} | {cells} |")
    return "\n".join(lines)


def _seen_shown(seen: Mapping[str, Mapping[str, Estimate]]) -> str:
    titles = next(iter(seen.values()))
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, read_from in seen.items():
        cells = [f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})" for one in read_from.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _looks_shown(looks: Looks) -> str:
    return (
        f"Of {looks.questions} questions ({looks.seeds} seeds) {looks.crops} began with a crop that could be run. Its "
        f"overlap (IoU) with the expert's first box is {looks.overlap:.3f} in the mean, and at least 0.5 in "
        f"{looks.half:.1%}; with the box of the next question it is {looks.overlap_of_next:.3f}."
    )


def write(work: Path, page: Path) -> None:
    torch.set_num_threads(1)
    found = measure(work.absolute())
    with whole_file(FILE) as partial:
        partial.write_bytes(TypeAdapter(Measured).dump_json(found, indent=1) + b"\n")
    for part, text in parts(found).items():
        put(page, part, text)
    with whole_file(page.parent / "images" / "latents.png") as picture:
        draw(found.latents, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    write(options.work, options.page)


if __name__ == "__main__":
    main()
