"""What several nodes cost and save: lost and crashed ones, saves, other meshes, many ranks.

``--only ROW`` takes one of:

lost: four nodes with a rank each, copies on another node, every step in a store too. A node goes,
with its processes, memory, disk and cable; another comes in its place, and all ranks start anew.
From the start of the first process to the end of the first step that goes on, beside a start of
the same ranks from nothing, and beside a raw copy of the lost bytes between two of the nodes.
crashed: the ranks die and start anew where they were; the bytes that crossed the network are
counted by the kernel and by the restores.
ddp: four nodes with two ranks each that hold the same; what a save captures and sends is counted.
fsdp, mesh: ``benchmarks.meshes``. agree: ``benchmarks.agreed``.

Nodes are network namespaces, and directories on the loopback without the rights for those: rows say
which. All of them share the cores of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measuring

sys.path.append(str(measuring.ROOT / "tests"))  # hosts, as tests have them

NUM_NODES = 4
ANSWER_S = 200.0
MESSAGES_BYTES = 1_000_000


def main() -> None:
    chosen = measuring.options(__doc__, rounds=0, size_mib=0, only="", ranks=0, tensors=0)
    for name in chosen.only.split(",") if chosen.only else [*_ROWS, *_ELSEWHERE]:
        if name in _ELSEWHERE:
            module, options = _ELSEWHERE[name]
            given = {**vars(chosen), "only": name}
            words = [f"--{each.replace('_', '-')}={given[each]}" for each in options]
            print(measuring.child(f"benchmarks.{module}", *words), end="", flush=True)
        else:
            _ROWS[name](chosen.size_mib, chosen.rounds)


# -- nodes -----------------------------------------------------------------------------------------


class Scene:
    """Nodes, and the ranks of the job that runs on them: so many on each."""

    def __init__(self, path: Path, per_node: int = 1, num_nodes: int = NUM_NODES) -> None:
        from net_scene import Network, why_no_network

        self.path, self.per_node = path, per_node
        self.network = None if why_no_network() else Network(path)
        self.kind = "directories on the loopback" if self.network is None else "network namespaces"
        self._names = (f"n{number}" for number in range(1000))
        self.nodes = [self.new_node() for _ in range(num_nodes)]
        self.ranks: list[Any] = []
        self._port = 29_700 + os.getpid() % 1000

    def new_node(self) -> Any:
        from node_scene import Node

        name = next(self._names)
        node = Node(self.path, name) if self.network is None else self.network.host(name)
        node.environment["MTCKPT_DOMAINS"] = f"host={name}"
        return node

    def start(self, **spec: Any) -> list[dict[str, Any]]:
        """Ranks on all nodes, once each has taken its first step: what each of them tells.

        ``started_s`` in each is when the first process was started.
        """
        from node_scene import Rank

        self.end()
        self._port += 1
        started_s = time.perf_counter()
        spec["world_size"] = world_size = len(self.nodes) * self.per_node
        for number in range(world_size):
            node = self.nodes[number // self.per_node]
            environment = {
                **os.environ,
                **node.places.environment(),
                "PYTHONPATH": os.pathsep.join(p for p in (str(measuring.ROOT), *sys.path) if p),
                "MTCKPT_PEER_HOST": getattr(node, "address", "127.0.0.1"),
                "MASTER_ADDR": getattr(self.nodes[0], "address", "127.0.0.1"),
                "MASTER_PORT": str(self._port),
                "GLOO_SOCKET_IFNAME": "lo" if self.network is None else "eth0",
                "RANK": str(number),
                "WORLD_SIZE": str(world_size),
                **{k: v for k, v in node.environment.items() if k != "MASTER_ADDR"},
            }
            words = [sys.executable, "-m", "benchmarks.node_rank", json.dumps(spec)]
            self.ranks.append(Rank([*node.prefix, *words], environment))
        return [{**rank.answer(ANSWER_S), "started_s": started_s} for rank in self.ranks]

    def all(self, *words: Any) -> list[Any]:
        """What each rank answers; they work at the same time."""
        for rank in self.ranks:
            rank.tell(*words)
        return [rank.answer(ANSWER_S) for rank in self.ranks]

    def end(self) -> None:
        """All ranks die; agents stay."""
        for rank in self.ranks:
            rank.process.send_signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.close()
        self.ranks = []

    def lose(self, number: int) -> None:
        """A node is gone, and a new one has its place; the job's other ranks end."""
        self.nodes[number].lose()
        self.end()
        self.nodes[number] = self.new_node()

    def received_bytes(self) -> int:
        """What has come to all nodes over their cables so far; without cables it is not known."""
        paths = "/sys/class/net/eth0/statistics/rx_bytes"
        hosts = self.nodes if self.network is not None else []
        return sum(int(host.output("cat", paths)) for host in hosts)

    def close(self) -> None:
        import _isolation

        self.end()
        for node in self.nodes:
            _isolation.sweep(node.places)
        if self.network is not None:
            self.network.close()


@contextlib.contextmanager
def scene(**settings: Any) -> Iterator[Scene]:
    """Four nodes with nothing on them; nothing is left of them afterwards."""
    with tempfile.TemporaryDirectory(prefix="mtb-", dir=_memory()) as directory:
        made = Scene(Path(directory), **settings)
        try:
            yield made
        finally:
            made.close()


def _memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def _raw_copy_s(job: Scene, size_bytes: int) -> float:
    """Seconds that so many bytes take from one node's memory into another's, nothing checked."""
    one, other = job.nodes[0], job.nodes[1]
    source = Path(job.path) / "raw"
    source.write_bytes(os.urandom(measuring.MIB) * (size_bytes // measuring.MIB + 1))
    base = [sys.executable, "-m", "benchmarks.raw_copy"]
    host = getattr(one, "address", "127.0.0.1")
    server = subprocess.Popen(
        [*one.prefix, *base, "serve", str(source), host], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        words = ["pull", host, port, str(size_bytes), f"{source}-copy"]
        done = subprocess.run(
            [*other.prefix, *base, *words], stdout=subprocess.PIPE, text=True, check=True,
            timeout=ANSWER_S,
        )  # fmt: skip
    finally:
        server.kill()
        server.communicate()
        source.unlink()
    return float(done.stdout)


# -- rows ------------------------------------------------------------------------------------------


def _first_step_s(told: list[dict[str, Any]]) -> float:
    return max(float(each["reached"]["stepped"] - each["started_s"]) for each in told)


def _phases(told: list[dict[str, Any]]) -> dict[str, float]:
    """When the last rank had come to each part of its start, from the first process on."""
    return {
        name: round(max(each["reached"][name] - each["started_s"] for each in told), 3)
        for name in told[0]["reached"]
    }


def lost(size_mib: int, rounds: int) -> None:
    size_mib, rounds = size_mib or 1024, rounds or 5
    resumed, plain, raw, over = [], [], [], []
    stored = 0
    phases: dict[str, float] = {}
    with scene() as job:
        settings = {"size_mib": size_mib, "kind": "sharded", "store": f"file://{job.path}/store"}
        job.start(restores=True, **settings)
        job.all("fill")
        step = 0
        for round_ in range(rounds):
            for _ in range(2):  # as a job that has run for a while
                step += 1
                job.all("save", step, "replicated", "durable")
            raw.append(_raw_copy_s(job, size_mib * measuring.MIB // NUM_NODES))
            with scene() as other:
                plain.append(_first_step_s(other.start(restores=False, **settings)))
            number = 1 + round_ % (NUM_NODES - 1) if round_ < NUM_NODES - 1 else 0
            job.lose(number)
            told = job.start(restores=True, **settings)
            if [each["step"] for each in told] != [step] * NUM_NODES or not all(job.all("same")):
                sys.exit(f"other bytes, or not step {step}: {told}")
            resumed.append(_first_step_s(told))
            over.append(resumed[-1] - plain[-1])
            stored += sum(each["sources"].get("store", 0) for each in told)
            phases = _phases(told)
        kind = job.kind
    bound = round(2 * median(raw) + 3, 3)
    facts = {"nodes": kind, "state_bytes": size_mib * measuring.MIB, "goal_is": "2 x raw + 3 s"}
    name, limit_name = "node lost, first resumed step", "raw copy of the lost bytes"
    how: dict[str, Any] = {"limit": raw, "limit_name": limit_name, "goal": f"value <= {bound}"}
    measuring.row(f"{name}: over a start from nothing", over, **how, **facts)
    measuring.row(f"{name}: from the process's start", resumed, **how, **facts, last=phases)
    measuring.row("the same ranks, started from nothing", plain, nodes=kind)
    goal = "value <= 0"
    measuring.row("node lost: bytes from the store", [stored], unit="B", goal=goal, nodes=kind)


def crashed(size_mib: int, rounds: int) -> None:
    size_mib, rounds = size_mib or 1024, rounds or 3
    far, crossed, took = [], [], []
    with scene() as job:
        settings = {"size_mib": size_mib, "kind": "sharded", "restores": True}
        job.start(**settings)
        job.all("fill")
        for step in range(1, rounds + 1):
            job.all("save", step, "replicated")
            job.end()
            before_bytes = job.received_bytes()
            told = job.start(**settings)
            crossed.append(job.received_bytes() - before_bytes)
            if [each["step"] for each in told] != [step] * NUM_NODES or not all(job.all("same")):
                sys.exit(f"other bytes, or not step {step}: {told}")
            sources = [each["sources"] for each in told]
            far.append(sum(n for each in sources for tier, n in each.items() if tier != "ram"))
            took.append(_first_step_s(told))
        facts = {"nodes": job.kind, "state_bytes": size_mib * measuring.MIB}
    name = "process crash"
    measuring.row(f"{name}: bytes not from the own node", far, unit="B", goal="value <= 0", **facts)
    if job.network is not None:
        goal = f"value <= {MESSAGES_BYTES}"
        what = f"{name}: bytes on all cables, messages included"
        measuring.row(what, crossed, unit="B", goal=goal, **facts)
    measuring.row(f"{name}: first resumed step, from the process's start", took, **facts)


def ddp(size_mib: int, rounds: int) -> None:
    size_mib, rounds = size_mib or 64, rounds or 3
    for layout in ("node", "spread"):
        part = {"node": 1.0, "spread": 2 / NUM_NODES}[layout]
        with scene(per_node=2) as job, _memory_for(job, layout, size_mib) as why_not:
            if why_not:
                print(f"ddp, {layout}: skipped, {why_not}", file=sys.stderr)
                continue
            job.start(size_mib=size_mib, kind="ddp", restores=True)
            crossed, ranks, nodes = [], [], []
            state_bytes = 0
            for step in range(1, rounds + 1):
                before_bytes = job.received_bytes()
                job.all("save", step, "replicated")
                crossed.append(job.received_bytes() - before_bytes)
                shards = [_shards(node, step) for node in job.nodes]
                ranks += [size for each in shards for size in each.values()]
                nodes += [sum(each.values()) for each in shards]
                state_bytes = job.all("state_bytes")[0]
        facts = {"nodes": job.kind, "layout": layout, "state_bytes": state_bytes}
        name = f"DDP over {NUM_NODES} nodes, copies=1, {layout}"
        goal = "value <= 0.01"
        if job.network is not None:
            sent = [each / state_bytes for each in crossed]
            measuring.row(f"{name}: sent, of the state", sent, unit="x", goal=goal, **facts)
        shares = [each / state_bytes for each in ranks]
        goal = f"value <= {part / 2 + 0.02}"
        measuring.row(
            f"{name}: a rank captures, of the state", shares, unit="x", goal=goal, **facts
        )
        shares = [each / state_bytes for each in nodes]
        goal = f"value <= {part + 0.02}"
        measuring.row(f"{name}: a node holds, of the state", shares, unit="x", goal=goal, **facts)


def _shards(node: Any, step: int) -> dict[str, int]:
    """What the shards of a step take in a node's memory, copies for other nodes included."""
    paths = node.places.ram.glob(f"*/bench/step-*{step}.*/rank-*.safetensors")
    return {path.stem: path.stat().st_size for path in paths}


@contextlib.contextmanager
def _memory_for(job: Scene, layout: str, size_mib: int) -> Iterator[str]:
    """Nodes that have not the memory for all that their ranks hold, where they are to share it."""
    if layout == "node":
        yield ""
        return
    if os.geteuid() != 0:
        yield "mounting takes root"
        return
    for node in job.nodes:
        # Two slots of all of it do not fit, of a half of it they do.
        size = f"size={int(1.5 * size_mib) + 4}m"
        words = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(node.places.ram)]
        subprocess.run(words, check=True)
    try:
        yield ""
    finally:
        for node in job.nodes:
            subprocess.run(["umount", "-l", str(node.places.ram)], check=False)


_ROWS: dict[str, Callable[[int, int], None]] = {"lost": lost, "crashed": crashed, "ddp": ddp}
# Rows of other modules, and what is passed on to them.
_ELSEWHERE = {
    "fsdp": ("meshes", ("size_mib", "rounds", "only")),
    "mesh": ("meshes", ("size_mib", "rounds", "only")),
    "agree": ("agreed", ("rounds", "ranks", "tensors")),
}


if __name__ == "__main__":
    main()
