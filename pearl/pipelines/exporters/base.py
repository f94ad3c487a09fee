"""What an export format is, and what the formats of JSON lines beside a folder of images share."""

from __future__ import annotations

import base64
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from PIL import ExifTags, Image

from pearl.files import whole_folder
from pearl.images import HARD_MAX_PIXELS, decode, encode
from pearl.pipelines.exporters.messages import ExportError, Message, Row, named
from pearl.records import EncodedImage

DATA = "data.jsonl"
MANIFEST = "export.json"
IMAGES = "images"
PLACEHOLDER = "<image>"
"""What stands for an image where text and images are kept apart."""
INLINE = ("jpeg", "png", "webp", "gif")
"""What services take in a data URI; anything else goes as PNG."""


class Exporter(ABC):
    """One format. Writing streams: rows are pulled one after another, and the output appears whole or not at all.

    Attributes:
        has_native_calls: The format has turns for calls and for what tools return.
        has_inline_images: Images may stand in the rows themselves.
        reserved: Texts that the consumer takes for something else than text; rows that say them are left out.
    """

    name: ClassVar[str]
    has_native_calls: ClassVar[bool] = True
    has_inline_images: ClassVar[bool] = False
    reserved: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, native_calls: bool = False, inline_images: bool = False) -> None:
        """
        Raises:
            ExportError: the format does not have what is asked for.
        """
        if native_calls and not self.has_native_calls:
            raise ExportError(
                f"{self.name} has no turns for tools that show images: calls stay in the template's words"
            )
        if inline_images and not self.has_inline_images:
            raise ExportError(f"{self.name} has one way to hold images")
        self.native_calls, self.inline_images = native_calls, inline_images

    @abstractmethod
    def write(self, rows: Iterable[Row], out: Path, made_by: Mapping[str, Any]) -> None:
        """Writes all rows; `made_by`, JSON values, is kept for `made_by`. `out` does not exist yet."""

    @abstractmethod
    def made_by(self, path: Path) -> dict[str, Any]:
        """What `write` was given.

        Raises:
            ExportError: there is no export of this format.
        """

    @abstractmethod
    def read(self, path: Path) -> Iterator[Row]:
        """The rows of an export, one after another.

        Raises:
            ExportError: a row cannot be read.
        """

    def refusal(self, row: Row) -> str | None:
        """Why the format cannot hold a row."""
        said = "".join(message.text for message in row.messages)
        return next((f"a text holds {text}" for text in self.reserved if text in said), None)


class JsonLinesExporter(Exporter):
    """A folder: `data.jsonl`, `images/`, `export.json`, and what else the consumer wants beside them."""

    @abstractmethod
    def encode(self, row: Row, images: ImageFolder, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A row as the consumer reads it, without `id` and `pearl`, which are added."""

    @abstractmethod
    def decode(self, entry: Mapping[str, Any], images: ImageFolder) -> tuple[Message, ...]:
        """The messages of an encoded row."""

    def beside(self) -> dict[str, Any]:
        """Further JSON files by name."""
        return {}

    def write(self, rows: Iterable[Row], out: Path, made_by: Mapping[str, Any]) -> None:
        with whole_folder(out) as folder:
            images = ImageFolder(folder, inline=self.inline_images)
            with (folder / DATA).open("w", encoding="utf-8") as file:
                for row in rows:
                    entry = {"id": row.facts["id"], **self.encode(row, images, made_by.get("tools", ()))}
                    entry["pearl"] = json.dumps(row.facts, ensure_ascii=False)
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            for name, content in {MANIFEST: dict(made_by), **self.beside()}.items():
                (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def made_by(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} is no export of pearl-gen: {error}") from error
        if not isinstance(found, dict):
            raise ExportError(f"{path / MANIFEST} is not a JSON object")
        return found

    def read(self, path: Path) -> Iterator[Row]:
        images = ImageFolder(path, inline=self.inline_images)
        with (path / DATA).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entry = json.loads(line)
                    facts = json.loads(entry["pearl"])
                    messages = self.decode(entry, images)
                    yield Row(named(messages, facts["paths"]), facts)
                except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
                    raise ExportError(f"{path / DATA} line {number}: {type(error).__name__}: {error}") from error


class ImageFolder:
    """Images of an export by reference: a path in its folder, named by content, or with `inline` a data URI."""

    def __init__(self, folder: Path, *, inline: bool) -> None:
        self._folder, self._inline = folder, inline

    def put(self, image: EncodedImage) -> str:
        data, kind = upright(image.data)
        if self._inline:
            if kind not in INLINE:
                data, kind = _encoded_anew(data, kind)
            return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        name = sha256(data).hexdigest()[:32]
        reference = f"{IMAGES}/{name[:2]}/{name}.{'jpg' if kind == 'jpeg' else kind}"
        path = self._folder / reference
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return reference

    def get(self, reference: str) -> EncodedImage:
        """
        Raises:
            ExportError: it names a file outside the folder.
        """
        if reference.startswith("data:"):
            return EncodedImage(base64.b64decode(reference.partition(",")[2], validate=True))
        path = (self._folder / reference).resolve()
        if not path.is_relative_to(self._folder.resolve()):
            raise ExportError(f"the image {reference} is outside {self._folder}")
        return EncodedImage(path.read_bytes())


def upright(data: bytes) -> tuple[bytes, str]:
    """An image file as consumers see it who ignore EXIF, and its format (`jpeg`, `png`, …).

    Most files come back untouched; one that is stored turned is encoded anew, since boxes refer to it upright.

    Raises:
        ImageError: it is turned and cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "png").lower().replace("mpo", "jpeg")  # of several pictures the first
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # Pillow raises anything
        return data, "png"
    if not turned:
        return data, kind
    return _encoded_anew(data, kind)


def _encoded_anew(data: bytes, kind: str) -> tuple[bytes, str]:
    pixels = decode(data, HARD_MAX_PIXELS)
    return (encode(pixels), "jpeg") if kind == "jpeg" else (encode(pixels, "png"), "png")


def with_placeholders(message: Message) -> str:
    return "".join(part if isinstance(part, str) else PLACEHOLDER for part in message.parts)


def from_placeholders(text: str, images: Iterator[EncodedImage]) -> tuple[str | EncodedImage, ...]:
    """Undoes `with_placeholders`; takes as many images as the text has placeholders.

    Raises:
        ExportError: there are fewer images.
    """
    first, *others = text.split(PLACEHOLDER)
    parts: list[str | EncodedImage] = [first]
    for other in others:
        image = next(images, None)
        if image is None:
            raise ExportError("there are more placeholders than images")
        parts += [image, other]
    return tuple(part for part in parts if part != "")
