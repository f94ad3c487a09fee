"""Trajectories in the formats of other trainers, and back: `pearl-gen export`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pearl import __version__
from pearl.files import whole_file
from pearl.parquet import TrajectoryWriter, open_parquet, read_group, read_trajectories, resolve
from pearl.pipelines.exporters.base import Exporter, JsonLinesExporter
from pearl.pipelines.exporters.messages import ExportError, Form, Message, Row
from pearl.plugins import Plugins
from pearl.records import Trajectory
from pearl.tools import ToolUnavailable, spec, tool_class
from pearl.trainer.conversation import Template, load_template

__all__ = [
    "ExportError",
    "Exported",
    "Exporter",
    "Form",
    "JsonLinesExporter",
    "Message",
    "Row",
    "bring_back",
    "export_data",
    "exporter_names",
    "read_export",
]

_PACKAGE = "pearl.pipelines.exporters"
EXPORTERS = Plugins(
    "export format",
    "pearl.exporters",
    {
        "trl": f"{_PACKAGE}.trl:Trl",
        "llamafactory": f"{_PACKAGE}.llamafactory:LlamaFactory",
        "ms-swift": f"{_PACKAGE}.msswift:MsSwift",
        "openai": f"{_PACKAGE}.openai:OpenAi",
    },
    f"{_PACKAGE}.base:Exporter",
    ExportError,
)


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        left_out: Rows that the format cannot hold, by reason.
        changed: Rows that `read_export` will not give back as they are.
        lost: What the template does not say; nothing can be read back then.
    """

    rows: int = 0
    images: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    lost: list[str] = field(default_factory=list)


def exporter_names() -> list[str]:
    """Built-in formats, then those of installed packages (entry-point group `pearl.exporters`)."""
    return EXPORTERS.names()


def exporter_class(kind: str) -> type[Exporter]:
    """
    Raises:
        ExportError: there is no such format, or its package does not load.
    """
    return EXPORTERS.find(kind)


def export_data(
    kind: str,
    data: str | Path,
    out: Path,
    template: str = "pearl",
    *,
    native_calls: bool = False,
    inline_images: bool = False,
) -> Exported:
    """Writes trajectories as another trainer reads them; a few row groups are in memory at a time.

    Args:
        template: Whose words the turns have: a shipped name or a JSON file.
        native_calls: Calls in the format's own turns, with the tools' specifications, instead of in words.
        inline_images: Images in the rows, where the format has both ways.

    Raises:
        ExportError: `out` exists, the format does not have what is asked for, or no row can be held.
        DataError, TemplateError: data or template cannot be read.
    """
    exporter = exporter_class(kind)(native_calls=native_calls, inline_images=inline_images)
    form = Form(load_template(template), native_calls)
    if out.exists():
        raise ExportError(f"{out} exists already")
    made_by = {
        "kind": kind, "template": asdict(form.template), "native_calls": native_calls, "inline_images": inline_images,
        "exported_from": str(data), "pearl_version": __version__,
        **({"tools": tool_specs(data)} if native_calls else {}),
    }  # fmt: skip
    exported = Exported(lost=form.lost())
    exporter.write(_rows(data, form, exporter, exported), out, made_by)
    return exported


def _rows(data: str | Path, form: Form, exporter: Exporter, exported: Exported) -> Iterator[Row]:
    """The rows that the format can hold, counted."""
    for trajectory in read_trajectories(data):
        row = form.row(trajectory)
        if reason := exporter.refusal(row):
            exported.left_out[reason] += 1
            continue
        exported.rows += 1
        exported.images += len(row.images)
        exported.changed += not exported.lost and not _comes_back(row, form, trajectory)
        yield row
    if not exported.rows:
        raise ExportError(f"{data}: there is no row to export: {dict(exported.left_out)}")


def _comes_back(row: Row, form: Form, trajectory: Trajectory) -> bool:
    try:
        return form.trajectory(row) == trajectory
    except ExportError:
        return False


def tool_specs(data: str | Path) -> list[dict[str, Any]]:
    """Function-calling specifications of the tools that a dataset uses; by name alone where one is not installed."""
    names = set[str]()
    for path in resolve(data):
        file = open_parquet(path)
        for group in range(file.num_row_groups):
            for row in read_group(path, file, group, ["steps.list.element.tool"]):
                names |= {step["tool"] for step in row["steps"] or () if step}
    return [_spec(name) for name in sorted(names)]


def _spec(name: str) -> dict[str, Any]:
    try:
        return spec(tool_class(name))
    except ToolUnavailable:
        parameters = {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def read_export(kind: str, path: Path) -> Iterator[Trajectory]:
    """The trajectories of an export, one after another, as its messages say them now.

    Raises:
        ExportError: it is no export of that kind, its template does not say all of a trajectory, or a row is not in
            the template's words.
    """
    form, rows = _opened(kind, path)
    return map(form.trajectory, rows)


def bring_back(kind: str, path: Path, out: Path) -> dict[str, str]:
    """Writes the trajectories of an export as one Parquet file, which appears whole or not at all.

    Returns:
        The rows that were left out, by id, with the reason: their messages are not in the template's words any more.

    Raises:
        ExportError: `out` exists, the export cannot be read, its template does not say all, or no row is left.
    """
    form, rows = _opened(kind, path)
    if lost := form.lost():
        raise ExportError(f"{path}: its template does not say ${', $'.join(lost)}: no trajectory can be read back")
    if out.exists():
        raise ExportError(f"{out} exists already")
    left_out, written = dict[str, str](), 0
    with whole_file(out) as partial, TrajectoryWriter(partial, {"brought_back": {"kind": kind}}) as writer:
        for row in rows:
            try:
                trajectory = form.trajectory(row)
            except ExportError as error:
                left_out[str(row.facts.get("id"))] = str(error)
                continue
            writer.write(trajectory)
            written += 1
        if not written:
            raise ExportError(f"{path}: no row can be read back: {next(iter(left_out.values()), 'there is none')}")
    return left_out


def _opened(kind: str, path: Path) -> tuple[Form, Iterator[Row]]:
    """How an export's rows became messages, and its rows."""
    made_by = exporter_class(kind)().made_by(path)
    if made_by.get("kind") != kind:
        raise ExportError(f"{path} is an export of kind {made_by.get('kind')!r}, not {kind!r}")
    try:
        form = Form(Template(**made_by["template"]), made_by["native_calls"])
        options = {"native_calls": form.native_calls, "inline_images": made_by["inline_images"]}
    except (KeyError, TypeError) as error:
        raise ExportError(f"{path}: the export's settings are damaged: {error}") from error
    return form, exporter_class(kind)(**options).read(path)
