"""The dataset card: YAML for the Hub, and what a reader must know before using the data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl import __version__
from pearl.parquet import schema
from pearl.paths import without_folders
from pearl.pipelines.publishing.facts import Facts, Run
from pearl.pipelines.publishing.pictures import strip
from pearl.pipelines.publishing.plan import Plan
from pearl.pipelines.sources import annotators_of
from pearl.pipelines.sources.photos import FOLDER as PHOTOS
from pearl.records import Trajectory
from pearl.scenes.samples import LICENSE as SCENES_LICENSE

TAG = "pearl-trajectories"
"""In every card; by it a later push knows that a repository's files are its own."""

UNSTATED = ("", "unknown")
_HUB_LICENSES = {
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "odbl", "pddl", "unlicense",
}  # fmt: skip
_SIZES = (
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"),
)  # fmt: skip
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~$&])")
_LONGEST = 400


@dataclass(frozen=True)
class Card:
    """README.md, and the pictures that it shows by their names in the repository."""

    text: str
    pictures: Mapping[str, bytes]


def make_card(repo: str, plan: Plan, facts: Facts, credits: str = "") -> Card:
    """The card of validated data. It holds no date, so that the same data gives the same card.

    Args:
        credits: Markdown that names who made what the sources hold, as their licences ask.
    """
    pictures = {f"pictures/{number}.jpg": strip(one) for number, one in enumerate(facts.samples, start=1)}
    sections = [
        f"# {_text(repo.rpartition('/')[2])}",
        _summary(plan, facts),
        _loading(repo, plan),
        _samples(facts.samples),
        _contents(plan, facts),
        _tools(facts),
        _making(facts),
        _origins(facts, credits),
        _limits(facts),
        _columns(),
        _configuration(facts),
    ]
    body = "\n\n".join(section for section in sections if section)
    return Card(f"---\n{_metadata(repo, plan, facts)}\n---\n\n{body}\n", pictures)


def _metadata(repo: str, plan: Plan, facts: Facts) -> str:
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    splits = SplitDict()
    for split in plan.splits:
        splits.add(SplitInfo(split.name, num_bytes=split.memory, num_examples=split.rows))
    info = DatasetInfo(
        features=Features.from_arrow_schema(schema()), splits=splits, download_size=plan.size,
        dataset_size=sum(split.memory for split in plan.splits),
    )  # fmt: skip
    data = DatasetCardData(
        pretty_name=repo.rpartition("/")[2],
        license=_licenses(facts),
        size_categories=[next((name for above, name in _SIZES if plan.rows < above), "n>1T")],
        task_categories=["visual-question-answering", "image-text-to-text"],
        tags=[TAG, "tool-use", "visual-reasoning", *sorted(facts.counts.tools)],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": one.name, "path": f"data/{one.name}-*"} for one in plan.splits],
            }
        ],
    )
    DatasetInfosDict(default=info).to_dataset_card_data(data)
    return str(data.to_yaml())


def _licenses(facts: Facts) -> str | list[str]:
    """The Hub's names of the licences; `other` stands for what it has no name for, the table says what it is."""
    names = {_hub_license(license) for _, license in facts.origins}
    found = sorted(names)
    return found[0] if len(found) == 1 else found


def _hub_license(license: str) -> str:
    name = re.sub(r"[\s_]+", "-", license.strip().lower())
    name = {"cc0": "cc0-1.0", "apache": "apache-2.0"}.get(name, name)
    return name if name in _HUB_LICENSES else "other"


def _summary(plan: Plan, facts: Facts) -> str:
    several = sum(count for steps, count in facts.counts.steps.items() if steps > 1)
    splits = ", ".join(f"{one.name} {one.rows:,}" for one in plan.splits)
    return (
        f"{plan.rows:,} trajectories of tool use for vision-language models ({splits}; {_megabytes(plan.size)}). Each is"
        " one image with a question, the steps of an expert (a thought, a call of a real tool, what the tool"
        f" returned), a conclusion and the answer. {several / plan.rows:.0%} have two or more steps."
        f" Made with `pearl-vlm` {__version__}, after"
        " [Pearl: Predictive Embedding Alignment for Reasoning in Latent space](https://arxiv.org/abs/2604.08065)."
    )


def _loading(repo: str, plan: Plan) -> str:
    first = plan.splits[0].name
    train = f"pearl-train --data {repo}{f':{first}' if len(plan.splits) > 1 else ''}"
    return (
        "## How to load it\n\n```python\nfrom datasets import load_dataset\n\n"
        f'trajectories = load_dataset("{repo}", split="{first}")\n'
        'trajectories[0]["image"], trajectories[0]["steps"][0]["thought"]\n```\n\n'
        f"```sh\n{train}\n```"
    )


def _samples(samples: Sequence[Trajectory]) -> str:
    parts = ["## Samples", "Left the image, then what the tools showed, in order."]
    for number, one in enumerate(samples, start=1):
        options = f" ({' / '.join(map(_text, one.choices))})" if one.choices else ""
        steps = "\n".join(
            f"{turn}. {_text(step.thought)} `{_code(step.call.tool)}`"
            f" `{_code(json.dumps(step.call.arguments, ensure_ascii=False))}` → {_text(step.observation.text)}"
            for turn, step in enumerate(one.steps, start=1)
        )
        parts.append(
            f"![Sample {number}](pictures/{number}.jpg)\n\n**{_text(one.question)}**{options}\n\n{steps}\n\n"
            f"{_text(one.conclusion)} Answer: **{_text(one.answer)}**"
        )
    return "\n\n".join(parts)


def _contents(plan: Plan, facts: Facts) -> str:
    counts = facts.counts
    sizes = [
        (one.name, f"{one.rows:,}", str(len(one.shards)), _megabytes(one.size), _megabytes(one.memory))
        for one in plan.splits
    ]
    steps = {str(number): count for number, count in sorted(counts.steps.items())}
    return "\n\n".join(
        (
            "## What is in it",
            _table(("split", "trajectories", "files", "size", "uncompressed"), sizes),
            f"{counts.image_bytes / max(counts.bytes, 1):.0%} of the bytes are images.",
            _shares("skill", counts.skills, plan.rows),
            _shares("steps", steps, plan.rows, ordered=False),
            _shares("tools of a trajectory", counts.combinations, plan.rows),
        )
    )


def _tools(facts: Facts) -> str:
    recipes = [run.manifest.get("recipe", {}) for run in facts.runs]
    rows = [
        (_text(tool), f"{count:,}", _settings(tool, recipes, facts.makings))
        for tool, count in _ordered(facts.counts.tools)
    ]
    versions = sorted({f"{name} {number}" for one in recipes for name, number in one.get("versions", {}).items()})
    known = (
        f"Packages that decide the bytes: {', '.join(map(_text, versions))}."
        if versions
        else "The versions of the packages are not known: the run that made the data did not lie beside it."
    )
    return f"## Tools\n\n{_table(('tool', 'calls', 'settings and versions'), rows)}\n\n{known}"


def _settings(tool: str, recipes: Iterable[Mapping[str, Any]], makings: Iterable[Mapping[str, Any]]) -> str:
    found: dict[str, None] = {}
    for recipe in recipes:
        values = {**recipe.get("settings", {}).get(tool, {}), **recipe.get("tools", {}).get(tool, {})}
        found.update(dict.fromkeys(_pairs(values)))
    for making in makings:
        found.update(dict.fromkeys(_pairs(making.get("config", {}).get("tool_settings", {}).get(tool, {}))))
    return ", ".join(found) or "—"


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if value is not None:
            yield f"{_text(name)} `{_code(str(without_folders(value)))}`"


def _making(facts: Facts) -> str:
    parts = ["## How it was made"]
    if "annotations" in facts.experts:
        parts.append(
            "The steps were decided by programs that read the images' annotations to know where to look, called the"
            " real tools, and branched on what these returned. Thoughts are put together from a bank of sentences; a"
            " finding is only spoken after a tool has shown it. Every trajectory passed the generator's checks, and"
            " `pearl-gen validate` before this upload."
        )
    else:
        parts.append("Every trajectory passed `pearl-gen validate` before this upload.")
    parts.append(_shares("expert", facts.experts, sum(facts.experts.values())))
    parts += [_yield(run) for run in facts.runs]
    return "\n\n".join(parts)


def _yield(run: Run) -> str:
    manifest = run.manifest
    planned, kept = manifest.get("planned", 0), manifest.get("kept", 0)
    if not planned:
        return ""
    said = (
        f"The run with the fingerprint `{_code(str(manifest.get('fingerprint', ''))[:16])}` kept {kept:,} of {planned:,}"
        f" samples ({kept / planned:.0%})."
    )
    return f"{said}\n\n{_shares('left out because', run.refusals, planned)}" if run.refusals else said


def _origins(facts: Facts, credits: str) -> str:
    rows = [
        (_text(source) or "—", _text(license) if license not in UNSTATED else "not stated", f"{count:,}")
        for (source, license), count in sorted(facts.origins.items())
    ]
    parts = ["## Sources, licences, credits", _table(("source of the images", "licence", "trajectories"), rows)]
    sources = {source for source, _ in facts.origins}
    if "photos" in sources:
        parts.append(_shipped_credits())
    if "scenes" in sources:
        parts.append(f"`scenes` are rendered with MuJoCo by pearl-vlm ({SCENES_LICENSE}).")
    if credits.strip():
        parts.append(credits.strip())
    return "\n\n".join(parts)


def _shipped_credits() -> str:
    """The credits of the photographs that the package carries, without their title."""
    return (PHOTOS / "CREDITS.md").read_text(encoding="utf-8").partition("\n")[2].strip()


def _limits(facts: Facts) -> str:
    return "## Known limits\n\n" + "\n".join(f"- {one}" for one in _known_limits(facts))


def _known_limits(facts: Facts) -> Iterator[str]:
    rows = sum(facts.experts.values())
    if unstated := sum(count for (_, license), count in facts.origins.items() if license in UNSTATED):
        yield f"The licence of the images of {unstated:,} trajectories is not stated: find out before you use them."
    if "annotations" in facts.experts:
        yield "The language of the thoughts is as varied as its bank of sentences, and no more."
    if any("depth-nano" in json.dumps(making) for making in (*facts.makings, *(run.manifest for run in facts.runs))):
        yield (
            "Depth comes from `depth-nano`, a small network trained on rendered scenes: relative, coarse, and weak on"
            " photographs."
        )
    if any(run.refusals for run in facts.runs):
        yield "What was left out, and why, stands above: samples that the tools fail on are rarer here than in life."
    if any(source == "folder" for source, _ in facts.origins):
        yield "The answers about the source `folder` are the tools' own readings; no one annotated them."
    for source in sorted({source for source, _ in facts.origins if annotators_of(source)}):
        tools = ", ".join(f"`{_code(name)}`" for name in annotators_of(source))
        yield (
            f"No one annotated the images of the source `{_code(source)}`: its regions and answers are what {tools}"
            " found, with scores above a threshold, and may be wrong."
        )
    single = facts.counts.steps[1]
    yield f"{single / rows:.0%} of the trajectories have a single step."
    yield "Tools err. What they returned is recorded as it was, right or wrong; the answer is the annotation's."
    yield "Near-duplicates among the images, and overlap with benchmarks, were not looked for by this upload."


def _columns() -> str:
    rows = (
        ("`id`", "a hash of the recipe, the source's key and the image"),
        ("`image`", "the original file's bytes, untouched"),
        ("`question`, `choices`, `answer`", "`choices` is empty for an open question"),
        ("`steps`", "`thought`, `tool`, `arguments` (JSON text), and the `text` and `image` of the observation"),
        ("`conclusion`", "the concluding thought; it contains the answer"),
        ("`expert`, `skill`, `source`, `license`", "who decided the steps, the question's family, whence the image is"),
        ("`seed`", "the run's seed"),
    )
    note = (
        "Boxes are `[x0, y0, x1, y1]` and points `[x, y]` in 0..1 of the image that the call names (`image`: 0 the"
        " original, i the output of step i)."
    )
    return f"## Columns\n\n{_table(('column', 'holds'), rows)}\n\n{note}"


def _configuration(facts: Facts) -> str:
    """What made the files; folders of the machine that made them are left out."""
    texts = (json.dumps(without_folders(making), indent=1, ensure_ascii=False) for making in facts.makings)
    shown = [text.replace("```", "'''") for text in texts]
    if not shown:
        return ""
    blocks = "\n\n".join(f"```json\n{text}\n```" for text in shown[:3])
    more = f"\n\n… and {len(shown) - 3} more." if len(shown) > 3 else ""
    return f"## The generator's configuration\n\n{blocks}{more}"


def _shares(title: str, counts: Mapping[str, int], total: int, ordered: bool = True) -> str:
    pairs = _ordered(counts) if ordered else list(counts.items())
    rows = [(_text(name) or "—", f"{count:,}", f"{count / max(total, 1):.1%}") for name, count in pairs]
    return _table((title, "trajectories" if title != "left out because" else "samples", "share"), rows)


def _ordered(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(Counter(counts).items(), key=lambda pair: (-pair[1], pair[0]))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _text(text: str) -> str:
    """Text of the data as Markdown that shows it and does nothing else, in one line, cut where it is very long."""
    line = " ".join(text.split())
    return _MARKUP.sub(r"\\\1", line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…")


def _code(text: str) -> str:
    """Text for a code span: it cannot end it, nor a cell of a table."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "¦")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
