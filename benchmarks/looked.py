"""What a save looks at before it copies: types, layouts and addresses of many small tensors.

Every save asks every tensor, and the values are no part of it: a save on a device, where the bytes
move by themselves, is made of little else. The limit is one address of each, asked for by itself:
the first look at a tensor brings it into the cache.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import measuring

_WARM_UPS = 3


def main() -> None:
    chosen = measuring.options(__doc__, tensors=20_000)
    import torch

    from mtckpt._save import Planner
    from mtckpt.adapters import active_adapters

    state = measuring.small_state(chosen.tensors)
    evicting = torch.zeros(16 * measuring.MIB, dtype=torch.uint8)  # what a step leaves in the cache
    planner, adapters = Planner(), active_adapters()
    looked: list[float] = []
    asked: list[float] = []
    plan: Any = None
    for number in range(_WARM_UPS + chosen.rounds):
        evicting.add_(1)
        looked_s, captured = _timed(lambda: planner.prepare(state, adapters))
        evicting.add_(1)
        asked_s, _ = _timed(lambda: list(map(torch.Tensor.data_ptr, state.values())))
        if number and captured.plan is not plan:
            raise SystemExit("the plan was made anew: no row")
        plan = captured.plan
        if number >= _WARM_UPS:
            looked.append(looked_s * 1e6 / chosen.tensors)
            asked.append(asked_s * 1e6 / chosen.tensors)
    measuring.row(
        "small tensor looked at", looked, unit="us", limit=asked, limit_name="address",
        tensors=chosen.tensors,
    )  # fmt: skip


def _timed(call: Any) -> tuple[float, Any]:
    """Processor time of this thread: what others do at the time is no part of it."""
    started_s = time.thread_time()
    result = call()
    return time.thread_time() - started_s, result


if __name__ == "__main__":
    main()
