"""`pearl-gen import`: parses and calls one function."""

from __future__ import annotations

from glob import has_magic
from pathlib import Path
from typing import Annotated

import typer

from pearl.cli.options import (
    INPUT,
    OUTPUT,
    Address,
    DryRun,
    EngineOption,
    ImageFormat,
    MaxPixels,
    MaxQuarantined,
    NumWorkers,
    Out,
    Overwrite,
    Resume,
    ShardSize,
    Split,
    console,
    errors,
)


def import_(
    kind: Annotated[
        str,
        typer.Argument(
            help="The format: lvr | visual-cot | thinkmorph | pixelreasoner | mirage | taco, or one that an installed"
            " package adds."
        ),
    ],
    path: Annotated[list[str], typer.Argument(help="A file, a folder, a glob or a Hub dataset id (org/name).")],
    images: Annotated[
        str | None,
        typer.Option(
            help="The folder or zip archive that the data's image paths start from (of a Hub dataset, also one of its"
            " own); the data's own folder when not given.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    reexecute: Annotated[
        bool,
        typer.Option(
            "--reexecute",
            help="Carry out again the recorded calls whose tool is known, and report what differs.",
            rich_help_panel=INPUT,
        ),
    ] = False,
    license: Annotated[
        str, typer.Option(help="The data's licence, recorded with each trajectory.", rich_help_panel=INPUT)
    ] = "unknown",
    max_pixels: MaxPixels = 64_000_000,
    out: Out = Path("imported.parquet"),
    split: Annotated[Split, typer.Option(help="What the shards are called.", rich_help_panel=OUTPUT)] = "train",
    image_format: Annotated[
        ImageFormat,
        typer.Option(help="Of images that tools make now (jpeg is quality 95); auto: by tool.", rich_help_panel=OUTPUT),
    ] = "auto",
    shard_size: ShardSize = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    max_quarantined: MaxQuarantined = 0.05,
    dry_run: DryRun = False,
    engine: EngineOption = "ray",
    address: Address = None,
    num_workers: NumWorkers = None,
) -> None:
    """Imports trajectories and grounding data that others published, in parallel on Ray.

    Where a format says where to look, the crop is carried out; where it brings images, they are kept. Every row that
    is rejected is counted by its reason. A run that was stopped continues with --resume and ends with the same bytes.

        pearl-gen import lvr meta_data_lvr_sft_stage1.json --images images
        pearl-gen import thinkmorph ThinkMorph/Visual_Search --out visual-search
        pearl-gen import pixelreasoner release.json --images images.zip --reexecute
    """
    from pearl.cli.report import print_preview, print_summary
    from pearl.pipelines.engines import EngineConfig
    from pearl.pipelines.generate import OutputPolicy, generate, preview
    from pearl.pipelines.importers import importer_class
    from pearl.pipelines.importers.config import ImportConfig
    from pearl.pipelines.progress import Progress
    from pearl.pipelines.run_directory import RunDirectory
    from pearl.pipelines.sources import SourceOptions

    config = ImportConfig(
        sources=tuple(_absolute(place) for place in path),
        source_options=SourceOptions(
            images=None if images is None else _absolute(images), split=split, max_pixels=max_pixels
        ),
        tools=importer_class(kind).tools,
        shard_size=shard_size,
        image_format=None if image_format == "auto" else image_format,
        kind=kind,
        license=license,
        reexecute=reexecute,
    )
    policy = OutputPolicy(resume, overwrite, max_quarantined)
    if dry_run:
        print_preview(console, preview(config, out, policy))
        return
    manifest = generate(config, out, EngineConfig(engine, address, num_workers), policy, Progress(errors))
    print_summary(console, manifest, out)
    if outcomes := manifest.get("reexecuted"):
        counts = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.items())
        console.print(f"carried out again: {counts}; each stands in {RunDirectory(out).run / 'differences'}")


def _absolute(place: str) -> str:
    """Workers do not share the driver's working directory; what is not there is on the Hub."""
    return str(Path(place).absolute()) if Path(place).exists() or has_magic(place) else place
