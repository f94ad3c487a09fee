"""`pearl-train`: trains a vision-language model on trajectories. It parses and calls one function."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from rich.table import Table

from pearl import __version__
from pearl.cli.options import console, exit_with_message, names, opt
from pearl.errors import PearlError
from pearl.trainer.config import Precision, TrainConfig, Tune, make_config, read_settings
from pearl.trainer.console import is_first

Distance = Literal["cosine", "smooth-l1", "l2", "mse", "infonce"]
Targets = Literal["trajectory", "steps"]
NextLatToken = Literal["next", "published"]
WHAT, PEARL, MODEL, LOOP, IMAGES, RUN, CLUSTER = (
    "What to train",
    "Objective pearl",
    "Model",
    "Loop",
    "Images and lengths",
    "Run",
    "Cluster",
)


def train(
    data: Annotated[str | None, opt(WHAT, "Trajectories: a Parquet file, folder, glob or Hub dataset id.")] = None,
    objective: Annotated[
        str | None, opt(WHAT, "pearl (default), sft, sft-answer, lvr, mirage, or a plug-in's.")
    ] = None,
    config: Annotated[
        list[Path] | None,
        opt(WHAT, "Settings as JSON (recipes/paper); repeatable, the later wins; options win over all."),
    ] = None,
    template: Annotated[str | None, opt(WHAT, "Conversation template: a shipped name or a JSON file.")] = None,
    option: Annotated[
        list[str] | None, opt(WHAT, "A setting of the objective as name=value; repeatable.", "--option", "-O")
    ] = None,
    lambda_: Annotated[float | None, opt(PEARL, "Weight of L_JEPA and L_NextLat (0.2).", "--lambda")] = None,
    num_predictor_tokens: Annotated[int | None, opt(PEARL, "K (4).")] = None,
    jepa_distance: Annotated[Distance | None, opt(PEARL, "Of predicted and target embedding (cosine).")] = None,
    no_jepa: Annotated[bool, opt(PEARL, "Without L_JEPA.", "--no-jepa")] = False,
    no_nextlat: Annotated[bool, opt(PEARL, "Without L_NextLat.", "--no-nextlat")] = False,
    nextlat_token: Annotated[NextLatToken | None, opt(PEARL, "The token that L_NextLat predicts (next).")] = None,
    targets: Annotated[Targets | None, opt(PEARL, "Predict the trajectory's end, or each step's observation.")] = None,
    target_encoder: Annotated[
        str | None,
        opt(
            PEARL,
            "Predict a frozen image encoder's view of each tool image: timm:NAME, timm:local-dir:DIR or a folder.",
        ),
    ] = None,
    direct_weight: Annotated[float | None, opt(PEARL, "Weight of a further loss on the direct answer (0).")] = None,
    model: Annotated[str | None, opt(MODEL, "A transformers folder or Hub id; default: the built-in vlm-nano.")] = None,
    tune: Annotated[Tune | None, opt(MODEL, "All weights or LoRA; auto: all below 100M parameters.")] = None,
    freeze: Annotated[str | None, opt(MODEL, "Parts to freeze, by comma: vision, projector, language.")] = None,
    lora_rank: Annotated[int | None, opt(MODEL, "LoRA r (64).")] = None,
    lora_alpha: Annotated[int | None, opt(MODEL, "LoRA α (128).")] = None,
    lora_dropout: Annotated[float | None, opt(MODEL, "LoRA dropout (0.1).")] = None,
    attention: Annotated[str | None, opt(MODEL, "transformers' attention: sdpa (default) or eager.")] = None,
    trust_remote_code: Annotated[
        bool, opt(MODEL, "Run code that comes with the model.", "--trust-remote-code")
    ] = False,
    allow_pickle: Annotated[bool, opt(MODEL, "Read pickle weights, which may run code.", "--allow-pickle")] = False,
    epochs: Annotated[float | None, opt(LOOP, "How often each trajectory is seen (1).")] = None,
    max_steps: Annotated[int | None, opt(LOOP, "Updates; overrides --epochs.")] = None,
    batch_size: Annotated[int | None, opt(LOOP, "Trajectories per process and forward (4).")] = None,
    accumulation: Annotated[int | None, opt(LOOP, "Forwards per update (1).")] = None,
    learning_rate: Annotated[float | None, opt(LOOP, "AdamW's peak, then a cosine (1e-4).")] = None,
    warmup: Annotated[float | None, opt(LOOP, "Share of the steps (0.05).")] = None,
    weight_decay: Annotated[float | None, opt(LOOP, "AdamW's weight decay (0.1).")] = None,
    max_grad_norm: Annotated[float | None, opt(LOOP, "The gradient's norm is clipped to this; 0: never (1).")] = None,
    precision: Annotated[Precision | None, opt(LOOP, "auto: bf16 on a GPU, fp32 on a CPU.")] = None,
    gradient_checkpointing: Annotated[
        bool, opt(LOOP, "Less memory for more time.", "--gradient-checkpointing")
    ] = False,
    no_tree: Annotated[bool, opt(LOOP, "Each view in a row of its own: slower, for comparison.", "--no-tree")] = False,
    seed: Annotated[int | None, opt(LOOP, "Decides everything random (0).")] = None,
    min_pixels: Annotated[int | None, opt(IMAGES, "Smaller images are enlarged to this; saved with the model.")] = None,
    max_pixels: Annotated[int | None, opt(IMAGES, "Larger images are shrunk to this; saved with the model.")] = None,
    max_tokens: Annotated[int | None, opt(IMAGES, "Longer trajectories are left out, counted and named.")] = None,
    out: Annotated[str | None, opt(RUN, "The run's folder: checkpoints, log, model/ (runs/OBJECTIVE).")] = None,
    resume: Annotated[bool, opt(RUN, "Go on from the last checkpoint in --out.", "--resume")] = False,
    dry_run: Annotated[bool, opt(RUN, "Show sizes, what is trained, a batch; train nothing.", "--dry-run")] = False,
    eval_data: Annotated[str | None, opt(RUN, "Trajectories to evaluate on.")] = None,
    eval_fraction: Annotated[float | None, opt(RUN, "Else this share of the images is held out (0.05).")] = None,
    eval_steps: Annotated[int | None, opt(RUN, "Evaluate every so many updates; 0: in the end (0).")] = None,
    save_steps: Annotated[int | None, opt(RUN, "Checkpoint every so many updates (200).")] = None,
    keep_checkpoints: Annotated[int | None, opt(RUN, "How many of the last checkpoints to keep (2).")] = None,
    log_steps: Annotated[int | None, opt(RUN, "Log every so many updates (1).")] = None,
    data_workers: Annotated[
        int | None, opt(RUN, "Processes that decode and tokenize (on a GPU up to 4, on a CPU 0).")
    ] = None,
    push_to_hub: Annotated[str | None, opt(RUN, "Publish model/ under this Hub id, private.")] = None,
    num_workers: Annotated[int | None, opt(CLUSTER, "Train under Ray Train with so many workers.", min=1)] = None,
    use_gpu: Annotated[bool, opt(CLUSTER, "A GPU for each worker.", "--use-gpu")] = False,
    address: Annotated[str | None, opt(CLUSTER, "A Ray cluster to join; default: one on this machine.")] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Trains a vision-language model on tool-use trajectories; what comes out is a plain checkpoint.

    pearl-train --data traj.parquet          Pearl's objective on the built-in model, on this machine

    pearl-train --data traj.parquet --model Qwen/Qwen2.5-VL-3B-Instruct --objective sft --num-workers 4 --use-gpu
    """
    given = {name: value for name, value in locals().items() if value is not None and value is not False}
    if version:
        console.print(f"pearl-train {__version__}")
        return
    with exit_with_message("stopped; --resume goes on from the last checkpoint, if there is one"):
        for name in ("use_gpu", "address"):
            if name in given and num_workers is None:
                raise PearlError(f"--{name.replace('_', '-')} is about workers of Ray: say how many, --num-workers N")
        settings = _settings(given)
        if dry_run:
            _show_dry_run(settings, num_workers or 1)
        else:
            _train(settings, num_workers, use_gpu, address)


def _settings(given: dict[str, Any]) -> TrainConfig:
    """The configuration files' settings, changed by the options that were given. What is said of one objective does not
    go for another that is named later."""
    known = {field.name for field in fields(TrainConfig)} - {"objective_options"}
    changes = {name: value for name, value in given.items() if name in known}
    if "freeze" in given:
        changes["freeze"] = names(given["freeze"])
    if "no_tree" in given:
        changes["tree"] = False
    options: dict[str, Any] = {
        name: given[name]
        for name in (
            "lambda_",
            "num_predictor_tokens",
            "jepa_distance",
            "nextlat_token",
            "targets",
            "target_encoder",
            "direct_weight",
        )
        if name in given
    }
    options |= {name: False for name in ("jepa", "nextlat") if f"no_{name}" in given}
    options |= dict(_pair(text) for text in given.get("option", ()))
    settings: dict[str, Any] = {"objective_options": {}}
    for found in (*map(read_settings, given.get("config", ())), {**changes, "objective_options": options}):
        named = settings.get("objective", TrainConfig.objective)
        another = "objective" in settings and found.get("objective", named) != named
        before = {} if another else settings["objective_options"]
        settings |= {**found, "objective_options": {**before, **found.get("objective_options", {})}}
    if "data" not in settings:
        raise PearlError("say what to train on: --data traj.parquet (pearl-gen trajectories makes one)")
    settings.setdefault("out", f"runs/{settings.get('objective', TrainConfig.objective)}")
    return make_config(settings, "settings")


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise PearlError(f"--option {text}: expected name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _show_dry_run(config: TrainConfig, processes: int) -> None:
    from pearl.trainer.dry_run import dry_run

    found = dry_run(config, processes)
    console.print(found.trained)
    console.print(f"{found.trajectories} trajectories, {found.held_out} held out; {found.updates} updates")
    console.print(
        f"weights, gradients and optimizer: {found.gigabytes:.2f} GB a process; a forward of the longest trajectories keeps "
        f"about {found.activations:.2f} GB"
    )
    rows, length, padding = found.batch
    console.print(f"a forward of the first trajectories: {rows} rows of {length} tokens, {padding:.0%} of them padding")
    views = ", ".join(f"{name} {tokens}" for name, tokens in found.tokens.items())
    console.print(f"the first has {found.row} tokens in its row ({views}); what is learned is in 【brackets】")
    for name, text in found.texts.items():
        console.print(f"\n{name}:\n{text}")


def _train(config: TrainConfig, num_workers: int | None, use_gpu: bool, address: str | None) -> None:
    if num_workers is None:
        from pearl.trainer.train import train as run

        report = run(config)
    else:
        from pearl.trainer.cluster import train_on_ray

        report = train_on_ray(config, num_workers, use_gpu, address)
    if not is_first():
        return
    terms = [name for name in report.last if name.startswith("loss")]
    table = Table("", "first step", "last step")
    for name in sorted(terms):
        table.add_row(name, f"{report.first.get(name, float('nan')):.4f}", f"{report.last[name]:.4f}")
    console.print(table)
    for name, value in sorted(report.evaluation.items()):
        if name in ("eval_loss", "eval_answer_accuracy", "eval_answer_chance"):
            console.print(f"{name.removeprefix('eval_').replace('_', ' ')} on what was held out: {value:.3f}")
    if report.refused:
        left = "1 trajectory was" if report.refused == 1 else f"{report.refused} trajectories were"
        console.print(f"{left} left out: see {config.out}/refused.jsonl")
    console.print(f"{report.steps} updates; the model: {report.model}")
    console.print(f"curves: tensorboard --logdir {config.out}/tensorboard")


app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
app.command()(train)


def main() -> None:
    app(prog_name="pearl-train")


if __name__ == "__main__":
    main()
