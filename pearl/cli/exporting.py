"""`pearl-gen export`: it parses and calls one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pearl.cli.options import console


def export(
    kind: Annotated[str, typer.Argument(help="trl | llamafactory | ms-swift | openai, or a plug-in's.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A Parquet file, a folder, a glob, or a Hub dataset id (org/name); with --back, an export."
        ),
    ],
    out: Annotated[Path, typer.Option(help="trl: the Parquet file to write; the others: the folder.")],
    back: Annotated[
        bool, typer.Option("--back", help="The other way: the trajectories of an export, as one Parquet file.")
    ] = False,
    template: Annotated[
        str, typer.Option(help="Whose words the turns have, as in pearl-train: a shipped name or a JSON file.")
    ] = "pearl",
    native_calls: Annotated[
        bool, typer.Option("--native-calls", help="Calls in the format's own turns, with the tools' specifications.")
    ] = False,
    inline_images: Annotated[
        bool, typer.Option("--inline-images", help="openai: images as data URIs instead of files.")
    ] = False,
) -> None:
    """Writes trajectories in the format of another trainer, or brings them back from it.

    pearl-gen export trl traj.parquet --out trl.parquet
    pearl-gen export llamafactory traj.parquet --out llamafactory --native-calls
    pearl-gen export llamafactory llamafactory --back --out corrected.parquet
    """
    from pearl.pipelines.exporters import bring_back, export_data

    if back:
        left_out = bring_back(kind, Path(data), out)
        for reason in left_out.values():
            console.print(f"left out: {reason}")
        console.print(f"the trajectories are in {out}" + (f"; left out: {len(left_out)}" if left_out else ""))
        return
    found = export_data(kind, data, out, template, native_calls=native_calls, inline_images=inline_images)
    console.print(f"{found.rows} trajectories with {found.images} images in {out}")
    for reason, count in found.left_out.items():
        console.print(f"left out: {count}, because {reason}")
    if found.lost:
        console.print(f"--back cannot read this export: the template leaves out ${', $'.join(found.lost)}")
    elif found.changed:
        console.print(
            f"{found.changed} rows would come back changed with --back (white space, or an answer in odd words)"
        )
