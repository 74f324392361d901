"""Training time lost per save: the extra wall time of a loop that saves over the same one without.

The trainer and all its threads are pinned to one core, the agent and its data processes to
another. Blocks of the same number of steps take turns: one without a save, one that begins with a
save to RAM alone, and one with a save to the slower tier too, a disk or an object store (SeaweedFS
on the agent's core). A block is longer than all that a save sets off; one that was not is counted
in its row as too short. Each row stands next to a memcpy on the trainer's core; rows of a slower
tier next to RAM alone as well, and that of the store next to RAM and obstore alone, which uploads
as many bytes on the agent's core: cores share caches and memory, so any upload costs training.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measuring

sys.path.append(str(measuring.ROOT / "tests"))

_OVER_RAM = {"ram and disk": "", "ram and store": "ratio <= 1.1"}
_UPLOAD = "ram and obstore"
_NEVER = 1 << 40  # steps: only when a save asks for all tiers
# How much longer than a save takes in an idle trainer a block is, and all blocks together.
MARGIN = 1.5
LONGEST_S = 180.0
END_S = 120.0


def main() -> None:
    chosen = measuring.options(__doc__, rounds=9, block_s=1.5, role="")
    if chosen.role == _UPLOAD:
        _upload(chosen.size_mib)
        return
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
        upload = None
        if role == "ram and store":
            tier, upload = _store(servers, size_mib)
            tiers.append(tier)
        loop = _Loop(mtckpt.Checkpointer("bench", tiers, max_stall_s=60), state, role, upload)
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
        kinds = list(dict.fromkeys(["", "ram", *([_UPLOAD] if upload else []), role]))
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
    goals = {"ram": _OVER_RAM[role], _UPLOAD: "ratio <= 1.1"} if role != "ram" else {}
    for kind, goal in goals.items():
        if kind in lost:
            how = {"limit": lost[kind], "limit_name": kind, "goal": goal}
            measuring.row(f"{name} / {kind}", lost[role], **how, **facts)


class _Loop:
    """A trainer's loop: blocks of steps, some of which begin with a save."""

    def __init__(self, checkpointer: Any, state: Any, role: str, upload: _Upload | None) -> None:
        self._checkpointer = checkpointer
        self._state = state
        self._role = role
        self._upload = upload
        self._step = 0
        self.too_short = 0

    def save(self, kind: str) -> Any:
        self._step += 1
        return self._checkpointer.save(
            self._step, self._state, tiers="all" if kind == self._role else "due"
        )

    def block(self, kind: str, steps: int) -> float:
        """Seconds that the steps take, with a save at their start unless ``kind`` is empty."""
        upload = self._upload if kind == _UPLOAD else None
        started_s = time.perf_counter()
        if upload:
            upload.start()
        save = self.save(kind) if kind else None
        _train(steps)
        took_s = time.perf_counter() - started_s
        self.too_short += bool(save and not save.done()) or bool(upload and not upload.done(0))
        if upload and not upload.done(END_S):
            sys.exit("no end of an upload by obstore")
        if save:
            self.settle(save)
        return took_s

    def settle(self, save: Any) -> None:
        """Wait until nothing more happens to a save: the next block has none of it."""
        end_s = time.monotonic() + END_S
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


def _store(servers: contextlib.ExitStack, size_mib: int) -> tuple[Any, _Upload]:
    from stores import s3_server

    import mtckpt

    directory = servers.enter_context(tempfile.TemporaryDirectory())
    server = servers.enter_context(s3_server(Path(directory)))
    upload = _Upload({**os.environ, **server.environment}, size_mib)
    servers.callback(upload.close)
    url = f"s3://{server.new_prefix()}"
    return mtckpt.ObjectStore(url, every=_NEVER, storage_options=server.options), upload


class _Upload:
    """A process that uploads ``size_mib`` by obstore alone whenever it is told to."""

    def __init__(self, environment: dict[str, str], size_mib: int) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.lost",
                f"--role={_UPLOAD}",
                f"--size-mib={size_mib}",
            ],
            cwd=measuring.ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._told = self._heard = 0
        self.start()
        if not self.done(END_S):
            sys.exit("no first upload by obstore")

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b".")
        self._told += 1

    def done(self, timeout_s: float) -> bool:
        """Whether all that was started is uploaded, at the latest after ``timeout_s``."""
        assert self._process.stdout is not None
        while self._heard < self._told:
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                return False
            if not self._process.stdout.read(1):
                sys.exit("the process that uploads by obstore is gone")
            self._heard += 1
        return True

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _upload(size_mib: int) -> None:
    """Upload once for each byte of the standard input; answer with one when it is done."""
    import obstore
    from obstore.store import S3Store
    from stores import BUCKET

    store = S3Store(
        BUCKET,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        region=os.environ["AWS_DEFAULT_REGION"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True, "timeout": "600s"},
    )
    data = os.urandom(measuring.MIB) * size_mib
    number = 0
    while sys.stdin.buffer.read(1):
        obstore.put(store, f"raw/{number}", data, chunk_size=16 * measuring.MIB, max_concurrency=8)
        number += 1
        os.write(1, b".")


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
