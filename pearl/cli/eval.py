"""`pearl-eval`: benchmarks, evidence about latents, and how much tools help. It parses and calls one function."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, cast

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from rich.table import Table

from pearl import __version__
from pearl.cli.options import console, exit_with_message, names, opt
from pearl.trainer.config import Precision

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True
)


Scoring = Literal["strict", "lvr", "pearl-published"]
ToolPrompt = Literal["auto", "spec", "json", "none"]
LatentEnd = Literal["quota", "token"]
MODELS, ANSWERS, RUN = "Models", "Questions and answers", "Run"


Model = Annotated[str, typer.Argument(help="A transformers folder or Hub id, or vlm-nano.")]
Models = Annotated[list[str], typer.Argument(help="Transformers folders or Hub ids, or vlm-nano.")]
Device = Annotated[str, opt(MODELS, "auto: a GPU where there is one.")]
Dtype = Annotated[Precision, opt(MODELS, "auto: bf16 on a GPU, fp32 on a CPU.")]
RemoteCode = Annotated[bool, opt(MODELS, "Run code that comes with a model.", "--trust-remote-code")]
Pickle = Annotated[bool, opt(MODELS, "Read pickle weights, which may run code.", "--allow-pickle")]
BatchSize = Annotated[int, opt(RUN, "Questions that are decoded together.", min=1)]
Data = Annotated[str, opt(RUN, "Trajectories: a Parquet file, folder, glob or Hub dataset id.")]
Limit = Annotated[int, opt(RUN, "Only the first so many trajectories.", min=1)]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Shows what came of a training: benchmarks, explicit tool use, evidence about latents."""
    if version:
        console.print(f"pearl-eval {__version__}")


@app.command()
def run(
    models: Models,
    bench: Annotated[
        str,
        opt(
            ANSWERS,
            "By comma: scenes, vstar, mmvp, blink, trajectories=DATA, a plug-in's; name=PLACE for a folder or Hub id.",
        ),
    ] = "scenes",
    mode: Annotated[str, opt(ANSWERS, "By comma: direct, tools (real calls), latent (lvr and mirage).")] = "direct",
    scoring: Annotated[Scoring, opt(ANSWERS, "How questions are worded and options read.")] = "strict",
    limit: Annotated[int | None, opt(ANSWERS, "Only the first so many questions of each category.", min=1)] = None,
    max_new_tokens: Annotated[
        int, opt(ANSWERS, "New tokens a turn, at most, where the scoring does not say.", min=1)
    ] = 256,
    opening: Annotated[
        str,
        opt(
            ANSWERS,
            "What an answer begins with (mode direct; in tools the last turn): 'Answer:' for models of whole trajectories.",
        ),
    ] = "",
    tools: Annotated[str, opt(ANSWERS, "Tools of mode tools, by comma.")] = "crop,zoom,depth",
    depth_model: Annotated[str | None, opt(ANSWERS, "The depth tool's: a folder or Hub id.")] = None,
    segment_model: Annotated[str | None, opt(ANSWERS, "The segment tool's.")] = None,
    detect_model: Annotated[str | None, opt(ANSWERS, "The detect tool's, which has none built in.")] = None,
    max_calls: Annotated[int, opt(ANSWERS, "Calls a question, at most (mode tools).", min=0)] = 6,
    max_tool_pixels: Annotated[
        int, opt(ANSWERS, "Pixels, at most, of all images that a question's calls return.", min=0)
    ] = 16_000_000,
    tool_prompt: Annotated[
        ToolPrompt, opt(ANSWERS, "How tools are announced; auto: as in training, else by the chat template, else JSON.")
    ] = "auto",
    latents: Annotated[int | None, opt(ANSWERS, "In a run of mode latent (mirage: as trained; lvr: 8).", min=0)] = None,
    latent_end: Annotated[
        LatentEnd,
        opt(ANSWERS, "What ends a run of lvr: its number of latents, or the model's own end token before that."),
    ] = "quota",
    out: Annotated[Path, opt(RUN, "The results' folder.")] = Path("runs/eval"),
    resume: Annotated[
        bool, opt(RUN, "Go on with what is in --out; models, modes and benchmarks may be added.", "--resume")
    ] = False,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
) -> None:
    """Puts benchmarks to models, and leaves every prediction, a table and a page.

    pearl-eval run vlm-nano runs/pearl/model --opening Answer:     the built-in model and yours, on held-out scenes

    pearl-eval run MODEL --bench vstar,mmvp=DIR --mode direct,tools
    """
    with exit_with_message():
        from pearl.evaluation.records import Mode
        from pearl.evaluation.report import markdown
        from pearl.evaluation.run import EvalConfig, evaluate

        models_of_tools = {"depth": depth_model, "segment": segment_model, "detect": detect_model}
        config = EvalConfig(
            models=tuple(models), benchmarks=names(bench), modes=cast("tuple[Mode, ...]", names(mode)), out=str(out), scoring=scoring,
            limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, opening=opening, tools=names(tools),
            tool_settings={name: {"model": place} for name, place in models_of_tools.items() if place},
            max_calls=max_calls, max_tool_pixels=max_tool_pixels, tool_prompt=tool_prompt, latents=latents, latent_end=latent_end,
            device=device, dtype=dtype, resume=resume,
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
        )  # fmt: skip
        summary = evaluate(config)
        console.print(markdown(summary))
        console.print(f"every prediction, and the page:  {out}/report.html")


@app.command()
def latents(
    models: Models,
    data: Data,
    limit: Limit = 256,
    out: Annotated[Path, opt(RUN, "Where latents.json, latents.md and latents.png go.")] = Path("runs/latents"),
    max_new_tokens: Annotated[int, opt(ANSWERS, "New tokens an answer, at most, latents included.", min=1)] = 128,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
) -> None:
    """Asks what latents are worth: replaced, counted, retrieved among others', compared with the tools' output.

    Of models that pearl-train made with lvr, mirage or pearl (there: of the predicted embedding).
    """
    with exit_with_message("stopped; what models gave before stands in --out"):
        from pearl.evaluation.latents import Evidence, NoLatents, latent_evidence
        from pearl.evaluation.latents_report import markdown, write_evidence
        from pearl.evaluation.subject import Subject
        from pearl.parquet import DataError, read_trajectories

        if (out / "latents.json").exists():
            raise DataError(f"{out} holds evidence already: choose another --out, or remove it")
        trajectories = list(islice(read_trajectories(data, one_split=True), limit))
        found, without = list[Evidence](), list[str]()
        for name in models:
            subject = Subject.load(name, device, dtype, allow_pickle, trust_remote_code)
            try:
                found.append(latent_evidence(subject, trajectories, batch_size, max_new_tokens, progress=True))
            except NoLatents as error:
                without.append(f"{name}: {error}")
                continue
            finally:
                del subject  # before the next one is loaded
            console.print(markdown(found[-1:]))
            write_evidence(found, out)
        for said in without:
            console.print(f"left out: {said}")
        if not found:
            raise NoLatents("none of the models gave what could be looked at")
        console.print(f"the curves:  {out}/latents.png")


@app.command()
def gain(
    data: Annotated[str, typer.Argument(help="Trajectories: a Parquet file, folder, glob or Hub dataset id.")],
    model: Annotated[str, opt(MODELS, "A transformers folder or Hub id.")] = "vlm-nano",
    template: Annotated[str, opt(ANSWERS, "Conversation template: a shipped name or a JSON file.")] = "pearl",
    limit: Annotated[int | None, opt(RUN, "Only the first so many trajectories.", min=1)] = None,
    out: Annotated[Path, opt(RUN, "A row a trajectory; pearl-gen filter takes it.")] = Path("gain.parquet"),
    resume: Annotated[bool, opt(RUN, "Go on with a measurement that was stopped.", "--resume")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measures how much each step's tool output raises the right answer's log-odds over what the image alone gives."""
    with exit_with_message():
        from tqdm import tqdm

        from pearl.evaluation.gain import Gain, GainMeter, by_skill, measure_gains_resumably, write_gains
        from pearl.evaluation.subject import Subject
        from pearl.parquet import DataError, count_rows, holds_trajectories, read_trajectories
        from pearl.trainer.conversation import load_template

        if holds_trajectories(out):
            raise DataError(f"{out} is a file of trajectories: choose another --out")
        journal = out.with_name(f"{out.name}.jsonl")
        if out.exists() and not journal.exists():
            raise DataError(f"{out} is there already, and finished: choose another --out, or remove it")
        total = min(count_rows(data, one_split=True), limit or 2**31)
        subject = Subject.load(model, device, dtype, allow_pickle, trust_remote_code)
        words = load_template(template)
        meter = GainMeter(subject, words)
        gains, skipped = list[Gain](), list[tuple[str, str]]()
        asked = {"model": subject.fingerprint(), "dtype": str(subject.model.dtype), "template": asdict(words)}
        rows = islice(read_trajectories(data, one_split=True), total)
        measured = measure_gains_resumably(meter, rows, journal, asked, resume)
        for trajectory, found in tqdm(measured, total=total, unit="trajectory"):
            if isinstance(found, Gain):
                gains.append(found)
            else:
                skipped.append((trajectory.id, found))
        write_gains(gains, out)
        journal.unlink()
        table = Table("skill", "count", "p before", "p words", "p after", "gain", "of images", "gain ≤ 0")
        for row in by_skill(gains):
            table.add_row(
                row.skill, str(row.count), f"{row.before:.3f}", f"{row.words:.3f}", f"{row.after:.3f}",
                f"{row.gain:+.2f}", f"{row.image_gain:+.2f}", f"{row.useless:.0%}",
            )  # fmt: skip
        console.print(table)
        for name, reason in skipped[:5]:
            console.print(f"not measured: {name}: {reason}")
        more = f", {len(skipped)} not measured" if skipped else ""
        console.print(f"{len(gains)} trajectories in {out}{more}")


def main() -> None:
    app(prog_name="pearl-eval")


if __name__ == "__main__":
    main()
