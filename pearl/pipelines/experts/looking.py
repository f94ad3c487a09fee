"""Experts that look closer: attributes and details, existence, counting, places, sizes and colours compared, text."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence

from pearl.boxes import longer_side, padded, rounded_outwards, seen_in, union
from pearl.pipelines.errors import Contradiction, Unsolvable
from pearl.pipelines.experts.base import Act, Case, Conclusion, Expertise
from pearl.pipelines.experts.voice import article
from pearl.records import Box
from pearl.tools.base import ToolResult

TINY, SMALL = 0.07, 0.25
AROUND_TEXT = (0.5, 0.3)
"""Margin and least side of a view to be read: where letters fill it, words fall apart."""
TEXT_WORDS = re.compile(
    r"\b(text|words?|letters?|names?|read|reads|says?|written|writing|printed|sign)\b", re.IGNORECASE
)


def look(case: Case, index: int, thought: str, name: str, *, patient: bool = False) -> Generator[Act, ToolResult, None]:
    """One closer view of a region; `patient`: a tiny one is approached in two steps when there is no zoom."""
    case.needs("crop", "zoom")
    box = case.region(index).box
    factor = min(6, max(1, round(0.35 / longer_side(padded(box)))))
    if "zoom" in case.tools and (("crop" not in case.tools) or (factor > 1 and case.fits_zoom(padded(box)))):
        yield from case.act(thought, "zoom", image=0, box=list(padded(box)), factor=float(factor))
    elif patient and longer_side(box) < TINY:
        outer = padded(box, margin=1.5, least=0.25)
        around = case.voice.say("look around", name=name)
        yield from case.act(around, "crop", image=0, box=list(outer))
        tighter = case.voice.say("look tighter", name=name)
        yield from case.act(tighter, "crop", image=case.steps, box=list(seen_in(outer, padded(box))))
    else:
        yield from case.act(thought, "crop", image=0, box=list(padded(box)))


def look_at_each(
    case: Case, targets: Sequence[int], names: Sequence[str], find: Callable[[int, str], str], before: str = ""
) -> Generator[Act, ToolResult, str]:
    """Several regions in turn. Each thought begins with what `find` says of the view before; the last is returned."""
    for number, (target, name) in enumerate(zip(targets, names, strict=True)):
        thought = case.voice.say("look also" if number else "look first", name=name)
        yield from look(case, target, f"{before} {thought}".strip(), name)
        before = find(target, name)
    return before


def in_view(case: Case) -> Callable[[int, str], str]:
    return lambda _, name: case.voice.say("in view", name=name)


def identified(case: Case, index: int) -> str:
    return case.voice.say("identified", article=article(case.region(index).label))


def attribute(case: Case) -> Expertise:
    """One look at each region that the question is about; more tools, more evidence."""
    targets, names = case.targets[:4], case.names[:4]
    if len(targets) == 1:
        yield from look(case, targets[0], case.voice.say("look", name=names[0]), names[0], patient=True)
    else:
        yield from look_at_each(case, targets, names, in_view(case))
    kind = case.query.get("attribute")
    if "edges" in case.tools and kind == "shape":
        yield from case.act(case.voice.say("outlines", name=names[0]), "edges", image=case.steps)
    if "segment" in case.tools and kind == "colour" and case.voice.chance(0.5):
        box = rounded_outwards(case.region(case.targets[0]).box)
        yield from case.act(case.voice.say("segment", name=names[0]), "segment", image=0, box=list(box))
    if "ocr" in case.tools and TEXT_WORDS.search(case.sample.question):
        result = yield from case.act(case.voice.say("read"), "ocr", image=case.steps)
        text = " ".join(line["text"] for line in result.numbers["lines"])
        if _agrees(text, case.sample.answer):
            return case.conclude(case.voice.say("text", text=text))
    if kind is None:
        return case.conclude(case.voice.say("in view", name=" and ".join(names)))
    return conclude_attribute(case, names[0], kind)


def conclude_attribute(case: Case, name: str, kind: str) -> Conclusion:
    """The answer is the value of an attribute that has been seen."""
    answer = case.sample.answer
    return case.conclude(case.voice.say("value", name=name, value=article(answer) if kind == "shape" else answer))


def _agrees(text: str, answer: str) -> bool:
    """Every word of the answer was read; an answer without a word ("?!") must stand in the text as it is."""
    read, words = (re.findall(r"\w+", one.casefold()) for one in (text, answer))
    if not words:
        return bool(answer.strip()) and answer.strip() in text
    return all(word in read for word in words)


def existence(case: Case) -> Expertise:
    """Looks at the candidates until one is what was asked for."""
    if "candidates" not in case.query:
        return (yield from attribute(case))
    wanted, matches = case.query["name"], set(case.query["matches"])
    candidates = list(case.query["candidates"])
    candidates = [candidates[i] for i in case.voice.rng.permutation(len(candidates))]
    if not candidates:
        raise Unsolvable("no annotated region says where to look")
    said = [case.voice.say("search", article=article(wanted))]
    for index in candidates:
        yield from look(case, index, " ".join(said), "this candidate")
        if index in matches:
            return case.conclude(case.voice.say("found", article=article(wanted)), answer="yes")
        finding = case.voice.say("other", other=article(case.region(index).label), article=article(wanted))
        said = [finding, case.voice.say("search on")]
    return case.conclude(said[0], case.voice.say("none left", article=article(wanted)), answer="no")


def counting(case: Case) -> Expertise:
    """Looks at each, or outlines all where the tool for that is allowed."""
    matches = list(case.query.get("matches", case.query.get("targets", ())))
    if not matches:
        raise Unsolvable("no annotated region says where to look")
    if str(len(matches)) != case.sample.answer:
        raise Contradiction("the number of regions contradicts the answer", f"{len(matches)}, not {case.sample.answer}")
    plural = case.query.get("plural", f"instances of “{case.region(matches[0]).label}”")
    total = case.voice.say("counted all", count=str(len(matches)))
    if "highlight" in case.tools and (len(matches) > 4 or case.voice.chance(0.5)):
        boxes = [list(rounded_outwards(case.region(i).box)) for i in matches]
        yield from case.act(case.voice.say("outline all", plural=plural), "highlight", image=0, boxes=boxes)
        return case.conclude(total)
    if len(matches) > 6:
        raise Unsolvable("too many to look at one by one: needs highlight")
    said = [case.voice.say("count", plural=plural)]
    for number, index in enumerate(matches, start=1):
        yield from look(case, index, " ".join(said), "it")
        seen = identified(case, index)
        said = [seen, case.voice.say("counted", count=str(number)), case.voice.say("count on")]
    return case.conclude(seen, total)


def relation(case: Case) -> Expertise:
    """Both in one view: outlined, marked, or cut out together; small ones may be looked at first."""
    targets, names = case.targets, case.names
    boxes = [case.region(i).box for i in targets]
    seen = ""
    if "crop" in case.tools and len(targets) == 2 and max(map(longer_side, boxes)) < SMALL and case.voice.chance(0.4):
        seen = yield from look_at_each(case, targets, names, in_view(case))
    yield from _view_both(case, boxes, names, seen)
    if "axis" not in case.query:
        return case.conclude(case.voice.say("in view", name=" and ".join(dict.fromkeys([names[0], names[-1]]))))
    words = {"left": "to the left of", "right": "to the right of"}
    how = words.get(case.sample.answer, case.sample.answer)
    return case.conclude(case.voice.say("relation", a=names[0], b=names[1], relation=how))


def _view_both(case: Case, boxes: Sequence[Box], names: Sequence[str], before: str) -> Generator[Act, ToolResult, None]:
    def thought(intention: str) -> str:
        return f"{before} {case.voice.say(intention, a=names[0], b=names[-1])}".strip()

    if "mark" in case.tools and case.voice.chance(0.4):
        points = [[round((b[0] + b[2]) / 2, 4), round((b[1] + b[3]) / 2, 4)] for b in boxes]
        yield from case.act(thought("mark"), "mark", image=0, points=points)
    elif "highlight" in case.tools:
        yield from case.act(
            thought("outline both"), "highlight", image=0, boxes=[list(rounded_outwards(b)) for b in boxes]
        )
    else:
        case.needs("highlight", "mark", "crop", "zoom")
        view = list(padded(union(boxes), margin=0.1))
        factor = {} if "crop" in case.tools else {"factor": 1.0}
        tool = "crop" if "crop" in case.tools else "zoom"
        yield from case.act(thought("both in view"), tool, image=0, box=view, **factor)


def comparison(case: Case) -> Expertise:
    if case.query.get("by") == "size":
        return (yield from _size(case))
    if case.query.get("by") == "colour":
        return (yield from _same_colour(case))
    return (yield from attribute(case))


def _size(case: Case) -> Expertise:
    """Cuts out both exactly and compares the cuts."""
    case.needs("crop", "zoom")
    tool, factor = ("crop", {}) if "crop" in case.tools else ("zoom", {"factor": 1.0})
    areas = []
    for number, (target, name) in enumerate(zip(case.targets, case.names, strict=True)):
        box: Box = rounded_outwards(case.region(target).box)
        thought = case.voice.say("measure also" if number else "measure", name=name)
        result = yield from case.act(thought, tool, image=0, box=list(box), **factor)
        areas.append(result.numbers["width"] * result.numbers["height"])
    larger = case.names[0] if areas[0] > areas[1] else case.names[1]
    if larger != case.sample.answer:
        raise Contradiction("the measured sizes contradict the answer", f"{areas[0]} and {areas[1]} pixels")
    return case.conclude(case.voice.say("larger", first=str(areas[0]), second=str(areas[1]), larger=larger))


def _same_colour(case: Case) -> Expertise:
    return (yield from compare_colours(case, case.targets, case.names))


def compare_colours(case: Case, pair: Sequence[int], names: Sequence[str], before: str = "") -> Expertise:
    """Looks at two regions and says whether they have the same colour."""

    def colour(index: int, name: str) -> str:
        return case.voice.say("value", name=name, value=case.region(index).attributes["colour"])

    yield from look_at_each(case, pair, names, colour, before)
    first, second = (case.region(i).attributes["colour"] for i in pair)
    if first == second:
        return case.conclude(case.voice.say("same", value=first), answer="yes")
    return case.conclude(case.voice.say("different", first=first, second=second), answer="no")


def text(case: Case) -> Expertise:
    """Reads the whole picture, or the place that the question names, after a closer look at it where the tools allow
    one; what was read is the answer where none is annotated."""
    case.needs("ocr")
    if case.query.get("names"):
        return (yield from _text_there(case))
    result = yield from case.act(case.voice.say("read"), "ocr", image=0)
    read = " ".join(line["text"] for line in result.numbers["lines"])
    if not read.strip():
        raise Contradiction("no text was found")
    if case.sample.answer and not _agrees(read, case.sample.answer):
        raise Contradiction("the text that was read contradicts the answer", read)
    return case.conclude(case.voice.say("text", text=read), answer=case.sample.answer or read)


def _text_there(case: Case) -> Expertise:
    where = {"image": 0, "box": list(padded(case.region(case.targets[0]).box, *AROUND_TEXT))}
    if case.tools & {"crop", "zoom"}:
        tool, factor = ("crop", {}) if "crop" in case.tools else ("zoom", {"factor": 1.0})
        yield from case.act(case.voice.say("look", name=case.names[0]), tool, **where, **factor)
        where = {"image": case.steps}
    result = yield from case.act(case.voice.say("read"), "ocr", **where)
    read = " ".join(line["text"] for line in result.numbers["lines"])
    if not _agrees(read, case.sample.answer):
        raise Contradiction("the text that was read contradicts the answer", read)
    return case.conclude(case.voice.say("text", text=case.sample.answer))
