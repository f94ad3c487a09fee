"""Tool calls in what a model says: the forms that are read, the mistakes that are told apart, and hostile text.

Any text gives a call, a fault or an answer, in time that is linear in its length, and what is run is bounded.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pearl.evaluation.calls import MAX_ERROR, run_calls
from pearl.images import Picture
from pearl.records import ToolCall
from pearl.tools import Toolbox
from pearl.tools.calls import CLOSE, MAX_CALL, MAX_DEPTH, OPEN, Fault, read_call, read_turn
from pearl.tools.crop import Crop

BOX = [0.25, 0.25, 0.75, 0.75]
CROP = {"name": "crop", "arguments": {"box": BOX}}
TEXT = json.dumps(CROP)
CALL = ToolCall("crop", {"box": BOX})


def marked(body: str) -> str:
    return f"{OPEN}\n{body}\n{CLOSE}"


@pytest.mark.parametrize(
    "said",
    [
        marked(TEXT),
        f"I look closer.\n{marked(TEXT)}",
        f"{OPEN}{TEXT}{CLOSE} The cup is red.",
        marked(f"```json\n{TEXT}\n```"),
        marked(json.dumps({"arguments": {"box": BOX}, "name": "crop"}, indent=2)),
        marked(json.dumps({"name": "crop", "arguments": json.dumps({"box": BOX})})),
        marked(json.dumps({"id": "call_1", "type": "function", "name": "crop", "parameters": {"box": BOX}})),
        TEXT,
        f"Let me see.\n```json\n{TEXT}\n```",
        json.dumps({"arguments": {"box": BOX}, "name": "crop"}),
        f'[{{ "name" : "crop", "arguments": {{"box": {BOX}}}}}]',
    ],
)
def test_each_form_is_read(said: str) -> None:
    assert read_call(said) == CALL


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "not a JSON object"),
        ("crop(0.1, 0.2)", "not a JSON object"),
        (f"[{TEXT}]", "not a JSON object"),
        ("{'name': 'crop'}", "property name"),
        (TEXT[:-1], "not closed"),
        (TEXT + "}", "follows"),
        (json.dumps({"arguments": {}}), "name is missing"),
        (json.dumps({"name": 3, "arguments": {}}), "name is missing"),
        (json.dumps({"name": "crop", "arguments": BOX}), "arguments"),
        (json.dumps({"name": "crop", "arguments": "box"}), "not a JSON object"),
        ('{"name": "crop", "arguments": {"image": NaN}}', "NaN is no number"),
        ('{"name": "crop", "arguments": {"image": -Infinity}}', "-Infinity is no number"),
        ('{"name": "crop", "arguments": {"image": 1e999}}', "1e999 is no number"),
        ('{"name": "crop", "arguments": {"image": ' + "9" * 5000 + "}}", "digits"),
        ('{"name": "crop", "arguments": {"image": "\\ud800"}}', "surrogates"),
        ('{"name": "crop", "arguments": ' + "[" * 9999 + "]" * 9999 + "}", "deeper"),
        ('{"name": "crop", "arguments": ' + '["]",' * 500 + "0" + "]" * 500 + "}", "deeper"),
        ('{"name": "crop", "arguments": {"box": "' + "a" * MAX_CALL + '"}}', "longer"),
        ('{"name": "crop", "arguments": {"box": "', "not closed"),
    ],
)
def test_what_is_malformed_is_told_why(body: str, reason: str) -> None:
    fault = read_call(marked(body))
    assert isinstance(fault, Fault)
    assert fault.kind == "malformed"
    assert reason in fault.message


@pytest.mark.parametrize("said", [f"{OPEN}\n{TEXT}", f"Now {TEXT[:-2]}", f"```json\n{TEXT[:40]}\n```"])
def test_a_call_that_is_cut_off_is_malformed(said: str) -> None:
    fault = read_call(said)
    assert isinstance(fault, Fault)
    assert fault.kind == "malformed"


@pytest.mark.parametrize(
    "said", ["", "A", "The answer is (B).", '{"answer": "A"}', '{"name": "a cup"}', '{"name": "cup', f"{CLOSE} A", "{}"]
)
def test_an_answer_is_no_call(said: str) -> None:
    assert read_call(said) is None


def test_a_turn_ends_after_its_first_call() -> None:
    for said in (f"Look. {marked(TEXT)}", f"Look. {TEXT}", f"Look. ```\n{TEXT}\n```"):
        alone, several = read_turn(said), read_turn(f"{said}\nuser: Cropped.\n{said} A")
        assert alone is not None
        assert several is not None
        assert alone.written == several.written == said
        assert not alone.more
        assert several.more


def test_a_marked_call_goes_before_a_plain_one() -> None:
    plain = json.dumps({"name": "zoom", "arguments": {}})
    assert read_call(f"Not {plain} but {marked(TEXT)}") == CALL


def test_nesting_up_to_the_limit_is_read() -> None:
    deep = "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)
    assert isinstance(read_call(marked(f'{{"name": "crop", "arguments": {{"box": {deep}}}}}')), ToolCall)
    assert isinstance(read_call(marked(f'{{"name": "crop", "arguments": {{"box": [{deep}]}}}}')), Fault)


@pytest.mark.parametrize(
    "said",
    [
        marked(TEXT) * 10_000,
        OPEN * 500_000,
        CLOSE * 500_000,
        TEXT * 20_000,
        '{"name":' * 500_000,
        '{"name":"' + "\\" * 3_000_000,
        '{"arguments":' + '"\\"' * 1_000_000,
        "{" * 3_000_000,
        "{" + " " * 3_000_000,
        "{ " * 1_500_000,
        "```" * 1_000_000 + TEXT + "```" * 1_000_000,
    ],
)
def test_megabytes_take_no_time(said: str) -> None:
    begin = time.process_time()
    read_turn(said)
    assert time.process_time() - begin < 1


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]":,\\`<>/_ \nabcdefglmnorstux019eE.-\ud7ff\x00'), st.booleans())
def test_any_text_is_read(text: str, inside: bool) -> None:
    read_turn(marked(text) if inside else text)
    read_turn('{"name": "crop", "arguments": ' + text)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=20), st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_every_call_that_can_be_written_is_read_again(name: str, arguments: dict[str, Any]) -> None:
    body = json.dumps({"name": name, "arguments": arguments})
    expected = ToolCall(name, arguments)
    if OPEN in body or CLOSE in body:
        return
    assert read_call(body) == expected
    assert read_call(marked(body)) == expected


# running


@pytest.fixture(scope="module")
def toolbox() -> Toolbox:
    return Toolbox(["crop", "zoom"])


@pytest.fixture
def picture() -> Picture:
    return Picture(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_mistakes_are_told_apart(toolbox: Toolbox, picture: Picture) -> None:
    calls = [
        CALL,
        ToolCall("grep", {}),
        ToolCall("crop", {"box": "0.1, 0.2, 0.3, 0.4"}),
        ToolCall("crop", {"box": BOX, "image": 1}),
        ToolCall("zoom", {"box": BOX, "factor": 1e9}),
        ToolCall("x" * 5000, {}),
        ToolCall("zoom", {"box": BOX, "factor": 2}),
    ]
    outcomes = run_calls(toolbox, [(call, [picture]) for call in calls])
    kinds = [outcome.fault for outcome in outcomes]
    assert kinds == [None, "unknown tool", "bad arguments", "refused", "bad arguments", "unknown tool", None]
    for outcome in outcomes:
        assert len(outcome.result.text) <= MAX_ERROR
        assert outcome.result.text.startswith("Error: ") == (outcome.fault is not None)
    assert outcomes[0].result.pixels is not None
    np.testing.assert_array_equal(outcomes[0].result.pixels, picture.pixels[10:30, 15:45])


def test_a_tool_that_breaks_harms_no_other_call(
    toolbox: Toolbox, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Crop.apply

    def breaking(self: Crop, one: Picture, arguments: Any) -> Any:
        if one.width == 7:
            raise ZeroDivisionError
        return apply(self, one, arguments)

    monkeypatch.setattr(Crop, "apply", breaking)
    odd = Picture(picture.pixels[:, :7])
    outcomes = run_calls(toolbox, [(CALL, [picture]), (CALL, [odd]), (ToolCall("zoom", {"box": BOX}), [odd])])
    assert [outcome.fault for outcome in outcomes] == [None, "tool failed", None]
    assert outcomes[1].result.text == "Error: the tool crop failed"


def test_no_calls_give_no_outcomes(toolbox: Toolbox) -> None:
    assert run_calls(toolbox, []) == []
