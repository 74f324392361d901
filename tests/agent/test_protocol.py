"""Messages and errors survive the wire; anything else is refused with a type."""

from __future__ import annotations

import inspect

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from mtckpt import errors
from mtckpt.agent import protocol
from mtckpt.agent.guests import Offer
from mtckpt.agent.nodes import News
from mtckpt.agent.protocol import TierConfig, decode, encode, error_from_wire, error_to_wire

MESSAGES = [
    type_
    for _, type_ in inspect.getmembers(protocol, inspect.isclass)
    if issubclass(type_, msgspec.Struct) and type_.__module__ == protocol.__name__
]

OPEN = protocol.Open(1, "run", "h", 0, 1, 12, 34, 1, "/dev/shm/x", [TierConfig("d", "disk", "/d")])
SOMEWHERE = {"host": "h", "control_port": 1, "data_port": 2}
UUID = "0" * 8 + "-0000-0000-0000-" + "0" * 12
EXAMPLES: dict[type, dict[str, object]] = {
    protocol.Open: msgspec.to_builtins(OPEN),
    protocol.Join: {"holder": "h", "secret": "", "world_size": 1, "nodes": []},
    protocol.NodeOfRun: {"address": SOMEWHERE, "ranks": [0]},
    protocol.Begin: {"holder": "h", "number": 1, "id": UUID},
    protocol.WantSlots: {"holder": "h", "shard_bytes": 1, "table_bytes": 1, "count": 1},
    protocol.Seal: {"holder": "h", "slot_id": "a", "inode": 1, "save_id": UUID, "step": 1},
    News: {"save": "s", "save_id": UUID},
    Offer: {"node": 0, "address": SOMEWHERE, "save": "s", "save_id": UUID, "ranks": [0]},
}


@pytest.mark.parametrize("type_", EXAMPLES)
def test_the_examples_are_messages(type_: type[msgspec.Struct]) -> None:
    assert isinstance(decode(encode(EXAMPLES[type_]), type_), type_)


def test_a_message_is_the_same_after_the_wire() -> None:
    assert decode(encode(OPEN), protocol.Open) == OPEN
    change = protocol.SaveChange("id", 3, ["staged"], {"disk": error_to_wire(OSError(5, "x"))})
    changes = protocol.Changes(7, [change], error_to_wire(errors.RunLocked("locked", run="r")))
    assert decode(encode(changes), protocol.Changes) == changes


def test_unknown_fields_are_ignored_and_missing_ones_refused() -> None:
    assert decode(b'{"holder":"h","new":1}', protocol.Flush) == protocol.Flush("h")
    with pytest.raises(errors.FormatError, match="holder"):
        decode(b"{}", protocol.Flush)


@given(st.sampled_from(MESSAGES), st.binary(max_size=200))
def test_no_bytes_crash_the_decoder(type_: type[msgspec.Struct], data: bytes) -> None:
    try:
        decode(data, type_)
    except errors.FormatError:
        pass


def test_deep_and_huge_input_is_refused() -> None:
    with pytest.raises(errors.FormatError):
        decode(b"[" * 1_000_000, protocol.Open)
    with pytest.raises(errors.FormatError, match="larger"):
        decode(b" " * (protocol.MAX_MESSAGE_BYTES + 1), protocol.Flush)


@pytest.mark.parametrize(
    ("type_", "given"),
    [
        (protocol.Open, {"world_size": 10**12}),
        (protocol.Open, {"world_size": 0}),
        (protocol.Open, {"rank": -1}),
        (protocol.Open, {"incarnation": 10**12}),
        (protocol.Join, {"world_size": 10**9}),
        (protocol.NodeOfRun, {"ranks": [10**9]}),
        (protocol.Begin, {"number": 10**12}),
        (protocol.WantSlots, {"shard_bytes": -1}),
        (protocol.WantSlots, {"shard_bytes": 2**60}),
        (protocol.WantSlots, {"count": 10**6}),
        (protocol.Seal, {"step": -1}),
        (News, {"world_size": 10**9}),
        (News, {"parts": {"ram": [10**9]}}),
        (Offer, {"ranks": [-1]}),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    type_: type[msgspec.Struct], given: dict[str, object]
) -> None:
    """Before anybody counts up to them."""
    with pytest.raises(errors.FormatError, match=rf"\$\.{next(iter(given))}"):
        decode(encode({**EXAMPLES[type_], **given}), type_)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_comes_back_as_itself(name: str) -> None:
    error = getattr(errors, name)(
        "what happened", state="unchanged", actions=["do this"], tier="disk", step=7, ratio=0.5
    )
    back = error_from_wire(decode(encode(error_to_wire(error)), protocol.WireError))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.details == error.details


def test_a_foreign_or_unknown_error_is_named() -> None:
    wire = error_to_wire(ZeroDivisionError("division by zero"))
    assert "ZeroDivisionError: division by zero" in str(error_from_wire(wire))
    later = error_from_wire(protocol.WireError("InventedLater", "new", details={"a-b": 1, "c": 2}))
    assert type(later) is errors.CheckpointError
    assert later.details == {"c": 2}


def test_details_cannot_replace_the_text() -> None:
    wire = protocol.WireError("TierFull", "full", details={"what": "no", "state": 1, "actions": 2})
    assert error_from_wire(wire).what == "full"


@pytest.mark.parametrize("hostile", ["__class__", "args", "with_traceback", "details", "step"])
def test_details_from_the_wire_cannot_break_an_error(hostile: str) -> None:
    error = error_from_wire(protocol.WireError("TierFull", "full", details={hostile: "x"}))
    assert "full" in str(error)
