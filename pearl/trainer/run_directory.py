"""A training run's folder: its settings, its checkpoints, and whose it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pearl import __version__
from pearl.files import locked, whole_file
from pearl.trainer.config import ConfigError, TrainConfig, differences
from pearl.trainer.objectives.registry import make_objective

COMPLETE = "complete"
"""A checkpoint's last file: without it the checkpoint was cut off, and is never resumed from."""
RUN_SETTINGS = "config.json"
LOGS = ("log.jsonl", "refused.jsonl", "tensorboard", "checkpoints")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it while it is used.

    Raises:
        ConfigError: another run is at work there, or it is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "lock", ConfigError(f"another run is at work in {out}: give another --out")):
        yield


def claim(config: TrainConfig, out: Path, processes: int) -> None:
    """Claims an existing folder for this run, and deletes what a run that reached no checkpoint left there.

    Raises:
        ConfigError: another run or something else is there, or the run to resume had other settings or another number
            of processes.
    """
    before = _read(out)
    if last_checkpoint(out) is not None or (out / "model").exists():
        if not config.resume:
            raise ConfigError(f"{out} holds a run already: give another --out, or --resume to go on with it")
        if before is None:
            raise ConfigError(f"{out} holds no settings of a run to resume: give another --out")
        _refuse_changes(config, before["settings"], out)
        if (had := before.get("processes", processes)) != processes:
            raise ConfigError(f"the run in {out} had another number of processes: {had} → {processes}")
        return
    left = [out / name for name in LOGS if (out / name).exists()]
    if left and before is None:
        raise ConfigError(f"{out} holds something else ({left[0].name}): give another --out")
    for place in left:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    write_json(out / RUN_SETTINGS, {"version": __version__, "processes": processes, "settings": config.to_json()})


def record(resolved: TrainConfig, digests: Mapping[str, str], out: Path) -> None:
    """Writes the resolved settings, and digests of what they name (data, template, frozen weights): what lies at a path may
    have changed.

    Raises:
        ConfigError: the run to resume had others.
    """
    before = _read(out) or {}
    _refuse_changes(resolved, before.get("resolved", resolved.to_json()), out)
    for name, digest in digests.items():
        if before.get("digests", digests).get(name) != digest:
            raise ConfigError(f"the run in {out} had other {name}: what lies there has changed since it was begun")
    write_json(out / RUN_SETTINGS, {**before, "resolved": resolved.to_json(), "digests": digests})


def _refuse_changes(config: TrainConfig, before: Mapping[str, Any], out: Path) -> None:
    alone = make_objective(config.objective, config.objective_options).least_batch == 1
    if changed := differences(config, before, regroup=alone):
        raise ConfigError(
            f"the run in {out} had other settings: {'; '.join(changed)}; give another --out, where "
            f"--model {out}/model trains on from what came of it"
        )


def _read(out: Path) -> dict[str, Any] | None:
    path = out / RUN_SETTINGS
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["settings"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{out} holds a {RUN_SETTINGS} of something else: give another --out") from error
    return found


def write_json(path: Path, value: Any) -> None:
    """The file is there whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2), encoding="utf-8")


def checkpoints(out: Path) -> list[Path]:
    """Those that were written whole, the oldest first."""
    found = [path.parent for path in (out / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(out: Path) -> Path | None:
    return next(reversed(checkpoints(out)), None)
