"""What another node may say to the data port, as far as a data process reads it: pure parsing.

Knows the one way in which our own client writes a request, and refuses every other. Does not know
sockets or files. Any bytes end in a ``Head`` or in a FormatError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mtckpt._handshake import MAX_SMALL_BYTES
from mtckpt.errors import FormatError

__all__ = ["MAX_HEAD_BYTES", "Head", "parse_head", "split_path"]

MAX_HEAD_BYTES = 8 * 1024
MAX_FIELDS = 32
_REQUEST = re.compile(r"(GET|POST) (/[!-~]{1,2000}) HTTP/1\.1")
_FIELD = re.compile(r"([A-Za-z0-9-]{1,64}):[ \t]*([ -~]{0,1000}?)[ \t]*")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})")
_PATH = re.compile(r"/v1/(objects|stat|list)/([a-z0-9-]{1,64})/([a-z0-9_.=/-]{1,600})")
_AFTER = re.compile(r"(?:after=([a-z0-9_.=/-]{0,600}))?")


@dataclass(frozen=True, slots=True)
class Head:
    """One request. ``first`` and ``last`` are the bytes that it is about, the last one included."""

    method: str
    path: str
    after: str = ""
    body_bytes: int = 0
    first: int = 0
    last: int = (1 << 62) - 1


def parse_head(data: bytes) -> Head:
    """Read a request up to its empty line, without it. Raises FormatError."""
    try:
        line, *rest = data.decode("ascii").split("\r\n")
    except UnicodeDecodeError as error:
        raise FormatError("not a request: it has bytes that are no text") from error
    request = _REQUEST.fullmatch(line)
    if request is None or len(rest) > MAX_FIELDS:
        raise FormatError("not a request that is answered here")
    fields: dict[str, str] = {}
    for text in rest:
        field = _FIELD.fullmatch(text)
        if field is None or field[1].lower() in fields:
            raise FormatError("not a request: a header that makes no sense")
        fields[field[1].lower()] = field[2]
    path, _, query = request[2].partition("?")
    after = _AFTER.fullmatch(query)
    length = fields.get("content-length", "0")
    if after is None or "transfer-encoding" in fields or not re.fullmatch(r"[0-9]{1,6}", length):
        raise FormatError("not a request that is answered here")
    if int(length) > MAX_SMALL_BYTES:
        raise FormatError("the request's body is larger than any can be", got_bytes=int(length))
    head = Head(request[1], path, after[1] or "", int(length))
    if "range" not in fields:
        return head
    span = _RANGE.fullmatch(fields["range"])
    if span is None or int(span[1]) > int(span[2]):
        raise FormatError("not a range that is answered here")
    return Head(head.method, path, head.after, head.body_bytes, int(span[1]), int(span[2]))


def split_path(path: str) -> tuple[str, str, str]:
    """Verb, label of the place, and key or prefix. Raises FormatError."""
    found = _PATH.fullmatch(path)
    if found is None:
        raise FormatError("no such request")
    return found[1], found[2], found[3]
