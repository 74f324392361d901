"""How values of a user's types travel: what was registered, by type and by the name that is saved.

Knows functions of the user's, and never finds one by a name that a checkpoint gives. Does not know
trees or arrays.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mtckpt.errors import FormatError, UnsupportedState

__all__ = ["CODECS", "DEQUE", "Codec", "codec_named", "register_codec"]


@dataclass(frozen=True, slots=True)
class Codec:
    """How values of a user's type travel: as a tree of what mtckpt can store."""

    name: str
    type: type
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


CODECS: dict[type, Codec] = {}
_by_name: dict[str, Codec] = {}


def register_codec(
    type_: type, *, name: str, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> None:
    """Let values of exactly ``type_`` be saved.

    ``encode`` returns arrays, plain values and containers of them; ``decode`` takes the same back.
    ``name`` stands in the checkpoint, and a process that restores must have registered it.
    Nothing in a checkpoint ever names code.
    """
    known = _by_name.get(name)
    if known is not None and known.type is not type_:
        raise UnsupportedState(
            f"codec name {name!r} is taken", type_name=known.type.__qualname__, path=""
        )
    CODECS[type_] = _by_name[name] = Codec(name, type_, encode, decode)


def codec_named(name: str, path: str) -> Codec:
    """The codec that a checkpoint names. Raises UnsupportedState where none is registered."""
    try:
        return _by_name[name]
    except KeyError:
        raise UnsupportedState(
            f"the checkpoint uses the codec {name!r}, and this process has not registered it",
            path=path,
            state="live state unchanged",
            actions=("call mtckpt.register_codec with that name before restore",),
        ) from None


def _as_deque(tree: Any) -> deque[Any]:
    try:
        items, most = tree["items"], tree["maxlen"]
        found = deque(items, most)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"what is called a deque is none: {error}") from error
    if len(found) != len(items):
        raise FormatError(f"what is called a deque of at most {most} items has {len(items)}")
    return found


DEQUE = "deque"
register_codec(
    deque,
    name=DEQUE,
    encode=lambda items: {"maxlen": items.maxlen, "items": list(items)},
    decode=_as_deque,
)


def _file_with(state: Any) -> io.BytesIO:
    try:
        data, position = state
        file = io.BytesIO(data)
        file.seek(position)
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"what is called a file in memory is none: {error}") from error
    return file


# What state_dict() of many a trainer holds: something that was pickled into memory.
register_codec(
    io.BytesIO,
    name="io.BytesIO",
    encode=lambda file: (file.getvalue(), file.tell()),
    decode=_file_with,
)
