"""`pearl-gen trajectories`: parses and calls one function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pearl.cli.options import (
    CLUSTER,
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
    names,
)

ExpertOption = Literal["annotations", "planner"]
TOOLS, PLANNER = "Tools", "Planner"


def trajectories(
    source: Annotated[
        list[str],
        typer.Option(
            help="Where samples come from; may be repeated. photos | scenes | coco:FILE | folder:DIR | parquet:PATH |"
            " hf:ORG/NAME",
            rich_help_panel=INPUT,
        ),
    ] = ["photos", "scenes"],  # noqa: B006
    count: Annotated[int, typer.Option(min=1, help="scenes: how many samples.", rich_help_panel=INPUT)] = 240,
    split: Annotated[
        Split,
        typer.Option(help="Of scenes (splits share none) and of hf:; what shards are called.", rich_help_panel=INPUT),
    ] = "train",
    size: Annotated[int, typer.Option(min=112, max=2048, help="scenes: pixels a side.", rich_help_panel=INPUT)] = 384,
    skill: Annotated[
        str,
        typer.Option(
            help="scenes: ask only about these, by comma, e.g. attribute,shape or outermost.", rich_help_panel=INPUT
        ),
    ] = "",
    images: Annotated[str | None, typer.Option(help="coco: the images' folder.", rich_help_panel=INPUT)] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="coco: JSONL of questions; made from the boxes when not given.", rich_help_panel=INPUT),
    ] = None,
    annotate: Annotated[
        str,
        typer.Option(
            help="folder: tools that annotate its images, of detect,segment,ocr,depth; with the models under Tools.",
            rich_help_panel=INPUT,
        ),
    ] = "",
    labels: Annotated[
        str, typer.Option(help='--annotate detect: what to look for, e.g. "cat,cup".', rich_help_panel=INPUT)
    ] = "",
    detect_scores: Annotated[
        str,
        typer.Option(
            help="--annotate detect: LEAST,SURE. Below the first nothing was found, below the second it is unsure,"
            " and nothing is asked about its label.",
            rich_help_panel=INPUT,
        ),
    ] = "0.15,0.4",
    ocr_scores: Annotated[
        str, typer.Option(help="--annotate ocr: the same for lines of text.", rich_help_panel=INPUT)
    ] = "0.5,0.9",
    columns: Annotated[
        str, typer.Option(help="parquet, hf: ours=theirs,… for columns of other names.", rich_help_panel=INPUT)
    ] = "",
    max_pixels: MaxPixels = 64_000_000,
    tools: Annotated[
        str, typer.Option(help="What the experts may use; `pearl-gen tools` lists them.", rich_help_panel=TOOLS)
    ] = "crop,depth",
    depth_model: Annotated[
        str,
        typer.Option(
            help="depth-nano (built in), sensor (the sample's own depth), or a folder or Hub id of any"
            " depth-estimation checkpoint.",
            rich_help_panel=TOOLS,
        ),
    ] = "depth-nano",
    segment_model: Annotated[
        str, typer.Option(help="grabcut, or a folder or Hub id of a SAM-type model.", rich_help_panel=TOOLS)
    ] = "grabcut",
    detect_model: Annotated[
        str | None,
        typer.Option(help="A folder or Hub id of an open-vocabulary detector.", rich_help_panel=TOOLS),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="For the models: cpu, cuda, …; what the worker has when not given.", rich_help_panel=TOOLS),
    ] = None,
    expert: Annotated[
        ExpertOption,
        typer.Option(
            help="Who decides the steps: programs that read the annotations, or a model.", rich_help_panel=PLANNER
        ),
    ] = "annotations",
    endpoint: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server, e.g. http://localhost:8000/v1.", rich_help_panel=PLANNER),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The planner, as the server names it.", rich_help_panel=PLANNER)
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(help="The environment variable with the key.", rich_help_panel=PLANNER)
    ] = "OPENAI_API_KEY",
    tries: Annotated[
        int,
        typer.Option(min=1, help="Tries a sample, at most; the shortest right one is kept.", rich_help_panel=PLANNER),
    ] = 3,
    max_calls: Annotated[int, typer.Option(min=1, max=6, help="Tool calls a try.", rich_help_panel=PLANNER)] = 6,
    temperature: Annotated[float, typer.Option(min=0, max=2, rich_help_panel=PLANNER)] = 0.7,
    max_reply_tokens: Annotated[int, typer.Option(min=1, help="Of each turn.", rich_help_panel=PLANNER)] = 1024,
    image_side: Annotated[
        int, typer.Option(min=28, help="Larger images are sent smaller, in pixels.", rich_help_panel=PLANNER)
    ] = 1536,
    request: Annotated[
        str,
        typer.Option(help="More fields of each request, as JSON; null takes one away.", rich_help_panel=PLANNER),
    ] = "{}",
    endpoint_concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at once, of each worker.", rich_help_panel=PLANNER)
    ] = 8,
    endpoint_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a reply.", rich_help_panel=PLANNER)] = 120.0,
    endpoint_retries: Annotated[int, typer.Option(min=0, help="Of a request that fails.", rich_help_panel=PLANNER)] = 8,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many.", rich_help_panel=PLANNER)
    ] = None,
    max_tokens_total: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many, in and out.", rich_help_panel=PLANNER)
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Stop when so much money is spent.", rich_help_panel=PLANNER)
    ] = None,
    price_in: Annotated[float, typer.Option(min=0, help="Of a million tokens in.", rich_help_panel=PLANNER)] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="Of a million tokens out.", rich_help_panel=PLANNER)] = 0.0,
    cache: Annotated[
        Path | None, typer.Option(help="The folder of replies; the run's own if not given.", rich_help_panel=PLANNER)
    ] = None,
    out: Out = Path("traj.parquet"),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.", rich_help_panel=OUTPUT)] = 0,
    image_format: Annotated[
        ImageFormat,
        typer.Option(
            help="Of tool images (jpeg is quality 95, webp lossless) and scenes; auto: by tool.", rich_help_panel=OUTPUT
        ),
    ] = "auto",
    shard_size: ShardSize = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    max_quarantined: MaxQuarantined = 0.05,
    dry_run: DryRun = False,
    engine: EngineOption = "ray",
    address: Address = None,
    num_workers: NumWorkers = None,
    num_gpus_per_worker: Annotated[
        float,
        typer.Option(
            min=0,
            help="GPUs (or a fraction) for each worker's models; without it they run on the CPU.",
            rich_help_panel=CLUSTER,
        ),
    ] = 0.0,
) -> None:
    """Makes multi-step trajectories: experts solve questions with real tools, in parallel on Ray.

    The result is one Parquet file, or with --out DIR a folder of shards; `datasets.load_dataset` reads both.
    A run that was stopped continues with --resume and ends with the same bytes.

        pearl-gen trajectories --tools crop,depth
        pearl-gen trajectories --source scenes --count 10000 --out data --num-workers 16
        pearl-gen trajectories --source coco:instances.json --images val2017 --depth-model depth-anything/Depth-Anything-V2-Small-hf
        pearl-gen trajectories --source folder:photos --annotate detect,ocr,depth --detect-model DIR --labels "cat,cup" --tools crop,depth,ocr
        pearl-gen trajectories --expert planner --endpoint http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct
    """
    from pearl.cli.report import print_preview, print_summary
    from pearl.pipelines.config import GenerateConfig
    from pearl.pipelines.endpoint.config import Budget, EndpointConfig
    from pearl.pipelines.engines import EngineConfig
    from pearl.pipelines.experts.planner import PlannerSettings
    from pearl.pipelines.generate import OutputPolicy, generate, preview
    from pearl.pipelines.planner_rollout import PlannerConfig
    from pearl.pipelines.progress import Progress
    from pearl.pipelines.sources import AnnotationOptions, SourceOptions, Thresholds

    named, annotators = names(tools), names(annotate)
    encoded = None if image_format == "auto" else image_format
    on_device = {} if device is None else {"device": device}
    settings: dict[str, dict[str, Any]] = {
        "depth": {"model": _absolute_model(depth_model), **on_device},
        "segment": {"model": _absolute_model(segment_model), **on_device},
        "detect": {"model": detect_model and _absolute_model(detect_model), **on_device},
    }
    annotation = AnnotationOptions(
        annotators, names(labels), {name: settings[name] for name in annotators if name in settings},
        Thresholds(*_scores("--detect-scores", detect_scores)), Thresholds(*_scores("--ocr-scores", ocr_scores)),
    )  # fmt: skip
    everything = dict[str, Any](
        sources=tuple(_absolute_source(spec) for spec in source),
        source_options=SourceOptions(
            count=count, seed=seed, split=split, size=size, skills=names(skill),
            image_format=encoded or "jpeg", images=_absolute(images), questions=_absolute(questions),
            columns=_mapping(columns), tools=named, annotation=annotation, max_pixels=max_pixels,
        ),
        tools=named,
        tool_settings={name: settings[name] for name in named if name in settings},
        seed=seed,
        shard_size=shard_size,
        image_format=encoded,
    )  # fmt: skip
    config, server = GenerateConfig(**everything), None
    if expert == "planner":
        config = PlannerConfig(
            **everything,
            planner=PlannerSettings(
                model or "", tries, max_calls, temperature, max_reply_tokens, image_side, _object(request)
            ),
        )
        server = EndpointConfig(
            endpoint or "", api_key_env, endpoint_concurrency, endpoint_timeout, endpoint_retries,
            cache=_absolute(str(cache) if cache else None),
            budget=Budget(max_requests, max_tokens_total, max_cost, price_in, price_out),
        )  # fmt: skip
    else:
        _refuse_idle(
            {"--endpoint": endpoint or None, "--model": model or None, "--cache": cache, "--max-requests": max_requests,
             "--max-tokens-total": max_tokens_total, "--max-cost": max_cost}
        )  # fmt: skip
    run_on = EngineConfig(engine, address, num_workers, num_gpus_per_worker, server)
    policy = OutputPolicy(resume, overwrite, max_quarantined)
    if dry_run:
        print_preview(console, preview(config, out, policy))
        return
    manifest = generate(config, out, run_on, policy, Progress(errors))
    print_summary(console, manifest, out)
    if not annotators and any(spec.startswith("folder:") for spec in source):
        nano = "; depth-nano has seen nothing but rendered scenes: give --depth-model"
        console.print(
            "note: without --annotate the answers about a folder's images are the tools' readings, which nothing has checked"
            + nano * ("depth" in named and depth_model == "depth-nano")
        )
    if not manifest["kept"]:
        raise typer.Exit(1)


def _refuse_idle(planners: dict[str, Any]) -> None:
    """Refuses what only a planner reads."""
    if given := [option for option, value in planners.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(given)}: only with --expert planner")


def _absolute(path: str | None) -> str | None:
    """Workers, perhaps on other nodes, do not share the driver's working directory."""
    return None if path is None else str(Path(path).absolute())


def _absolute_source(spec: str) -> str:
    kind, colon, place = spec.partition(":")
    return f"{kind}:{_absolute(place)}" if place and kind != "hf" else f"{kind}{colon}{place}"


def _absolute_model(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _scores(option: str, text: str) -> tuple[float, float]:
    try:
        least, sure = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r}: expected LEAST,SURE, two numbers in 0..1") from None
    return least, sure


def _mapping(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in names(text)]
    if any(not (equals and theirs) for _, equals, theirs in pairs):
        raise typer.BadParameter(f"--columns {text!r}: expected ours=theirs,ours=theirs")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"--request {text!r}: expected a JSON object")
    return value
