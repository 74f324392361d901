"""The checksum that stores verify and keep: CRC32C, or CRC32 where its library is not installed.

It knows the two functions, their base64 form and how two checksums make that of the whole. It does
not know who asks for which. They are for accidents on the way; what was saved is known by XXH3.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Crc"]

CRC32_POLYNOMIAL = 0xEDB88320
CRC32C_POLYNOMIAL = 0x82F63B78
PIECE_BYTES = 1 << 20


class Crc:
    """``algorithm`` is "CRC32C" by awscrt, "CRC32C" by google_crc32c if ``must_be_c``, else "CRC32"
    by zlib, at a tenth of the speed."""

    def __init__(self, *, must_be_c: bool = False) -> None:
        self._value: Callable[[Any], int] = zlib.crc32
        self._polynomial = CRC32_POLYNOMIAL
        self.algorithm = "CRC32"
        try:
            from awscrt import checksums
        except ImportError:
            if not must_be_c:
                return
            self._value = _by_google
        else:
            self._value = checksums.crc32c
        self._polynomial = CRC32C_POLYNOMIAL
        self.algorithm = "CRC32C"

    def of(self, data: memoryview | bytes) -> str:
        return _encoded(self._value(data))

    def of_digests(self, checksums: Iterable[str]) -> str:
        """What S3 says of an object made of parts: the checksum of their checksums."""
        digests = [base64.b64decode(checksum) for checksum in checksums]
        return f"{self.of(b''.join(digests))}-{len(digests)}"

    def of_joined(self, parts: Iterable[tuple[str, int]]) -> str:
        """The checksum of all bytes, from those of the parts and their sizes in bytes."""
        value = 0
        for checksum, size_bytes in parts:
            part = int.from_bytes(base64.b64decode(checksum), "big")
            value = _times(_power(8 * size_bytes, self._polynomial), value, self._polynomial) ^ part
        return _encoded(value)


def _encoded(value: int) -> str:
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def _by_google(data: memoryview | bytes) -> int:
    import google_crc32c

    value = 0
    view = memoryview(data)
    for start in range(0, len(view), PIECE_BYTES):
        value = google_crc32c.extend(value, bytes(view[start : start + PIECE_BYTES]))
    return value


def _times(left: int, right: int, polynomial: int) -> int:
    """The product of two polynomials over GF(2), lowest power in the highest bit, reduced."""
    product = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ (polynomial if right & 1 else 0)
    return product


def _power(exponent: int, polynomial: int) -> int:
    """x to the power of ``exponent``, reduced."""
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _times(square, result, polynomial)
        square = _times(square, square, polynomial)
        exponent >>= 1
    return result
