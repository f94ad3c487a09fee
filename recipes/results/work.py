"""Works through the list of runs: `python -m recipes.results.work`. Stop it whenever you like; it goes on where it was.

Each finished run is a file in `recipes/results/measured/`. Models and their logs stay below `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipes.results.jobs import BATCH_SIZE, UPDATES, Job, searches, table, variant

MEASURED = Path(__file__).parent / "measured"


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
        found[job.variant.name] = max(found.get(job.variant.name, (-1.0, 0.0)), (measured["accuracy"], job.rate))
    return {name: rate for name, (_, rate) in found.items()}


def run(job: Job, work: Path, threads: int = 1) -> str:
    """Trains and evaluates, and writes the result."""
    import torch

    torch.set_num_threads(threads)
    begin = time.monotonic()
    model, losses = train(job, work)
    trained = time.monotonic() - begin
    measured = {**evaluate(job, model, work), "losses": losses, "training seconds": round(trained, 1)}
    MEASURED.mkdir(exist_ok=True)
    partial = MEASURED / f".{job.name}.json"
    partial.write_text(json.dumps(measured, indent=1) + "\n")
    partial.replace(MEASURED / f"{job.name}.json")
    return job.name


def train(job: Job, work: Path) -> tuple[str, list[dict[str, float]]]:
    """The model (as `model_of` says), and of each of its trainings the losses of the first and the last update."""
    from pearl.trainer.config import TrainConfig
    from pearl.trainer.train import train as pearl_train

    one = job.variant
    if one.trained_as:
        return train(replace(job, variant=variant(one.trained_as)), work)
    if one.objective is None:
        return "vlm-nano", []
    stages = [one.options, *one.stages]
    model, losses = None, []
    for number, options in enumerate(stages):
        out = work / job.name / str(number)
        config = TrainConfig(
            data=str(work / "data" / "train.parquet"), out=str(out), model=model, objective=one.objective,
            objective_options=dict(options), max_steps=UPDATES // len(stages), batch_size=BATCH_SIZE,
            learning_rate=job.rate, seed=job.seed, eval_fraction=0, save_steps=0, log_steps=10, resume=True,
        )  # fmt: skip
        if not (out / "model").exists():
            report = pearl_train(config, progress=False)
            (out / "losses.json").write_text(json.dumps([report.first, report.last]))
        losses += json.loads((out / "losses.json").read_text())
        model = str(out / "model")
    assert model
    return model, losses


def model_of(job: Job, work: Path) -> Path:
    """Where a finished job's model is."""
    one = variant(job.variant.trained_as) if job.variant.trained_as else job.variant
    return work / replace(job, variant=one).name / str(len(one.stages)) / "model"


def evaluate(job: Job, model: str, work: Path) -> dict[str, Any]:
    from pearl.evaluation.results import read_results, surroundings
    from pearl.evaluation.run import EvalConfig
    from pearl.evaluation.run import evaluate as pearl_eval

    one = job.variant
    benchmark = "scenes" if job.phase == "table" else f"trajectories={work / 'data' / 'val.parquet'}"
    config = EvalConfig(
        models=(model,), benchmarks=(benchmark,), modes=(one.mode,), out=str(work / "evaluated" / job.name),
        opening=one.opening, tools=("crop", "zoom", "depth", "highlight"), resume=True,
    )  # fmt: skip
    (score,) = pearl_eval(config, progress=False).scores
    predictions = sorted(
        chain.from_iterable(read_results(Path(config.out)).predictions.values()), key=lambda one: one.question
    )
    return {
        "variant": one.name, "rate": job.rate, "seed": job.seed, "phase": job.phase, "questions": score.questions,
        "accuracy": score.accuracy.value, "macro": score.macro.value, "unparsed": score.unparsed,
        "categories": {name: found.accuracy.value for name, found in score.categories.items()},
        "prompt tokens": score.prompt_tokens, "new tokens": score.new_tokens, "calls": score.calls,
        "faults": dict(score.faults), "seconds": score.seconds,
        "right": "".join(str(int(one.correct)) for one in predictions), **surroundings(),
    }  # fmt: skip


def pending(phases: Sequence[str]) -> list[Job]:
    jobs = [*searches()] if "search" in phases else []
    if "table" in phases and all(result(job) for job in searches()):
        jobs += table(chosen_rates())
    return [job for job in jobs if result(job) is None]


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
                found = result(running[done]) or {}
                said = failed.get(name) or f"accuracy {found['accuracy']:.3f}"
                print(f"{count}/{len(jobs)} {name}: {said}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
