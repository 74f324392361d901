"""An object store: time, processor and memory of the tier, next to obstore and s3fs at their best.

A real S3 server (SeaweedFS) and a GCS server for tests are started on loopback. Ways take turns,
round by round, with the same bytes, part size and number of requests in flight; every upload goes
to a new key, is compared once when it comes back, and is deleted after its round. Seconds of
processor time are those of this process, all threads together; the server's are not in them, but it
runs on the same cores, so rates are of this machine only. Of GCS only reads are compared.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.measuring import MIB

sys.path.append(str(measuring.ROOT / "tests"))

from stores import GcsServer, S3Server, gcs_server, s3_server

from mtckpt.tiers import BytesSource, ObjectStoreTier

PART_BYTES = 16 * MIB
RANGE_BYTES = 16 * MIB
IN_FLIGHT = 8
SMALL_BYTES = 8 * MIB
_names = iter(range(1 << 60))

Put = Callable[[str, memoryview], object]
Get = Callable[[str, memoryview], object]
Ways = dict[str, tuple[Put, Get]]
_S3_GOALS = {
    ("up", "mtckpt, obstore", "obstore"): ("ratio >= 0.9", "ratio <= 1.15"),
    ("down", "mtckpt, obstore", "obstore"): ("ratio >= 0.9", "ratio <= 1.15"),
    ("up", "mtckpt, obstore", "s3fs"): ("ratio >= 1.5", ""),
    ("down", "mtckpt, obstore", "s3fs"): ("ratio >= 1.0", "ratio <= 0.6"),
    ("up", "mtckpt, fsspec", "s3fs"): ("ratio >= 0.95", ""),
    ("down", "mtckpt, fsspec", "s3fs"): ("ratio >= 0.95", ""),
}
_GCS_GOALS = {("down", "mtckpt, gs", "obstore"): ("ratio >= 0.9", "ratio <= 1.15")}


def main() -> None:
    chosen = measuring.options(__doc__, memory_mib=0, only="s3,gcs")
    only = chosen.only.split(",")
    if chosen.memory_mib:
        with tempfile.TemporaryDirectory() as directory, s3_server(Path(directory)) as server:
            _memory(server, chosen.memory_mib)
        return
    data = _touched(chosen.size_mib * MIB)
    if "s3" in only:
        _on_s3(data, chosen.rounds)
        memory = measuring.child("benchmarks.store", f"--memory-mib={4 * chosen.size_mib}")
        print(memory, end="", flush=True)
    if "gcs" in only:
        _on_gcs(data, chosen.rounds)


def _on_s3(data: memoryview, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory, s3_server(Path(directory)) as server:
        place = server.new_prefix()
        ways = _ways(server, place)

        def forget(names: Sequence[str]) -> None:
            _deleted(_tiers["obstore"], names)
            server.give_space_back()

        _compare("1 object", ways, [data], rounds, _S3_GOALS, forget)
        count = max(1, len(data) // SMALL_BYTES * 100 // 128)
        small = [data[i * SMALL_BYTES : (i + 1) * SMALL_BYTES] for i in range(count)]
        _compare(f"{count} x 8 MiB", ways, small, rounds, _S3_GOALS, forget)
        _reuse(server, place, data)
        for tier in _tiers.values():
            tier.close()


def _on_gcs(data: memoryview, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory, gcs_server(Path(directory)) as server:
        place = server.new_prefix()
        tier = ObjectStoreTier(
            f"gs://{place}",
            storage_options=server.options,
            part_bytes=PART_BYTES,
            concurrency=IN_FLIGHT,
            timeout_s=300,
        )
        ways = _gcs_ways(server, place, tier)
        forget = functools.partial(_deleted, tier)
        _compare("1 object, GCS", ways, [data], rounds, _GCS_GOALS, forget)
        tier.close()


def _deleted(tier: ObjectStoreTier, names: Sequence[str]) -> None:
    for name in names:
        tier.delete(name)


# -- ways ------------------------------------------------------------------------------------------

_tiers: dict[str, ObjectStoreTier] = {}


def _ways(server: S3Server, place: str) -> Ways:
    import obstore
    import s3fs
    from obstore.store import S3Store

    bucket = place.partition("/")[0]
    prefix = place.partition("/")[2]
    raw = S3Store(
        bucket,
        endpoint=server.url,
        access_key_id=server.key,
        secret_access_key=server.secret,
        region="us-east-1",
        client_options={"allow_http": True, "timeout": "600s"},
    )
    fs = s3fs.S3FileSystem(**server.options)

    def raw_put(name: str, view: memoryview) -> None:
        obstore.put(raw, f"{prefix}/{name}", view, chunk_size=PART_BYTES, max_concurrency=IN_FLIGHT)

    def fs_put(name: str, view: memoryview) -> None:
        fs.pipe_file(
            f"{place}/{name}", bytes(view), chunksize=PART_BYTES, max_concurrency=IN_FLIGHT
        )

    def fs_get(name: str, out: memoryview) -> None:
        starts = list(range(0, len(out), RANGE_BYTES))
        stops = [min(start + RANGE_BYTES, len(out)) for start in starts]
        path = f"{place}/{name}"
        found = fs.cat_ranges([path] * len(starts), starts, stops, batch_size=IN_FLIGHT)
        for start, stop, piece in zip(starts, stops, found, strict=True):
            out[start:stop] = piece

    ways: Ways = {}
    for engine in ("obstore", "fsspec"):
        tier = _tiers[engine] = ObjectStoreTier(
            f"s3://{place}",
            engine=engine,
            storage_options=server.options,
            part_bytes=PART_BYTES,
            concurrency=IN_FLIGHT,
            timeout_s=300,
        )
        ways[f"mtckpt, {engine}"] = (
            lambda name, view, tier=tier: tier.put(name, BytesSource(view)),  # type: ignore[misc]
            lambda name, out, tier=tier: tier.read_into(name, out),  # type: ignore[misc]
        )
    raw_get = functools.partial(_read_by_obstore, raw, prefix, ThreadPoolExecutor(IN_FLIGHT))
    return {**ways, "obstore": (raw_put, raw_get), "s3fs": (fs_put, fs_get)}


def _gcs_ways(server: GcsServer, place: str, tier: ObjectStoreTier) -> Ways:
    from obstore.store import GCSStore

    bucket, _, prefix = place.partition("/")
    raw = GCSStore(
        bucket,
        base_url=server.url,
        skip_signature=True,
        client_options={"allow_http": True, "timeout": "600s"},
    )

    def put(name: str, view: memoryview) -> None:
        tier.put(name, BytesSource(view))

    raw_get = functools.partial(_read_by_obstore, raw, prefix, ThreadPoolExecutor(IN_FLIGHT))
    return {"mtckpt, gs": (put, tier.read_into), "obstore": (put, raw_get)}


def _read_by_obstore(
    store: Any, prefix: str, pool: ThreadPoolExecutor, name: str, out: memoryview
) -> None:
    import obstore

    def one(start: int) -> None:
        stop = min(start + RANGE_BYTES, len(out))
        found = obstore.get_range(store, f"{prefix}/{name}", start=start, end=stop)
        out[start:stop] = memoryview(found)

    if len(out) <= RANGE_BYTES:
        one(0)
    else:
        list(pool.map(one, range(0, len(out), RANGE_BYTES)))


def _compare(
    what: str,
    ways: Ways,
    views: Sequence[memoryview],
    rounds: int,
    goals: Mapping[tuple[str, str, str], tuple[str, str]],
    forget: Callable[[Sequence[str]], None],
) -> None:
    """Every way up and down with all views at once; rows of seconds and processor seconds."""
    found: dict[tuple[str, str, str], list[float]] = {}
    out = [memoryview(bytearray(len(view))) for view in views]
    for turn in range(rounds + 1):
        made = []
        for way, (put, get) in ways.items():
            names = [f"n{next(_names)}" for _ in views]
            made += names
            up = _measured(lambda put=put, names=names: _each(put, names, views))  # type: ignore[misc]
            down = _measured(lambda get=get, names=names: _each(get, names, out))  # type: ignore[misc]
            if turn == 0:
                if any(a != b for a, b in zip(out, views, strict=True)):
                    raise SystemExit(f"{way}: what came back differs: no row")
                continue  # The first round warms connections up.
            for verb, (took_s, cpu_s) in (("up", up), ("down", down)):
                found.setdefault((verb, way, "s"), []).append(took_s)
                found.setdefault((verb, way, "cpu"), []).append(cpu_s)
        forget(made)
    size_bytes = sum(map(len, views))
    for (verb, ours, theirs), (time_goal, cpu_goal) in goals.items():
        for unit, goal in (("s", time_goal), ("cpu", cpu_goal)):
            samples, limit = found[verb, ours, unit], found[verb, theirs, unit]
            measuring.row(
                f"{verb}, {what}, {ours} / {theirs}" + (", cpu" if unit == "cpu" else ""),
                samples,
                limit=limit,
                limit_name=theirs,
                of_limit=unit == "s",
                goal=goal,
                size_bytes=size_bytes,
            )


def _each(call: Callable[[str, memoryview], object], names: Any, views: Any) -> None:
    if len(names) == 1:
        call(names[0], views[0])
        return
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(call, names, views))


def _measured(call: Callable[[], None]) -> tuple[float, float]:
    cpu_s = time.process_time()
    took_s = measuring.quietly(call)
    return took_s, time.process_time() - cpu_s


def _touched(size_bytes: int) -> memoryview:
    memory = memoryview(mmap.mmap(-1, size_bytes))
    block = os.urandom(MIB)
    for start in range(0, size_bytes, MIB):
        memory[start : start + MIB] = block
        memory[start : start + 8] = start.to_bytes(8, "little")
    return memory


# -- what is not sent again ------------------------------------------------------------------------


def _reuse(server: S3Server, place: str, old: memoryview) -> None:
    """Bytes sent when one range of 5 % has changed."""
    tier = _tiers["obstore"]
    tier.put("old", BytesSource(old))
    changed = (len(old) // 3, len(old) // 3 + len(old) // 20)
    new = memoryview(bytearray(old))
    for start in range(*changed, 4096):
        new[start] ^= 1

    def same(start: int, stop: int) -> tuple[str, int] | None:
        return ("old", start) if stop <= changed[0] or start >= changed[1] else None

    before = tier.counts.requests
    result = tier.put_reusing("new", BytesSource(new), same)
    parts = len(tier.part_ranges(len(new)))
    requests = tier.counts.requests - before
    percent = 100 * (len(new) - result.copied_bytes) / len(new)
    measuring.row("sent where 5 % changed", [percent], unit="%", goal="value <= 8")
    measuring.row(
        "requests beyond parts, for one object", [requests - parts], unit="", goal="value <= 4"
    )


# -- memory ----------------------------------------------------------------------------------------


class _Made:
    """A source that holds one block for each thread that asks, as one that reads a file does."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._own = threading.local()

    def read(self, offset: int, size_bytes: int) -> memoryview:
        buffer: bytearray | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < size_bytes:
            buffer = self._own.buffer = bytearray(size_bytes)
        buffer[:8] = offset.to_bytes(8, "little")
        return memoryview(buffer)[:size_bytes]


@contextlib.contextmanager
def _opened(server: S3Server, engine: Any) -> Iterator[ObjectStoreTier]:
    tier = ObjectStoreTier(
        f"s3://{server.new_prefix()}",
        engine=engine,
        storage_options=server.options,
        part_bytes=PART_BYTES,
        concurrency=IN_FLIGHT,
        timeout_s=300,
    )
    try:
        yield tier
    finally:
        tier.close()


def _memory(server: S3Server, size_mib: int) -> None:
    """Memory of a process while it uploads, beyond the parts in flight."""
    with _opened(server, "obstore") as tier:
        tier.put("small", BytesSource(b"x"))
        before_bytes = measuring.memory_bytes("VmHWM")
        tier.put("large", _Made(size_mib * MIB))
    grown_bytes = measuring.memory_bytes("VmHWM") - before_bytes
    in_flight_bytes = min(IN_FLIGHT * PART_BYTES, size_mib * MIB)
    measuring.row(
        f"memory beyond parts in flight, {size_mib} MiB up",
        [(grown_bytes - in_flight_bytes) / MIB],
        unit="M",
        goal="value <= 64",
        before_mib=before_bytes / MIB,
    )


if __name__ == "__main__":
    main()
