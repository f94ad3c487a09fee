"""`pearl-eval` from end to end: real tiny models, real tools, real files."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pearl.cli.eval import app
from pearl.errors import PearlError
from pearl.evaluation.records import Key
from pearl.evaluation.results import read_results
from pearl.evaluation.run import EvalConfig, evaluate
from pearl.evaluation.subject import Subject
from pearl.parquet import read_trajectories
from tests.runs import data_file, model, rows, run
from tests.test_benchmarks import VSTAR, vstar

torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return data_file(tmp_path)


def pearl_eval(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_models_modes_and_a_page(data: Path, tmp_path: Path) -> None:
    out, tiny, other = tmp_path / "out", str(model()), str(model("llava"))
    asked = ["--bench", f"trajectories={data}", "--max-new-tokens", "6", "--batch-size", "5", "--max-calls", "1"]
    ended = pearl_eval("run", tiny, other, *asked, "--mode", "direct,tools", "--tools", "crop", "--out", out)
    assert ended.exit_code == 0, ended.output
    assert "| trajectories |" in ended.output
    stored = read_results(out)
    assert set(stored.predictions) == {
        Key(m, mode, "trajectories") for m in (tiny, other) for mode in ("direct", "tools")
    }
    for predictions in stored.predictions.values():
        assert [one.question for one in predictions] == [row.id for row in rows()]
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["scores"]) == 4
    assert len(summary["comparisons"]) == 6
    assert (out / "report.html").stat().st_size > 10_000


def test_a_stopped_evaluation_goes_on(data: Path, tmp_path: Path) -> None:
    """What a killed run left behind: a journal whose last line is cut off."""
    config = EvalConfig(
        (str(model()),), (f"trajectories={data}",), out=str(tmp_path / "a"), max_new_tokens=6, batch_size=4
    )
    evaluate(config, progress=False)
    whole = read_results(tmp_path / "a").predictions
    stopped = EvalConfig(**{**vars(config), "out": str(tmp_path / "b"), "batch_size": 3, "limit": None})
    evaluate(stopped, progress=False)
    (finished,) = (tmp_path / "b" / "predictions").glob("*.parquet")
    finished.unlink()
    (key,) = whole
    from pearl.evaluation.results import Results

    results = Results.open(tmp_path / "b", read_results(tmp_path / "a").setup, resume=True)
    results.add(key, whole[key][:5])
    (journal,) = (tmp_path / "b" / "predictions").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes() + b'{"question": "row-0')
    evaluate(EvalConfig(**{**vars(stopped), "resume": True}), progress=False)
    after = read_results(tmp_path / "b").predictions[key]
    assert [(one.question, one.reply.said) for one in after] == [(one.question, one.reply.said) for one in whole[key]]


def test_modes_and_benchmarks_are_added_to_results_and_the_page_keeps_its_pictures(data: Path, tmp_path: Path) -> None:
    out, tiny = tmp_path / "out", str(model())
    settings = ("--max-new-tokens", "6", "--out", out)
    tools = ("--max-calls", "1", "--max-tool-pixels", "5000", "--tools", "crop")
    ended = pearl_eval("run", tiny, "--bench", f"vstar={vstar(tmp_path / 'vstar')}", *settings)
    assert ended.exit_code == 0, ended.output
    assert VSTAR[0]["text"].splitlines()[0] in (out / "report.html").read_text()
    more = ("run", tiny, "--bench", f"trajectories={data}", *settings, "--resume")
    ended = pearl_eval(*more, *tools, "--mode", "tools")
    assert ended.exit_code == 0, ended.output
    keys = {(key.mode, key.benchmark) for key in read_results(out).predictions}
    assert keys == {("direct", "vstar"), ("tools", "trajectories")}
    assert read_results(out).setup.modes["tools"]["pixels"] == 5000
    assert VSTAR[0]["text"].splitlines()[0] in (out / "report.html").read_text()
    assert pearl_eval(*more, *tools, "--mode", "direct,tools").exit_code == 0
    data_file(tmp_path, [replace(row, question=f"{row.question} Really?") for row in rows()])
    ended = pearl_eval(*more)
    assert ended.exit_code == 1
    assert "questions of benchmark 'trajectories' was" in " ".join(ended.output.split())


def test_the_page_comes_without_a_benchmark_that_is_gone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("run", model(), "--max-new-tokens", "6", "--out", out)
    assert pearl_eval(*asked, "--bench", f"trajectories={data}").exit_code == 0
    data.unlink()
    ended = pearl_eval(*asked, "--bench", f"vstar={vstar(tmp_path / 'vstar')}", "--resume")
    assert ended.exit_code == 0, ended.output
    assert "| trajectories |" in ended.output
    assert VSTAR[0]["text"].splitlines()[0] in (out / "report.html").read_text()


def test_one_model_is_gone_before_the_next_is_loaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        data_file(tmp_path, [one for one in rows() if len(one.steps) == 1]),
        tmp_path / "lvr",
        objective="lvr",
        max_steps=1,
    )
    lvr, loaded, load = str(tmp_path / "lvr" / "model"), list[Any](), Subject.load

    def alone(*arguments: Any) -> Subject:
        gc.collect()
        assert not [one for one in loaded if one() is not None]
        subject = load(*arguments)
        loaded.append(weakref.ref(subject.model))
        return subject

    monkeypatch.setattr(Subject, "load", alone)
    modes = ("--mode", "direct,latent", "--max-new-tokens", "6")
    ended = pearl_eval("run", lvr, model(), "--bench", f"trajectories={data}", *modes, "--out", tmp_path / "out")
    assert ended.exit_code == 0, ended.output
    run(data, tmp_path / "pearl", max_steps=1)
    pearl = tmp_path / "pearl" / "model"
    ended = pearl_eval("latents", pearl, model(), "--data", data, "--out", tmp_path / "evidence")
    assert ended.exit_code == 1
    assert len(loaded) == 4
    assert json.loads((tmp_path / "evidence" / "latents.json").read_text())[0]["model"] == str(pearl)


def test_what_a_model_cannot_do_is_left_out_with_a_note(tmp_path: Path) -> None:
    boxed = [one for one in rows() if len(one.steps) == 1]
    data, base, out = data_file(tmp_path, boxed), str(model()), tmp_path / "out"
    run(data, tmp_path / "lvr", objective="lvr", max_steps=2)
    lvr = str(tmp_path / "lvr" / "model")
    asked = ("--bench", f"trajectories={data}", "--max-new-tokens", "12", "--out", out)
    ended = pearl_eval("run", base, lvr, *asked, "--mode", "direct,latent", "--latents", "2", "--latent-end", "token")
    assert ended.exit_code == 0, ended.output
    assert f"not asked: {base} in mode latent" in ended.output
    stored = read_results(out)
    assert {(key.model, key.mode) for key in stored.predictions} == {(base, "direct"), (lvr, "direct"), (lvr, "latent")}
    assert stored.setup.modes["latent"] == {"new tokens": 12, "latents": 2, "end": "token"}
    assert all(one.reply.new_tokens for one in stored.predictions[Key(lvr, "latent", "trajectories")])


def test_an_evaluation_that_fails_leaves_a_table_of_what_was_answered(data: Path, tmp_path: Path) -> None:
    config = EvalConfig(
        (str(model()), "nowhere/at/all"), (f"trajectories={data}",), out=str(tmp_path), max_new_tokens=6
    )
    with pytest.raises(PearlError, match="nowhere"):
        evaluate(config, progress=False)
    assert len(json.loads((tmp_path / "summary.json").read_text())["scores"]) == 1
    assert (tmp_path / "report.html").exists()


def test_what_cannot_be_evaluated_is_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bench, out = f"trajectories={data}", tmp_path / "out"
    shutil.copy(data, tmp_path / "copy.parquet")
    wrong: list[tuple[list[str | Path], str]] = [
        (["run", "nowhere/at/all", "--bench", bench], "nowhere/at/all"),
        (["run", model(), "--bench", "tea"], "there is no benchmark 'tea'"),
        (["run", model(), "--bench", f"{bench},{bench}"], "the benchmark trajectories stands there twice"),
        (["run", model(), "--bench", f"trajectories={tmp_path}/*.parquet"], "share their id with another: 'row-00'"),
        (["run", model(), "--bench", bench, "--mode", "dream"], "there is no mode dream"),
        (["run", model(), "--bench", bench, "--scoring", "lvr"], "'lvr' cannot read"),
        (["run", model(), "--bench", bench, "--mode", "latent"], "no training_config.json"),
        (["run", model(), "--bench", bench, "--mode", "latent", "--scoring", "pearl-published"], "no room for latents"),
        (["run", model(), "--bench", bench, "--mode", "tools", "--scoring", "pearl-published"], "only mode direct"),
        (["run", model(), "--bench", bench, "--opening", "A", "--scoring", "pearl-published"], "and no --opening"),
        (["run", model(), "--bench", bench, "--opening", "A", "--scoring", "lvr"], "would be the --opening's"),
        (["run", model(), "--bench", bench, "--mode", "tools", "--tools", "hammer"], "there is no tool 'hammer'"),
        (["run", model(), "--bench", bench, "--max-calls", "2"], "max_calls is about mode tools, in which nothing"),
        (["run", model(), "--bench", bench, "--latent-end", "token"], "latent_end is about mode latent"),
        (["run", model(), "--bench", bench, "--mode", "latent", "--opening", "A"], "opening is about modes direct"),
        (["latents", model(), "--data", data], "no training_config.json"),
        (["gain", tmp_path / "gone.parquet", "--model", model()], "gone.parquet"),
        (["gain", data, "--model", model(), "--device", "cuda:7"], "device cuda:7: torch sees no GPU on this machine"),
        (["gain", tmp_path / "splits", "--model", model()], "holds test, train: name one"),
        (["run", model(), "--bench", f"trajectories={tmp_path}/splits"], "holds test, train: name one"),
        (["run", tmp_path / "run", "--bench", bench], f"is the folder of a run; its model is {tmp_path}/run/model"),
    ]
    (tmp_path / "splits").mkdir()
    for split in ("test", "train"):
        shutil.copy(data, tmp_path / "splits" / f"{split}-00000-of-00001.parquet")
    shutil.copytree(model(), tmp_path / "run" / "model")
    for arguments, said in wrong:
        ended = pearl_eval(*arguments, "--out", out)
        assert ended.exit_code == 1, arguments
        assert said in ended.output.replace("\n", ""), arguments
        assert "Traceback" not in ended.output
    assert not out.with_name("out.jsonl").exists()  # no measurement was begun


def test_a_model_without_latents_is_left_out(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "lvr", objective="lvr", max_steps=1)
    run(data, tmp_path / "pearl", max_steps=1)
    silent, pearl = (tmp_path / name / "model" for name in ("lvr", "pearl"))
    asked = ("--data", data, "--out", tmp_path / "evidence", "--max-new-tokens", "4")
    ended = pearl_eval("latents", silent, pearl, *asked)
    assert ended.exit_code == 0, ended.output
    assert f"left out: {silent}: fewer than two trajectories gave a latent" in ended.output.replace("\n", "")
    found = json.loads((tmp_path / "evidence" / "latents.json").read_text())
    assert [one["model"] for one in found] == [str(pearl)]
    ended = pearl_eval("latents", silent, *asked)
    assert f"{tmp_path}/evidence holds evidence already" in ended.output.replace("\n", "")
    ended = pearl_eval("latents", silent, *asked, "--out", tmp_path / "none")
    assert ended.exit_code == 1
    assert "none of the models" in ended.output


def test_latents_and_gain(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", max_steps=2)
    ended = pearl_eval("latents", tmp_path / "run" / "model", "--data", data, "--out", tmp_path / "evidence")
    assert ended.exit_code == 0, ended.output
    assert "| distance from the target |" in ended.output
    gains = tmp_path / "gain.parquet"
    ended = pearl_eval("gain", data, "--model", model(), "--out", gains)
    assert ended.exit_code == 0, ended.output
    without = [row.id for row in rows() if not row.steps]
    assert f"{len(rows()) - len(without)} trajectories in {gains}, {len(without)} not measured" in ended.output

    again = pearl_eval("gain", data, "--model", model(), "--out", gains, "--resume")
    assert f"{gains} is there already, and finished" in again.output.replace("\n", "")

    from pearl.cli.gen import app as gen

    ended = CliRunner().invoke(
        gen, ["filter", str(data), "--gains", str(gains), "--out", str(tmp_path / "all.parquet")]
    )
    assert "--gains needs --min-gain or --min-image-gain" in str(ended.exception)
    ended = CliRunner().invoke(
        gen, ["filter", str(data), "--gains", str(gains), "--min-gain", "-100", "--out", str(tmp_path / "kept.parquet")]
    )
    assert ended.exit_code == 0, ended.output
    assert [row.id for row in read_trajectories(tmp_path / "kept.parquet")] == [r.id for r in rows() if r.steps]
