"""Training time lost per save: the extra wall time of a loop that saves over the same one without.

The trainer and all its threads are pinned to one core, the agent and its data processes to
another. Blocks of the same number of steps take turns: one without a save, one that begins with a
save to RAM alone, and one with a save to the slower tier too, a disk or an object store (SeaweedFS
on the agent's core). A block is longer than all that a save sets off; one that was not is counted
in its row as too short. Each row stands next to a memcpy on the trainer's core; rows of a slower
tier next to RAM alone as well.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measuring

_OVER_RAM = {"ram and disk": "", "ram and store": "ratio <= 1.1"}
_NEVER = 1 << 40  # steps: only when a save asks for all tiers
# How much longer than a save takes in an idle trainer a block is, and all blocks together.
MARGIN = 1.5
LONGEST_S = 180.0


def main() -> None:
    chosen = measuring.options(__doc__, rounds=9, block_s=1.5, role="")
    if chosen.role:
        _measure(chosen.role, chosen.size_mib, chosen.rounds, chosen.block_s)
        return
    if len(os.sched_getaffinity(0)) < 2:
        print("training time lost: skipped, one core only", file=sys.stderr)
        return
    for role in ("ram", "ram and disk", "ram and store"):
        out = measuring.child(
            "benchmarks.lost",
            f"--role={role}",
            f"--size-mib={chosen.size_mib}",
            f"--rounds={chosen.rounds}",
            f"--block-s={chosen.block_s}",
        )
        print(out, end="", flush=True)


def _measure(role: str, size_mib: int, rounds: int, block_s: float) -> None:
    import torch

    torch.set_num_threads(1)
    trainer_core, agent_core = sorted(os.sched_getaffinity(0))[:2]
    with measuring.places() as where, contextlib.ExitStack() as servers:
        import mtckpt

        state = measuring.gpt_state(size_mib)
        measuring.fill(state, 1)
        os.sched_setaffinity(0, {agent_core})  # what is started from here on inherits it
        tiers: list[Any] = [mtckpt.Ram(every=1)]
        if role == "ram and disk":
            tiers.append(mtckpt.Disk(where.disk, every=_NEVER, keep=2))
        elif role == "ram and store":
            tiers.append(_store(servers))
        loop = _Loop(mtckpt.Checkpointer("bench", tiers, max_stall_s=60), state, role)
        for _ in range(4):
            started_s = time.perf_counter()
            loop.settle(loop.save(role))
            behind_s = time.perf_counter() - started_s
        _pin(os.getpid(), trainer_core)
        for pid in where.agent_pids():
            _pin(pid, agent_core)
        memcpy = measuring.Memcpy(state)
        block_s = max(block_s, MARGIN * behind_s)
        steps = max(5, int(block_s / _train(50) * 50))
        kinds = ["", "ram"] if role == "ram" else ["", "ram", role]
        rounds = min(rounds, max(3, int(LONGEST_S / (len(kinds) * block_s))))
        lost: dict[str, list[float]] = {kind: [] for kind in kinds}
        copied = []
        for turn in range(rounds):
            first = turn % len(kinds)
            took = {kind: loop.block(kind, steps) for kind in (*kinds[first:], *kinds[:first])}
            for kind in kinds:
                lost[kind].append(took[kind] - took[""])
            copied.append(memcpy())
        loop.check()
    facts: dict[str, Any] = {
        "size_bytes": memcpy.size_bytes,
        "steps_a_block": steps,
        "too_short": loop.too_short,
    }
    name = f"training time lost, {role}"
    measuring.row(name, lost[role], limit=copied, goal="ratio <= 1.4", **facts)
    if role != "ram":
        how = {"limit": lost["ram"], "limit_name": "ram alone", "goal": _OVER_RAM[role]}
        measuring.row(f"{name} / ram", lost[role], **how, **facts)


class _Loop:
    """A trainer's loop: blocks of steps, some of which begin with a save."""

    def __init__(self, checkpointer: Any, state: Any, role: str) -> None:
        self._checkpointer = checkpointer
        self._state = state
        self._role = role
        self._step = 0
        self.too_short = 0

    def save(self, kind: str) -> Any:
        self._step += 1
        return self._checkpointer.save(
            self._step, self._state, tiers="due" if kind == "ram" else "all"
        )

    def block(self, kind: str, steps: int) -> float:
        """Seconds that the steps take, with a save at their start unless ``kind`` is empty."""
        started_s = time.perf_counter()
        save = self.save(kind) if kind else None
        _train(steps)
        took_s = time.perf_counter() - started_s
        if save is not None:
            self.too_short += not save.done()
            self.settle(save)
        return took_s

    def settle(self, save: Any) -> None:
        """Wait until nothing more happens to a save: the next block has none of it."""
        end_s = time.monotonic() + 120
        while not save.done():
            if time.monotonic() > end_s:
                sys.exit(f"no end of {save!r}")
            time.sleep(0.02)
        if save.skipped or save.exception():
            sys.exit(f"a save went wrong: {save!r}: {save.exception()}")
        measuring.settle(0.5)

    def check(self) -> None:
        """The last save, to all tiers, comes back with every byte."""
        self.settle(self.save(self._role))
        for tensor in measuring.tensors_of(self._state):
            tensor.fill_(-2.0)
        if not self._checkpointer.restore(self._state) or not measuring.same(self._state, 1):
            sys.exit("restored bytes differ: no row")
        self._checkpointer.close()


def _store(servers: contextlib.ExitStack) -> Any:
    sys.path.append(str(measuring.ROOT / "tests"))
    from stores import s3_server

    import mtckpt

    directory = servers.enter_context(tempfile.TemporaryDirectory())
    server = servers.enter_context(s3_server(Path(directory)))
    return mtckpt.ObjectStore(
        f"s3://{server.new_prefix()}", every=_NEVER, storage_options=server.options
    )


def _pin(pid: int, core: int) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def _train(steps: int) -> float:
    """Steps of a few milliseconds of small operations, as an eager trainer's host side has."""
    import torch

    weight = torch.full((128, 128), 0.01)
    started_s = time.perf_counter()
    for _ in range(steps):
        hidden = weight
        for _ in range(40):
            hidden = torch.tanh(hidden @ weight)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
