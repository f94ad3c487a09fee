"""`pearl-gen stats`: parses and calls `pearl.pipelines.stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pearl.cli.options import console, not_parquet


def stats(
    data: Annotated[
        list[str], typer.Argument(help="A Parquet file, folder, glob or Hub dataset id; two for a comparison.")
    ],
    out: Annotated[Path, typer.Option(help="Where the page goes.", callback=not_parquet)] = Path("stats.html"),
    markdown: Annotated[
        Path | None, typer.Option(help="A Markdown file with the same figures.", callback=not_parquet)
    ] = None,
    near: Annotated[
        int | None,
        typer.Option(
            min=0, max=12, help="Also find images that differ in at most so many of 64 bits; decodes every original."
        ),
    ] = None,
) -> None:
    """Draws what a dataset is made of, or two side by side: one self-contained HTML page.

    Skills, tools, steps, answers against chance, boxes, images, words, duplicates, licences, bytes.

        pearl-gen stats traj.parquet
        pearl-gen stats train.parquet test.parquet --out stats.html --markdown stats.md --near 4
    """
    from pearl.files import whole_file
    from pearl.pipelines.stats import gather, write_page
    from pearl.pipelines.stats import markdown as as_markdown

    report = gather(data, near)
    write_page(report, out)
    if markdown is not None:
        with whole_file(markdown) as partial:
            partial.write_text(as_markdown(report), encoding="utf-8")
    rows = " and ".join(f"{one['rows']:,}" for one in report["datasets"])
    console.print(f"{rows} trajectories in {out}" + (f" and {markdown}" if markdown else "") + "; open it in a browser")
