"""Works through the list of runs: `python -m recipes.results.work`. Stop it whenever you like; it goes on where it was.

Each finished run is a file in `recipes/results/measured/`. Models and their logs stay below `--work`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from pearl.files import whole_file
from recipes.results.data import DATA, TOOLS
from recipes.results.jobs import BATCH_SIZE, Job, Phase, beside, searches, table, variant

if TYPE_CHECKING:
    from pearl.evaluation.run import EvalConfig

MEASURED = Path(__file__).parent / "measured"
PHASES: tuple[Phase, ...] = ("search", "table")
PRECISION: Literal["fp32"] = "fp32"
"""On a GPU too."""
MAX_CALLS = 2
"""As many as a trajectory of the data has at most."""
SPLITS: dict[Phase, tuple[str, ...]] = {"search": ("val",), "table": ("val", "test")}
DECISIVE = ("benchmarks", "modes", "opening", "tools", "max_calls", "max_new_tokens")


def result(job: Job) -> dict[str, Any] | None:
    path = MEASURED / f"{job.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def searched_rates() -> dict[str, float]:
    """For each objective whose search is finished the learning rate with the highest accuracy on `val`."""
    found = dict[str, list[tuple[float, float]]]()
    missing = set[str]()
    for job in searches():
        if measured := result(job):
            found.setdefault(job.variant.name, []).append((measured["benchmarks"]["val"]["accuracy"], job.rate))
        else:
            missing.add(job.variant.name)
    return {name: max(pairs)[1] for name, pairs in found.items() if name not in missing}


def chosen_rates() -> dict[str, float]:
    """
    Raises:
        SystemExit: the search is not finished.
    """
    rates = searched_rates()
    if missing := {job.variant.name for job in searches()} - rates.keys():
        raise SystemExit(f"{', '.join(sorted(missing))}: run the search first (--phase search)")
    return rates


def run(job: Job, work: Path, threads: int = 1) -> str:
    """Trains and evaluates, and writes the result and, beside it, the trainings' log."""
    import torch

    from pearl.evaluation.results import surroundings

    torch.set_num_threads(threads)
    model, trainings = train(job, work)
    one = job.variant
    asked = [evaluation(job, model, work, split) for split in SPLITS[job.phase]]
    measured = {
        "variant": one.name, "rate": job.rate, "seed": job.seed, "phase": job.phase,
        "benchmarks": dict(chain.from_iterable(evaluate(config).items() for config in asked)),
        "trainings": [_settings(out) for out in trainings], "digests": _digests(one.data),
        "evaluations": [{name: getattr(config, name) for name in DECISIVE} for config in asked], **surroundings(),
    }  # fmt: skip
    MEASURED.mkdir(exist_ok=True)
    log = "".join((out / "log.jsonl").read_text() for out in trainings)
    for kind, text in (("jsonl", log), ("json", json.dumps(measured, indent=1) + "\n")):
        with whole_file(MEASURED / f"{job.name}.{kind}") as partial:
            partial.write_text(text)
    return job.name


def _digests(data: str) -> dict[str, str]:
    """SHA-256 of the base's weights and of the trajectories."""
    from pearl.trainer.models import BUILT_IN, place_of

    files = {"base": Path(place_of(BUILT_IN)) / "model.safetensors"}
    files |= {name: DATA / f"{name}.parquet" for name in (data, "val", "test")}
    found = dict[str, str]()
    for name, path in files.items():
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _settings(out: Path) -> dict[str, Any]:
    """Of a training, but where it lay."""
    settings: dict[str, Any] = json.loads((out / "config.json").read_text())["settings"]
    return {name: value for name, value in settings.items() if name not in ("out", "model")}


def train(job: Job, work: Path) -> tuple[str, list[Path]]:
    """The model and the folders of its trainings, which are not made again where they are."""
    from pearl.trainer.config import TrainConfig
    from pearl.trainer.models import BUILT_IN
    from pearl.trainer.train import train as pearl_train

    one = job.variant
    if one.trained_as:
        return train(replace(job, variant=variant(one.trained_as)), work)
    if one.objective is None:
        return BUILT_IN, []
    stages = [one.options, *one.stages]
    model, trainings = BUILT_IN, list[Path]()
    for number, options in enumerate(stages):
        out = work / job.name / str(number)
        config = TrainConfig(
            data=str(DATA / f"{one.data}.parquet"), out=str(out), model=model, objective=one.objective,
            objective_options=dict(options), max_steps=job.updates // len(stages), batch_size=BATCH_SIZE,
            learning_rate=job.rate, seed=job.seed, precision=PRECISION, eval_fraction=0, save_steps=0, log_steps=10, resume=True,
        )  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_suffix(".lock")):  # another job may ask the same model
            if not _is_trained(out, config.to_json()):
                shutil.rmtree(out, ignore_errors=True)
                pearl_train(config, progress=False)
        trainings.append(out)
        model = str(out / "model")
    return model, trainings


def _is_trained(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds a finished training of exactly these settings."""
    if not (out / "model" / "training_config.json").exists():
        return False
    done: dict[str, Any] = json.loads((out / "config.json").read_text())
    return bool(done["settings"] == settings)


def evaluation(job: Job, model: str, work: Path, split: str) -> EvalConfig:
    """Of questions like those of training, held out; with `test` goes the benchmark `scenes` (all families)."""
    from pearl.evaluation.run import EvalConfig

    one = job.variant
    calls: dict[str, Any] = {"tools": TOOLS, "max_calls": MAX_CALLS} if one.mode == "tools" else {}
    return EvalConfig(
        models=(model,), benchmarks=(f"trajectories={DATA / split}.parquet", *(("scenes",) if split == "test" else ())),
        modes=(one.mode,), out=str(work / "evaluated" / job.name / split), opening=one.opening,
        max_new_tokens=128, dtype=PRECISION, resume=True, **calls,
    )  # fmt: skip


def evaluate(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """By benchmark; `trajectories` goes by its split."""
    from pearl.evaluation.results import read_results
    from pearl.evaluation.run import evaluate as pearl_eval

    scores = pearl_eval(config, progress=False).scores
    right = dict[str, dict[str, bool]]()
    for prediction in chain.from_iterable(read_results(Path(config.out)).predictions.values()):
        right.setdefault(prediction.benchmark, {})[prediction.question] = prediction.correct
    split = Path(config.out).name
    return {
        (split if score.benchmark == "trajectories" else score.benchmark): {
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
        rates = chosen_rates()
        jobs += [*table(rates), *beside(rates)]
    return [job for job in jobs if result(job) is None]


def _summary(measured: dict[str, Any]) -> str:
    return ", ".join(f"{name} {one['accuracy']:.3f}" for name, one in measured["benchmarks"].items())


def work_through(work: Path, workers: int, phases: Sequence[str] = PHASES) -> None:
    """
    Raises:
        SystemExit: jobs have failed; all others are done.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = dict[str, str]()
    while jobs := [job for job in pending(phases) if job.name not in failed]:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            running = {pool.submit(run, job, work.absolute()): job for job in jobs}
            for count, done in enumerate(as_completed(running), start=1):
                name, error = running[done].name, done.exception()
                if error is not None:
                    failed[name] = f"{type(error).__name__}: {error}"
                said = failed.get(name) or _summary(result(running[done]) or {})
                print(f"{count}/{len(jobs)} {name}: {said}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES))
    options = parser.parse_args()
    work_through(options.work, options.workers, options.phase)


if __name__ == "__main__":
    main()
