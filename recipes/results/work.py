"""Works through the list of runs: `python -m recipes.results.work`. Stop it whenever you like; it goes on where it was.

Each finished run is a file in `recipes/results/measured/`. Models and their logs stay below `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipes.results.base import BASE
from recipes.results.data import DATA, TOOLS
from recipes.results.jobs import BATCH_SIZE, Job, searches, table, variant

MEASURED = Path(__file__).parent / "measured"
MAX_CALLS = 2
"""As many as a trajectory of the data has at most."""


def result(job: Job) -> dict[str, Any] | None:
    path = MEASURED / f"{job.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def chosen_rates() -> dict[str, float]:
    """For each objective the learning rate with the highest accuracy on `val`.

    Raises:
        SystemExit: the search is not finished.
    """
    found: dict[str, tuple[float, float]] = {}
    for job in searches():
        measured = result(job)
        if measured is None:
            raise SystemExit(f"{job.name} is missing: run the search first (--phase search)")
        accuracy = measured["benchmarks"]["trajectories"]["accuracy"]
        found[job.variant.name] = max(found.get(job.variant.name, (-1.0, 0.0)), (accuracy, job.rate))
    return {name: rate for name, (_, rate) in found.items()}


def run(job: Job, work: Path, threads: int = 1) -> str:
    """Trains and evaluates, and writes the result."""
    import torch

    from pearl.evaluation.results import surroundings

    torch.set_num_threads(threads)
    model, losses, seconds = train(job, work)
    one = job.variant
    measured = {
        "variant": one.name, "rate": job.rate, "seed": job.seed, "phase": job.phase,
        "benchmarks": evaluate(job, model, work), "losses": losses, "training seconds": round(seconds, 1),
        **surroundings(),
    }  # fmt: skip
    MEASURED.mkdir(exist_ok=True)
    partial = MEASURED / f".{job.name}.json"
    partial.write_text(json.dumps(measured, indent=1) + "\n")
    partial.replace(MEASURED / f"{job.name}.json")
    return job.name


def train(job: Job, work: Path) -> tuple[str, list[dict[str, float]], float]:
    """The model (as `model_of` says), of each of its trainings the losses of the first and the last update, and how
    many seconds they took."""
    from pearl.trainer.config import TrainConfig
    from pearl.trainer.train import train as pearl_train

    one = job.variant
    if one.trained_as:
        return train(replace(job, variant=variant(one.trained_as)), work)
    if one.objective is None:
        return str(BASE), [], 0.0
    stages = [one.options, *one.stages]
    model, losses, seconds = str(BASE), list[dict[str, float]](), 0.0
    for number, options in enumerate(stages):
        out = work / job.name / str(number)
        config = TrainConfig(
            data=str(DATA / "train.parquet"), out=str(out), model=model, objective=one.objective,
            objective_options=dict(options), max_steps=job.updates // len(stages), batch_size=BATCH_SIZE,
            learning_rate=job.rate, seed=job.seed, eval_fraction=0, save_steps=0, log_steps=10, resume=True,
        )  # fmt: skip
        if not _is_trained(out, config.to_json()):
            shutil.rmtree(out, ignore_errors=True)
            report = pearl_train(config, progress=False)
            (out / "losses.json").write_text(json.dumps([report.first, report.last]))
        losses += json.loads((out / "losses.json").read_text())
        seconds += json.loads((out / "log.jsonl").read_text().splitlines()[-1])["train_runtime"]
        model = str(out / "model")
    return model, losses, seconds


def _is_trained(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds a finished training of exactly these settings."""
    if not (out / "losses.json").exists():
        return False
    done: dict[str, Any] = json.loads((out / "config.json").read_text())
    return bool(done["settings"] == settings)


def model_of(job: Job, work: Path) -> Path:
    """Where a finished job's model is."""
    one = variant(job.variant.trained_as) if job.variant.trained_as else job.variant
    return work / replace(job, variant=one).name / str(len(one.stages)) / "model"


def evaluate(job: Job, model: str, work: Path) -> dict[str, dict[str, Any]]:
    """By benchmark: `trajectories` (questions like those of training) and, for the table, `scenes` (all families)."""
    from pearl.evaluation.results import read_results
    from pearl.evaluation.run import EvalConfig
    from pearl.evaluation.run import evaluate as pearl_eval

    one = job.variant
    held_out = f"trajectories={DATA / ('val' if job.phase == 'search' else 'test')}.parquet"
    config = EvalConfig(
        models=(model,), benchmarks=(held_out,) if job.phase == "search" else (held_out, "scenes"), modes=(one.mode,),
        out=str(work / "evaluated" / job.name), opening=one.opening, tools=TOOLS, max_new_tokens=128, max_calls=MAX_CALLS, resume=True,
    )  # fmt: skip
    scores = pearl_eval(config, progress=False).scores
    right = dict[str, dict[str, bool]]()
    for prediction in chain.from_iterable(read_results(Path(config.out)).predictions.values()):
        right.setdefault(prediction.benchmark, {})[prediction.question] = prediction.correct
    return {
        score.benchmark: {
            "questions": score.questions, "accuracy": score.accuracy.value, "unparsed": score.unparsed,
            "categories": {name: found.accuracy.value for name, found in score.categories.items()},
            "prompt tokens": score.prompt_tokens, "new tokens": score.new_tokens, "calls": score.calls,
            "faults": dict(score.faults), "seconds": score.seconds,
            "right": "".join(str(int(correct)) for _, correct in sorted(right[score.benchmark].items())),
        }
        for score in scores
    }  # fmt: skip


def pending(phases: Sequence[str]) -> list[Job]:
    jobs = [*searches()] if "search" in phases else []
    if "table" in phases and all(result(job) for job in searches()):
        jobs += table(chosen_rates())
    return [job for job in jobs if result(job) is None]


def _summary(measured: dict[str, Any]) -> str:
    return ", ".join(f"{name} {one['accuracy']:.3f}" for name, one in measured["benchmarks"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--phase", choices=("search", "table"), nargs="+", default=["search", "table"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = dict[str, str]()
    while jobs := [job for job in pending(options.phase) if job.name not in failed]:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            running = {pool.submit(run, job, options.work.absolute()): job for job in jobs}
            for count, done in enumerate(as_completed(running), start=1):
                name, error = running[done].name, done.exception()
                if error is not None:
                    failed[name] = f"{type(error).__name__}: {error}"
                said = failed.get(name) or _summary(result(running[done]) or {})
                print(f"{count}/{len(jobs)} {name}: {said}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
