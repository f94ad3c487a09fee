"""The sentences that experts speak, by what they say. Thoughts are put together from these alone.

A sentence of the first group states an intention; one of the second a finding, which is only spoken after a tool has
shown it. `say` picks one at random.
"""

from __future__ import annotations

import re

import numpy as np

INTENTIONS: dict[str, tuple[str, ...]] = {
    "look": (
        "Let me take a closer look at {name}.",
        "I should look at {name} more closely.",
        "The answer depends on {name}, so I will look at it up close.",
        "To be sure, I will examine {name}.",
        "First I need a better view of {name}.",
        "A closer view of {name} will settle this.",
        "I cannot tell at this size; let me enlarge the part with {name}.",
    ),
    "look also": (
        "Now the same for {name}.",
        "Next, {name}.",
        "Let me also look at {name}.",
        "And now a closer view of {name}.",
        "I still need to see {name}.",
    ),
    "look around": (
        "I will start with the surroundings of {name}.",
        "First, let me cut out the area around {name}.",
        "Let me narrow the picture down to where {name} is.",
    ),
    "look tighter": (
        "That is the right area; now a tighter cut around {name}.",
        "Closer still: I will cut {name} out of this view.",
        "From this view I can go in further on {name}.",
    ),
    "search": (
        "I will go through the places where {article} could be.",
        "Is {article} there? Let me check the candidates one by one.",
        "To find out whether {article} can be seen, I will look at what comes closest.",
        "There may be {article} among these; let me check.",
    ),
    "search on": (
        "Let me check the next candidate.",
        "On to the next one.",
        "There is another place to check.",
        "I will look at the next candidate.",
    ),
    "count": (
        "I will look at the {plural} one by one and count.",
        "Counting needs care; let me go to each of the {plural} in turn.",
        "Let me visit each of the {plural} and keep count.",
        "I will count the {plural} by looking at each.",
    ),
    "count on": ("Next one.", "And the next.", "Let me go on to the next.", "There is another place to look at."),
    "outline all": (
        "Drawing a box around each of the {plural} will make them easy to count.",
        "I will outline all the {plural} and count the boxes.",
        "To count the {plural} without missing one, I will mark them.",
    ),
    "both in view": (
        "I want {a} and {b} in one view to compare where they are.",
        "Let me get a view with both {a} and {b}.",
        "Seeing {a} and {b} side by side will help.",
        "To compare their places, I will bring {a} and {b} into one view.",
    ),
    "depth of two": (
        "Distances are hard to judge by eye; I will estimate depth for {a} and {b}.",
        "A depth estimate will show which of {a} and {b} is nearer.",
        "Let me measure how near {a} and {b} are.",
        "I will read the depth at {a} and at {b}.",
    ),
    "depth of many": (
        "A depth estimate for the {plural} will show how they lie.",
        "Let me measure how near each of the {plural} is.",
        "I need the depth of all the {plural}.",
        "Which of the {plural} is nearer than which? A depth map will tell.",
    ),
    "mark": (
        "Let me mark {a} and {b} in the picture first.",
        "I will make the two places, {a} and {b}, visible.",
        "First I mark {a} and {b}.",
    ),
    "measure": (
        "I will cut out exactly {name} and see how large the cut is.",
        "How large is {name}? A tight cut will tell.",
        "Let me measure {name} by its box.",
    ),
    "segment": (
        "Separating {name} from the background will show it alone.",
        "I will cut {name} out along its outline.",
        "Let me isolate {name}.",
    ),
    "outlines": (
        "Its outline should be telling; let me draw the edges of this view.",
        "The edges of this view will show the outline of {name}.",
        "To see the form of {name} without its colour, I will extract the edges.",
    ),
    "read": (
        "Let me read the text in this view.",
        "There may be text here; I will read it.",
        "I will run text recognition on this view.",
    ),
}

FINDINGS: dict[str, tuple[str, ...]] = {
    "value": (
        "The view shows that {name} is {value}.",
        "Up close, {name} is clearly {value}.",
        "Now it can be seen: {name} is {value}.",
        "{name} turns out to be {value}.",
    ),
    "form": (
        "The view shows that {name} is a {value}.",
        "Up close, {name} is clearly a {value}.",
        "Now it can be seen: {name} is a {value}.",
        "{name} turns out to be a {value}.",
    ),
    "in view": (
        "Now {name} can be seen well.",
        "This view shows {name} clearly.",
        "Here {name} is large enough to judge.",
    ),
    "identified": (
        "This view shows a {label}.",
        "Here is a {label}.",
        "This is a {label}.",
    ),
    "found": (
        "Here it is: this is {article}.",
        "This one is {article}, just what was asked for.",
        "Found: this is {article}.",
    ),
    "other": (
        "This is {other}, not {article}.",
        "Not {article}: this is {other}.",
        "What this view shows is {other}, so it is not {article}.",
    ),
    "none left": (
        "That was the last candidate; there is no {name}.",
        "None of the candidates is {article}.",
        "I have checked every candidate without finding {article}.",
    ),
    "counted": ("That makes {count}.", "So far {count}.", "The count is now {count}.", "{count} up to here."),
    "counted all": (
        "That is all of them: {count}.",
        "In total I count {count}.",
        "There are no more; the total is {count}.",
    ),
    "relation": (
        "In this view, {a} is {relation} {b}.",
        "It can be seen that {a} is {relation} {b}.",
        "Here {a} is {relation} {b}.",
    ),
    "nearer": (
        "The reading of {a} is {first}, that of {b} is {second}, so {near} is nearer.",
        "{a}: {first}; {b}: {second}. The higher value is nearer, so {near} is closer to the camera.",
        "With {first} for {a} and {second} for {b}, {near} is the nearer one.",
    ),
    "nearest": (
        "The highest reading among the {plural} is {value} (region {number}); that one is nearest.",
        "Region {number} has the highest value, {value}, so it is the nearest of the {plural}.",
        "Of the {plural}, region {number} is nearest, with {value}.",
    ),
    "farthest": (
        "The lowest reading is {value} (region {number}); that one is farthest.",
        "Region {number} is farthest, with only {value}.",
        "Farthest is region {number}, at {value}.",
    ),
    "count nearer": (
        "{name} reads {own}; {count} of the {plural} read higher and are nearer.",
        "Compared with {own} for {name}, {count} of the {plural} have a higher value.",
        "Against the {own} of {name}, {count} of the {plural} are nearer.",
    ),
    "larger": (
        "One cut has {first} pixels, the other {second}, so {larger} takes up more of the picture.",
        "{first} against {second} pixels: {larger} takes up more room.",
        "By area it is {first} to {second} pixels, so {larger} is larger in the picture.",
    ),
    "same": (
        "Both are {value}.",
        "They share the same colour, {value}.",
        "One is {value} and so is the other.",
    ),
    "different": (
        "One is {first}, the other {second}.",
        "The first is {first} while the second is {second}.",
        "Their colours differ: {first} and {second}.",
    ),
    "text": ("The text reads “{text}”.", "It says “{text}”.", "“{text}” is what can be read."),
    "answer": (
        "So the answer is {answer}.",
        "The answer is therefore {answer}.",
        "That gives the answer: {answer}.",
        "Hence: {answer}.",
        "My answer is {answer}.",
    ),
}


class Voice:
    """Says things in varied sentences; the same generator gives the same ones."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def say(self, what: str, **slots: str) -> str:
        sentences = INTENTIONS.get(what) or FINDINGS[what]
        sentence = sentences[int(self.rng.integers(len(sentences)))].format(**slots)
        return sentence[0].upper() + sentence[1:]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if re.match('[aeiouAEIOU]', noun) else 'a'} {noun}"
