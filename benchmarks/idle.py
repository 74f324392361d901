"""``save()`` in a step in which no tier is due: what every step of a loop pays."""

from __future__ import annotations

import time

from benchmarks import measuring

_CALLS = 2_000


def main() -> None:
    chosen = measuring.options(__doc__)
    took, empty = [], []
    with measuring.places():
        import mtckpt

        state: dict[str, int] = {}
        with mtckpt.Checkpointer("bench", [mtckpt.Ram(every=1_000_000)]) as checkpointer:
            for _ in range(chosen.rounds):
                started_s = time.perf_counter()
                for step in range(1, _CALLS + 1):
                    checkpointer.save(step, state)
                ended_s = time.perf_counter()
                for step in range(1, _CALLS + 1):
                    int(step)
                took.append((ended_s - started_s) / _CALLS)
                empty.append((time.perf_counter() - ended_s) / _CALLS)
    measuring.row(
        "nothing due", took, limit=empty, limit_name="empty loop", goal="value <= 0.00002"
    )


if __name__ == "__main__":
    main()
