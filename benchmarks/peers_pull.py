"""A sealed shard from one process's tmpfs into another's, verified, next to raw and other ways.

Raw: ``sendfile`` on one side, ``recv_into`` a mapped file of the other, two streams, nothing
checked; all ways take turns with it. Arrow Flight: two streams of record batches of 4 MiB out of
the mapped file, copied into a mapped file, nothing checked. aiohttp: ranged GETs of the file
(sendfile in its event loop), read by ``http.client``. ``--tls=1``: our own way again, over TLS 1.3.

``cpu_s`` is the processor time of both sides: what other work on the machine changes least.
"""

from __future__ import annotations

import contextlib
import filecmp
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from unittest import mock

from benchmarks import measuring, raw_copy
from benchmarks.raw_copy import PIECE_BYTES, STREAMS

AGENT, SECRET = "a" * 16, bytes(range(32))
_servers: list[int] = []


def main() -> None:
    if "--serve" in sys.argv:
        serve(*sys.argv[2:])
        return
    chosen = measuring.options(__doc__, tls=0)
    with measuring.places() as where, contextlib.ExitStack() as stack:
        source = _shard(where.ram, chosen.size_mib)
        target = stack.enter_context(tempfile.TemporaryDirectory(dir=where.ram))
        ways = dict(_ways(stack, source, target, tls=bool(chosen.tls)))
        found: dict[str, list[float]] = {name: [] for name in ways}
        used: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(chosen.rounds + 1):
            for name, pull in ways.items():
                before_s, started_s = _cpu_s(), time.perf_counter()
                path = pull()
                took_s, used_s = time.perf_counter() - started_s, _cpu_s() - before_s
                if not filecmp.cmp(source, path, shallow=False):
                    raise SystemExit(f"{name}: bytes differ: no row")
                _empty(target)
                if round_:
                    found[name].append(took_s)
                    used[name].append(used_s)
        size_bytes = source.stat().st_size
    raw = found.pop("raw")
    goals = {"pulled, sealed and verified": "ratio >= 0.65"}
    for name, samples in found.items():
        measuring.row(
            name,
            samples,
            limit=raw,
            limit_name=f"sendfile and recv_into, {STREAMS} streams",
            of_limit=True,
            goal=goals.get(name, ""),
            size_bytes=size_bytes,
            cpu_s=round(median(used[name]), 3),
            limit_cpu_s=round(median(used["raw"]), 3),
        )


def _cpu_s() -> float:
    """Of this process and all servers."""
    ticks = 0
    for pid in (os.getpid(), *_servers):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _shard(ram: str, size_mib: int) -> Path:
    """The shard of a save; the agent keeps it while it lives."""
    import mtckpt

    state = measuring.gpt_state(size_mib)
    measuring.fill(state, 1)
    with mtckpt.Checkpointer("bench", [mtckpt.Ram(every=1)], max_stall_s=60) as checkpointer:
        checkpointer.save(1, state).wait("staged", timeout_s=120)
    (path,) = [p for p in Path(ram).rglob("rank-00000.safetensors") if ".slots" not in p.parts]
    return path


def _empty(target: str) -> None:
    for path in sorted(Path(target).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _ways(
    stack: contextlib.ExitStack, source: Path, target: str, *, tls: bool
) -> Iterator[tuple[str, Callable[[], Path]]]:
    port = _start(stack, "peer", source)
    yield "pulled, sealed and verified", lambda: _pull_ours(port, source, target)
    yield (
        "pulled, not verified",
        lambda: _in_streams(source, target, lambda v, i: _pull_peer(port, source, v, i)),
    )
    raw_port = _start(stack, "raw", source)
    yield (
        "raw",
        lambda: _in_streams(source, target, lambda v, i: raw_copy.pull_stream(raw_port, v, i)),
    )
    http_port = _start(stack, "aiohttp", source)
    yield (
        "aiohttp, not verified",
        lambda: _in_streams(source, target, lambda v, i: _pull_http(http_port, v, i)),
    )
    try:
        import pyarrow.flight  # noqa: F401
    except ImportError:
        print("no row for Arrow Flight: pip install pyarrow", file=sys.stderr)
    else:
        flight_port = _start(stack, "flight", source)
        yield (
            "Arrow Flight, not verified",
            lambda: _in_streams(source, target, lambda v, i: _pull_flight(flight_port, v, i)),
        )
    if tls:
        files = _certificates(stack)
        tls_port = _start(stack, "peer", source, files)
        yield "pulled over TLS", lambda: _pull_ours(tls_port, source, target, files)


def _certificates(stack: contextlib.ExitStack) -> dict[str, str]:
    """The variables that make both sides speak TLS."""
    import trustme

    where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    authority = trustme.CA()
    issued = authority.issue_cert("node.example")
    authority.cert_pem.write_to_path(where / "ca")
    issued.private_key_pem.write_to_path(where / "key")
    (where / "cert").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    return {f"MTCKPT_PEER_TLS_{name.upper()}": str(where / name) for name in ("cert", "key", "ca")}


def _start(
    stack: contextlib.ExitStack, kind: str, source: Path, more: dict[str, str] | None = None
) -> int:
    """A server of that kind in a process of its own; its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers_pull", "--serve", kind, str(source)],
        cwd=measuring.ROOT,
        env={**os.environ, **(more or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    _servers.append(process.pid)
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    stack.callback(process.stdout.close)
    return int(process.stdout.readline())


# -- the side that pulls ---------------------------------------------------------------------------


def _pull_ours(port: int, source: Path, target: str, tls: dict[str, str] | None = None) -> Path:
    from mtckpt._handshake import PeerAddress
    from mtckpt.agent import work
    from mtckpt.agent.carry import Carrier

    here = work.TierRef("ram", target, label="ram")
    command = work.Pull(
        work.TierRef("peers", "pull", label="peers"),
        source.parent.parent.name,
        source.parent.name,
        0,
        PeerAddress("127.0.0.1", 1, port, agent_id=AGENT),
        SECRET.hex(),
        here,
    )
    carrier = Carrier()
    with mock.patch.dict(os.environ, tls or {}):
        carrier.carry(command, lambda _: None)
    carrier.close()
    return Path(target).joinpath(*source.parts[-3:])


def _in_streams(source: Path, target: str, pull: Callable[[memoryview, int], None]) -> Path:
    path = Path(target) / "raw"
    raw_copy.in_streams(path, source.stat().st_size, pull)
    return path


def _pull_peer(port: int, source: Path, view: memoryview, stream: int) -> None:
    from mtckpt._handshake import PeerAddress
    from mtckpt.tiers.peer import PeerTier

    run_key, *rest = source.parts[-3:]
    tier = PeerTier(PeerAddress("127.0.0.1", 1, port), run_key, SECRET)
    for start, stop in raw_copy.ranges(len(view), stream):
        tier.read_into("/".join((run_key, *rest)), view[start:stop], start)
    tier.close()


def _pull_http(port: int, view: memoryview, stream: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for start, stop in raw_copy.ranges(len(view), stream):
        connection.request("GET", "/", headers={"Range": f"bytes={start}-{stop - 1}"})
        with connection.getresponse() as response:
            while start < stop:
                start += response.readinto(view[start : min(stop, start + PIECE_BYTES)])
    connection.close()


def _pull_flight(port: int, view: memoryview, stream: int) -> None:
    import pyarrow.flight

    with pyarrow.flight.connect(f"grpc://127.0.0.1:{port}") as client:
        half = -(-len(view) // STREAMS)
        start = stream * half
        stop = min(start + half, len(view))
        for chunk in client.do_get(pyarrow.flight.Ticket(b"%d %d" % (start, stop))):
            data = memoryview(chunk.data.column(0).buffers()[1]).cast("B")[: chunk.data.num_rows]
            view[start : start + len(data)] = data
            start += len(data)
        assert start == stop


# -- the side that serves --------------------------------------------------------------------------


def serve(kind: str, path: str) -> None:
    """Print a port and serve the file there until killed."""
    {
        "peer": _serve_peer,
        "raw": raw_copy.serve,
        "aiohttp": _serve_aiohttp,
        "flight": _serve_flight,
    }[kind](Path(path))


def _say(port: int) -> None:
    print(port, flush=True)


def _serve_peer(path: Path) -> None:
    from mtckpt.agent import work
    from mtckpt.agent.peer_server import PeerServer

    ref = work.TierRef("ram", str(path.parents[2]), label="ram")
    run = work.ServedRun(path.parts[-3], SECRET.hex(), [ref])
    _say(PeerServer().serve(work.ServePeers(ref, AGENT, "127.0.0.1", 0, [run])).port)
    threading.Event().wait()


def _serve_aiohttp(path: Path) -> None:
    from aiohttp import web

    async def answer(_: web.Request) -> web.FileResponse:
        return web.FileResponse(path)

    async def say(_: web.Application) -> None:
        _say(listener.getsockname()[1])

    listener = socket.create_server(("127.0.0.1", 0))
    app = web.Application()
    app.router.add_get("/", answer)
    app.on_startup.append(say)
    web.run_app(app, sock=listener, print=None)


def _serve_flight(path: Path) -> None:
    import pyarrow
    import pyarrow.flight

    file = pyarrow.memory_map(str(path))
    data = file.read_buffer()
    schema = pyarrow.schema([("bytes", pyarrow.uint8())])

    class Server(pyarrow.flight.FlightServerBase):  # type: ignore[misc]  # it has no types
        def do_get(self, _: object, ticket: pyarrow.flight.Ticket) -> object:
            start, stop = map(int, ticket.ticket.split())

            def batches() -> Iterator[pyarrow.RecordBatch]:
                for at in range(start, stop, PIECE_BYTES):
                    size_bytes = min(PIECE_BYTES, stop - at)
                    part = data.slice(at, size_bytes)
                    column = pyarrow.Array.from_buffers(pyarrow.uint8(), size_bytes, [None, part])
                    yield pyarrow.RecordBatch.from_arrays([column], schema=schema)

            return pyarrow.flight.GeneratorStream(schema, batches())

    server = Server("grpc://127.0.0.1:0")
    _say(server.port)
    server.serve()


if __name__ == "__main__":
    main()
