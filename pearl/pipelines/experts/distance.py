"""Experts that need depth: which is closer, the nearest one's attribute, and chains of several steps.

A reading that contradicts the annotated truth rejects the trajectory: no thought may say what the tool did not show.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pearl.boxes import padded, rounded_outwards
from pearl.pipelines.errors import Contradiction, Unsolvable
from pearl.pipelines.experts.base import Act, Case, Conclusion, Expertise
from pearl.pipelines.experts.looking import (
    compare_colours,
    conclude_attribute,
    identified,
    in_view,
    look,
    look_at_each,
)
from pearl.tools.base import ToolResult
from pearl.tools.depth import MARGIN, SURE

AROUND_POINT = 0.2
"""Side of the view around a point."""


def closer(case: Case) -> Expertise:
    """Which of two regions is closer; sometimes each is looked at first."""
    case.needs("depth")
    targets, names = case.targets, case.names
    if len(targets) != 2:
        raise Unsolvable("depth compares two regions", f"the question has {len(targets)}")
    answers = _answers(case, names)
    seen = ""
    if case.tools & {"crop", "zoom"} and case.voice.chance(0.75):
        seen = yield from look_at_each(case, targets, names, in_view(case))
    boxes = [list(rounded_outwards(case.region(i).box)) for i in targets]
    thought = f"{seen} {case.voice.say('depth of two', a=names[0], b=names[1])}".strip()
    result = yield from case.act(thought, "depth", image=0, boxes=boxes)
    return _nearer(case, result.numbers["boxes"], names, answers)


def closer_point(case: Case) -> Expertise:
    """Which of two points is closer. Those that the picture shows may be looked at first, others are marked in it
    where the tool for that is allowed."""
    case.needs("depth")
    points, names = [list(point) for point in case.query["points"]], case.names
    seen = ""
    if case.query.get("marked"):
        if "crop" in case.tools and case.voice.chance(0.5):
            for number, ((x, y), name) in enumerate(zip(points, names, strict=True)):
                thought = f"{seen} {case.voice.say('look also' if number else 'look first', name=name)}".strip()
                yield from case.act(thought, "crop", image=0, box=list(padded((x, y, x, y), least=AROUND_POINT)))
                seen = case.voice.say("in view", name=name)
    elif "mark" in case.tools:
        yield from case.act(
            case.voice.say("mark", a=names[0], b=names[1]), "mark", image=0, points=points, labels=names
        )
    thought = f"{seen} {case.voice.say('depth of two', a=names[0], b=names[1])}".strip()
    result = yield from case.act(thought, "depth", image=0, points=points)
    return _nearer(case, result.numbers["points"], names, names)


def _answers(case: Case, names: Sequence[str]) -> list[str]:
    """For each name the choice that means it."""
    choices = case.sample.choices
    matching = [[c for c in choices if c == name] or [c for c in choices if _means(c, name)] for name in names]
    if any(len(found) != 1 for found in matching) or matching[0] == matching[1]:
        raise Unsolvable("the choices do not name the two regions", f"{list(choices)} for {list(names)}")
    return [found[0] for found in matching]


def _means(choice: str, name: str) -> bool:
    """Whether all of the choice's words, the article aside, stand in the name."""
    words = set(choice.casefold().split()) - {"the", "a", "an", "its"}
    return bool(words) and words <= set(name.casefold().split())


def _nearer(case: Case, values: Sequence[float], names: Sequence[str], answers: Sequence[str]) -> Conclusion:
    first, second = values
    margin = MARGIN if case.sample.answer else SURE
    readings = f"{first:.2f} and {second:.2f}"
    if abs(first - second) < margin:
        raise Contradiction("the depth readings are too close to each other", readings)
    near = 0 if first > second else 1
    if case.sample.answer and answers[near] != case.sample.answer:
        raise Contradiction("the depth readings contradict the answer", readings)
    finding = case.voice.say(
        "nearer", a=names[0], b=names[1], first=f"{first:.2f}", second=f"{second:.2f}", near=names[near]
    )
    return case.conclude(finding, answer=answers[near])


def nearest(case: Case) -> Expertise:
    """Depth finds the nearest of several, a closer look reads its attribute."""
    case.needs("depth")
    target = case.query["target"]
    finding = yield from _find_nearest(case, case.query["candidates"], target, case.query["plural"])
    name = "the nearest one"
    yield from look(case, target, f"{finding} {case.voice.say('look', name=name)}", name)
    return conclude_attribute(case, name, case.query["attribute"])


def chain(case: Case) -> Expertise:
    """Several steps, each of which needs the one before."""
    case.needs("depth")
    forms = {"ends": _nearest_and_farthest, "beside": _nearest_beside, "nearer": _how_many_nearer}
    return (yield from forms[case.query["form"]](case))


def _nearest_and_farthest(case: Case) -> Expertise:
    candidates, (near, far) = case.query["candidates"], case.query["targets"]
    values = yield from _read(case, candidates, case.query["plural"])
    findings = [
        _extreme(case, candidates, values, near, case.query["plural"], highest=True),
        _extreme(case, candidates, values, far, case.query["plural"], highest=False),
    ]
    names = ["the nearest one", "the farthest one"]
    return (yield from compare_colours(case, [near, far], names, before=" ".join(findings)))


def _nearest_beside(case: Case) -> Expertise:
    reference, name = case.query["reference"], case.query["name"]
    yield from look(case, reference, case.voice.say("look first", name=name), name)
    seen = identified(case, reference)
    plural = f"objects to the {case.query['side']} of {name}"
    target = case.query["target"]
    finding = yield from _find_nearest(case, case.query["candidates"], target, plural, before=seen)
    name = "the nearest of them"
    yield from look(case, target, f"{finding} {case.voice.say('look', name=name)}", name)
    return conclude_attribute(case, name, case.query["attribute"])


def _how_many_nearer(case: Case) -> Expertise:
    reference, name, plural = case.query["reference"], case.query["name"], case.query["plural"]
    yield from look(case, reference, case.voice.say("look first", name=name), name)
    seen = identified(case, reference)
    candidates = case.query["candidates"]
    values = yield from _read(case, [reference, *candidates], f"{plural} and {name}", before=seen)
    own, others = values[0], values[1:]
    if any(abs(value - own) < MARGIN for value in others):
        raise Contradiction("the depth readings are too close to each other", str(values))
    nearer = [index for index, value in zip(candidates, others, strict=True) if value > own]
    if nearer != list(case.query["matches"]):
        raise Contradiction("the depth readings contradict the answer", str(values))
    count = str(len(nearer))
    finding = case.voice.say("count nearer", name=name, own=f"{own:.2f}", count=count, plural=plural)
    for index in nearer:
        thought = case.voice.say("confirm", number=str(candidates.index(index) + 2))
        yield from look(case, index, f"{finding} {thought}", "it")
        finding = identified(case, index)
    return case.conclude(finding, *([case.voice.say("confirmed", count=count)] if nearer else []))


def _find_nearest(
    case: Case, candidates: Sequence[int], target: int, plural: str, before: str = ""
) -> Generator[Act, ToolResult, str]:
    values = yield from _read(case, candidates, plural, before)
    return _extreme(case, candidates, values, target, plural, highest=True)


def _read(
    case: Case, candidates: Sequence[int], plural: str, before: str = ""
) -> Generator[Act, ToolResult, list[float]]:
    boxes = [list(rounded_outwards(case.region(i).box)) for i in candidates]
    thought = f"{before} {case.voice.say('depth of many', plural=plural)}".strip()
    result = yield from case.act(thought, "depth", image=0, boxes=boxes)
    return list(result.numbers["boxes"])


def _extreme(
    case: Case, candidates: Sequence[int], values: Sequence[float], expected: int, plural: str, *, highest: bool
) -> str:
    """Says which reading is the highest or lowest, after checking that it is the expected region's, by a margin."""
    ordered = sorted(range(len(values)), key=lambda i: values[i], reverse=highest)
    if abs(values[ordered[0]] - values[ordered[1]]) < MARGIN:
        raise Contradiction("the depth readings are too close to each other", str(values))
    if candidates[ordered[0]] != expected:
        raise Contradiction("the depth readings contradict the answer", str(values))
    slots = {"plural": plural, "value": f"{values[ordered[0]]:.2f}", "number": str(ordered[0] + 1)}
    if highest:
        return case.voice.say("nearest", **slots)
    slots.pop("plural")
    return case.voice.say("farthest", **slots)
