"""Images by their content: exact by bytes, near by a perceptual hash.

The hash is the usual pHash: which of the 8×8 lowest frequencies of the 32×32 grey image are above their median. It is
written down here because the package ImageHash brings SciPy and PyWavelets for it, and OpenCV has the cosine transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise

import cv2
import numpy as np

from pearl.images import HARD_MAX_PIXELS, ImageError, decode

BITS = 64
NEAR = 4
"""Encoding anew and resizing change at most about this many bits; different scenes differ in 16 and more."""
MAX_DISTANCE = 12
_SIDE, _LOW = 32, 8
_FLAT = 8
_BLOCK = 4096


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def share(*names: str | int | bytes) -> float:
    """A number in 0..1 that depends on the names alone."""
    named = b"/".join(name if isinstance(name, bytes) else str(name).encode() for name in names)
    return int.from_bytes(blake2b(named, digest_size=8).digest()) / 2**64


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """64 bits of RGB (H, W, 3); None for an image that is all but one grey, which would be near every other one."""
    grey = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    if int(grey.max()) - int(grey.min()) < _FLAT:
        return None
    low = cv2.dct(grey.astype(np.float32))[:_LOW, :_LOW].flatten()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes())


class ImageIndex:
    """Distinct images by number, in the order in which they came; each is decoded once, none is kept.

    Attributes:
        digests: Of their bytes.
        hashes: Perceptual; None for flat and unreadable images, which are near nothing but themselves.
        unreadable: How many of the images could not be decoded.
    """

    def __init__(self, *, perceptual: bool) -> None:
        self._perceptual = perceptual
        self._numbers = dict[bytes, int]()
        self.digests = list[bytes]()
        self.hashes = list[int | None]()
        self.unreadable = 0

    def add(self, data: bytes) -> int:
        """The number of an image file."""
        key = digest(data)
        number = self._numbers.setdefault(key, len(self.digests))
        if number == len(self.digests):
            self.digests.append(key)
            self.hashes.append(self._hash(data) if self._perceptual else None)
        return number

    def _hash(self, data: bytes) -> int | None:
        try:
            return perceptual_hash(decode(data, HARD_MAX_PIXELS))
        except ImageError:
            self.unreadable += 1
            return None

    def groups(self, distance: int) -> list[int]:
        """For each image the first of its group: images that are linked by steps of at most `distance` bits."""
        first = list(range(len(self.digests)))
        hashed = [(number, value) for number, value in enumerate(self.hashes) if value is not None]
        values, place = np.unique(np.array([value for _, value in hashed], np.uint64), return_inverse=True)
        representative = dict[int, int]()
        for (number, _), where in zip(hashed, place.tolist(), strict=True):
            _join(first, representative.setdefault(where, number), number)
        for one, other in near_pairs(values, distance):
            _join(first, representative[one], representative[other])
        return [_root(first, number) for number in range(len(first))]


def _root(first: list[int], number: int) -> int:
    while first[number] != number:
        first[number] = first[first[number]]
        number = first[number]
    return number


def _join(first: list[int], one: int, other: int) -> None:
    one, other = _root(first, one), _root(first, other)
    first[max(one, other)] = min(one, other)


def near_pairs(values: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """All pairs (i, j) of uint64 `values` that differ in at most `distance` bits; a pair may come several times.

    Of `distance` + 1 bands of bits two such values have one in common, so only those that share a band are compared.
    """
    bounds = np.linspace(0, BITS, distance + 2).round().astype(int)
    for low, high in pairwise(bounds):
        band = (values >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(band, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            if len(members) > 1:
                yield from _pairs_within(values, members, distance)


def _pairs_within(values: np.ndarray, members: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, len(members), _BLOCK):
        left = members[begin : begin + _BLOCK]
        for other in range(begin, len(members), _BLOCK):
            right = members[other : other + _BLOCK]
            near = np.bitwise_count(values[left][:, None] ^ values[right][None, :]) <= distance
            for i, j in zip(*np.nonzero(near), strict=True):
                if begin + i < other + j:
                    yield int(left[i]), int(right[j])


def nearest(
    queries: Sequence[int | None], references: Sequence[int | None], distance: int
) -> list[tuple[int, int] | None]:
    """For each query the nearest reference (the first of several) and how many bits they differ in, if at most
    `distance`."""
    asked = [(number, value) for number, value in enumerate(queries) if value is not None]
    known = [(number, value) for number, value in enumerate(references) if value is not None]
    found: list[tuple[int, int] | None] = [None] * len(queries)
    if not known:
        return found
    goals = np.array([value for _, value in known], np.uint64)
    rows = max(1, _BLOCK * _BLOCK // len(goals))
    for begin in range(0, len(asked), rows):
        block = asked[begin : begin + rows]
        apart = np.bitwise_count(np.array([value for _, value in block], np.uint64)[:, None] ^ goals[None, :])
        best = apart.argmin(axis=1)
        for (number, _), where, bits in zip(
            block, best.tolist(), apart[np.arange(len(block)), best].tolist(), strict=True
        ):
            if bits <= distance:
                found[number] = (known[where][0], bits)
    return found
