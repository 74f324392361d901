"""Every parser of mtckpt as a function of bytes, for hypothesis and for a fuzzer.

Not a test file: ``test_fuzz`` runs these. A target gives bytes to a parser and to whatever works on
what was parsed; errors of ours are answers, anything else is a bug. What comes out of names is
checked to be no path. As a program it fuzzes one target, or all of them:

    python tests/fuzz_targets.py TARGET SECONDS CORPUS [options of libFuzzer]
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["mtckpt"]):
        import mtckpt._places
        import mtckpt._renaming
        import mtckpt._slots
        import mtckpt.agent.work  # noqa: F401 - so that the imports below find it instrumented

import msgspec
from xxhash import xxh3_128_hexdigest

from mtckpt import (
    _handshake,
    _inventory,
    _manifest,
    _node,
    _places,
    _renaming,
    _shard,
    _slots,
    _state,
)
from mtckpt._handshake import Hello, PeerAddress, Proof, Welcome
from mtckpt._manifest import Incarnation, Manifest, Metrics, Record, SaveName
from mtckpt._state import ArraySpec
from mtckpt.agent import peer_requests, protocol, work
from mtckpt.agent.guests import Offer, Taken
from mtckpt.agent.nodes import Heard, News, Tell
from mtckpt.errors import CheckpointError, FormatError, UsageError
from mtckpt.tiers import check_key
from mtckpt.tiers.peer import Listing, Stat

__all__ = ["TARGETS", "seeds"]

GOLDEN = Path(__file__).resolve().parent / "golden"
ID = str(uuid.UUID(int=5))
RUN = "run"
MESSAGES = sorted(
    (
        value
        for value in vars(protocol).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    ),
    key=lambda type_: type_.__name__,
)
PEER_MESSAGES: list[type[Any]] = [Hello, Welcome, Proof, _handshake.Refusal, Offer, Taken, Tell]
PEER_MESSAGES += [Heard, Listing, Stat]
LAYOUT = _shard.plan_layout([("a", "float32", (70_000,)), ("b", "int8", (3,))])
NUM_LEAVES = 8


def header(data: bytes) -> None:
    """As a whole header, and as the JSON of one whose length is right."""
    for text, size_bytes in ((data, len(data)), (struct.pack("<Q", len(data)) + data, 0)):
        with contextlib.suppress(CheckpointError):
            _shard.parse_layout(text, size_bytes or len(text))
    text = struct.pack("<Q", len(data)) + data
    for size_bytes in (4096, 2**20, 2**46, len(text) + data.count(b"0")):
        with contextlib.suppress(CheckpointError):
            layout = _shard.parse_layout(text, size_bytes)
            assert layout.size_bytes == size_bytes
            assert layout.num_chunks <= size_bytes


def table(data: bytes) -> None:
    for layout in (None, LAYOUT):
        with contextlib.suppress(CheckpointError):
            parsed = _shard.Table.parse(data, layout)
            assert 8 * len(parsed.digests) + _shard.TABLE_HEADER.size == len(data)
            if layout is not None:
                _shard.root_digests(layout, parsed.digests)
    _shard.generation_in(data)


def record(data: bytes) -> None:
    for sealed in _as_sealed(data, "record"):
        with contextlib.suppress(CheckpointError):
            _look_at(_manifest.decode_sealed(sealed, Record))


def _look_at(found: Record) -> None:
    key = f"{RUN}/{found.name}/{_manifest.record_file(found.rank)}"
    assert check_key(key) == key
    assert SaveName.parse(str(found.name)) == found.name
    assert _manifest.generation_of(found.save_id)
    _manifest.is_complete({found.rank: found})
    _manifest.describe(found)
    for work_on in (
        found.root_bytes,
        found.array_entries,
        lambda: _inventory.check_record(found, found.name, found.rank),
        lambda: _inventory.check_identity(found, LAYOUT.header, LAYOUT.size_bytes, b""),
        lambda: structure(bytes(found.structure)),
        lambda: [_node.decode_plain(v) for v in msgspec.json.decode(found.plain, type=list[Any])],
    ):
        with contextlib.suppress(CheckpointError, msgspec.DecodeError, UnicodeDecodeError):
            work_on()


def manifest(data: bytes) -> None:
    for sealed in _as_sealed(data, "manifest"):
        with contextlib.suppress(CheckpointError):
            found = _manifest.decode_sealed(sealed, Manifest)
            assert check_key(str(_manifest.save_name(found.step, found.incarnation, found.save_id)))


def incarnation(data: bytes) -> None:
    for sealed in _as_sealed(data, "incarnation"):
        with contextlib.suppress(CheckpointError):
            found = _manifest.decode_sealed(sealed, Incarnation)
            key = _inventory.incarnation_key(RUN, found)
            assert check_key(key).count("/") == 1
            assert _manifest.parse_incarnation_file(key.partition("/")[2]) == found.number
            _manifest.newest_line([found])


def metrics(data: bytes) -> None:
    for sealed in _as_sealed(data, "metrics"):
        with contextlib.suppress(CheckpointError):
            found = _manifest.decode_sealed(sealed, Metrics)
            assert all(type(value) is float for value in found.metrics.values())


def _as_sealed(data: bytes, kind: str) -> tuple[bytes, ...]:
    """As it is, and as the body of somebody who can compute a digest."""
    digest = xxh3_128_hexdigest(kind.encode() + data)
    return data, b'{"kind":"%s","digest":"%s","body":%s}' % (kind.encode(), digest.encode(), data)


def message(data: bytes) -> None:
    """What the agent or a trainer receives, of every verb."""
    type_ = MESSAGES[data[0] % len(MESSAGES)] if data else MESSAGES[0]
    with contextlib.suppress(CheckpointError):
        found = protocol.decode(data[1:], type_)
        assert protocol.decode(protocol.encode(found), type_) == found
        if isinstance(found, protocol.WireError):
            error = protocol.error_from_wire(found)
            assert str(error)
            protocol.error_to_wire(error)
        if isinstance(found, protocol.Begin):
            assert check_key(_manifest.incarnation_file(1, found.id))


def request(data: bytes) -> None:
    """What a stranger says to the data port: bounded numbers, and a path below one run, or none."""
    with contextlib.suppress(FormatError):
        head = peer_requests.parse_head(data)
        assert 0 <= head.first <= head.last < 2**63
        assert head.body_bytes <= _handshake.MAX_SMALL_BYTES
        verb, label, rest = peer_requests.split_path(head.path)
        assert verb in ("objects", "stat", "list")
        assert not {"/", "\0"} & {*label}
        assert not rest.startswith("/")
        assert "\0" not in rest + head.after


def peer_message(data: bytes) -> None:
    """What agents of other nodes say, before a proof and after it."""
    type_ = PEER_MESSAGES[data[0] % len(PEER_MESSAGES)] if data else Hello
    small = type_ in (Hello, Welcome, Proof, _handshake.Refusal)
    with contextlib.suppress(CheckpointError):
        decode: Any = _handshake.decode_small if small else protocol.decode
        found = decode(data[1:], type_)
        assert decode(protocol.encode(found), type_) == found
        if isinstance(found, Hello):
            answerer = _handshake.Answerer("a", "data", {RUN: bytes(32)}.get)
            answerer.welcome(found)
            assert not answerer.run_key


def command(data: bytes) -> None:
    """What the control process and its data processes receive from one another."""
    for decode in (work.decode_request, work.decode_reply):
        with contextlib.suppress(CheckpointError):
            found: Any = decode(data)
            assert decode(work.encode_line(found)) == found


def names(data: bytes) -> None:
    """Names of files and runs: what is taken for one is one component of a path, or refused."""
    text = data.decode("utf-8", "surrogateescape")
    if (name := SaveName.parse(text)) is not None:
        assert check_key(str(name))
        assert SaveName.parse(str(name)) == name
    if (rank := _manifest.parse_record_file(text)) is not None:
        assert check_key(_manifest.record_file(rank))
    if _manifest.parse_incarnation_file(text) is not None:
        assert check_key(text)
    for accept in (check_key, lambda t: _slots._slot_file(t, ".json"), _manifest.run_key):
        with contextlib.suppress(UsageError):
            path = accept(text)
            assert ".." not in path.split("/")
            assert not path.startswith(("/", "."))
            assert "\0" not in path
            assert accept is check_key or "/" not in path


def location(data: bytes) -> None:
    """What a user types: a directory that is there, or an error of ours."""
    text = os.fsdecode(data)
    _places.is_location(text)
    with contextlib.suppress(CheckpointError):
        assert _places._directory(text).is_dir()


def plain(data: bytes) -> None:
    with contextlib.suppress(FormatError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = _node.decode_plain(msgspec.json.decode(data))
        again = _node.decode_plain(
            msgspec.json.decode(msgspec.json.encode(_node.encode_plain(found)))
        )
        assert type(again) is type(found)
        assert again == found or found != found


def structure(data: bytes) -> None:
    tree = _json(data)
    with contextlib.suppress(CheckpointError):
        node = _node.node_from_json(tree, NUM_LEAVES, NUM_LEAVES)
        again = _node.node_from_json(_node.node_to_json(node), NUM_LEAVES, NUM_LEAVES)
        assert _node.node_to_json(again) == _node.node_to_json(node)


def renaming(data: bytes) -> None:
    """A tree, and after a line break the text that each path gets, in turn."""
    text, _, rest = data.partition(b"\n")
    new = rest.decode("utf-8", "replace").split("\n")
    spec = ArraySpec("float32", (1,), "numpy")
    stored = [_renaming.Stored(str(i), spec, i) for i in range(NUM_LEAVES)]
    count = 0

    def rename(path: str) -> str | None:
        nonlocal count
        count += 1
        name = new[count % len(new)]
        return {"": path, "-": None}.get(name, name)

    with contextlib.suppress(FormatError, UsageError):
        root = _node.node_from_json(_json(text), NUM_LEAVES, NUM_LEAVES)
        tree, arrays = _renaming.rename_tree(root, stored, [], rename)
        assert len(arrays) == NUM_LEAVES
        assert all(array.bytes_of == i for i, array in enumerate(arrays))
        assert _depth(tree) < 10_000


def _depth(node: _state.Node) -> int:
    depth, level = 0, [node]
    while level:
        level = [child for parent in level for child in parent.children]
        depth += 1
    return depth


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        *(header, table, record, manifest, incarnation, metrics, message, command),
        *(request, peer_message),
        *(names, location, plain, structure, renaming),
    )
}


def everything(data: bytes) -> None:
    """All targets; the first byte says which."""
    if data:
        list(TARGETS.values())[data[0] % len(TARGETS)](data[1:])


# -- where to begin --------------------------------------------------------------------------------


def seeds(target: str) -> list[bytes]:
    """What the parser is made for: golden files, and one of each kind."""
    if target == "everything":
        return [bytes([i]) + seed for i, name in enumerate(TARGETS) for seed in seeds(name)]
    return _SEEDS[target]()


def _golden(pattern: str) -> list[bytes]:
    return [path.read_bytes()[:20_000] for path in sorted(GOLDEN.rglob(pattern))][:40]


def _bodies(pattern: str) -> list[bytes]:
    sealed = _golden(pattern)
    return sealed + [bytes(msgspec.json.decode(data, type=_Sealed).body) for data in sealed]


class _Sealed(msgspec.Struct):
    body: msgspec.Raw


def _of_record(name: str) -> list[bytes]:
    records = [_manifest.decode_sealed(data, Record) for data in _golden("rank-*.json")]
    return [bytes(getattr(found, name)) for found in records]


def _value_seeds(value: Incarnation | Manifest | Metrics) -> list[bytes]:
    return [_manifest.encode_sealed(value), msgspec.json.encode(value)]


def _message_seeds() -> list[bytes]:
    grant = protocol.SlotGrant("a", 7, "d", "t", "r")
    tier = protocol.TierConfig("disk", "disk", "/d", [{"last": 3}])
    wire = protocol.WireError("Damaged", "what", "state", ["do"], {"tier": "ram", "args": 1})
    change = protocol.SaveChange(ID, 1, ["staged"], {"disk": wire}, {"disk": "why"})
    values = [
        protocol.Open(1, RUN, "h", 0, 1, 2, 3, 4, "/r", [tier], 1, {"a": 7}, "t"),
        protocol.Opened(1, "a", "b", 2, "/r", ["s"], 3),
        protocol.Begin("h", 1, ID, (1, 2)),
        protocol.WantSlots("h", 1, 2, 3, 0.5),
        protocol.Slots(grant, "why"),
        protocol.Seal("h", "a", 7, ID, 1, ["disk"]),
        protocol.Sealed("s", grant),
        protocol.Report("h", 1, {"loss": 1.5}),
        protocol.Damage("disk", "k", "why"),
        protocol.Remove(1, ["disk"]),
        protocol.Changes(3, [change], wire),
        wire,
    ]
    return [bytes([MESSAGES.index(type(value))]) + protocol.encode(value) for value in values]


def _request_seeds() -> list[bytes]:
    key = f"run/step-{5:012d}.{1:06d}.{'a' * 12}/rank-00000.safetensors"
    texts = [
        f"GET /v1/objects/ram/{key} HTTP/1.1\r\nHost: a:1\r\nRange: bytes=0-1048575",
        "GET /v1/list/disk-2/run/?after=run/a.json HTTP/1.1\r\nHost: a:1",
        "POST /v1/hello HTTP/1.1\r\nHost: a:1\r\nAccept-Encoding: identity\r\nContent-Length: 120",
    ]
    return [text.encode() for text in texts]


def _peer_message_seeds() -> list[bytes]:
    address = PeerAddress("10.0.0.1", 1, 2, "b", "a", "host", (("rack", "r1"),))
    save = f"step-{5:012d}.{1:06d}.{'a' * 12}"
    values = [
        Hello(1, RUN, "data", "ab" * 32),
        Welcome("ab" * 32, "a", "cd" * 32),
        Proof("cd" * 32),
        _handshake.Refusal("AccessDenied", "no"),
        Offer(1, address, save, ID, [0, 1], 2.0),
        Taken(1, 2, "b"),
        Tell(1, address, [News(save, ID, parts={"ram": [0]})]),
        Heard("a"),
        Listing([("run/a", 1)], True),
        Stat(5),
    ]
    return [bytes([PEER_MESSAGES.index(type(v))]) + protocol.encode(v) for v in values]


def _command_seeds() -> list[bytes]:
    ref = work.TierRef("ram", "/r", True)
    requests = [work.Request(1, work.Free(ref, RUN, "a")), work.Request(2, work.Scan(ref, RUN))]
    replies = [work.Reply(1, result=work.Freed(10)), work.Reply(2, work.Progress(10, 20))]
    return [*map(work.encode_line, requests), *map(work.encode_line, replies)]


_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "header": lambda: [data[8:4096].rstrip() for data in _golden("*.safetensors")],
    "table": lambda: [*_golden("*.xxh3"), _shard.Table.header(LAYOUT, 3) + bytes(24)],
    "record": lambda: _bodies("rank-*.json"),
    "manifest": lambda: _value_seeds(
        Manifest(1, RUN, 5, 1, ID, 1, [_manifest.ManifestEntry(0, 10, "x")])
    ),
    "incarnation": lambda: _value_seeds(Incarnation(1, RUN, 2, ID, (1, 10), "host", 7)),
    "metrics": lambda: _value_seeds(Metrics(1, 5, ID, {"loss": 1.5})),
    "message": _message_seeds,
    "command": _command_seeds,
    "request": _request_seeds,
    "peer_message": _peer_message_seeds,
    "names": lambda: [
        text.encode()
        for text in (
            *("rank-00003.json", f"step-{5:012d}.{1:06d}.{'a' * 12}", "slot_1-a", "run/x.json"),
            *(_manifest.incarnation_file(1, ID), "GPT small!", "../../etc/passwd", "a/../b"),
        )
    ],
    "location": lambda: [b"/tmp", b".", b"~", b"~nobody/x", b"s3://a/b", b"a\0b", b"", b"\xff"],
    "plain": lambda: [
        json.dumps(_node.encode_plain(value)).encode()
        for value in (None, True, 3, -(2**70), 1.5, float("nan"), "text", b"bytes", float("inf"))
    ],
    "structure": lambda: [*_of_record("structure"), b'{"codec":["c",{"tuple":[{"array":0}]}]}'],
    "renaming": lambda: [
        *(found + b"\n\n-\na/b\nc/0" for found in _of_record("structure")),
        b'{"dict":[["a",{"list":[{"array":0},{"array":1}]}]]}\na/1\na/0',
        b'{"dict":[["a",{"array":0}]]}\na' + b"/b" * 2000,
    ],
}


def main(target: str, seconds: str, corpus: str, *options: str) -> None:
    """Fuzz until the time is up; libFuzzer ends the process."""
    run = everything if target == "everything" else TARGETS[target]
    os.makedirs(corpus, exist_ok=True)
    for i, seed in enumerate(seeds(target)):
        (Path(corpus) / f"seed-{i}").write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=8192"]
    atheris.Setup([sys.argv[0], *limits, *options, corpus], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
