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
        "The answer depends on {name}, so I will go up close.",
        "I will examine {name} up close.",
        "A closer view of {name} will settle this.",
        "From here I cannot be certain; let me see {name} up close.",
        "What matters is {name}, so I want a closer view there.",
    ),
    "look first": (
        "First, a closer look at {name}.",
        "I will begin with {name}.",
        "Let me start with a closer view of {name}.",
        "To begin with, I want to see {name} up close.",
        "First I need a better view of {name}.",
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
        "I will look where {article} could be.",
        "Is {article} there? Let me look at what comes closest.",
        "To find out whether {article} can be seen, I will look at what comes closest.",
        "If {article} is there, a closer look will show it.",
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
        "To count the {plural} without missing one, I will draw a box around each.",
    ),
    "both in view": (
        "I want {a} and {b} in one view to compare where they are.",
        "Let me get a view with both {a} and {b}.",
        "To compare their places, I will bring {a} and {b} into one view.",
        "One view that holds {a} and {b} will show how they lie.",
    ),
    "outline both": (
        "Let me outline {a} and {b} to compare where they are.",
        "A box around {a} and another around {b} will show how they lie.",
        "To compare their places, I will outline {a} and {b}.",
    ),
    "mark": (
        "Let me mark {a} and {b} in the picture.",
        "Marks will show where {a} and {b} are.",
        "I will mark {a} and {b} to see where they lie.",
    ),
    "depth of two": (
        "Distances are hard to judge by eye; I will estimate depth for {a} and {b}.",
        "A depth estimate will show which of {a} and {b} is nearer.",
        "Let me measure how near {a} and {b} are.",
        "I will read the depth at {a} and at {b}.",
    ),
    "depth of many": (
        "A depth estimate will show how the {plural} lie.",
        "Let me measure how near each of the {plural} is.",
        "I need the depth of the {plural}.",
        "How far away are the {plural}? A depth map will tell.",
    ),
    "confirm": (
        "Let me confirm what region {number} is.",
        "To be sure, I will check region {number} up close.",
        "Region {number} deserves a closer view before I trust the count.",
    ),
    "measure": (
        "I will cut out {name} exactly and see how large the cut is.",
        "How large is {name}? A tight cut will tell.",
        "A cut right around {name} will give its size.",
    ),
    "measure also": (
        "Now {name}, cut out in the same way.",
        "Let me cut out {name} as tightly.",
        "And how large is {name}? I will cut it out as well.",
    ),
    "segment": (
        "Separating {name} from the background will show it alone.",
        "I will cut {name} out along its outline.",
        "Let me isolate {name}.",
    ),
    "outlines": (
        "The outline of {name} should be telling; let me draw the edges of this view.",
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
    "in view": (
        "{name} can be seen well here.",
        "This view shows {name} clearly.",
        "Here {name} can be made out easily.",
    ),
    "identified": (
        "This view shows {article}.",
        "Here is {article}.",
        "This is {article}.",
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
        "There is no other place where {article} could be.",
        "Nothing else comes close, so {article} cannot be seen.",
        "That was the last place to look for {article}.",
    ),
    "counted": ("That makes {count}.", "So far {count}.", "The count is now {count}.", "Up to here, {count}."),
    "counted all": (
        "In total I count {count}.",
        "There are no more, so the total is {count}.",
        "That completes the count: {count}.",
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
        "{name} reads {own}; the number of {plural} that read higher is {count}.",
        "Compared with {own} for {name}, the number of {plural} with a higher value is {count}.",
        "Counting the {plural} that read higher than {name} ({own}) gives {count}.",
    ),
    "confirmed": ("That confirms the count of {count}.", "So the count of {count} stands."),
    "larger": (
        "One cut has {first} pixels, the other {second}, so {larger} takes up more of the picture.",
        "With {first} against {second} pixels, {larger} has the larger cut.",
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
        "This makes the answer {answer}.",
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
    """The noun with "a" or "an"; alone if it looks like a plural ("skis", but not "glass" or "bus")."""
    if re.search("[^su]s$", noun):
        return noun
    silent_h = r"hour|hono[u]?r|honest|heir"
    spoken_as_you_or_won = r"uni(?![dmn])|us[aeu]|usb|utensil|utilit|ukulele|urin|eu|ewe|ufo|one\b|once\b"
    vowel = re.match(rf"{silent_h}|(?!{spoken_as_you_or_won})[aeiou]", noun, re.IGNORECASE)
    return f"{'an' if vowel else 'a'} {noun}"
