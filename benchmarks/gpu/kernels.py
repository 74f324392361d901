"""The kernels on a CUDA device: the values they compute, and how fast; what the driver promises.

Prints one JSON line a figure and exits 0, or says ``skipped: no GPU`` and exits 0. A figure that
fails is a line with its error. ``--values=1`` only looks at values, for compute-sanitizer. Rates
are bytes of the sources a second, one way; the copy of the driver stands beside them.
"""

from __future__ import annotations

import array
import ctypes
import functools
import json
import random
import time
import traceback
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from xxhash import xxh3_64_intdigest

from benchmarks import measuring
from benchmarks.gpu import ordering
from mtckpt.capture.driver import Driver
from mtckpt.capture.kernels import Kernels
from scripts.compile_kernels import SOURCE, Nvrtc, nvrtc_libraries

MIB = 1 << 20
GIB = 1 << 30
CHUNK = 256 << 10
PATTERN_BYTES = 64 * MIB
VARIANTS = [
    (1, 32),
    (2, 32),
    (3, 32),
    (4, 32),
    (2, 24),
    (3, 24),
    (1, 40),
    (2, 40),
    (1, 48),
    (2, 16),
]
BUDGET_S = 20.0
Row = tuple[int, int, int, int]


class Bench:
    """A device with random bytes on it, a second place of that size, and a stream."""

    def __init__(self, driver: Driver, size_bytes: int) -> None:
        self.driver = driver
        self.size_bytes = size_bytes
        self.stream = driver.stream()
        self.source = driver.alloc(size_bytes)
        self.target = driver.alloc(size_bytes + 64)
        self.host = driver.alloc_host(PATTERN_BYTES)
        self.pattern = random.Random(7).randbytes(min(PATTERN_BYTES, size_bytes))
        ctypes.memmove(self.host, self.pattern, len(self.pattern))
        for at in range(0, size_bytes, PATTERN_BYTES):
            part = min(PATTERN_BYTES, size_bytes - at)
            driver.to_device(self.source + at, self.host, part, self.stream)
        driver.synchronize(self.stream)
        started = time.perf_counter()
        self.kernels = Kernels(driver, 0)
        self.load_ms = (time.perf_counter() - started) * 1e3

    def upload(self, words: Sequence[int]) -> int:
        packed = array.array("Q", words)
        address = self.driver.alloc(max(8 * len(packed), 1))
        self.driver.to_device(address, packed.buffer_info()[0], 8 * len(packed), self.stream)
        self.driver.synchronize(self.stream)
        return address

    def table(self, rows: Sequence[Row]) -> int:
        return self.upload([value for row in rows for value in row])

    def words(self, address: int, count: int) -> list[int]:
        out = (ctypes.c_uint64 * count)()
        self.driver.to_host(ctypes.addressof(out), address, 8 * count, self.stream)
        self.driver.synchronize(self.stream)
        return list(out)

    def bytes(self, address: int, size_bytes: int) -> bytes:
        out = ctypes.create_string_buffer(size_bytes)
        self.driver.to_host(ctypes.addressof(out), address, size_bytes, self.stream)
        self.driver.synchronize(self.stream)
        return out.raw

    def expected(self, rows: Sequence[Row]) -> list[int]:
        view = memoryview(self.pattern)
        starts = [(row[0] - self.source) % PATTERN_BYTES for row in rows]
        return [xxh3_64_intdigest(view[a : a + r[2]]) for a, r in zip(starts, rows, strict=True)]

    def seconds(self, launch: Callable[[], None], rounds: int = 7) -> float:
        took = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            launch()
            self.driver.synchronize(self.stream)
            took.append(time.perf_counter() - started)
        return median(took[1:])

    def rate(self, launch: Callable[[], None], size_bytes: int) -> float:
        return round(size_bytes / GIB / self.seconds(launch), 1)


def chunks(
    bench: Bench, source_shift: int, target_shift: int | None, size: int, most: int = 1 << 20
) -> list[Row]:
    count = min(most, (bench.size_bytes - 64) // size)
    target = 0 if target_shift is None else bench.target + target_shift
    return [
        (bench.source + source_shift + i * size, target and target + i * size, size, i)
        for i in range(count)
    ]


# ----------------------------------------------------------------------------------------- values


def check(bench: Bench, rows: list[Row], kernels: Kernels | None = None) -> dict[str, Any]:
    """Digest, and copy where there are targets; compare all of it with the host."""
    digests = bench.upload([0] * len(rows))
    table = bench.table(rows)
    (kernels or bench.kernels).digest_copy(bench.stream, table, len(rows), digests)
    found = bench.words(digests, len(rows))
    wrong = [
        i
        for i, pair in enumerate(zip(found, bench.expected(rows), strict=True))
        if pair[0] != pair[1]
    ]
    copied = None
    if rows[0][1]:
        sizes = [row[2] for row in rows]
        first, last = rows[0][1], rows[-1][1] + sizes[-1]
        got = bench.bytes(first, last - first)
        view = memoryview(bench.pattern)
        copied = all(
            got[row[1] - first : row[1] - first + row[2]] == view[at : at + row[2]]
            for row in rows
            for at in [(row[0] - bench.source) % PATTERN_BYTES]
        )
    bench.driver.free(digests)
    bench.driver.free(table)
    return {"rows": len(rows), "equal": not wrong, "first_wrong": wrong[:3], "copied": copied}


def small_rows(bench: Bench, source_shift: int, target_shift: int | None) -> list[Row]:
    """Rows of 1 to 2,048 bytes, at distances that keep the shifts."""
    rows, at = [], 0
    for i, size in enumerate(range(1, 2049)):
        target = 0 if target_shift is None else bench.target + at + target_shift
        rows.append((bench.source + at + source_shift, target, size, i))
        at += -(-size // 16) * 16 + 16
    return rows


def values(bench: Bench) -> dict[str, Any]:
    found = {}
    for source_shift in (0, 8, 4, 2, 1):
        for target_shift in (None, 0, 8, 4, 2, 1):
            result = check(bench, small_rows(bench, source_shift, target_shift))
            if not result["equal"] or result["copied"] is False:
                found[f"{source_shift}->{target_shift}"] = result
    return {"ok": not found, "wrong": found, "sizes": "1..2048", "alignments": 30}


def values_of_chunks(bench: Bench) -> dict[str, Any]:
    found = {}
    shifts: Sequence[tuple[int, int | None]] = [
        (0, None),
        (0, 0),
        (0, 4),
        (0, 2),
        (0, 1),
        (4, 0),
        (2, 2),
        (1, 3),
    ]
    for source, target in shifts:
        for size in (CHUNK, CHUNK - 1, CHUNK - 64 + 7):
            most = min(128, PATTERN_BYTES // size - 1)
            rows = chunks(bench, source, target, size, most)
            result = check(bench, rows)
            if not result["equal"] or result["copied"] is False:
                found[f"{source}->{target} {size}"] = result
    return {"ok": not found, "wrong": found}


def values_of_verify(bench: Bench) -> dict[str, Any]:
    rows = [*small_rows(bench, 0, None)[:1000], *small_rows(bench, 1, None)[1000:]]
    wanted = bench.expected(rows)
    wrong = set(range(0, len(rows), 97))
    digests = bench.upload([value ^ (i in wrong) for i, value in enumerate(wanted)])
    bad = bench.upload([0] * (len(rows) // 8 + 1))
    table = bench.table(rows)
    bench.kernels.verify(bench.stream, table, len(rows), digests, bad)
    flags = bench.bytes(bad, len(rows))
    for address in (digests, bad, table):
        bench.driver.free(address)
    return {"ok": {i for i, flag in enumerate(flags) if flag} == wrong, "rows": len(rows)}


# ------------------------------------------------------------------------------------------ rates


def rates(bench: Bench, kernels: Kernels, shapes: Sequence[tuple[str, int, int | None]]) -> Any:
    found: dict[str, Any] = {}
    digests = bench.driver.alloc(8 * (bench.size_bytes // CHUNK + 1))
    for name, source_shift, target_shift in shapes:
        rows = chunks(bench, source_shift, target_shift, CHUNK)
        table, count = bench.table(rows), len(rows)
        total = count * CHUNK
        launch = functools.partial(kernels.digest_copy, bench.stream, table, count, digests)
        found[name] = bench.rate(launch, total)
        bench.driver.free(table)
    bench.driver.free(digests)
    return found


BOTH = [("digest_gibps", 0, None), ("digest_copy_gibps", 0, 0)]
SHAPES = [
    ("digest_source_at_8_gibps", 8, None),
    ("digest_source_at_4_gibps", 4, None),
    ("digest_source_at_2_gibps", 2, None),
    ("digest_copy_target_at_8_gibps", 0, 8),
    ("digest_copy_target_at_4_gibps", 0, 4),
    ("digest_copy_target_at_2_gibps", 0, 2),
    ("digest_copy_target_at_1_gibps", 0, 1),
    ("digest_copy_both_at_4_gibps", 4, 4),
    ("digest_copy_both_at_2_gibps", 2, 2),
]


def limits(bench: Bench) -> dict[str, Any]:
    size = bench.size_bytes
    driver, stream = bench.driver, bench.stream
    copy = bench.rate(lambda: driver.on_device(bench.target, bench.source, size, stream), size)
    return {"driver_copy_gibps": copy}


def copies(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, shift in (
        ("gather_gibps", 0),
        ("gather_target_at_4_gibps", 4),
        ("gather_target_at_2_gibps", 2),
    ):
        rows = chunks(bench, 0, shift, CHUNK)
        table, count = bench.table(rows), len(rows)
        launch = functools.partial(bench.kernels.gather, bench.stream, table, count)
        found[name] = bench.rate(launch, count * CHUNK)
        bench.driver.free(table)
    return found


def verified(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, shift in (("verify", None), ("place", 0), ("place_target_at_4", 4)):
        rows = chunks(bench, 0, shift, CHUNK)
        table, count = bench.table(rows), len(rows)
        digests = bench.upload([0] * count)
        bad = bench.upload([0] * (count // 8 + 1))
        bench.kernels.digest_copy(bench.stream, table, count, digests)
        launch = bench.kernels.verify if name == "verify" else bench.kernels.place
        found[f"{name}_gibps"] = bench.rate(
            functools.partial(launch, bench.stream, table, count, digests, bad), count * CHUNK
        )
        found[f"{name}_found_nothing"] = not any(bench.bytes(bad, count))
        for address in (table, digests, bad):
            bench.driver.free(address)
    return found


def small(bench: Bench) -> dict[str, Any]:
    """20,000 tensors of 8 KiB, packed: what a launch costs, and with the table's upload."""
    rows = chunks(bench, 0, 0, 8192, 20000)
    count = len(rows)
    result = check(bench, rows[:4000])
    packed = array.array("Q", [value for row in rows for value in row])
    table, digests = bench.table(rows), bench.driver.alloc(8 * count)
    driver, stream = bench.driver, bench.stream
    ctypes.memmove(bench.host, packed.buffer_info()[0], 8 * len(packed))

    def uploaded() -> None:
        driver.to_device(table, bench.host, 8 * len(packed), stream)
        bench.kernels.digest_copy(stream, table, count, digests)

    found = {
        "gather_ms": bench.seconds(lambda: bench.kernels.gather(stream, table, count)) * 1e3,
        "digest_copy_ms": bench.seconds(
            lambda: bench.kernels.digest_copy(stream, table, count, digests)
        )
        * 1e3,
        "table_and_digest_copy_ms": bench.seconds(uploaded) * 1e3,
    }
    ctypes.memmove(bench.host, bench.pattern, 8 * len(packed))
    for address in (table, digests):
        driver.free(address)
    return {**result, **{name: round(value, 3) for name, value in found.items()}}


def few_chunks(bench: Bench) -> dict[str, Any]:
    """A small model: how fast a chunk alone is, and 64, 400 and 4,000 of them."""
    found = {}
    digests = bench.driver.alloc(8 * 4000)
    every = chunks(bench, 0, None, CHUNK)
    for rows in (every[:1], every[:64], every[:400], every[:4000]):
        count = len(rows)
        table = bench.table(rows)
        launch = functools.partial(bench.kernels.digest_copy, bench.stream, table, count, digests)
        took = bench.seconds(launch)
        found[f"{count}_chunks_ms"] = round(took * 1e3, 3)
        bench.driver.free(table)
    bench.driver.free(digests)
    return found


# --------------------------------------------------------------------------------------- variants


class Variant(Kernels):
    """Other PTX than the one that is shipped."""

    def __init__(self, driver: Driver, image: bytes) -> None:
        self._driver = driver
        self._ordinal = 0
        self._module = driver.load_module(image)
        self._digest_copy = driver.function(self._module, "mtckpt_digest_copy")


def variants(bench: Bench, until: float) -> None:
    libraries = nvrtc_libraries()
    if not libraries:
        return
    nvrtc = Nvrtc(libraries[-1])
    source = SOURCE.read_bytes()
    for ahead, warps in VARIANTS:
        if time.perf_counter() > until:
            print(json.dumps({"figure": "variants", "stopped": "no time left"}))
            return
        options = [f"-DAHEAD={ahead}", f"-DWARPS_AT_ONCE={warps}"]

        def one(options: list[str] = options) -> dict[str, Any]:
            kernels = Variant(bench.driver, nvrtc.compile(source, "compute_90", options))
            result = check(bench, chunks(bench, 0, 0, CHUNK)[:64], kernels)
            return {"equal": result["equal"], **rates(bench, kernels, BOTH)}

        figure(f"variant ahead {ahead}, warps {warps}, NVRTC {nvrtc.version}", one)


# -------------------------------------------------------------------------------------------------


def figure(name: str, measure: Callable[[], dict[str, Any]]) -> None:
    started = time.perf_counter()
    try:
        found = measure()
    except Exception as error:  # the other figures are still worth having
        last = traceback.extract_tb(error.__traceback__)[-1]
        found = {"error": f"{type(error).__name__}: {error}", "at": f"{last.name}:{last.lineno}"}
    took = round(time.perf_counter() - started, 2)
    print(json.dumps({"figure": name, **found, "took_s": took}), flush=True)


def main() -> None:
    chosen = measuring.options(__doc__, size_mib=4096, values=0)
    driver = Driver.load()
    if driver is None:
        print("skipped: no GPU")
        return
    started = time.perf_counter()
    with driver.current(0):
        bench = Bench(driver, chosen.size_mib * MIB)
        machine = {
            "device": driver.device_name(0),
            "cuda": driver.version(),
            "multiprocessors": driver.num_multiprocessors(0),
            "load_ms": round(bench.load_ms, 1),
        }
        figure("machine", lambda: machine)
        figure("values of 1 to 2,048 bytes", lambda: values(bench))
        figure("values of chunks", lambda: values_of_chunks(bench))
        figure("verify finds what differs", lambda: values_of_verify(bench))
        if chosen.values:
            return
        figure("limit", lambda: limits(bench))
        figure("rates", lambda: rates(bench, bench.kernels, BOTH))
        figure("rates elsewhere than at 16 bytes", lambda: rates(bench, bench.kernels, SHAPES))
        figure("copies", lambda: copies(bench))
        figure("verify and place", lambda: verified(bench))
        figure("20,000 x 8 KiB", lambda: small(bench))
        figure("few chunks", lambda: few_chunks(bench))
        for name, measure in ordering.figures(driver):
            figure(name, measure)
        variants(bench, started + BUDGET_S)


if __name__ == "__main__":
    main()
