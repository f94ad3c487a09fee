"""An evaluation, from its settings to a folder of results: what `pearl-eval run` calls."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from pearl.errors import PearlError
from pearl.evaluation.benchmarks.base import Benchmark, BenchmarkError
from pearl.evaluation.benchmarks.registry import open_benchmark
from pearl.evaluation.modes.base import DecodingMode
from pearl.evaluation.modes.direct import Direct
from pearl.evaluation.modes.latent import Latent
from pearl.evaluation.modes.tools import TOOLS, Prompt, ToolUse
from pearl.evaluation.records import Key, Mode, Prediction, Question, Reply, Scoring
from pearl.evaluation.report import write_report, write_summary
from pearl.evaluation.results import PLACE, Results, Setup, StoredResults, read_results
from pearl.evaluation.scoring import choice_of
from pearl.evaluation.statistics import Summary, summarise
from pearl.evaluation.subject import Subject
from pearl.trainer.config import Precision
from pearl.trainer.console import tell

OF_MODE: dict[Mode, tuple[str, ...]] = {
    "tools": ("tools", "tool_settings", "max_calls", "max_tool_pixels", "tool_prompt"),
    "latent": ("latents", "latent_end"),
}
"""Settings that are about one mode only."""


@dataclass(frozen=True)
class EvalConfig:
    """Settings.

    Attributes:
        models: Folders or Hub ids of transformers, or `vlm-nano`, which ships with the package.
        benchmarks: Names, or `name=PLACE` for a folder or Hub dataset id.
        modes: How the models answer.
        out: The results' folder.
        scoring: How questions are worded, and how an option is read from a reply.
        limit: Only the first so many questions of each category.
        batch_size: Questions that are decoded together.
        max_new_tokens: In a turn, where the scoring does not say.
        opening: What the assistant's turn begins with in mode `direct`, where the scoring does not say: a model that was
            trained on whole trajectories answers at once only after the words that its answers begin with.
        tools: Of mode `tools`; `tool_settings` are their constructors' arguments.
        max_calls: A question's, in mode `tools`; `max_tool_pixels`: of all images together that they may bring.
        tool_prompt: How tools are announced (`ToolUse`).
        latents: In a run, in mode `latent`; None: as many as the model was trained with, or 8 for `lvr`.
        latent_end: What ends a run of `lvr`: its quota, or the token that the model says before that.
        device, dtype: "auto": a GPU where there is one, and bf16 on it.
        resume: Go on with what is in `out`.
        trust_remote_code, allow_pickle: For models that need them.
    """

    models: tuple[str, ...]
    benchmarks: tuple[str, ...] = ("scenes",)
    modes: tuple[Mode, ...] = ("direct",)
    out: str = "runs/eval"
    scoring: Scoring = "strict"
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 256
    opening: str = ""
    tools: tuple[str, ...] = TOOLS
    tool_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_calls: int = 6
    max_tool_pixels: int = 16_000_000
    tool_prompt: Prompt = "auto"
    latents: int | None = None
    latent_end: Literal["quota", "token"] = "quota"
    device: str = "auto"
    dtype: Precision = "auto"
    resume: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if not (self.models and self.benchmarks and self.modes):
            raise PearlError("an evaluation needs at least one model, one benchmark and one mode")
        if unknown := set(self.modes) - set(get_args(Mode)):
            raise PearlError(f"there is no mode {', '.join(sorted(unknown))}; there are {', '.join(get_args(Mode))}")
        usual = {one.name: one.default for one in fields(self)} | {"tool_settings": {}}
        for mode, names in OF_MODE.items():
            if idle := [name for name in names if mode not in self.modes and getattr(self, name) != usual[name]]:
                raise PearlError(f"{idle[0]} is about mode {mode}, in which nothing is asked")
        if self.opening and self.modes == ("latent",):
            raise PearlError("opening is about modes direct and tools, in which nothing is asked")
        if min(self.batch_size, self.max_new_tokens) < 1:
            raise PearlError("--batch-size and --max-new-tokens must be at least 1")
        if self.scoring == "pearl-published" and ({*self.modes} - {"direct"} or self.opening):
            raise PearlError(
                "--scoring pearl-published allows four tokens behind an opening of its own: no room for latents or "
                "calls, so only mode direct, and no --opening"
            )
        if self.scoring == "lvr" and self.opening:
            raise PearlError("--scoring lvr reads the first character, which would be the --opening's: leave it out")

    def limits(self, mode: Mode) -> dict[str, Any]:
        """What decides the answers of a mode."""
        own: dict[Mode, dict[str, Any]] = {
            "direct": {"opening": self.opening},
            "tools": {
                "tools": list(self.tools), "tool settings": dict(self.tool_settings), "calls": self.max_calls,
                "pixels": self.max_tool_pixels, "opening": self.opening, "tool prompt": self.tool_prompt,
            },
            "latent": {"latents": self.latents, "end": self.latent_end},
        }  # fmt: skip
        return {"new tokens": self.max_new_tokens, **own[mode]}


def evaluate(config: EvalConfig, progress: bool = True) -> Summary:
    """Asks what has not been asked yet, and leaves predictions, `summary.json`, `summary.md` and `report.html`.

    A model that cannot answer in one of several modes is not asked in it, with a note.

    Raises:
        PearlError: a benchmark, a model or a tool cannot be used, no model can answer in any mode, or `out` holds
            something else. What was answered before that has its summary and page.
    """
    asked = [Asked.of(open_benchmark(name, config.scoring, config.limit)) for name in config.benchmarks]
    if twice := [name for name, count in Counter(one.benchmark.name for one in asked).items() if count > 1]:
        raise PearlError(f"the benchmark {twice[0]} stands there twice: give each place an --out of its own")
    modes = [_mode(name, config) for name in config.modes]
    begun, unable = False, list[str]()
    try:
        for name in config.models:
            subject = Subject.load(name, config.device, config.dtype, config.allow_pickle, config.trust_remote_code)
            able = [mode for mode in modes if not _refused(mode, subject, unable)]
            if able:
                setup = _setup(config, asked, subject, able)
                results = Results.open(Path(config.out), setup, resume=config.resume or begun)
                begun = True
                for mode, one in product(able, asked):
                    key = Key(name, mode.name, one.benchmark.name)
                    _answer(results, subject, mode, key, one.questions, config, progress)
            for mode in modes:
                mode.leave()
            del subject  # before the next one is loaded
    except Exception:
        if begun:
            write_everything(Path(config.out), asked)
        raise
    if not begun:
        raise PearlError("; ".join(unable))
    for reason in unable:
        tell(f"note: not asked: {reason}")
    return write_everything(Path(config.out), asked)


@dataclass(frozen=True)
class Asked:
    """A benchmark and its questions."""

    benchmark: Benchmark
    questions: tuple[Question, ...]

    @classmethod
    def of(cls, benchmark: Benchmark) -> Asked:
        """
        Raises:
            BenchmarkError: questions are missing, or two have the same id.
        """
        questions = benchmark.questions()
        if twice := [id for id, count in Counter(one.id for one in questions).items() if count > 1]:
            raise BenchmarkError(f"{benchmark.name}: {len(twice)} questions share their id with another: {twice[0]!r}")
        return cls(benchmark, questions)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed; where the benchmark lies may change."""
        digest = hashlib.sha256()
        for one in self.questions:
            words = (one.id, one.category, one.prompt, one.options, one.answer, one.opening, one.max_new_tokens)
            digest.update(json.dumps(words).encode())
            for image in one.images:
                digest.update(hashlib.sha256(image.data).digest())
        benchmark, found = self.benchmark, digest.hexdigest()[:16]
        return {"version": benchmark.version, "a category": benchmark.count, "questions": found, PLACE: benchmark.place}


def write_everything(folder: Path, asked: Sequence[Asked]) -> Summary:
    """Summary and page of all that a folder holds, benchmarks that were asked earlier included."""
    stored = read_results(folder)
    asked = [*asked, *_asked_before(stored, {one.benchmark.name for one in asked})]
    pairs = {one.benchmark.name: found for one in asked if (found := one.benchmark.pairs(one.questions))}
    summary = summarise(stored.predictions, pairs)
    write_summary(summary, folder)
    questions = {(one.benchmark.name, question.id): question for one in asked for question in one.questions}
    write_report(stored, summary, questions, folder / "report.html")
    return summary


def _asked_before(stored: StoredResults, known: Collection[str]) -> Iterator[Asked]:
    """The other benchmarks of a folder; one that has changed or is gone is left out: the page lacks its pictures."""
    for name, identity in stored.setup.benchmarks.items():
        if name not in known:
            with suppress(PearlError, OSError):
                spec = f"{name}={identity[PLACE]}" if identity[PLACE] else name
                one = Asked.of(open_benchmark(spec, stored.setup.scoring, identity["a category"]))
                if one.identity == identity:
                    yield one


def _refused(mode: DecodingMode, subject: Subject, unable: list[str]) -> bool:
    """Whether a model cannot answer in a mode; `unable` gets the reason."""
    try:
        mode.check(subject)
    except PearlError as error:
        unable.append(f"{subject.name} in mode {mode.name}: {error}")
        return True
    return False


def _mode(name: Mode, config: EvalConfig) -> DecodingMode:
    if name == "direct":
        return Direct(config.max_new_tokens, config.opening)
    if name == "latent":
        return Latent(config.max_new_tokens, config.latents, config.latent_end == "token")
    return ToolUse(
        config.tools, config.tool_settings, max_calls=config.max_calls, max_pixels=config.max_tool_pixels,
        max_new_tokens=config.max_new_tokens, opening=config.opening, prompt=config.tool_prompt,
    )  # fmt: skip


def _setup(config: EvalConfig, asked: Sequence[Asked], subject: Subject, modes: Sequence[DecodingMode]) -> Setup:
    return Setup(
        models={subject.name: {"weights": subject.fingerprint(), "dtype": str(subject.model.dtype)}},
        modes={mode.name: {**config.limits(mode.name), **mode.identity()} for mode in modes},
        benchmarks={one.benchmark.name: one.identity for one in asked},
        scoring=config.scoring,
    )


def _answer(
    results: Results, subject: Subject, mode: DecodingMode, key: Key, questions: Sequence[Question],
    config: EvalConfig, progress: bool,
) -> None:  # fmt: skip
    if results.is_finished(key):
        return
    there = {one.question for one in results.predictions(key)}
    missing = [question for question in questions if question.id not in there]
    bar = tqdm(total=len(questions), initial=len(there), desc=" ".join(key), unit="question", disable=not progress)
    with bar:
        for batch in _batches(missing, config.batch_size):
            replies = mode.answer(subject, batch)
            results.add(key, [_scored(key, q, r, config.scoring) for q, r in zip(batch, replies, strict=True)])
            bar.update(len(batch))
    results.finish(key)


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _scored(key: Key, question: Question, reply: Reply, scoring: Scoring) -> Prediction:
    choice = choice_of(reply.said, question, scoring)
    return Prediction(
        question.id, question.benchmark, question.category, key.model, key.mode, reply, choice, question.answer
    )
