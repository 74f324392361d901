"""``save()`` until staged, the device idle: a GPT, small tensors, a state of which 5 % changed.

Each round of a save stands next to a copy of the same tensors into a registered tmpfs file, the
limit. What was saved is restored into the same tensors, after they were spoiled, and compared;
if it differs there is no row.
"""

from __future__ import annotations

import itertools
import os
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.gpu.bench import (
    GIB,
    Bench,
    bits_of,
    differing,
    make_state,
    opened,
    ram,
    saved,
    scramble,
    size_of,
    small_state,
)
from benchmarks.gpu.pinned import pinned

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    import mtckpt

_WARM_UPS = 4
_SEED = 11


def measure(bench: Bench) -> None:
    """A GPT's state."""
    state = make_state(bench.size_mib(), bench.device)
    found = _rounds(bench, state)
    gib = size_of(state) / GIB
    limit = [gib / took_s for took_s in found["limit"]]
    facts: dict[str, Any] = {"size_bytes": size_of(state), "tensors": len(state)}
    how = {"unit": "GiB/s", "limit": limit, "limit_name": "device to registered tmpfs"}
    rates = [gib / took_s for took_s in found["staged"]]
    bench.row("staged", rates, goal="value >= 46", **how, **facts)
    bench.row("staged: save() blocks", found["blocked"], **facts)


def measure_small(bench: Bench) -> None:
    """20,000 tensors of 8 KiB. ``captured`` is the stage from which the values are safe."""
    state = small_state(bench.chosen.tensors, bench.device)
    found = _rounds(bench, state)
    facts = {"size_bytes": size_of(state), "tensors": len(state)}
    bench.row("small tensors: captured", found["captured"], goal="value <= 0.015", **facts)
    bench.row("small tensors: save() blocks", found["blocked"], **facts)
    how = {"limit": found["limit"], "limit_name": "copied one by one into registered tmpfs"}
    bench.row("small tensors: staged", found["staged"], **how, **facts)


def _rounds(bench: Bench, state: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"blocked": [], "captured": [], "staged": [], "limit": []}
    scramble(state, _SEED)
    room_bytes = size_of(state) + 64 * len(state)
    directory = os.environ["MTCKPT_RAM_DIR"]
    with pinned(bench, directory, room_bytes) as slot, opened(ram()) as checkpointer:
        views = slot.views(state)
        for step in range(1, 1 + _WARM_UPS + bench.rounds):
            measuring.settle()
            limit_s = _copied(bench, state, views)
            took = _staged(bench, checkpointer, step, state)
            if step > _WARM_UPS:
                found["limit"].append(limit_s)
                for name, value in took.items():
                    found[name].append(value)
            if bench.left_s() < 5 and found["limit"]:
                break
        scramble(state, _SEED + 1)
        restore_and_compare(checkpointer, state, _SEED)
    return found


def _copied(bench: Bench, state: Mapping[str, torch.Tensor], views: list[torch.Tensor]) -> float:
    bench.sync()
    started_s = time.perf_counter()
    for view, tensor in zip(views, state.values(), strict=True):
        view.copy_(tensor, non_blocking=True)
    bench.sync()
    return time.perf_counter() - started_s


def _staged(
    bench: Bench, checkpointer: mtckpt.Checkpointer, step: int, state: Any
) -> dict[str, float]:
    bench.sync()
    started_s = time.perf_counter()
    save = saved(checkpointer, step, state)
    blocked_s = time.perf_counter() - started_s
    save.wait("captured", timeout_s=60)
    captured_s = time.perf_counter() - started_s
    save.wait("staged", timeout_s=60)
    staged_s = time.perf_counter() - started_s
    return {"blocked": blocked_s, "captured": captured_s, "staged": staged_s}


def restore_and_compare(
    checkpointer: mtckpt.Checkpointer, state: Mapping[str, torch.Tensor], seed: int
) -> None:
    """Raises if the state does not come back with the bits that it was saved with."""
    restored = checkpointer.restore(dict(state))
    if not restored:
        raise RuntimeError("nothing to restore")
    if wrong := differing(state, seed):
        raise RuntimeError(f"{len(wrong)} tensors came back with other bits: {wrong[:3]}")


def measure_changed(bench: Bench) -> None:
    """A twentieth of the bytes changes between saves, as in a run that trains adapters only."""
    state = make_state(bench.size_mib(), bench.device)
    few = _twentieth(state)
    steps = itertools.count(1)
    took: dict[str, list[float]] = {"all": [], "few": []}
    scramble(state, _SEED)
    with opened(ram()) as checkpointer:
        for name, part in (("all", dict(state)), ("few", few)):
            for number in range(_WARM_UPS + bench.rounds):
                scramble(part, _SEED + number)
                measuring.settle()
                found = _staged(bench, checkpointer, next(steps), state)
                if number >= _WARM_UPS:
                    took[name].append(found["staged"])
        before = bits_of(state)
        scramble(state, _SEED + 1000)
        checkpointer.restore(dict(state))
        now = bits_of(state)
    if wrong := [name for name in state if not before[name].equal(now[name])]:
        raise RuntimeError(f"{len(wrong)} tensors came back with other bits: {wrong[:3]}")
    bench.row(
        "5 % of the bytes changed: staged", took["few"], limit=took["all"],
        limit_name="all bytes changed", goal="ratio <= 0.2", size_bytes=size_of(state),
        changed=round(size_of(few) / size_of(state), 3), all_s=median(took["all"]),
    )  # fmt: skip


def _twentieth(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some whole tensors, spread over the state, that together hold 5 % of its bytes."""
    few: dict[str, torch.Tensor] = {}
    for name in itertools.chain(*(list(state)[first::7] for first in range(7))):
        if size_of(few) + state[name].nbytes <= size_of(state) / 20:
            few[name] = state[name]
    return few
