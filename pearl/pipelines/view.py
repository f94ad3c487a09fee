"""One self-contained HTML page on which people look at trajectories: `pearl-gen view DATA`.

The page needs no server and no network. Its template is `view.html`; what this module puts into it are the images,
each once, and the trajectories as JSON, which the page's script shows as text and never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, ImageOps

from pearl.images import ImageError, decode, header
from pearl.parquet import count_rows, read_trajectories
from pearl.records import EncodedImage, Step, Trajectory

MAX_SIDE = 1600
THUMBNAIL_SIDE = 144
_MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif"}


def write_page(data: str | Path, out: Path, limit: int = 300, title: str | None = None) -> int:
    """Writes the page about the first `limit` trajectories of a file, folder, glob or Hub id.

    The page appears whole or not at all. Memory holds one row group, whatever the limit.

    Returns:
        The number of trajectories shown.

    Raises:
        ValueError: `limit` is less than 1.
        DataError: there is nothing at `data` that can be read as trajectories.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it takes at least 1 trajectory to make a page")
    total = count_rows(data)
    title = title or f"Trajectories of {Path(data).name or data}"
    before_images, before_data, after_data = _template()
    with _whole_file(out) as page:
        page.write(before_images.replace("{{title}}", html.escape(title)))
        images = _Images(page)
        rows = [_row(trajectory, images) for trajectory in islice(read_trajectories(data), limit)]
        page.write(before_data)
        page.write(embeddable_json({"title": title, "total": total, "images": images.table, "rows": rows}))
        page.write(after_data)
    return len(rows)


def embeddable_json(value: Any) -> str:
    """JSON as ASCII that can stand in a `<script>`: nothing in it can end the element or begin a comment."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity, but arguments that a model wrote may: they are shown by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return value


def _template() -> tuple[str, str, str]:
    """The template's parts around the images and the data. Its policy admits its own style and script, by their
    hashes, and nothing else, so not even an injected `<script>` would run."""
    text = files("pearl.pipelines").joinpath("view.html").read_text(encoding="utf-8")
    for kind in ("style", "script"):
        source = text.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        text = text.replace(f"{{{{{kind} hash}}}}", f"sha256-{digest}")
    before_images, rest = text.split("{{images}}")
    before_data, after_data = rest.split("{{data}}")
    return before_images, before_data, after_data


@contextmanager
def _whole_file(out: Path) -> Iterator[TextIO]:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _row(trajectory: Trajectory, images: _Images) -> dict[str, Any]:
    return {
        "id": trajectory.id,
        "image": images.add(trajectory.image),
        "thumbnail": images.add_thumbnail(trajectory.image),
        "question": trajectory.question,
        "choices": trajectory.choices,
        "answer": trajectory.answer,
        "steps": [_step_row(step, images) for step in trajectory.steps],
        "conclusion": trajectory.conclusion,
        "expert": trajectory.expert,
        "skill": trajectory.skill,
        "source": trajectory.source,
        "license": trajectory.license,
        "seed": str(trajectory.seed),  # JavaScript rounds integers beyond 2^53
    }


def _step_row(step: Step, images: _Images) -> dict[str, Any]:
    image = step.observation.image
    return {
        "thought": step.thought,
        "tool": step.call.tool,
        "arguments": step.call.arguments,
        "text": step.observation.text,
        "image": None if image is None else images.add(image),
    }


class _Images:
    """Writes each distinct image once, as it comes, in a script element of its own: a data URI that the page reads
    when the image is looked at. So neither this process nor the page's JSON ever holds them all."""

    def __init__(self, page: TextIO) -> None:
        self._page = page
        self._known: dict[tuple[str, bytes], int] = {}
        self.table: list[dict[str, Any]] = []
        """What the page must know of each image: its size as it is seen, or a note why it cannot be shown."""

    def add(self, image: EncodedImage) -> int:
        key = ("full", hashlib.sha256(image.data).digest())
        if key not in self._known:
            self._known[key] = self._write_full(image.data)
        return self._known[key]

    def add_thumbnail(self, image: EncodedImage) -> int:
        full = self.add(image)
        size = self.table[full]
        if "note" in size or max(size["width"], size["height"]) <= 2 * THUMBNAIL_SIDE:
            return full
        key = ("thumbnail", hashlib.sha256(image.data).digest())
        if key not in self._known:
            self._known[key] = self._write_thumbnail(image.data)
        return self._known[key]

    def _write_full(self, data: bytes) -> int:
        try:
            mime, (width, height) = _mime(data), header(data)
            if mime is None or max(width, height) > MAX_SIDE:
                picture = Image.fromarray(decode(data))
                picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
                return self._write(_jpeg(picture, 88), "image/jpeg", *picture.size)
        except ImageError as error:
            return self._note(str(error))
        return self._write(data, mime, width, height)

    def _write_thumbnail(self, data: bytes) -> int:
        try:
            side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
            return self._write(_jpeg(ImageOps.fit(Image.fromarray(decode(data)), side), 80), "image/jpeg", *side)
        except ImageError as error:
            return self._note(str(error))

    def _write(self, data: bytes, mime: str, width: int, height: int) -> int:
        number = len(self.table)
        self.table.append({"width": width, "height": height})
        uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        self._page.write(f'<script type="text/plain" id="image-{number}">{uri}</script>\n')
        return number

    def _note(self, reason: str) -> int:
        self.table.append({"note": reason})
        return len(self.table) - 1


def _mime(data: bytes) -> str | None:
    """The MIME type of a format that every browser shows; None for others."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return next((mime for start, mime in _MAGIC.items() if data.startswith(start)), None)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
