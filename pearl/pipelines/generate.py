"""Generation from end to end: plan, make the shards on an engine, check that everything adds up, finish."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pearl import __version__
from pearl.files import file_hash, locked
from pearl.parquet import concatenate
from pearl.pipelines.config import GenerateConfig, fingerprint, recipe
from pearl.pipelines.endpoint.ledger import as_manifest
from pearl.pipelines.engines import EngineConfig, make_shards
from pearl.pipelines.errors import ConfigError, RunError
from pearl.pipelines.planner_rollout import PlannerConfig, check_endpoint
from pearl.pipelines.progress import Progress
from pearl.pipelines.rollout import Refusal
from pearl.pipelines.run_directory import RunDirectory, faults_explained, read_json, whole, write_json
from pearl.pipelines.shards import ShardMaker, ShardTask
from pearl.pipelines.sources import SourceError
from pearl.records import Trajectory

MAX_QUARANTINED = 0.05
PREVIEWED = 8


@dataclass(frozen=True)
class OutputPolicy:
    """What happens when the output is there already: `resume` continues it, `overwrite` starts anew, else an error.

    `max_quarantined` is the share of samples that may be quarantined; ten always may, unless it is 0.
    """

    resume: bool = False
    overwrite: bool = False
    max_quarantined: float = MAX_QUARANTINED

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")


def generate(
    config: GenerateConfig, out: Path, engine: EngineConfig, policy: OutputPolicy, progress: Progress | None = None
) -> dict[str, Any]:
    """Generates trajectories into `out` (a folder, or one `.parquet` file) and returns the manifest.

    Raises:
        ConfigError: a planner without an endpoint, or an endpoint without a planner.
        RunError: the output is there already, the machine failed, or too many samples had to be quarantined.
        SourceError: a source cannot be used.
        ToolUnavailable: a tool or its model is missing.
    """
    out = out.absolute()
    directory = RunDirectory(out, config.source_options.split)
    check_endpoint(config, engine.endpoint)
    previous = _admit(directory, config, policy)
    settings = _settings(config)
    _refuse_another_recipe(directory, previous, settings)
    directory.create()
    with _locked(directory):
        previous = _admit(directory, config, policy)  # again: another process may have been here meanwhile
        _refuse_another_recipe(directory, previous, settings)
        if policy.overwrite:
            _replace(directory, config, settings)
        directory.sweep()
        if (manifest := _complete(directory)) is not None:
            return manifest
        if not directory.plan.exists():
            _plan(directory, config, settings)
        planned, total = directory.size()
        task = ShardTask(config, settings["fingerprint"], str(out), total, engine.endpoint)
        _make(directory, task, engine, policy, progress or Progress.silent(), planned)
        return _finish(directory, task, settings, planned)


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """What is kept beside a run, and compared before it is resumed; files of sources are hashed for it."""
    made_by = recipe(config)
    return {"config": config.as_json(), "recipe": made_by, "fingerprint": fingerprint(made_by)}


def _plan(directory: RunDirectory, config: GenerateConfig, settings: dict[str, Any]) -> None:
    """Freezes the plan; where that fails nothing is left behind, so that the corrected command finds a free place."""
    try:
        write_json(directory.settings, settings)
        if directory.write_plan(config.open_sources(), config.shard_size) == 0:
            raise RunError("the sources hold no sample")
    except (SourceError, RunError):
        directory.remove()
        raise


def _replace(directory: RunDirectory, config: GenerateConfig, settings: dict[str, Any]) -> None:
    """Clears the folder when the new plan is made: sources that cannot be listed must not cost the old data."""
    listed = directory.run / ".plan.tmp"
    try:
        if directory.write_plan(config.open_sources(), config.shard_size, listed) == 0:
            raise RunError("the sources hold no sample")
        directory.clear()
        write_json(directory.settings, settings)
        listed.replace(directory.plan)
    finally:
        listed.unlink(missing_ok=True)


def _admit(directory: RunDirectory, config: GenerateConfig, policy: OutputPolicy) -> dict[str, Any] | None:
    """Refuses an output that is there and is not to be continued or replaced; changes nothing, and needs no recipe.

    Returns:
        The settings of the run that is continued, if one is.
    """
    with faults_explained(directory.root):
        previous = read_json(directory.settings)
    if directory.single_file and directory.single_file.is_dir():
        raise RunError(f"{directory.single_file} is a folder; choose another --out")
    if previous is None:
        replaceable = directory.single_file if policy.overwrite else None
        for path in filter(None, (directory.single_file, directory.root)):
            if path != replaceable and _is_occupied(path):
                raise RunError(f"{path} is there already and is no run of pearl-gen; choose another --out")
        return None
    if policy.overwrite:
        return None
    if not policy.resume:
        state = "a finished run" if directory.manifest.exists() else "an unfinished run"
        raise RunError(f"{directory.root} holds {state}: --resume continues it, --overwrite starts anew")
    if previous["config"] != config.as_json():
        changes = _differences(previous["config"], config.as_json())
        raise RunError(f"{directory.root} was made with another configuration; it cannot be resumed:\n{changes}")
    return previous


def _refuse_another_recipe(directory: RunDirectory, previous: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    if previous is not None and previous["fingerprint"] != settings["fingerprint"]:
        changes = _differences(previous["recipe"], settings["recipe"])
        raise RunError(
            f"{directory.root} was made with other inputs, models or versions; it cannot be resumed:\n{changes}"
        )


def _is_occupied(path: Path) -> bool:
    """A file, or a folder with a file in it: of a run that never began empty folders, a lock and an unfinished plan may
    be left."""
    return path.is_file() or any(
        inner.is_file() for inner in path.rglob("*") if inner.name != "lock" and not inner.match(".*.tmp")
    )


def _differences(old: Any, new: Any, where: str = "") -> str:
    """The leaves in which two JSON values differ, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        lines = (_differences(old.get(n), new.get(n), f"{where}.{n}" if where else n) for n in names)
        return "\n".join(line for line in lines if line)
    return "" if old == new else f"  {where}: {old!r} there, {new!r} now"


@contextmanager
def _locked(directory: RunDirectory) -> Iterator[None]:
    with ExitStack() as stack:  # only taking the lock has its faults explained, not the work under it
        with faults_explained(directory.run):
            busy = RunError(f"another process is working on {directory.root}")
            stack.enter_context(locked(directory.run / "lock", busy))
        yield


def _complete(directory: RunDirectory) -> dict[str, Any] | None:
    """The manifest, when the run is complete and its output still there, unchanged."""
    manifest = read_json(directory.manifest)
    if manifest is None:
        return None
    folder = directory.root.parent if directory.single_file else directory.root
    intact = all((folder / f).exists() and file_hash(folder / f) == digest for f, digest in manifest["files"].items())
    return manifest if intact else None


def _make(
    directory: RunDirectory,
    task: ShardTask,
    engine: EngineConfig,
    policy: OutputPolicy,
    progress: Progress,
    planned: int,
) -> None:
    done, missing = [], []
    for number in range(task.total):
        marker = directory.finished(number, task.total, task.fingerprint)
        done.append(marker) if marker else missing.append(number)
    allowed = max(10.0, policy.max_quarantined * planned) if policy.max_quarantined else 0
    quarantined = 0

    def on_done(marker: dict[str, Any]) -> None:
        nonlocal quarantined
        quarantined += marker["quarantined"]
        progress.update(marker)
        if quarantined > allowed:
            raise RunError(
                f"{quarantined} of {planned} samples are quarantined, more than --max-quarantined allows; the reasons"
                f" stand in {directory.run / 'refused'}"
            )

    with progress.over(planned):
        for marker in done:
            on_done(marker)
        if missing:
            make_shards(task, missing, engine, on_done)


def _finish(directory: RunDirectory, task: ShardTask, settings: dict[str, Any], planned: int) -> dict[str, Any]:
    """Checks the sums, joins the shards where one file is wanted, and writes the manifest last."""
    sums: dict[str, Counter[str]] = {name: Counter() for name in ("rejected", "skills", "steps", "tools", "seconds")}
    totals: Counter[str] = Counter()
    reexecuted: Counter[str] = Counter()
    peak_memory = 0.0
    for marker in directory.markers(task.total):
        for name, counter in sums.items():
            counter.update(marker[name])
        reexecuted.update(marker.get("reexecuted", {}))
        peak_memory = max(peak_memory, marker["peak_memory_mb"])
        totals.update({name: marker[name] for name in ("planned", "kept", "quarantined", "bytes")})
    rejected = sum(sums["rejected"].values())
    if not totals["kept"] + rejected + totals["quarantined"] == totals["planned"] == planned:
        raise RunError(f"the counts do not add up: {dict(totals)}, {rejected} rejected, {planned} planned")
    directory.remove_strangers(task.total)
    shards = [directory.shard(number, task.total) for number in range(task.total)]
    if directory.single_file:
        made_by = {"fingerprint": task.fingerprint, "config": settings["config"]}
        with whole(directory.single_file) as partial:
            concatenate(shards, partial, made_by)
        files = {directory.single_file.name: file_hash(directory.single_file)}
    else:
        hashes = (marker["sha256"] for marker in directory.markers(task.total))
        files = {f"data/{shard.name}": digest for shard, digest in zip(shards, hashes, strict=True)}
    manifest = {
        "pearl": __version__,
        "fingerprint": task.fingerprint,
        "files": files,
        "planned": planned,
        "kept": totals["kept"],
        "quarantined": totals["quarantined"],
        "bytes": totals["bytes"],
        "peak_memory_mb": peak_memory,
        **{name: dict(sorted(counter.items())) for name, counter in sums.items()},
        **({"costs": as_manifest(task.endpoint.url, directory.ledger)} if task.endpoint else {}),
        **({"reexecuted": dict(sorted(reexecuted.items()))} if reexecuted else {}),
        **settings,
    }
    write_json(directory.manifest, manifest)
    if directory.single_file:
        shutil.rmtree(directory.data)
    return manifest


def preview(config: GenerateConfig, out: Path, policy: OutputPolicy) -> dict[str, Any]:
    """What `generate` would do, without writing: samples by source, shards, what becomes of the first of each source.

    Raises:
        RunError: `generate` would refuse.
        SourceError: a source cannot be used.
        ToolUnavailable: a tool or its model is missing.
    """
    there = RunDirectory(out.absolute(), config.source_options.split)
    previous = _admit(there, config, policy)
    settings = _settings(config)
    _refuse_another_recipe(there, previous, settings)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "preview", config.source_options.split)
        directory.create()
        directory.write_plan(config.open_sources(), config.shard_size)
        planned, total = directory.size()
        if planned == 0:
            raise RunError("the sources hold no sample")
        sources = [source for shard in range(total) for _, source, _ in directory.planned(shard)]
        outcomes: dict[int, list[Trajectory | Refusal]] = {}
        if not isinstance(config, PlannerConfig):  # a planner would cost money
            maker = ShardMaker(ShardTask(config, settings["fingerprint"], str(directory.root), total))
            outcomes = maker.first_outcomes(PREVIEWED)
    return {
        "out": str(out),
        "planned": planned,
        "shards": total,
        "by_source": {config.sources[number]: count for number, count in sorted(Counter(sources).items())},
        "fingerprint": settings["fingerprint"],
        "outcomes": {config.sources[number]: found for number, found in sorted(outcomes.items())},
    }
