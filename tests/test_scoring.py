"""What a model said, and the option that each scoring reads from it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from pearl.evaluation.records import LETTERS, Question, Scoring
from pearl.evaluation.scoring import choice_of
from pearl.trainer.conversation import Conversation, load_template, template_names
from tests.plain import trajectory


def question(*options: str, answer: int = 0) -> Question:
    return Question("q", "test", "all", (), "", options, answer)


COLOUR = question("red", "blue", "dark blue", "white", answer=1)
POINT = question("B", "A", answer=0)
YES_NO = question("yes", "no", answer=1)
THING = question("the red cone", "the blue ball", answer=0)
TWICE = question("red", "red", "blue", answer=0)

SAID: list[tuple[Question, str, int | None, int | None, int | None]] = [
    # of, said, strict, lvr, pearl-published
    (COLOUR, "B", 1, 1, 1),
    (COLOUR, "b", 1, None, None),
    (COLOUR, " B \n", 1, 1, 1),
    (COLOUR, "B.", 1, 1, 1),
    (COLOUR, "B)", 1, 1, 1),
    (COLOUR, "(B)", 1, None, 1),
    (COLOUR, "(b)", 1, None, None),
    (COLOUR, "(B).", 1, None, 1),
    (COLOUR, "B. blue", 1, 1, 1),
    (COLOUR, "(B) blue", 1, None, 1),
    (COLOUR, "B) Blue.", 1, 1, 1),
    (COLOUR, "B: red", None, 1, 1),
    (COLOUR, "B blue", None, 1, 1),
    (COLOUR, "B or C", None, 1, 1),
    (COLOUR, "AB", None, 0, 1),
    (COLOUR, "A because not B", None, 0, 1),
    (COLOUR, "Because of the light, A", None, 1, 1),
    (COLOUR, "", None, None, None),
    (COLOUR, "   ", None, None, None),
    (COLOUR, "blue", 1, None, None),
    (COLOUR, "Blue", 1, 1, 1),
    (COLOUR, "BLUE.", 1, 1, 1),
    (COLOUR, "dark blue", 2, None, None),
    (COLOUR, "Dark blue", 2, 3, 3),
    (COLOUR, "The blue one", None, None, None),
    (COLOUR, "<answer> B </answer>", 1, 1, 1),
    (COLOUR, "<answer>b</answer>", 1, None, None),
    (COLOUR, "<answer>(B)</answer>", 1, None, 1),
    (COLOUR, "<answer>B</answer> A", 1, 1, 1),
    (COLOUR, "A</answer> B", 0, 0, 1),
    (COLOUR, "<answer>A</answer><answer>B</answer>", 1, 1, 1),
    (COLOUR, "<answer>B</answer><answer>A</answer>", 0, 0, 1),
    (COLOUR, "<answer></answer>", None, None, None),
    (COLOUR, "<answer>B", 1, 1, 1),
    (COLOUR, "<answer>blue</answer>", 1, None, None),
    (COLOUR, "<answer>The answer is B</answer>", None, None, 1),
    (COLOUR, "The answer is A", None, None, 0),
    (COLOUR, "The answer is B", None, None, 1),
    (COLOUR, "Answer: B", 1, 0, 1),
    (COLOUR, "Answer: blue", 1, 0, 0),
    (COLOUR, "Zoomed in, the cup is blue.\nAnswer: blue", 1, None, 0),
    (COLOUR, "Answer: A\nAnswer: B", 1, 0, 1),
    (COLOUR, "Answer: B\nIt is clear.", None, 0, 1),
    (COLOUR, "answer: B", None, None, 1),
    (COLOUR, "Answer:", None, 0, 0),
    (COLOUR, "Answer: <answer>C</answer>", 2, 2, 0),
    (COLOUR, "E", None, None, None),
    (COLOUR, "2", None, None, None),
    (COLOUR, "**B**", None, None, 1),
    (COLOUR, "Both", None, 1, 1),
    (COLOUR, "D. white", 3, 3, 3),
    (COLOUR, "A. dark blue", None, 0, 0),
    (POINT, "B", 0, 1, 1),
    (POINT, "A", 1, 0, 0),
    (POINT, "(A)", 1, None, 0),
    (YES_NO, "No", 1, None, None),
    (THING, "Answer: the red cone", 0, 0, 0),
    (THING, "The blue ball.", 1, None, None),
    (TWICE, "red", None, None, None),
    (TWICE, "A. red", 0, 0, 0),
]


@pytest.mark.parametrize(("column", "scoring"), [(2, "strict"), (3, "lvr"), (4, "pearl-published")])
def test_fixed_answers(column: int, scoring: Scoring) -> None:
    assert len(SAID) == 60
    expected = {(row[0].options, row[1]): row[column] for row in SAID}
    assert len(expected) == 60
    assert {(row[0].options, row[1]): choice_of(row[1], row[0], scoring) for row in SAID} == expected


@pytest.mark.parametrize("name", template_names())
def test_the_words_of_every_shipped_template_are_read(name: str) -> None:
    colour = question("red", "blue", "white", answer=1)
    told = Conversation(replace(trajectory(), choices=colour.options, answer="blue"), load_template(name))
    for turn in (told.conclusion(), told.direct()):
        (said,) = turn.parts
        assert choice_of(str(said), colour, "strict") == 1
    assert choice_of("\\boxed{blue", colour, "strict") is None
    assert choice_of("\\boxed{red} no: \\boxed{\\text{blue}}", colour, "strict") is None
    assert choice_of("\\boxed{red} no: \\boxed{B}.", colour, "strict") == 1
    assert choice_of("\\boxed{blue} and \\boxed{re", colour, "strict") == 1


def test_lmms_eval_scores_an_options_words_alike() -> None:
    """Its pattern, on the fixed answers that are no letters."""
    task = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "lmms_eval" / "trajectories.yaml").read_text())
    (pattern,) = (one["regex_pattern"] for one in task["filter_list"][0]["filter"] if one["function"] == "regex")
    compared = 0
    for asked, said, strict, _, _ in SAID:
        found = re.findall(pattern, said)
        words = found[0].strip().casefold() if found else ""
        if asked in (COLOUR, YES_NO, THING) and not re.match(r"\(?[a-z]\b", words):
            compared += 1
            assert (words == asked.options[asked.answer].casefold()) == (strict == asked.answer), said
    assert compared > 20


def test_the_published_rule_depends_on_the_right_answer() -> None:
    answers = [choice_of("AB", question("red", "blue", "white", answer=right), "pearl-published") for right in range(3)]
    assert answers == [0, 1, 0]


pieces = st.sampled_from(["A", "B", "b", "(", ")", ".", ":", " ", "\n", "Answer:", "<answer>", "</answer>", "red"])
texts = st.one_of(st.text(), st.lists(pieces).map("".join))
questions = st.lists(st.text(min_size=1), min_size=2, max_size=26).flatmap(
    lambda options: st.integers(0, len(options) - 1).map(lambda answer: question(*options, answer=answer))
)


@given(texts, questions, st.sampled_from(["strict", "lvr", "pearl-published"]))
def test_any_text_gives_an_option_or_none(said: str, asked: Question, scoring: Scoring) -> None:
    choice = choice_of(said, asked, scoring)
    assert choice is None or 0 <= choice < len(asked.options)


words = st.lists(st.from_regex(r"[a-z]{2,8}( [a-z]{2,8})?", fullmatch=True), min_size=2, max_size=6, unique=True)


@given(words, st.data())
def test_an_option_is_read_however_it_is_named(options: list[str], data: st.DataObject) -> None:
    asked = question(*options)
    chosen = data.draw(st.integers(0, len(options) - 1))
    letter, option = LETTERS[chosen], options[chosen]
    for named in (letter, letter.lower(), f"({letter})", f"{letter}. {option}", f"({letter}) {option}", option.upper()):
        for said in (named, f"Some thought.\nAnswer: {named}", f"A thought, B. <answer>{named}</answer>"):
            assert choice_of(said, asked, "strict") == chosen


@given(st.text(alphabet="ABCD xyz", min_size=2).filter(lambda said: len(said.strip()) > 1))
def test_letters_in_running_text_choose_nothing(said: str) -> None:
    assert choice_of(said, question("red", "blue", "green", "white"), "strict") is None
