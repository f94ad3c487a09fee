"""From what a model said to the option that it chose, by one of three rules.

- `strict`: what concludes the text must be exactly one option. Nothing is searched for in running text.
- `lvr`: the first character of the answer, as the code of Latent Visual Reasoning (arXiv 2509.24251) has it. That code
  keeps special tokens in the text, so that an answer without `<answer>` after latent tokens is wrong; here they are
  removed before.
- `pearl-published`: the right letter stands anywhere in the text, as the code published with Pearl has it. It counts
  "AB" and "A because not B" as right, whichever of the two is, and so is no fair measure; it repeats published numbers.
"""

from __future__ import annotations

import re

from pearl.boxed import last_boxed
from pearl.evaluation.records import LETTERS, Question, Scoring

_MARK = re.compile("Answer:|<answer>")
_LETTER = re.compile(r"(?:\((?P<enclosed>[A-Za-z])\)[.:]?|(?P<bare>[A-Za-z])(?P<mark>[.):]?))(?P<rest>.*)", re.DOTALL)


def choice_of(said: str, question: Question, scoring: Scoring) -> int | None:
    """The option that was chosen, None where none can be told."""
    if scoring == "lvr":
        return _first_character(said, question)
    if scoring == "pearl-published":
        return _letter_anywhere(said, question)
    return _exactly_one(said, question)


def _exactly_one(said: str, question: Question) -> int | None:
    r"""What follows the last "Answer:" or `<answer>` (all, where there is none), or there stands in the last `\boxed{…}`,
    must be an option's text or letter.

    Texts are compared without case and final full stop. A letter may be lower-case, in parentheses or followed by
    ".", ")" or ":"; after one of these its own option's text may stand, and nothing else.
    """
    conclusion = _MARK.split(said)[-1].split("</answer>")[0].strip()
    if boxed := last_boxed(conclusion):
        conclusion = boxed[1].strip()
    alike = [index for index, option in enumerate(question.options) if _plain(option) == _plain(conclusion)]
    if alike:
        return _only(alike)
    letter = _LETTER.fullmatch(conclusion)
    if letter is None:
        return None
    name = (letter["enclosed"] or letter["bare"]).upper()
    named = _only([index for index, one in enumerate(_names(question.options)) if one == name])
    rest = letter["rest"].strip()
    if named is None or not rest:
        return named
    marked = letter["enclosed"] or letter["mark"]
    return named if marked and _plain(rest) == _plain(question.options[named]) else None


def _names(options: tuple[str, ...]) -> list[str]:
    """The letter of each option: its text, where that is a letter itself (points A and B), else by its place."""
    return [
        option.upper() if re.fullmatch("[A-Za-z]", option) else letter
        for option, letter in zip(options, LETTERS, strict=False)
    ]


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def _only(indices: list[int]) -> int | None:
    return indices[0] if len(indices) == 1 else None


def _first_character(said: str, question: Question) -> int | None:
    answer = said.split("<answer>")[-1].split("</answer")[0].strip()
    return _index(answer[:1], question)


def _letter_anywhere(said: str, question: Question) -> int | None:
    """The right option if its letter occurs; else the first option whose letter does: only right and wrong are told."""
    occurring = [index for index, letter in enumerate(LETTERS[: len(question.options)]) if letter in said]
    return question.answer if question.answer in occurring else next(iter(occurring), None)


def _index(letter: str, question: Question) -> int | None:
    index = LETTERS.find(letter) if letter else -1
    return index if 0 <= index < len(question.options) else None
