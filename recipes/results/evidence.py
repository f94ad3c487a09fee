"""What tools' output and latents are worth: `python -m recipes.results.evidence`, after `work.py`.

Asks `pearl-eval gain` of the base and of the first seed of `sft`, on held-out trajectories, and `pearl-eval latents` of
the first seed of `lvr`, `mirage` and forms of `pearl`; measures where `tools` looks with its first calls, and what the
visual tokens hold (`seen.py`); puts tables and curves into docs/results.md. Models that are not below `--work` are
trained again, up to nine minutes of a core each.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path
from statistics import fmean

import torch

from pearl.records import Box
from pearl.trainer.models import BUILT_IN
from recipes.results.data import DATA
from recipes.results.jobs import DIRECT, STEPS, Job, table
from recipes.results.seen import tokens_read
from recipes.results.table import PAGE, put
from recipes.results.work import chosen_rates, evaluate, evaluation, result, train

ASKED = ("lvr", "mirage", "pearl", DIRECT, STEPS, f"{STEPS}, infonce", f"{DIRECT}, external encoder")
LOOKING = ("sft-answer", "sft", DIRECT, STEPS)
"""Whose visual tokens are read, beside the base's."""
TRAJECTORIES = 256


def gains(models: dict[str, str]) -> str:
    """The probability of the right answer among the options, from the image alone and after the expert's steps."""
    from pearl.evaluation.gain import Gain, GainMeter, by_skill, measure_gains
    from pearl.evaluation.subject import Subject
    from pearl.parquet import read_trajectories
    from pearl.trainer.conversation import load_template

    trajectories = list(read_trajectories(DATA / "val.parquet"))
    measured = {}
    for name, model in models.items():
        meter = GainMeter(Subject.load(model), load_template("pearl"))
        measured[name] = by_skill([one for _, one in measure_gains(meter, trajectories) if isinstance(one, Gain)])
    lines = [
        f"| | trajectories | {' | '.join(f'{name}: image alone | {name}: after the steps' for name in models)} |",
        f"|---|---|{'---|' * 2 * len(models)}",
    ]
    for rows in zip(*measured.values(), strict=True):
        cells = " | ".join(f"{row.before:.2f} | {row.after:.2f}" for row in rows)
        lines.append(f"| {rows[0].skill} | {rows[0].count} | {cells} |")
    return "\n".join(lines)


def seen(models: dict[str, str]) -> str:
    """How often the answer can be read from the visual tokens of the base and of models that were trained."""
    from pearl.parquet import read_trajectories

    return tokens_read({"base": BUILT_IN, **models}, list(read_trajectories(DATA / "test.parquet")))


def boxes(results: Iterable[Path]) -> str:
    """Where the first calls of `tools` look: their overlap with the expert's box, and with the next question's."""
    from pearl.boxes import intersection_over_union
    from pearl.evaluation.results import read_results
    from pearl.parquet import read_trajectories

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
    return (
        f"Of {asked} questions {len(looked)} began with a crop that could be run. Its overlap (IoU) with the expert's "
        f"first box is {fmean(own):.3f} in the mean, and at least 0.5 in {half:.1%}; with the box of the next question "
        f"it is {fmean(others):.3f}."
    )


def latents(models: dict[str, str], out: Path, images: Path) -> str:
    """Tables and curves; of a model that makes no latents, that it makes none."""
    from pearl.evaluation.latents import Evidence, NoLatents, latent_evidence
    from pearl.evaluation.latents_report import markdown, write_evidence
    from pearl.evaluation.subject import Subject
    from pearl.parquet import read_trajectories

    trajectories = list(islice(read_trajectories(DATA / "test.parquet"), TRAJECTORIES))
    found, without = list[Evidence](), list[str]()
    for name, model in models.items():
        try:
            found.append(replace(latent_evidence(Subject.load(model), trajectories), model=name))
        except NoLatents as error:
            without.append(f"`{name}`: {error}.")
    write_evidence(found, out)
    shutil.copy(out / "latents.png", images / "latents.png")
    picture = "![Retrieval, replaced latents, number of latents](images/latents.png)"
    return "\n\n".join([*without, picture, markdown(found).replace("## ", "### ").strip()])


def write(work: Path, page: Path) -> None:
    torch.set_num_threads(1)
    work = work.absolute()
    first = {job.variant.name: job for job in table(chosen_rates()) if job.seed == 0}
    asked = {name: first[name] for name in ASKED}
    looking = {name: first[name] for name in LOOKING}
    answered = [job for job in table(chosen_rates()) if job.variant.mode == "tools" and result(job)]
    models = {job.name: train(job, work)[0] for job in (first["sft"], *asked.values(), *looking.values())}
    put(page, "gain", gains({"base": BUILT_IN, "sft": models[first["sft"].name]}))
    put(page, "seen", seen({name: models[job.name] for name, job in looking.items()}))
    put(page, "boxes", boxes([answers_of(job, work) for job in answered]))
    of_latents = {name: models[job.name] for name, job in asked.items()}
    put(page, "latents", latents(of_latents, work / "evidence", page.parent / "images"))


def answers_of(job: Job, work: Path) -> Path:
    """The folder with a job's answers on `test`, asked again where only their accuracy is here."""
    folder = work / "evaluated" / job.name / "test"
    if not folder.exists():
        evaluate(evaluation(job, train(job, work)[0], work, "test"))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    write(options.work, options.page)


if __name__ == "__main__":
    main()
