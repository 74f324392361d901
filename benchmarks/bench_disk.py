"""How fast the disk tier stores a shard, against the best raw write of the same bytes.

    python benchmarks/bench_disk.py --place /nvme --size-mib 1024 --rounds 7

Prints one JSON line. The bytes come from a mapped tmpfs file, as those of a sealed shard do. Every
round runs every way once, in an order that moves on, so that drift of the device hits all alike;
figures are medians. "raw" ways write, fsync and close one file, and nothing else. Each file is read
back and compared once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtckpt.tiers import BytesSource, DeadlineTier, LocalTier, Tier, read_all

BLOCK_BYTES = 8 << 20
MIB = 1 << 20


def write_raw(path: Path, data: memoryview, *, threads: int, direct: bool, reserve: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    fd = os.open(path, flags, 0o600)
    try:
        if reserve:
            os.posix_fallocate(fd, 0, len(data))
        offsets = itertools.count(0, BLOCK_BYTES)

        def work() -> None:
            while (offset := next(offsets)) < len(data):
                os.pwrite(fd, data[offset : offset + BLOCK_BYTES], offset)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        os.fsync(fd)
    finally:
        os.close(fd)


def raw_ways(place: Path, data: memoryview) -> dict[str, Callable[[], Path]]:
    def way(name: str, *, threads: int, direct: bool, reserve: bool) -> Callable[[], Path]:
        def run() -> Path:
            path = place / name
            write_raw(path, data, threads=threads, direct=direct, reserve=reserve)
            return path

        return run

    ways = {"raw_buffered": way("raw_buffered", threads=1, direct=False, reserve=False)}
    for threads, reserve in itertools.product((1, 2, 3, 4), (False, True)):
        name = f"raw_direct_{threads}_threads{'_reserved' if reserve else ''}"
        ways[name] = way(name, threads=threads, direct=True, reserve=reserve)
    return ways


def tier_ways(place: Path, data: memoryview) -> dict[str, Callable[[], Path]]:
    local = LocalTier(place / "tier")
    buffered = LocalTier(place / "buffered", direct_io="never")
    tiers: dict[str, tuple[Tier, LocalTier]] = {
        "put": (local, local),
        "put_buffered": (buffered, buffered),
        "put_with_deadline": (DeadlineTier(local, timeout_s=600), local),
    }

    def way(name: str) -> Callable[[], Path]:
        tier, inner = tiers[name]

        def run() -> Path:
            tier.put(f"run/step/{name}", BytesSource(data))
            return inner.path_of(f"run/step/{name}")

        return run

    return {name: way(name) for name in tiers}


def read_rate(place: Path, data: memoryview, rounds: int) -> dict[str, float]:
    """Seconds to read the object into touched memory, from the device and from the page cache."""
    tier = LocalTier(place / "tier")
    tier.put("read", BytesSource(data))
    out = mmap.mmap(-1, len(data))
    for offset in range(0, len(data), mmap.PAGESIZE):
        out[offset] = 1
    times: dict[str, list[float]] = {"read_cold": [], "read_warm": []}
    for _ in range(rounds):
        for name, seconds in times.items():
            if name == "read_cold":
                with tier.lease("read") as lease:
                    os.posix_fadvise(lease.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            tier.read_into("read", memoryview(out))
            seconds.append(time.perf_counter() - start)
    assert memoryview(out) == data
    return {f"{name}_s": statistics.median(seconds) for name, seconds in times.items()}


def measure(place: Path, data: memoryview, rounds: int) -> dict[str, object]:
    ways = {**raw_ways(place, data), **tier_ways(place, data)}
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn * 5 % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            path = ways[name]()
            times[name].append(time.perf_counter() - start)
            if turn == 0:
                checker = LocalTier(path.parent, read_only=True)
                assert read_all(checker, path.name, max_bytes=len(data)) == data
            path.unlink()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min((name for name in names if name.startswith("raw")), key=medians.__getitem__)
    return {
        "ratio_to_best_raw": round(medians[best] / medians["put"], 3),
        "best_raw": best,
        "elapsed_s": {
            name: {
                "median": round(medians[name], 4),
                "min": round(min(seconds), 4),
                "max": round(max(seconds), 4),
            }
            for name, seconds in times.items()
        },
        **{name: round(value, 4) for name, value in read_rate(place, data, rounds).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size_bytes = options.size_mib * MIB
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    place = Path(tempfile.mkdtemp(prefix="mtckpt-bench-", dir=options.place))
    try:
        with tempfile.TemporaryFile(dir=memory) as slot:
            os.posix_fallocate(slot.fileno(), 0, size_bytes)
            mapped = mmap.mmap(slot.fileno(), size_bytes)
            block = os.urandom(BLOCK_BYTES - 1)  # Not a divisor: no two pages are alike.
            for offset in range(0, size_bytes, len(block)):
                mapped[offset : offset + len(block)] = block[: size_bytes - offset]
            result = measure(place, memoryview(mapped), options.rounds)
    finally:
        shutil.rmtree(place)
    about = {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "disk", "size_bytes": size_bytes, "rounds": options.rounds,
                      **result, "machine": about}))  # fmt: skip


if __name__ == "__main__":
    main()
