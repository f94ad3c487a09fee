"""The images that rows name: files of a folder, members of a zip archive, or bytes in the row itself."""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

from pearl.images import ImageError, header
from pearl.pipelines.sources.base import MAX_FILE_BYTES, BadRecord, SourceError, read_image
from pearl.records import EncodedImage


class Images:
    """Images by a path in `root`, which is a folder or a zip archive, or by their bytes."""

    def __init__(self, root: Path, max_pixels: int) -> None:
        self.root, self.max_pixels = root, max_pixels

    def read(self, value: Any) -> EncodedImage:
        """An image from a path, from a struct of `bytes` and `path`, or from bytes.

        Raises:
            BadRecord: it is missing, unreadable, too large, or lies outside the folder.
        """
        if isinstance(value, Mapping):
            path = value.get("path")
            name = Path(path).name if isinstance(path, str) else None
            return self._checked(value["bytes"], name) if value.get("bytes") else self.read(path)
        if isinstance(value, bytes):
            return self._checked(value, None)
        if not isinstance(value, str) or not value:
            raise BadRecord(f"no image: {str(value)[:80]}")
        if self.root.is_file():
            return EncodedImage(_member(self.root, value, self.max_pixels), posixpath.basename(value))
        return read_image(self.root, value, self.max_pixels)

    def _checked(self, data: Any, name: str | None) -> EncodedImage:
        if not isinstance(data, bytes):
            raise BadRecord("an image's bytes are no bytes")
        try:
            header(data, self.max_pixels)
        except ImageError as error:
            raise BadRecord(f"{name}: {error}") from error
        return EncodedImage(data, name)


def check_images(place: Path) -> Path:
    """
    Raises:
        SourceError: there is neither a folder nor a readable zip archive.
    """
    if not place.exists():
        raise SourceError(f"the images' folder or zip archive {place} is not there")
    if not place.is_dir():
        try:
            _open(str(place))
        except _UNREADABLE as error:
            raise SourceError(f"{place} is neither a folder nor a zip archive of images: {error}") from error
    return place


_UNREADABLE = (OSError, BadZipFile, EOFError, RuntimeError, ValueError, zlib.error)
"""What `zipfile` raises: RuntimeError for encrypted members, ValueError for names that are no text."""


def _member(archive: Path, name: str, max_pixels: int) -> bytes:
    """An image, read in place: nothing is unpacked, so no name can lead out of the archive. No more is read than the
    archive says, and only by methods that can stop there."""
    where = f"{name} in {archive.name}"
    try:
        opened = _open(str(archive))
        member = opened.NameToInfo.get(name) or opened.getinfo(posixpath.normpath(name))
        if member.file_size > MAX_FILE_BYTES:
            raise BadRecord(f"{where}: {member.file_size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise BadRecord(f"{where}: compressed by method {member.compress_type}; only stored and deflate are read")
        with opened.open(member) as file:
            data = file.read(member.file_size)
        header(data, max_pixels)
    except KeyError as error:
        raise BadRecord(f"{where}: there is no such member") from error
    except ImageError as error:
        raise BadRecord(f"{where}: {error}") from error
    except BadRecord:
        raise
    except _UNREADABLE as error:
        raise BadRecord(f"{where}: cannot be read: {error}") from error
    return data


@lru_cache(maxsize=4)
def _open(archive: str) -> ZipFile:
    return ZipFile(archive)
