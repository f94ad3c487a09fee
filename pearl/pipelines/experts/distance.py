"""Experts that need depth: which is closer, the nearest one's attribute, and chains of several steps.

A reading that contradicts the annotated truth rejects the trajectory: no thought may say what the tool did not show.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pearl.pipelines.experts.base import Act, Case, Conclusion, Contradiction, Expertise, Unsolvable, rounded
from pearl.pipelines.experts.looking import conclude_colours, look
from pearl.tools.base import ToolResult

MARGIN = 0.02
"""Readings nearer to each other than this say nothing (they are given to two decimals)."""

SURE = 0.08
"""The margin where no annotation confirms the reading."""


def closer(case: Case) -> Expertise:
    """Which of two regions is closer; sometimes each is looked at first."""
    case.needs("depth")
    targets, names = case.targets, case.names
    if len(targets) != 2:
        raise Unsolvable("depth compares two regions", f"the question has {len(targets)}")
    answers = _answers(case, names)
    if case.tools & {"crop", "zoom"} and case.voice.chance(0.75):
        for number, (target, name) in enumerate(zip(targets, names, strict=True)):
            yield from look(case, target, case.voice.say("look also" if number else "look", name=name), name)
    boxes = [list(rounded(case.region(i).box)) for i in targets]
    thought = case.voice.say("depth of two", a=names[0], b=names[1])
    result = yield from case.act(thought, "depth", image=0, boxes=boxes)
    return _nearer(case, result.numbers["boxes"], names, answers)


def closer_point(case: Case) -> Expertise:
    """Which of two points is closer; they are marked first where the tool for that is allowed."""
    case.needs("depth")
    points, names = [list(point) for point in case.query["points"]], case.names
    if "mark" in case.tools:
        yield from case.act(
            case.voice.say("mark", a=names[0], b=names[1]), "mark", image=0, points=points, labels=names
        )
    thought = case.voice.say("depth of two", a=names[0], b=names[1])
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
    return _attribute_seen(case, name)


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
    name = "the nearest one"
    yield from look(case, near, " ".join([*findings, case.voice.say("look", name=name)]), name)
    yield from look(case, far, case.voice.say("look also", name="the farthest one"), "the farthest one")
    return conclude_colours(case, [near, far])


def _nearest_beside(case: Case) -> Expertise:
    reference, name = case.query["reference"], case.query["name"]
    yield from look(case, reference, case.voice.say("look", name=name), name)
    seen = case.voice.say("identified", label=case.region(reference).label)
    plural = f"objects to the {case.query['side']} of {name}"
    target = case.query["target"]
    finding = yield from _find_nearest(case, case.query["candidates"], target, plural, before=seen)
    name = "the nearest of them"
    yield from look(case, target, f"{finding} {case.voice.say('look', name=name)}", name)
    return _attribute_seen(case, name)


def _how_many_nearer(case: Case) -> Expertise:
    reference, name, plural = case.query["reference"], case.query["name"], case.query["plural"]
    yield from look(case, reference, case.voice.say("look", name=name), name)
    seen = case.voice.say("identified", label=case.region(reference).label)
    candidates = case.query["candidates"]
    values = yield from _read(case, [reference, *candidates], f"{plural} and {name}", before=seen)
    own, others = values[0], values[1:]
    if any(abs(value - own) < MARGIN for value in others):
        raise Contradiction("the depth readings are too close to each other", str(values))
    nearer = [index for index, value in zip(candidates, others, strict=True) if value > own]
    if nearer != list(case.query["matches"]):
        raise Contradiction("the depth readings contradict the answer", str(values))
    finding = case.voice.say("count nearer", name=name, own=f"{own:.2f}", count=str(len(nearer)), plural=plural)
    for number, index in enumerate(nearer[:2]):
        thought = case.voice.say(
            "look also" if number else "look", name=f"the one of region {candidates.index(index) + 2}"
        )
        yield from look(case, index, thought if number else f"{finding} {thought}", "it")
        finding = case.voice.say("identified", label=case.region(index).label)
    return case.conclude(finding)


def _find_nearest(
    case: Case, candidates: Sequence[int], target: int, plural: str, before: str = ""
) -> Generator[Act, ToolResult, str]:
    values = yield from _read(case, candidates, plural, before)
    return _extreme(case, candidates, values, target, plural, highest=True)


def _read(
    case: Case, candidates: Sequence[int], plural: str, before: str = ""
) -> Generator[Act, ToolResult, list[float]]:
    boxes = [list(rounded(case.region(i).box)) for i in candidates]
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


def _attribute_seen(case: Case, name: str) -> Conclusion:
    finding = "form" if case.query["attribute"] == "shape" else "value"
    return case.conclude(case.voice.say(finding, name=name, value=case.sample.answer))
