"""A model behind a server plans the steps.

1. The real tools carry out its calls, it is shown what they gave, and the row is sound.
2. Of several tries the shortest right one is kept; the others lie in a file, each with its reason.
3. Faults of server and network are repeated, counted, and change no byte; what cannot pass stops the run in one line.
4. Every reply is kept: after a kill nothing is asked twice, a rerun asks nothing and gives the same bytes.
5. The budget holds, for all workers together.
"""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pearl.cli.gen import main
from pearl.files import file_hash
from pearl.parquet import read_trajectories
from pearl.pipelines.endpoint.client import Client
from pearl.pipelines.endpoint.config import Budget, EndpointConfig
from pearl.pipelines.endpoint.ledger import BudgetUsedUp, Ledger, read_costs
from pearl.pipelines.endpoint.replies import MalformedReply, ReplyCache, Unanswered, content_key, read_reply
from pearl.pipelines.engines import EngineConfig
from pearl.pipelines.errors import ConfigError, RunError
from pearl.pipelines.experts.planner import PlannerSettings
from pearl.pipelines.generate import OutputPolicy, generate, preview
from pearl.pipelines.planner_rollout import PlannerConfig
from pearl.pipelines.sources import SourceOptions
from pearl.pipelines.validation import validate_data
from pearl.randomness import generator
from pearl.records import Trajectory
from tests.chat_server import (
    FAULTS,
    Body,
    ChatServer,
    Message,
    Script,
    calls,
    digest,
    images,
    question,
    says,
    share_of_faults,
    turns,
)

PLAIN, RESUME, OVERWRITE = OutputPolicy(), OutputPolicy(resume=True), OutputPolicy(overwrite=True)
BOX = [0.25, 0.25, 0.75, 0.75]
CROP = {"image": 0, "box": BOX}
SIDE = 64


def cards(folder: Path, count: int, choices: bool = False) -> str:
    """A dataset of noise with questions whose answer is their number."""
    rows = []
    for number in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        rows.append({
            "image": {"bytes": file.getvalue(), "path": None}, "question": f"What stands on card {number}?",
            "answer": f"number {number}", "choices": ["nothing", f"number {number}"] if choices else [],
        })  # fmt: skip
    schema = pa.schema([
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("question", pa.string()),
        ("answer", pa.string()), ("choices", pa.list_(pa.string())),
    ])  # fmt: skip
    path = folder / "cards.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return f"parquet:{path}"


def config_of(source: str, **planner: Any) -> PlannerConfig:
    tools = ("crop", "zoom")
    asked = PlannerSettings(**{"model": "tiny", "tries": 1, **planner})
    return PlannerConfig((source,), SourceOptions(tools=tools), tools, shard_size=6, planner=asked)


def endpoint_of(server: ChatServer, **more: Any) -> EndpointConfig:
    return EndpointConfig(server.url, **{"timeout": 0.5, "backoff": 0.001, **more})


def on(server: ChatServer, **more: Any) -> EngineConfig:
    return EngineConfig(engine="local", endpoint=endpoint_of(server, **more))


def number_of(body: Body) -> int:
    found = re.search(r"card (\d+)", question(body))
    assert found
    return int(found[1])


def try_of(body: Body) -> int:
    seeds = [int(generator("planner", 0, number).integers(2**31)) for number in range(8)]
    return seeds.index(body["seed"])


def look_once(body: Body) -> Message:
    if turns(body) == 0:
        return calls("I look closer at the card.", "crop", CROP)
    return says(f"Now I can read it.\nAnswer: number {number_of(body)}")


def in_turns(*messages: Message) -> Script:
    """The same turns for every sample; the last is repeated."""
    return lambda body: messages[min(turns(body), len(messages) - 1)]


RIGHT = says("It reads 0.\nAnswer: number 0")
LOOK = calls("I look closer.", "crop", CROP)


def hashes(out: Path) -> dict[str, str]:
    found = {path.name: file_hash(path) for path in sorted((out / "data").glob("*.parquet"))}
    assert found
    return found


def tries_in(out: Path) -> list[dict[str, Any]]:
    paths = sorted((out / "run" / "tries").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def one(tmp_path: Path, script: Script, **planner: Any) -> tuple[list[Trajectory], dict[str, Any], ChatServer]:
    """What becomes of one sample, with the manifest."""
    config = config_of(cards(tmp_path, 1), **planner)
    with ChatServer(script) as server:
        manifest = generate(config, tmp_path / "out", on(server), PLAIN)
    return list(read_trajectories(tmp_path / "out")), manifest, server


# 1. what is made


def test_real_tools_carry_out_the_calls_and_the_rows_are_sound(tmp_path: Path) -> None:
    config = config_of(cards(tmp_path, 3, choices=True))
    with ChatServer(look_once) as server:
        manifest = generate(config, tmp_path / "out", on(server), PLAIN)
    rows = list(read_trajectories(tmp_path / "out"))
    assert [row.answer for row in rows] == ["number 0", "number 1", "number 2"]
    assert {row.expert for row in rows} == {"planner:tiny"}
    (step,) = rows[0].steps
    assert (step.thought, step.call.tool, dict(step.call.arguments)) == ("I look closer at the card.", "crop", CROP)
    assert step.observation.image is not None
    assert rows[0].conclusion == "Now I can read it. The answer is number 0."
    assert validate_data(str(tmp_path / "out")) == (3, [])
    costs = manifest["costs"]
    assert (costs["requests"], costs["retries"], costs["cached"], costs["faults"]) == (6, 0, 0, {})
    assert (costs["tokens_in"], costs["tokens_out"], costs["endpoint"]) == (600, 60, server.url)


def test_the_model_is_shown_what_the_tools_gave(tmp_path: Path) -> None:
    _, _, server = one(tmp_path, look_once)
    first, second = server.bodies
    assert [tool["function"]["name"] for tool in first["tools"]] == ["crop", "zoom"]
    assert [image.size for image in images(first)] == [(SIDE, SIDE)]
    assert [image.size for image in images(second)] == [(SIDE, SIDE), (SIDE // 2, SIDE // 2)]
    called, told, shown = second["messages"][2:]
    assert called["tool_calls"][0]["id"] == told["tool_call_id"]
    assert called["tool_calls"][0]["function"]["name"] == "crop"
    assert told["role"] == "tool"
    assert "32×32" in told["content"]
    assert shown["content"][0]["text"] == "Image 1:"


def test_options_are_listed_and_large_images_are_sent_smaller(tmp_path: Path) -> None:
    config = config_of(cards(tmp_path, 1, choices=True), image_side=32, extra={"max_tokens": None, "top_p": 0.9})
    with ChatServer(look_once) as server:
        generate(config, tmp_path / "out", on(server), PLAIN)
    body = server.bodies[0]
    assert question(body) == "What stands on card 0?\nOptions:\n- nothing\n- number 0"
    assert images(body)[0].size == (32, 32)
    assert "max_tokens" not in body
    assert body["top_p"] == 0.9


@pytest.mark.parametrize(
    ("turn", "thought"),
    [
        (says('I look.\n<tool_call>\n{"name": "crop", "arguments": {"box": [0.1, 0.1, 0.6, 0.6]}}\n</tool_call>'), "I look."),
        (says('Let me see.\n```json\n{"name": "crop", "arguments": {"box": [0, 0, 0.5, 0.5]}}\n```'), "Let me see."),
        (calls("First.", "crop", CROP, more=2), "First."),
        ({**calls(None, "crop", CROP), "reasoning_content": "Hidden words."}, "Hidden words."),
        (calls("A dictionary.", "crop", CROP) | {"content": [{"type": "text", "text": "In parts."}]}, "In parts."),
    ],
    ids=["marked", "fenced", "several", "reasoning", "parts"],
)  # fmt: skip
def test_calls_are_read_in_each_form(tmp_path: Path, turn: Message, thought: str) -> None:
    rows, manifest, _ = one(tmp_path, in_turns(turn, RIGHT))
    assert manifest["kept"] == 1, manifest["rejected"]
    assert [step.thought for step in rows[0].steps] == [thought]


@pytest.mark.parametrize("said", ["number 0", "**Number 0.**", '"number 0"', " number  0 "])
def test_the_answer_is_the_annotated_one_in_its_spelling(tmp_path: Path, said: str) -> None:
    rows, _, _ = one(tmp_path, in_turns(LOOK, says(f"I read number 0 there.\n**Answer:** {said}")))
    assert rows[0].answer == "number 0"
    assert rows[0].conclusion == "I read number 0 there."


# 2. what is kept


def test_the_shortest_right_try_is_kept_and_the_others_lie_in_a_file(tmp_path: Path) -> None:
    def script(body: Body) -> Message:
        wanted = {0: 3, 1: 2, 2: 2, 3: 1}[try_of(body)]
        if turns(body) < wanted:
            return calls(f"Look {turns(body)}.", "crop", CROP)
        return says("Answer: nothing") if try_of(body) == 1 else RIGHT

    rows, _, server = one(tmp_path, script, tries=6)
    assert [len(row.steps) for row in rows] == [1]
    assert max(map(try_of, server.bodies)) == 3, "nothing is shorter than one step"
    found = [(attempt["number"], attempt["reason"]) for attempt in tries_in(tmp_path / "out")]
    assert found == [(0, "right, but longer"), (1, "wrong answer"), (2, "right, but longer")]
    transcript = tries_in(tmp_path / "out")[1]["transcript"]
    assert [entry["role"] for entry in transcript] == ["assistant", "observation"] * 2 + ["assistant"]
    assert "base64" not in json.dumps(transcript)


MALFORMED = calls("I look.", "crop", '{"image": 0, "box": [0.1')


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (in_turns(LOOK, says("Answer: number 7")), "wrong answer"),
        (in_turns(MALFORMED), "malformed call"),
        (in_turns(calls("I look.", "crop", {"box": [0.5, 0.5, 0.4, 0.4]})), "malformed call"),
        (in_turns(calls("I look.", "teleport", {})), "malformed call"),
        (in_turns(calls("I look.", "crop", {"image": 5, "box": BOX})), "malformed call"),
        (in_turns(calls("", "crop", CROP)), "malformed call"),
        (in_turns(LOOK, says("It is a card.")), "no answer"),
        (in_turns(LOOK, says("")), "no answer"),
        (in_turns(LOOK), "too many calls"),
        (in_turns(RIGHT), "no tool call"),
    ],
)
def test_what_is_not_kept_has_a_reason(tmp_path: Path, script: Script, reason: str) -> None:
    rows, manifest, _ = one(tmp_path, script)
    assert not rows
    assert manifest["rejected"] == {reason: 1}
    (attempt,) = tries_in(tmp_path / "out")
    assert attempt["reason"] == reason
    assert attempt["detail"]
    assert attempt["transcript"]


@pytest.mark.parametrize(("message", "reason"), [(says("I see a"), "no answer"), (MALFORMED, "malformed call")])
def test_a_turn_that_is_cut_off_ends_the_try(tmp_path: Path, message: Message, reason: str) -> None:
    config = config_of(cards(tmp_path, 1))
    with ChatServer(in_turns(message), finish_reason="length") as server:
        manifest = generate(config, tmp_path / "out", on(server), PLAIN)
    assert manifest["rejected"] == {reason: 1}
    assert server.requests == 1


def test_a_mistake_may_be_mended_and_is_no_step(tmp_path: Path) -> None:
    turns_ = [MALFORMED, LOOK, calls("Closer.", "crop", {"image": 2, "box": BOX}), calls("So.", "crop", {"image": 1, "box": BOX}), RIGHT]  # fmt: skip
    rows, manifest, server = one(tmp_path, in_turns(*turns_))
    assert manifest["kept"] == 1, manifest["rejected"]
    assert [step.call.arguments["image"] for step in rows[0].steps] == [0, 1]
    assert validate_data(str(tmp_path / "out")) == (1, [])
    told = [m["content"] for m in server.bodies[-1]["messages"] if str(m["content"]).startswith("Error:")]
    assert len(told) == 2
    assert "there is no image 2" in told[1]


def test_numbers_that_were_written_as_text_are_recorded_as_numbers(tmp_path: Path) -> None:
    call = calls("I look.", "crop", {"image": "0", "box": [str(side) for side in BOX]})
    rows, _, _ = one(tmp_path, in_turns(call, RIGHT))
    assert dict(rows[0].steps[0].call.arguments) == {"image": 0, "box": BOX}
    assert validate_data(str(tmp_path / "out")) == (1, [])


def test_the_commonest_reason_is_the_samples(tmp_path: Path) -> None:
    def script(body: Body) -> Message:
        return in_turns(*([says("No idea.")] if try_of(body) == 0 else [LOOK, says("Answer: 7")]))(body)

    _, manifest, _ = one(tmp_path, script, tries=3)
    assert manifest["rejected"] == {"wrong answer": 1}
    assert Counter(attempt["reason"] for attempt in tries_in(tmp_path / "out")) == {"no answer": 1, "wrong answer": 2}


# 3. faults


@pytest.mark.parametrize("kind", [*FAULTS, "503"])
def test_a_fault_that_passes_changes_no_byte(tmp_path: Path, kind: str) -> None:
    config = config_of(cards(tmp_path, 2))
    with ChatServer(look_once) as server:
        generate(config, tmp_path / "calm", on(server), PLAIN)
    with ChatServer(look_once, fault=lambda _, attempt: kind if attempt < 2 else "", slow=0.3) as server:
        manifest = generate(config, tmp_path / "out", on(server, timeout=0.2), PLAIN)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")
    costs = manifest["costs"]
    assert (costs["requests"], costs["retries"]) == (12, 8)
    assert sum(costs["faults"].values()) == 8
    names = {
        "429": "rate limit",
        "500": "server error",
        "503": "server error",
        "timeout": "timeout",
        "trickle": "timeout",
    }
    names |= {"truncated": "broken reply", "dropped": "broken reply", "malformed": "malformed reply"}
    assert set(costs["faults"]) == {names.get(kind, "malformed reply")}


def test_a_server_that_asks_for_a_pause_gets_it(tmp_path: Path) -> None:
    from pearl.pipelines.endpoint.client import _pause

    assert _pause("2.5") == 2.5
    assert 50 < _pause(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60
    assert [_pause(advised) for advised in ("", "soon", "-3", "nan")] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("429", "rate limit, tried 3 times: .*; --resume goes on"),
        ("404", "answers 404: .*; are --endpoint, --model and key right?"),
        ("302", "answers 302"),
        ("400", "nothing is answered any more; the last fault: the server refuses the request: 400"),
        ("500", "nothing is answered any more; the last fault: server error, tried 3 times: 500"),
    ],
)
def test_what_cannot_pass_stops_the_run_and_it_goes_on_later(tmp_path: Path, fault: str, message: str) -> None:
    config = config_of(cards(tmp_path, 7))
    with ChatServer(look_once, fault=lambda *_: fault) as server, pytest.raises(RunError, match=message):
        generate(config, tmp_path / "out", on(server, retries=2), PLAIN)
    with ChatServer(look_once) as server:
        assert generate(config, tmp_path / "out", on(server), RESUME)["kept"] == 7


def test_a_server_that_is_not_there_is_said(tmp_path: Path) -> None:
    engine = EngineConfig(engine="local", endpoint=EndpointConfig("http://127.0.0.1:9/v1", retries=1, backoff=0.001))
    with pytest.raises(RunError, match="connection, tried 2 times"):
        generate(config_of(cards(tmp_path, 1)), tmp_path / "out", engine, PLAIN)


def test_a_request_that_is_never_answered_concerns_its_sample_alone(tmp_path: Path) -> None:
    config = config_of(cards(tmp_path, 4), tries=2)

    def poison(body: Body, attempt: int) -> str:
        return "500" if number_of(body) == 2 else ""

    with ChatServer(look_once, fault=poison) as server:
        manifest = generate(config, tmp_path / "out", on(server, retries=1), PLAIN)
        assert (manifest["kept"], manifest["rejected"]) == (3, {"no reply": 1})
        assert manifest["costs"]["unanswered"] == 2
        asked = server.requests
        before = hashes(tmp_path / "out")
        generate(config, tmp_path / "out", on(server, retries=1), OVERWRITE)
        assert server.requests == asked
        assert hashes(tmp_path / "out") == before


def test_what_a_dying_server_left_unanswered_is_not_remembered(tmp_path: Path) -> None:
    """Of one worker of several: too few in a row to tell, and no request is answered after them."""
    with ChatServer(look_once, fault=lambda *_: "500") as server:
        client = client_of(server, tmp_path, retries=0)
        for number in range(3):
            with pytest.raises(Unanswered):
                client.ask(request(), number)
    with ChatServer(look_once) as server:
        client = client_of(server, tmp_path, retries=0)
        assert [bool(client.ask(request(), number)) for number in range(3)] == [True] * 3
        assert server.requests == 3


def test_a_reply_that_is_too_long_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pearl.pipelines.endpoint.client as module

    monkeypatch.setattr(module, "MAX_REPLY", 50)
    with ChatServer(look_once) as server:
        client = client_of(server, tmp_path, retries=0)
        with pytest.raises(module._Passing) as fault:
            client._send(json.dumps(request()).encode())
    assert fault.value.kind == "malformed reply"


# 4. replies are kept


def test_a_rerun_asks_nothing_and_gives_the_same_bytes(tmp_path: Path) -> None:
    config, cache = config_of(cards(tmp_path, 4), tries=2), str(tmp_path / "cache")
    with ChatServer(look_once) as server:
        generate(config, tmp_path / "first", on(server, cache=cache), PLAIN)
    with ChatServer(look_once) as server:
        manifest = generate(config, tmp_path / "second", on(server, cache=cache), PLAIN)
    assert server.requests == 0
    assert (manifest["costs"]["requests"], manifest["costs"]["cached"]) == (0, 8)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


def test_another_try_another_seed_or_another_image_is_another_request() -> None:
    body = request()
    others = [(body, 1), ({**body, "seed": 2}, 0), ({**body, "model": "other"}, 0), ({**body, "messages": []}, 0)]
    assert len({content_key(one, number) for one, number in [(body, 0), *others]}) == 5


def test_a_damaged_reply_is_asked_again(tmp_path: Path) -> None:
    with ChatServer(look_once) as server:
        client = client_of(server, tmp_path)
        reply = client.ask(request(), 0)
        path = client.cache.path(content_key(request(), 0))
        path.write_text(path.read_text()[:40])
        assert client.ask(request(), 0).content == reply.content
        assert client.ask(request(), 0).content == reply.content
    assert server.requests == 2


def test_the_key_is_sent_and_stands_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-very-secret")
    config = config_of(cards(tmp_path, 2))
    with ChatServer(look_once, key="sk-very-secret") as server:
        assert generate(config, tmp_path / "out", on(server, key_variable="SECRET_KEY"), PLAIN)["kept"] == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)
    with ChatServer(look_once, key="another") as server, pytest.raises(RunError, match="answers 401") as refusal:
        generate(config, tmp_path / "other", on(server, key_variable="SECRET_KEY"), PLAIN)
    assert "sk-very-secret" not in str(refusal.value)


def test_a_key_that_is_missing_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with ChatServer(look_once) as server, pytest.raises(RunError, match=r"NO_SUCH_KEY.*is not set"):
        generate(config_of(cards(tmp_path, 1)), tmp_path / "out", on(server, key_variable="NO_SUCH_KEY"), PLAIN)
    assert not (tmp_path / "out").exists()


# 5. budgets and concurrency


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(requests=5), "5 of 5 .requests, --max-requests.*--resume with a larger budget"),
        (Budget(tokens=550), "550 of 550 .tokens"),
        (Budget(cost=0.005, price_in=5.0, price_out=50.0), "0.005 of 0.005 .money"),
    ],
)
def test_a_run_stops_at_its_budget_and_goes_on_with_a_larger_one(tmp_path: Path, budget: Budget, message: str) -> None:
    config = config_of(cards(tmp_path, 4))
    with ChatServer(look_once) as server:
        with pytest.raises(BudgetUsedUp, match=message):
            generate(config, tmp_path / "out", on(server, budget=budget, concurrency=1), PLAIN)
        assert server.requests == 5
        more = replace(budget, **{name: 1000 for name in ("requests", "tokens", "cost") if getattr(budget, name)})
        manifest = generate(config, tmp_path / "out", on(server, budget=more, concurrency=1), RESUME)
    assert manifest["kept"] == 4
    assert (manifest["costs"]["requests"], server.requests) == (8, 8)
    assert {len(ids) for ids in server.answered.values()} == {1}


def test_a_budget_of_tokens_needs_a_server_that_counts(tmp_path: Path) -> None:
    config = config_of(cards(tmp_path, 1))
    with ChatServer(look_once, usage=False) as server:
        with pytest.raises(RunError, match="does not say how many tokens"):
            generate(config, tmp_path / "out", on(server, budget=Budget(tokens=10**6)), PLAIN)
        assert generate(config, tmp_path / "out", on(server), RESUME)["kept"] == 1


def test_requests_are_sent_together_and_no_more_than_allowed(tmp_path: Path) -> None:
    config = replace(config_of(cards(tmp_path, 9)), shard_size=9)
    with ChatServer(look_once, delay=0.1) as server:
        manifest = generate(config, tmp_path / "out", on(server, concurrency=3), PLAIN)
    assert server.most_at_once == 3
    assert manifest["seconds"]["planner"] < 18 * 0.1


def test_workers_on_ray_give_the_bytes_of_the_loop_and_keep_one_ledger(tmp_path: Path) -> None:
    config = config_of(cards(tmp_path, 12))
    with ChatServer(look_once, fault=share_of_faults(0.2, ("429", "500", "malformed"))) as server:
        generate(config, tmp_path / "loop", on(server), PLAIN)
        asked = server.requests
        manifest = generate(config, tmp_path / "ray", EngineConfig(num_workers=2, endpoint=endpoint_of(server)), PLAIN)
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "loop")
    assert manifest["costs"]["requests"] == server.requests - asked


def test_many_workers_share_one_budget(tmp_path: Path) -> None:
    def spend(_: int) -> int:
        ledger, admitted = Ledger(tmp_path / "ledger.json", Budget(requests=40)), 0
        try:
            while True:
                ledger.admit()
                admitted += 1
        except BudgetUsedUp:
            return admitted

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(spend, range(4))) == 40
    assert read_costs(tmp_path / "ledger.json").requests == 40


# the command line


COMMAND = [sys.executable, "-m", "pearl.cli.gen", "trajectories", "--expert", "planner", "--model", "tiny"]


def command(source: str, server: ChatServer, out: Path, *more: str) -> list[str]:
    flags = ["--source", source, "--endpoint", server.url, "--tools", "crop,zoom", "--engine", "local", "--resume"]
    return [*COMMAND, *flags, "--endpoint-timeout", "1", "--shard-size", "10", "--out", str(out), *more]


def mixed(body: Body) -> Message:
    """Most samples come out right, some at the second try, some never; some calls are malformed."""
    number, attempt = number_of(body), try_of(body)
    if turns(body) == 0:
        return MALFORMED if number % 10 == 3 and attempt == 0 else LOOK
    if turns(body) == 1 and number % 4 == 1:
        return calls("And closer.", "zoom", {"image": 1, "box": BOX, "factor": 2})
    wrong = number % 10 == 7 or (number % 10 == 5 and attempt == 0)
    return says("Answer: nothing") if wrong else look_once(body)


def kept_ids(out: Path) -> set[str]:
    """The ids of all replies that the run has kept so far."""
    ids = set()
    for path in (out / "run" / "replies").glob("*/*.json"):
        ids.add(json.loads(path.read_text())["id"])
    return ids


def killed_and_resumed(tmp_path: Path, count: int, kills: int, gen: Callable[[list[str]], str]) -> None:
    source, out = cards(tmp_path, count), tmp_path / "out"
    with ChatServer(mixed, fault=share_of_faults(0.2), delay=0.01, slow=1.2) as server:
        for kill in range(kills):
            enough = (kill + 1) * count // (kills + 1)
            process = subprocess.Popen(command(source, server, out), stderr=subprocess.DEVNULL)
            end = time.monotonic() + 240
            while sum(map(len, server.answered.values())) < enough and process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kept = {one for one, ids in list(server.answered.items()) if kept_ids(out).intersection(ids)}
            asked = len(server.bodies)
            assert kept, "the kill came too early"
        said = gen(command(source, server, out))
        assert not kept.intersection(map(digest, server.bodies[asked:])), "what was answered is asked again"
        repeated = [ids for ids in server.answered.values() if len(ids) > 1]
        assert len(repeated) <= 8 * kills, "more than what was in flight when it was killed"
        manifest = json.loads((out / "manifest.json").read_text())
        costs = manifest["costs"]
        assert 0 <= costs["requests"] - server.requests <= 8 * kills, "booked, and killed before it was sent"
        assert manifest["kept"] + sum(manifest["rejected"].values()) == count
        assert manifest["rejected"] == {"wrong answer": count // 10}
        assert manifest["kept"] == count - count // 10
        assert 0.1 < sum(costs["faults"].values()) / costs["requests"] < 0.3
        assert f"planner: {costs['requests']} requests" in said
        rejected = Counter(attempt["reason"] for attempt in tries_in(out))
        assert rejected["wrong answer"] >= count // 10 * 3
        assert rejected["malformed call"] == 0, "it was mended"
    with ChatServer(mixed, delay=0.0) as calm:
        gen(command(source, calm, tmp_path / "calm"))
    assert hashes(out) == hashes(tmp_path / "calm")
    assert validate_data(str(out))[1] == []


@pytest.fixture
def gen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs a command line in this process; what it prints."""

    def run(line: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", line[2:])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return printed.out

    return run


def test_after_a_kill_nothing_is_asked_twice(tmp_path: Path, gen: Callable[[list[str]], str]) -> None:
    killed_and_resumed(tmp_path, 20, kills=1, gen=gen)


@pytest.mark.slow
def test_two_hundred_samples_with_a_fifth_of_faults_and_three_kills(
    tmp_path: Path, gen: Callable[[list[str]], str]
) -> None:
    killed_and_resumed(tmp_path, 200, kills=3, gen=gen)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert", "planner"], "a planner needs --endpoint URL and --model NAME"),
        (["--expert", "planner", "--model", "m"], "--endpoint: expected a URL"),
        (["--expert", "planner", "--model", "m", "--endpoint", "http://me:pw@host/v1"], "only a plain URL"),
        (["--endpoint", "http://host/v1"], "--endpoint: only with --expert planner"),
        (["--max-requests", "9", "--cache", "replies"], "--cache, --max-requests: only with --expert planner"),
        (["--max-cost", "3", "--max-tokens-total", "9"], "--max-tokens-total, --max-cost: only with --expert planner"),
        (["--expert", "planner", "--model", "m", "--request", "[1]"], "expected a JSON object"),
        (["--expert", "planner", "--model", "m", "--request", '{"stream": true}'], "stream cannot be set"),
        (["--expert", "planner", "--model", "m", "--endpoint", "http://host/v1", "--max-cost", "3"], "--max-cost needs"),
    ],
)  # fmt: skip
def test_the_command_line_says_what_is_wrong(
    tmp_path: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["pearl-gen", "trajectories", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_asks_nothing(tmp_path: Path) -> None:
    found = preview(config_of(cards(tmp_path, 5)), tmp_path / "out", PLAIN)
    assert (found["planned"], found["outcomes"]) == (5, {})


def test_planner_and_endpoint_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        generate(config_of(cards(tmp_path, 1)), tmp_path / "out", EngineConfig(engine="local"), PLAIN)


def test_a_run_of_another_model_is_not_resumed(tmp_path: Path) -> None:
    source = cards(tmp_path, 1)
    with ChatServer(look_once) as server:
        generate(config_of(source), tmp_path / "out", on(server), PLAIN)
        with pytest.raises(RunError, match=r"planner.model: 'tiny' there, 'large' now"):
            generate(config_of(source, model="large"), tmp_path / "out", on(server), RESUME)


# what a server may send


def request() -> Body:
    message = {"role": "user", "content": [{"type": "text", "text": "card 0"}]}
    return {"model": "tiny", "seed": 1, "messages": [{"role": "system", "content": "Look."}, message]}


def client_of(server: ChatServer, folder: Path, **more: Any) -> Client:
    return Client(endpoint_of(server, **more), ReplyCache(folder / "replies"), Ledger(folder / "ledger.json", Budget()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FUNCTION = st.fixed_dictionaries({}, optional={"name": JSON, "arguments": JSON})
MESSAGE = st.fixed_dictionaries(
    {}, optional={"content": JSON, "tool_calls": JSON | st.lists(st.fixed_dictionaries({"function": JSON | FUNCTION}))}
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.fixed_dictionaries({"message": JSON | MESSAGE, "finish_reason": JSON}), max_size=2), JSON)
def test_any_reply_is_read_or_malformed(choices: list[Any], usage: Any) -> None:
    try:
        reply = read_reply(json.dumps({"choices": choices, "usage": usage}).encode())
    except MalformedReply:
        return
    assert isinstance(reply.content, str)
    assert all(isinstance(part, str) for call in reply.calls for part in (call.name, call.arguments))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_malformed(body: bytes) -> None:
    with pytest.raises(MalformedReply):
        read_reply(body)


def test_json_that_is_too_deep_is_malformed() -> None:
    with pytest.raises(MalformedReply):
        read_reply(b"[" * 100_000)
