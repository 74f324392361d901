"""From staged in RAM to committed and fsynced on a disk, next to the best raw write of that file.

Raw: the same number of bytes from memory that was touched, to a new file, fsynced, renamed, its
directory fsynced. All ways take turns with the flush; the best by median is the limit.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from statistics import median

from benchmarks import measuring

_PIECE_BYTES = 8 * measuring.MIB
_ALIGNMENT_BYTES = 4096


def main() -> None:
    chosen = measuring.options(__doc__)
    with measuring.places() as where:
        import mtckpt

        state = measuring.gpt_state(chosen.size_mib)
        measuring.fill(state, 1)
        size_bytes = sum(tensor.nbytes for tensor in measuring.tensors_of(state))
        raw = _ways(where.disk, size_bytes)
        found: dict[str, list[float]] = {name: [] for name in raw}
        flushed = []
        tiers = [mtckpt.Ram(every=1), mtckpt.Disk(os.path.join(where.disk, "tier"), keep=2)]
        checkpointer = mtckpt.Checkpointer("bench", tiers, max_stall_s=60)
        for step in range(1, 3 + chosen.rounds):
            save = checkpointer.save(step, state)
            save.wait("staged", timeout_s=60)
            started_s = time.perf_counter()
            save.wait("local", timeout_s=120)
            took_s = time.perf_counter() - started_s
            measuring.settle(0.3)  # retention deletes the previous file
            for name, write in raw.items():
                raw_s = write()
                if step > 2:
                    found[name].append(raw_s)
            if step > 2:
                flushed.append(took_s)
        checkpointer.close()
        if not _comes_back(where.disk, state):
            raise SystemExit("restored bytes differ: no row")
    best = min(found, key=lambda name: median(found[name]))
    measuring.row(
        "flushed to disk",
        flushed,
        limit=found[best],
        limit_name=f"raw write, {best}",
        of_limit=True,
        goal="ratio >= 0.85",
        size_bytes=size_bytes,
        raw_s={name: round(median(samples), 4) for name, samples in found.items()},
    )


def _comes_back(disk: str, state: object) -> bool:
    import mtckpt

    for tensor in measuring.tensors_of(state):
        tensor.fill_(-2.0)
    tier = mtckpt.Disk(os.path.join(disk, "tier"), keep=2)
    with mtckpt.Checkpointer("bench", [mtckpt.Ram(every=1), tier]) as checkpointer:
        restored = checkpointer.restore(state)
    return bool(restored) and "disk" in restored.sources and measuring.same(state, 1)


def _ways(directory: str, size_bytes: int) -> dict[str, Callable[[], float]]:
    memory = mmap.mmap(-1, -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
    view = memoryview(memory)
    for start in range(0, len(view), _ALIGNMENT_BYTES):
        view[start : start + 8] = start.to_bytes(8, "little")  # touched, and no page like another

    def write(flags: int, num_threads: int) -> float:
        path = f"{directory}/raw"
        started_s = time.perf_counter()
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o600)
        os.posix_fallocate(fd, 0, len(view))
        starts = iter(range(0, len(view), _PIECE_BYTES))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                part = view[start : start + _PIECE_BYTES]
                while part:
                    done = os.pwrite(fd, part, start)
                    part, start = part[done:], start + done

        threads = [threading.Thread(target=work) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(fd)
        os.close(fd)
        os.rename(f"{path}.new", path)
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
        took_s = time.perf_counter() - started_s
        os.unlink(path)
        return took_s

    return {
        "direct, 1 thread": lambda: write(os.O_DIRECT, 1),
        "direct, 2 threads": lambda: write(os.O_DIRECT, 2),
        "buffered": lambda: write(0, 1),
    }


if __name__ == "__main__":
    main()
