"""`pearl-gen split`, `merge`, `sample`, `filter`, `dedup`, `decontaminate`: each parses and calls one function."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from pearl.cli.options import Data, console, names, not_parquet

Datasets = Annotated[list[str], typer.Argument(help="Parquet files, folders, globs or Hub dataset ids.")]
Out = Annotated[Path, typer.Option(help="The Parquet file to write.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]


SampleBalance = Literal["skill", "source", "expert"]
MergeBalance = Literal["input", "source", "skill"]
By = Literal["either", "image", "question", "both"]


def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write; each part is a file in it.")],
    parts: Annotated[str, typer.Option(help="Names and shares, by comma.")] = "train=0.9,val=0.05,test=0.05",
    seed: Seed = 0,
    near: Annotated[
        int | None,
        typer.Option(help="Keep images together that differ in at most so many of 64 bits (4 is good).", min=0, max=12),
    ] = None,
) -> None:
    """Splits by image: no image is in two parts.

    Where an image goes depends on its bytes and the seed alone, so shares are met on average.

        pearl-gen split traj.parquet --out splits --parts train=0.9,test=0.1 --near 4
    """
    from pearl.pipelines.curation.splitting import Split, split_data

    counts = split_data(data, out, Split(_numbers(parts, "--parts"), seed, near))
    console.print(f"{_listed(counts)} in {out}")


def merge(
    data: Datasets,
    out: Out,
    balance: Annotated[
        MergeBalance | None, typer.Option(help="What gives equally much, or by --weights; all rows without it.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="name=weight by comma: skills, sources, or the datasets' numbers from 1.")
    ] = "",
    seed: Seed = 0,
) -> None:
    """Joins datasets, one after another; a row that stood before is left out.

    With --balance no row is repeated: the scarcest gives all that it has, the others fewer.

        pearl-gen merge a.parquet b.parquet --out ab.parquet --balance input --weights 1=2,2=1
    """
    from pearl.pipelines.curation.merging import Merge, merge_data

    merged = merge_data(data, out, Merge(balance, _numbers(weights, "--weights"), seed))
    repeated = f"; {merged.repeated} stood before" if merged.repeated else ""
    console.print(f"{sum(merged.kept.values())} trajectories in {out}: {_listed(merged.kept)}{repeated}")


def sample(
    data: Data,
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="How many trajectories.")],
    balance: Annotated[SampleBalance | None, typer.Option(help="As many of each as there are.")] = None,
    seed: Seed = 0,
) -> None:
    """Draws trajectories without repeating one; they keep their order."""
    from pearl.pipelines.curation.sampling import sample_data

    drawn = sample_data(data, out, count, balance, seed)
    console.print(f"{count} trajectories in {out}" + (f": {_listed(drawn)}" if balance else ""))


def filter(
    data: Data,
    out: Out,
    skill: Annotated[str, typer.Option(help="Keep these skills, by comma.")] = "",
    tool: Annotated[str, typer.Option(help="Keep what uses no other tools than these, by comma.")] = "",
    min_steps: Annotated[int | None, typer.Option(min=0)] = None,
    max_steps: Annotated[int | None, typer.Option(min=0)] = None,
    gains: Annotated[Path | None, typer.Option(help="What pearl-eval gain measured on this data.")] = None,
    min_gain: Annotated[float | None, typer.Option(help="Least log-odds that the steps add.")] = None,
    min_image_gain: Annotated[float | None, typer.Option(help="Least that the best image adds beyond words.")] = None,
    min_width: Annotated[int | None, typer.Option(min=1, help="Of the original image, in pixels.")] = None,
    min_height: Annotated[int | None, typer.Option(min=1)] = None,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Width times height.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Keeps the trajectories that pass, in their order, and says why the others fell out."""
    from pearl.pipelines.curation.filtering import Filter, filter_data

    wanted = Filter(
        names(skill), names(tool), min_steps, max_steps, None if gains is None else str(gains), min_gain,
        min_image_gain, min_width, min_height, min_pixels, max_pixels,
    )  # fmt: skip
    found = filter_data(data, out, wanted)
    console.print(
        f"{found.kept} trajectories in {out}" + (f"; fell out: {_listed(found.dropped)}" if found.dropped else "")
    )


def dedup(
    data: Datasets,
    out: Out,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A dataset that is only compared with, e.g. your test set, by image and question, whatever the answer;"
            " may be repeated."
        ),
    ] = None,
    near: Annotated[
        int, typer.Option(min=0, max=12, help="Images that differ in at most so many of 64 bits count as one.")
    ] = 4,
    images_only: Annotated[
        bool, typer.Option("--images-only", help="One trajectory an image, whatever is asked about it.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="A JSON file: what was left out, and for which row.", callback=not_parquet)
    ] = None,
) -> None:
    """Leaves out near-duplicates within and across datasets: the same question and answer about nearly the same image.

    pearl-gen dedup a.parquet b.parquet --out ab.parquet --against test.parquet
    """
    from pearl.files import whole_file
    from pearl.pipelines.curation.duplicates import Dedup, dedup_data

    if report is not None and report.resolve() == out.resolve():
        raise typer.BadParameter(f"{out} cannot be both --out and --report")
    found = dedup_data(data, out, Dedup(near, images_only), against or [])
    if report is not None:
        with whole_file(report) as partial:
            partial.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    console.print(f"{found.kept} trajectories in {out}; {len(found.left_out)} near-duplicates left out")
    if found.unreadable:
        console.print(f"{found.unreadable} images cannot be decoded and were compared by their bytes alone")


def decontaminate(
    data: Data,
    bench: Annotated[
        list[str],
        typer.Option(help="name=FOLDER: images, Parquet, CSV, TSV or JSON files of a benchmark; may be repeated."),
    ],
    out: Annotated[Path | None, typer.Option(help="The Parquet file to write; without it only the report is.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Where the report goes, without suffix: a .json and a .md file.")
    ] = None,
    near: Annotated[
        int, typer.Option(min=0, max=12, help="Images that differ in at most so many of 64 bits overlap.")
    ] = 6,
    by: Annotated[By, typer.Option(help="What a row is left out for.")] = "either",
) -> None:
    """Leaves out what overlaps with benchmarks, by image and by question, and reports every match.

    pearl-gen decontaminate traj.parquet --bench vstar=DIR --bench mmvp=DIR --out clean.parquet
    """
    from pearl.pipelines.curation.decontamination import Decontamination, write_report
    from pearl.pipelines.curation.decontamination import decontaminate as compare

    found = compare(data, _folders(bench), out, Decontamination(near, by))
    stem = report or (out.with_name(f"{out.stem}.overlap") if out is not None else Path("overlap"))
    as_json, as_markdown = write_report(found, stem)
    where = "would stay" if out is None else f"in {out}" if found.kept else f"are left: {out} is not written"
    console.print(
        f"{found.kept} of {found.rows} trajectories {where}; {len(found.matches)} matches: {as_markdown}, {as_json}"
    )
    if out is not None and not found.kept:
        raise typer.Exit(1)


def _numbers(text: str, option: str) -> dict[str, float]:
    """`name=number,name=number`."""
    found = dict[str, float]()
    for pair in names(text):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name in found:
            raise typer.BadParameter(f"{option} {text!r}: {name} stands there twice")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise typer.BadParameter(f"{option} {text!r}: expected name=number,name=number") from error
        if not math.isfinite(found[name]):
            raise typer.BadParameter(f"{option} {text!r}: {name} is no finite number")
    return found


def _folders(specs: list[str]) -> dict[str, Path]:
    pairs = [spec.partition("=") for spec in specs]
    if any(not (name and folder) for name, _, folder in pairs):
        raise typer.BadParameter(f"--bench {' '.join(specs)}: expected name=FOLDER")
    if twice := [name for name, count in Counter(name for name, _, _ in pairs).items() if count > 1]:
        raise typer.BadParameter(f"--bench {' '.join(specs)}: {twice[0]} stands there twice")
    return {name: Path(folder).expanduser() for name, _, folder in pairs}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
