"""What several commands share: where they print, and the options of a run of shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pearl.errors import PearlError

console = Console(markup=False, highlight=False, soft_wrap=True)
errors = Console(markup=False, highlight=False, soft_wrap=True, stderr=True)

INPUT, OUTPUT, CLUSTER = "Input", "Output", "Cluster"


def not_parquet(path: Path | None) -> Path | None:
    """Refuses an output path that is a file of trajectories."""
    if path is not None and path.suffix == ".parquet":
        raise typer.BadParameter(f"{path} ends in .parquet: that is for trajectories; a page or report goes elsewhere")
    if path is not None and _begins_as_parquet(path):
        raise typer.BadParameter(f"{path} is a Parquet file: a page or report goes elsewhere")
    return path


def _begins_as_parquet(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


@contextmanager
def exit_with_message(when_stopped: str = "stopped; --resume goes on") -> Iterator[None]:
    """Ends the command with a message where an exception comes out."""
    try:
        yield
    except (PearlError, OSError, json.JSONDecodeError) as error:
        errors.print(f"error: {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        errors.print(when_stopped)
        raise typer.Exit(130) from stop


def opt(panel: str, help_text: str, *names: str, **more: Any) -> Any:
    """An option of a panel of `--help`."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


def names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


Engine = Literal["ray", "local"]
ImageFormat = Literal["auto", "jpeg", "png", "webp"]
Split = Literal["train", "val", "test"]
Data = Annotated[str, typer.Argument(help="A Parquet file, a folder, a glob, or a Hub dataset id (org/name).")]
MaxPixels = Annotated[
    int, typer.Option(min=1, max=178_000_000, help="Larger images are refused.", rich_help_panel=INPUT)
]
Out = Annotated[Path, typer.Option(help="One .parquet file, or a folder of shards.", rich_help_panel=OUTPUT)]
ShardSize = Annotated[
    int | None, typer.Option(min=1, help="Samples a shard; 128, fewer in a small run.", rich_help_panel=OUTPUT)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue this very run.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew.", rich_help_panel=OUTPUT)]
MaxQuarantined = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Stop when more than this share fails (ten always may, unless 0).", rich_help_panel=OUTPUT
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and show the first one.", rich_help_panel=OUTPUT)
]
EngineOption = Annotated[Engine, typer.Option(help="local is a plain loop, for debugging.", rich_help_panel=CLUSTER)]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster to join, e.g. auto or host:6379.", rich_help_panel=CLUSTER)
]
NumWorkers = Annotated[
    int | None, typer.Option(min=1, help="One a CPU when not given (less one above four).", rich_help_panel=CLUSTER)
]
