from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory
from pearl.trainer.conversation import (
    Conversation,
    ImagePart,
    Template,
    TemplateError,
    Turn,
    load_template,
    template_names,
)

ORIGINAL, CROP = EncodedImage(b"original"), EncodedImage(b"crop")
BOX = [0.25, 0.5, 0.75, 1.0]


def step(tool: str, text: str, made: EncodedImage | None, /, thought: str = "I look closer.", **arguments: Any) -> Step:
    return Step(thought, ToolCall(tool, arguments), Observation(text, made))


def trajectory(*steps: Step, **changes: Any) -> Trajectory:
    return replace(
        Trajectory(
            id="t", image=ORIGINAL, question="Which is nearer?", choices=("the cup", "the box"), answer="the cup",
            steps=steps, conclusion="The cup is nearer.", expert="", skill="", source="", license="", seed=0,
        ),
        **changes,
    )  # fmt: skip


FIXED = trajectory(
    step("crop", "Region of image 0.", CROP, image=0, box=BOX),
    step("depth", "cup 0.9, box 0.4", None, thought="Now the depth.", image=0, boxes=[BOX, [0, 0, 1, 1]]),
)


def texts(turns: tuple[Turn, ...]) -> list[str]:
    """Each turn's text, an image as `<n>`."""
    return ["".join(p if isinstance(p, str) else f"<{p.index}>" for p in turn.parts) for turn in turns]


def template(**changes: str) -> Template:
    return replace(load_template("pearl"), **changes)  # type: ignore[arg-type]


# templates


def test_every_shipped_template_loads_and_says_the_answer() -> None:
    assert template_names() == ["pearl", "published-lvr", "published-pixelreasoner", "published-thinkmorph"]
    for name in template_names():
        talk = Conversation(FIXED, load_template(name))
        assert "the cup" in texts((talk.conclusion(),))[0]
        assert "the cup" in texts((talk.direct(),))[0]
        assert "Which is nearer?" in texts(talk.question())[0]


CALLS = [
    '{"name": "crop", "arguments": {"image": 0, "box": [0.25, 0.5, 0.75, 1.0]}}',
    '{"name": "depth", "arguments": {"image": 0, "boxes": [[0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1]]}}',
]
FULL = {
    "pearl": [
        "<0>Which is nearer?\nOptions: the cup, the box.",
        f"I look closer.\n<tool_call>\n{CALLS[0]}\n</tool_call>",
        "Region of image 0.<1>",
        f"Now the depth.\n<tool_call>\n{CALLS[1]}\n</tool_call>",
        "cup 0.9, box 0.4",
        "The cup is nearer.\nAnswer: the cup",
    ],
    "published-pixelreasoner": [
        "<0>Which is nearer?\nOptions: the cup, the box.",
        f"I look closer.\n<tool_call>\n{CALLS[0]}\n</tool_call>",
        "Region of image 0.<1>",
        f"Now the depth.\n<tool_call>\n{CALLS[1]}\n</tool_call>",
        "cup 0.9, box 0.4",
        "The cup is nearer.\n\\boxed{the cup}",
    ],
    "published-thinkmorph": [
        "<0>Which is nearer?\nOptions: the cup, the box.",
        "I look closer.",
        "Here is the focused image.<1>",
        "Now the depth.",
        "Here is the focused image.",
        "The cup is nearer.\n<answer>the cup</answer>",
    ],
    "published-lvr": [
        "<0>Which is nearer?\nOptions: the cup, the box.\nAnswer with one of the options.",
        "I should look closely at [0.25, 0.5, 0.75, 1.0].",
        "Here is that part of the image.<1>",
        "I should look closely at [0.25, 0.5, 0.75, 1.0].",
        "Here is that part of the image.",
        "<answer> the cup </answer>",
    ],
}


@pytest.mark.parametrize("name", FULL)
def test_the_words_of_a_shipped_template(name: str) -> None:
    assert FULL.keys() == set(template_names())
    talk = Conversation(FIXED, load_template(name))
    assert texts(talk.full()) == FULL[name]
    learned = [turn.supervised for turn in talk.full()]
    assert learned == [False, name != "published-lvr", False, name != "published-lvr", False, True]


def test_a_template_of_ones_own_by_its_path(tmp_path: Path) -> None:
    entries = {"question": "Q: $question", "choices": "", "step": "$tool", "observation": "$text"}
    entries |= {"conclusion": "A: $answer", "direct": "$answer", "supervise": "answer", "system": "Be brief."}
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    talk = Conversation(FIXED, load_template(str(tmp_path / "mine.json")))
    said = ["Be brief.", "<0>Q: Which is nearer?", "crop", "Region of image 0.<1>", "depth", "cup 0.9, box 0.4"]
    assert texts(talk.full()) == [*said, "A: the cup"]
    assert [turn.role for turn in talk.question()] == ["system", "user"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "$question"', "no template"),
        ("[1]", "not a JSON object of texts"),
        ('{"question": 3}', "not a JSON object of texts"),
        ('{"question": "$question", "colour": "x"}', "unknown entries: colour"),
        ('{"question": "$question"}', "missing .* 'choices'"),
    ],
)
def test_a_file_that_is_no_template(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(TemplateError, match=said):
        load_template(str(tmp_path / "mine.json"))


def test_an_unknown_template_names_those_there_are() -> None:
    with pytest.raises(TemplateError, match=r"no template 'perl'.*published-lvr"):
        load_template("perl")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": "$thought $answer"}, r"'step' uses \$answer; it may use \$box, \$call, \$thought, \$tool"),
        ({"question": "$question costs $5"}, r"'question' uses a \$ that starts no name"),
        ({"observation": "$"}, r"'observation' uses a \$"),
        ({"system": "$question"}, r"'system' uses \$question; it may use nothing"),
        ({"supervise": "some"}, "'supervise' is 'some'; expected 'all' or 'answer'"),
    ],
)
def test_a_template_with_a_wrong_entry(changes: dict[str, str], said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        template(**changes)


def test_dollars_in_data_stay_and_two_in_a_template_are_one() -> None:
    given = trajectory(
        step("ocr", "total $text", None, thought="It says $call.", image=0),
        question="Is it $5 or $answer?",
        choices=("$5", "$question"),
        answer="$conclusion",
        conclusion="It is $answer.",
    )
    talk = Conversation(given, template(observation="$$: $text"))
    assert texts(talk.full()) == [
        "<0>Is it $5 or $answer?\nOptions: $5, $question.",
        'It says $call.\n<tool_call>\n{"name": "ocr", "arguments": {"image": 0}}\n</tool_call>',
        "$: total $text",
        "It is $answer.\nAnswer: $conclusion",
    ]


# turns


def test_identical_images_are_kept_once() -> None:
    again = EncodedImage(b"original", path="other.png")
    talk = Conversation(
        trajectory(step("flip", "", again), step("crop", "", CROP), step("ocr", "x", None), step("zoom", "", CROP)),
        template(),
    )
    assert talk.images == [ORIGINAL, CROP]
    assert talk.of_step == [0, 1, None, 1]
    assert texts(talk.steps())[1::2] == ["<0>", "<1>", "x", "<1>"]


def test_without_choices_nothing_is_said_of_options() -> None:
    assert texts(Conversation(trajectory(choices=()), template()).question()) == ["<0>Which is nearer?"]


def test_the_question_is_left_out_of_what_is_not_asked() -> None:
    talk = Conversation(FIXED, template(system="Be brief."))
    assert texts(talk.question(asked=False)) == ["Be brief.", "<0>"]
    assert texts(talk.full(asked=False))[2:] == texts(talk.full())[2:]
    assert texts(talk.question("!")) == ["Be brief.", "<0>Which is nearer?\nOptions: the cup, the box.!"]
    assert texts(talk.question("!", asked=False)) == ["Be brief.", "<0>!"]


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"box": BOX}, "[0.25, 0.5, 0.75, 1.0]"),
        ({"boxes": [BOX, [0, 0, 1, 1]]}, "[0.25, 0.5, 0.75, 1.0]"),
        ({"boxes": []}, ""),
        ({"box": None}, ""),
        ({"angle": 90}, ""),
    ],
)
def test_the_box_of_a_call(arguments: dict[str, Any], place: str) -> None:
    talk = Conversation(trajectory(step("crop", "", CROP, **arguments)), template(step="Look at <$box>."))
    assert texts(talk.steps())[0] == f"Look at <{place}>."


def test_calls_keep_letters_of_any_script_and_their_order() -> None:
    talk = Conversation(trajectory(step("detect", "", CROP, names=["杯子", "🥤"], image=0)), template(step="$call"))
    assert texts(talk.steps())[0] == '{"name": "detect", "arguments": {"names": ["杯子", "🥤"], "image": 0}}'


def test_words_are_stripped_and_what_is_empty_is_no_part() -> None:
    given = trajectory(step("crop", " \n", CROP, thought=""), conclusion=" So. \n", answer=" left\n")
    talk = Conversation(given, template(step="$thought", conclusion="$conclusion", direct="$answer"))
    assert talk.steps() == (Turn("assistant", ("",), True), Turn("user", (ImagePart(1),)))
    assert talk.conclusion() == Turn("assistant", ("So.",), True)
    assert talk.direct() == Turn("assistant", ("left",), True)


def test_a_tool_that_returned_nothing_has_an_empty_turn() -> None:
    talk = Conversation(trajectory(step("ocr", "", None)), template())
    assert talk.steps()[1] == Turn("user", ())
