"""What cannot be saved, and what to save in its place: errors with a path and an action.

Knows types by name and by what they are. Does not know trees, adapters or arrays.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import is_dataclass
from enum import Enum

from mtckpt.errors import CaptureFailed, UnsupportedState

__all__ = [
    "check_name",
    "refused",
    "refused_depth",
    "refused_int",
    "refused_key",
    "refused_to_tell",
    "same_path",
]

_AS_LIST = "save it as a list, in an order that is always the same: sorted(value)"
_AS_TEXT = "save it as text: str(value)"
_AS_BYTES = "save it as bytes: bytes(value)"
_AS_COLUMNS = "save its columns, as a dict of lists: value.to_dict('list')"
_AS_FIELDS = "save the dict of its fields, which restore() fills in its place: vars(value)"
_INSTEAD = {
    "builtins.set": _AS_LIST,
    "builtins.frozenset": _AS_LIST,
    "builtins.complex": "save its two parts: [value.real, value.imag]",
    "builtins.bytearray": _AS_BYTES,
    "builtins.memoryview": _AS_BYTES,
    "builtins.range": "save its numbers: [value.start, value.stop, value.step]",
    "builtins.slice": "save its numbers: [value.start, value.stop, value.step]",
    "argparse.Namespace": _AS_FIELDS,
    "array.array": "save it as an array of NumPy: numpy.array(value)",
    "collections.UserList": "save the list in it: value.data",
    "datetime.date": "save it as text: value.isoformat()",
    "datetime.time": "save it as text: value.isoformat()",
    "datetime.timedelta": "save its numbers: [value.days, value.seconds, value.microseconds]",
    "decimal.Decimal": _AS_TEXT,
    "fractions.Fraction": _AS_TEXT,
    "omegaconf.listconfig.ListConfig": "save it as a list: OmegaConf.to_container(value)",
    "pandas.DataFrame": _AS_COLUMNS,
    "pandas.core.frame.DataFrame": _AS_COLUMNS,  # until pandas 3
    "types.SimpleNamespace": _AS_FIELDS,
    "uuid.UUID": _AS_TEXT,
    "torch.utils.data.sampler.Sampler": (
        "save the generator that it draws from, value.generator, or a sampler of torchdata's"
    ),
    "torch.utils.data.dataloader.DataLoader": (
        "torchdata's StatefulDataLoader knows its place; or leave it out, and find the batch again"
        " from the number of the step: https://mtckpt.readthedocs.io/quickstart#data-loaders"
    ),
}


def _instead(kind: type) -> str:
    """What to save in the place of such a value; empty for a type that nothing is known of."""
    for base in kind.__mro__:
        action = _INSTEAD.get(f"{base.__module__}.{base.__qualname__}")
        if action:
            return action
    if issubclass(kind, os.PathLike):
        return "save it as text: os.fspath(value)"
    if issubclass(kind, Enum):
        return "save what it stands for: value.value"
    if issubclass(kind, Iterator | Coroutine):
        return "save list(value), or how far it has come, and go that far again after restore()"
    if is_dataclass(kind) and kind.__dictoffset__:  # with __slots__ it has no such dict
        return _AS_FIELDS
    return ""


def refused(kind: type, path: str) -> UnsupportedState:
    """A value of a type that is neither array, container, plain value nor has a state."""
    instead = _instead(kind)
    actions = (
        *([instead] if instead else []),
        "leave it out of the state if it can be built again",
        "give it state_dict() and load_state_dict()",
        "or describe it once with mtckpt.register_codec(type, name=, encode=, decode=)",
    )
    return UnsupportedState(
        f"cannot save a value of type {kind.__module__}.{kind.__qualname__}",
        path=path,
        type_name=kind.__qualname__,
        state="nothing was written",
        actions=actions,
    )


def refused_to_tell(kind: type, path: str, error: Exception) -> CaptureFailed:
    """An object that was asked for its state, and failed."""
    return CaptureFailed(
        f"the state of a {kind.__qualname__} could not be read: {type(error).__name__}: {error}",
        path=path,
        type_name=kind.__qualname__,
        stage="captured",
    )


def refused_depth(path: str, max_depth: int) -> UnsupportedState:
    """A tree without an end, or nearly."""
    return UnsupportedState(
        "nested too deeply, or a container that holds itself",
        path=path,
        max_depth=max_depth,
        state="nothing was written",
        actions=("save what is deep inside as a dict of its own, by path or number",),
    )


def refused_int(number: int, path: str, most_bits: int) -> UnsupportedState:
    """A whole number with more digits than are read again."""
    return UnsupportedState(
        f"an integer of {number.bit_length():,} bits",
        path=path,
        type_name="int",
        limit_bits=most_bits,
        state="nothing was written",
        actions=("save it as bytes: number.to_bytes(...)",),
    )


def refused_key(key: object, path: str) -> UnsupportedState:
    """A key of a dict that a path cannot have."""
    return UnsupportedState(
        "a dict key must be a str, int, float, bool, None or a tuple of these, not"
        f" {type(key).__qualname__}",
        path=path,
        type_name=type(key).__qualname__,
        state="nothing was written",
        actions=(
            "use a text or a number in its place, such as str(key) or int(key)",
            "or save the list of its items, and make a dict of it after restore():"
            " list(value.items())",
        ),
    )


def same_path(paths: Sequence[str]) -> UnsupportedState:
    """Of several paths two or more are the same."""
    path, count = Counter(paths).most_common(1)[0]
    return UnsupportedState(
        f"{count} leaves have the same path",
        path=path,
        state="nothing was written",
        actions=("give the keys of that dict different texts: 1 and '1' have the same",),
    )


def check_name(name: str, path: str | None = None) -> None:
    """Raise UnsupportedState for a text that no file can hold; ``path`` is where, if not itself."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedState(
            f"text with a lone surrogate has no UTF-8 form: {name[:100]!a}",
            path=(name if path is None else path).encode(errors="backslashreplace").decode(),
            state="nothing was written",
            actions=("save it as bytes: os.fsencode(text)", "or leave it out of the state"),
        ) from error
    if name == "__metadata__" and path is None:
        raise UnsupportedState(
            "a leaf cannot be called __metadata__: safetensors keeps that name for itself",
            path=name,
            state="nothing was written",
        )
