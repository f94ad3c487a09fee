"""Sizes, formats and bytes of images, from their headers: nothing is decoded."""

from __future__ import annotations

from typing import Any

from pearl.images import HARD_MAX_PIXELS, ImageError, header
from pearl.pipelines.stats.counters import Spread, Tally

_STARTS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"GIF8": "GIF", b"BM": "BMP"}


class Pictures:
    def __init__(self) -> None:
        self._longer, self._aspect, self._bytes = Spread(whole=True), Spread(), Spread(whole=True)
        self._sizes, self._formats = Tally(), Tally()
        self._unreadable = 0

    def add(self, data: bytes) -> tuple[int, int] | None:
        """Counts an image file; its width and height in pixels as they will be seen, None if its header is damaged."""
        self._bytes.add(len(data))
        self._formats.add(next((name for start, name in _STARTS.items() if data.startswith(start)), "other"))
        try:
            width, height = header(data, HARD_MAX_PIXELS)
        except ImageError:
            self._unreadable += 1
            return None
        self._longer.add(max(width, height))
        self._aspect.add(width / height)
        self._sizes.add(f"{width}×{height}")
        return width, height

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self._bytes.count,
            "unreadable": self._unreadable,
            "longer": self._longer.to_json(),
            "aspect": self._aspect.to_json(),
            "bytes": self._bytes.to_json(),
            "sizes": self._sizes.to_json(8),
            "formats": self._formats.to_json(8),
        }
