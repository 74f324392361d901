"""Nodes on one machine: each with its agent, its memory and its disk, and ranks as processes.

A node is a runtime directory, a RAM directory and a disk directory. Without network namespaces all
of them are on loopback; ``net_scene`` puts each into one of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import _isolation
from agent_checks import until

from mtckpt import _inventory
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.tiers import LocalTier

WORKER = Path(__file__).with_name("node_worker.py")


class Node:
    """One node. ``prefix`` are words before every command: where it runs."""

    def __init__(self, path: Path, name: str, *, host: str = "127.0.0.1") -> None:
        self.name = name
        self.places = _isolation.make_places()
        self.disk = path / name
        self.host = host
        self.prefix: list[str] = []
        self.environment: dict[str, str] = {}

    def start(self, **spec: Any) -> Rank:
        """A rank on this node."""
        environment = {
            **os.environ,
            **self.places.environment(),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "MTCKPT_PEER_HOST": self.host,
            **self.environment,
        }
        spec = {"disk": str(self.disk), **spec}
        return Rank([*self.prefix, sys.executable, str(WORKER), json.dumps(spec)], environment)

    def command(self, *words: str) -> str:
        """What ``mtckpt`` says on this node, where it says that all is well."""
        environment = {
            **os.environ,
            **self.places.environment(),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        command = [*self.prefix, sys.executable, "-m", "mtckpt.cli", *words]
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True
        ).stdout

    @property
    def agent_pid(self) -> int:
        return int((self.places.runtime / "agent.pid").read_text().split()[0])

    def kill_agent(self) -> None:
        """Its control process and so, in a moment, its data processes."""
        pid = self.agent_pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: not _isolation._is_alive(pid))

    def signal_all(self, number: signal.Signals) -> None:
        """To every process of the node."""
        for pid in _isolation._pids_with_runtime(self.places.runtime):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def lose(self) -> None:
        """All processes, the memory and the disk are gone."""
        for _ in range(3):
            self.signal_all(signal.SIGKILL)
        _isolation.sweep(self.places)
        shutil.rmtree(self.disk, ignore_errors=True)

    def status(self) -> protocol.RunStatus:
        with AgentClient(str(self.places.runtime / protocol.SOCKET_NAME), 45.0) as client:
            found = client.call("/status", None, protocol.AgentStatus)
        return next(run for run in found.runs if run.run == "run")

    def steps_on_disk(self) -> dict[int, list[int]]:
        """Ranks whose records are on this node's disk, by step."""
        if not (self.disk / "run").is_dir():
            return {}
        tier = LocalTier(self.disk, name="disk", sync=False, read_only=True)
        try:
            found = _inventory.scan(tier, "run")
        finally:
            tier.close()
        return {s.name.step: sorted(s.records) for s in found.saves.values() if s.records}


class Rank:
    """A rank's process, told what to do by lines."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def tell(self, *words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout_s: float = 90.0) -> Any:
        """The next answer; one of an error is a dictionary with ``error``."""
        assert self.process.stdout is not None
        timer = threading.Timer(timeout_s, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        assert line, "the rank has ended, or was too slow"
        found = json.loads(line)
        return found if "error" in found else found["ok"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def close(self) -> None:
        """Idempotent."""
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Cluster:
    """A job: some ranks on each of some nodes. It may be started again, as another job."""

    def __init__(self, path: Path, nodes: Sequence[Node]) -> None:
        self.path = path
        self.nodes = list(nodes)
        self.ranks: list[Rank] = []
        self.step = 0  # that the job has come to
        self._jobs = 0

    def start(self, per_node: int | Sequence[int] = 1, **settings: Any) -> None:
        """Rank processes, numbered node by node; so many on each, or on each of them."""
        for rank in self.ranks:
            rank.close()
        self._jobs += 1
        board = self.path / f"board-{self._jobs}"
        board.mkdir()
        counts = [per_node] * len(self.nodes) if isinstance(per_node, int) else per_node
        places = [
            node for node, count in zip(self.nodes, counts, strict=True) for _ in range(count)
        ]
        self.ranks = [
            node.start(rank=rank, world_size=len(places), board=str(board), **settings)
            for rank, node in enumerate(places)
        ]

    def all(self, *words: Any, ranks: Iterable[int] | None = None) -> list[Any]:
        """What each rank answers; they work at the same time."""
        chosen = [self.ranks[r] for r in (range(len(self.ranks)) if ranks is None else ranks)]
        for rank in chosen:
            rank.tell(*words)
        return [rank.answer() for rank in chosen]

    def save(self, step: int, stage: str = "staged") -> None:
        """A save that has to get there on every rank."""
        answers = self.all("save", step)
        assert answers == [""] * len(self.ranks), answers
        for reached in self.all("wait", step, stage):
            assert isinstance(reached, str), reached
            assert {stage, "durable"} & set(reached.split(",")), reached  # it, or one above it

    def saved(self, stage: str = "staged") -> int:
        """The next step is saved, and gets there."""
        self.step += 1
        self.save(self.step, stage)
        return self.step

    def begin(self, ranks: Iterable[int] | None = None) -> int:
        """The next step is captured by these ranks, and may not come further."""
        self.step += 1
        answers = self.all("save", self.step, ranks=ranks)
        assert not any(answers), answers
        return self.step

    def fails(self, step: int, *ranks: int, stage: str = "staged") -> list[tuple[str, str]]:
        """Why a save does not get there, as each rank is told: the class of the cause, the text."""
        answers = self.all("wait", step, stage, ranks=ranks)
        assert all(isinstance(a, dict) and a["error"] == "SaveFailed" for a in answers), answers
        return [(answer["cause"], answer["text"]) for answer in answers]

    def told_once(self) -> None:
        """The next save tells of a failure before it, where there was one, and is none itself."""
        self.step += 1
        self.all("save", self.step)

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        for node in self.nodes:
            _isolation.sweep(node.places)
