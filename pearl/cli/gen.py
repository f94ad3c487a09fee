"""`pearl-gen`: makes, checks and shows trajectories. Each command parses and calls one function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from rich.table import Table

from pearl import __version__
from pearl.cli import curation
from pearl.cli.exporting import export
from pearl.cli.importing import import_
from pearl.cli.options import Data, console, errors, not_parquet
from pearl.cli.publishing import push
from pearl.cli.stats import stats
from pearl.cli.trajectories import trajectories
from pearl.errors import PearlError

app = typer.Typer(
    name="pearl-gen",
    help="Makes expert tool-use trajectories with real tools, checks them, and shows them.",
    epilog="Start with: pearl-gen trajectories --tools crop,depth",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
USAGE_ERROR: Any = typer.BadParameter.__base__
"""Of click, or of the copy of it that newer versions of typer bring."""


app.command(rich_help_panel="Make")(trajectories)


@app.command("tools", rich_help_panel="Make")
def list_tools(
    as_json: Annotated[bool, typer.Option("--json", help="Print the function-calling specifications.")] = False,
) -> None:
    """Lists the tools: their arguments with bounds, and whether their package or model is at hand."""
    from pearl.tools import Tool, ToolUnavailable, spec, tool_class, tool_names

    classes: list[type[Tool]] = []
    for name in tool_names():
        try:
            classes.append(tool_class(name))
        except ToolUnavailable as error:
            errors.print(f"{name}: {error}")
    if as_json:
        typer.echo(json.dumps([spec(tool) for tool in classes], indent=2))
        return
    table = Table(title="Tools", show_lines=True)
    for heading in ("tool", "what it does", "arguments", "ready"):
        table.add_column(heading, overflow="fold")
    for tool in classes:
        parameters = spec(tool)["function"]["parameters"]["properties"]
        arguments = "\n".join(f"{name}: {_bounds(schema)}" for name, schema in parameters.items())
        missing = tool().missing()
        table.add_row(tool.name, tool.description, arguments, f"no: {missing}" if missing else "yes")
    console.print(table)


def _bounds(schema: dict[str, Any]) -> str:
    """An argument's type, bounds and default, in a few words."""
    options = schema.get("anyOf", [schema])
    kind = " or ".join(str(option.get("type", option.get("enum", ""))) for option in options)
    words = {"minimum": "≥ {}", "maximum": "≤ {}", "minItems": "at least {}", "maxItems": "at most {}"}
    limits = [text.format(option[key]) for option in options for key, text in words.items() if key in option]
    if "enum" in schema:
        kind = " | ".join(schema["enum"])
    default = [f"default {schema['default']}"] if "default" in schema else []
    return ", ".join([kind, *limits, *default])


@app.command(rich_help_panel="Look")
def inspect(data: Data) -> None:
    """Counts by skill, tool, steps and source, what was rejected and why, sizes."""
    from pearl.cli.report import print_inspection
    from pearl.pipelines.inspection import inspect_data

    print_inspection(console, inspect_data(data))


@app.command(rich_help_panel="Look")
def validate(data: Data) -> None:
    """Checks every row: schema, unique ids, images decode, arguments valid, steps consistent. Exit code 1 if not."""
    from pearl.pipelines.validation import validate_data

    rows, problems = validate_data(data)
    for problem in problems[:50]:
        errors.print(problem, markup=False, highlight=False, soft_wrap=True)
    if len(problems) > 50:
        errors.print(f"… and {len(problems) - 50} more")
    console.print(f"{rows} trajectories, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


@app.command(rich_help_panel="Look")
def view(
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the page goes.", callback=not_parquet)] = Path("trajectories.html"),
    limit: Annotated[int, typer.Option(min=1, help="At most this many trajectories.")] = 300,
) -> None:
    """Writes one self-contained HTML page on which the trajectories can be looked at, filtered and searched."""
    from pearl.pipelines.view import write_page

    shown = write_page(data, out, limit)
    console.print(f"{shown} trajectories in {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser")


app.command("import", rich_help_panel="Make")(import_)
app.command(rich_help_panel="Look")(stats)
app.command(rich_help_panel="Change")(curation.split)
app.command(rich_help_panel="Change")(curation.merge)
app.command(rich_help_panel="Change")(curation.sample)
app.command(rich_help_panel="Change")(curation.filter)
app.command(rich_help_panel="Change")(curation.dedup)
app.command(rich_help_panel="Change")(curation.decontaminate)
app.command(rich_help_panel="Share")(export)
app.command(rich_help_panel="Share")(push)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"pearl-vlm {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line; what a user can mend is said in one line, without a traceback."""
    raise SystemExit(run(app))


def run(command: Callable[..., Any]) -> int:
    try:
        result = command(standalone_mode=False)
        return int(result or 0)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except USAGE_ERROR as error:
        error.show()
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        errors.print("stopped; an unfinished generation continues with --resume")
        return 130
    except (PearlError, OSError) as error:
        errors.print("error:", error, style="red")
        return 1


if __name__ == "__main__":
    main()
