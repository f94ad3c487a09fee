"""The progress of a run: rows, rate, kept, rejected, quarantined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.progress import Task as BarTask
from rich.text import Text


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: BarTask) -> Text:
        return Text(f"{task.speed or 0:.1f} rows/s")


class Progress:
    """A progress bar on `console`; where that is no terminal, a line every tenth of the way."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.kept = self.rejected = self.quarantined = self.seen = 0
        self.total = self.reported = 0

    @classmethod
    def silent(cls) -> Progress:
        return cls(None)

    @contextmanager
    def over(self, total: int) -> Iterator[None]:
        self.total = total
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(),
            TextColumn("kept {task.fields[kept]} · rejected {task.fields[rejected]} · quarantined {task.fields[quarantined]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        shown = self.console is not None and self.console.is_terminal
        with Bar(*columns, console=self.console, disable=not shown) as self.bar:
            self.task = self.bar.add_task("trajectories", total=total, **dict[str, Any](self._counts()))
            yield

    def update(self, marker: dict[str, Any]) -> None:
        self.kept += marker["kept"]
        self.rejected += sum(marker["rejected"].values())
        self.quarantined += marker["quarantined"]
        self.seen += marker["planned"]
        self.bar.update(self.task, completed=self.seen, **dict[str, Any](self._counts()))
        if self.console is not None and not self.console.is_terminal and self.seen * 10 // self.total > self.reported:
            self.reported = self.seen * 10 // self.total
            counts = ", ".join(f"{name} {value}" for name, value in self._counts().items())
            self.console.print(f"{self.seen}/{self.total} samples: {counts}")

    def _counts(self) -> dict[str, int]:
        return {"kept": self.kept, "rejected": self.rejected, "quarantined": self.quarantined}
