"""What the project's self-contained HTML pages share: templates under a strict policy, data as JSON, images as data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, TextIO

from PIL import Image, ImageOps

from pearl.images import ImageError, decode, header
from pearl.records import EncodedImage

MAX_SIDE = 1600
THUMBNAIL_SIDE = 144
_MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif"}


def template(package: str, name: str) -> tuple[str, str, str]:
    """A template's parts around the images and the data, with the files of this package where it names them.

    Its policy admits its own style and script, by their hashes, and nothing else, so not even an injected `<script>`
    would run.
    """
    text = files(package).joinpath(name).read_text(encoding="utf-8")
    text = re.sub(r"\{\{([\w.]+)\.(css|js|html)\}\}", lambda match: _shared(f"{match[1]}.{match[2]}"), text)
    for kind in ("style", "script"):
        source = text.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        text = text.replace(f"{{{{{kind} hash}}}}", f"sha256-{digest}")
    before_images, rest = text.split("{{images}}")
    before_data, after_data = rest.split("{{data}}")
    return before_images, before_data, after_data


def _shared(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8").rstrip()


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


class Images:
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
