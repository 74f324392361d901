"""What tests of the agent ask: which process it is, what it says, what lies in a tier."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_trainer import FakeTrainer, TrainerProcess, body_of

from mtckpt import _inventory, _manifest
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.spawn import ensure_agent
from mtckpt.tiers import LocalTier

Trainers = Callable[..., TrainerProcess]
Own = Callable[..., FakeTrainer]


def agent_pid() -> int:
    with AgentClient(ensure_agent(20.0), 20.0) as client:
        return client.call("/status", None, protocol.AgentStatus).pid


def kill_agent() -> None:
    pid = agent_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())


def data_processes() -> dict[str, int]:
    """Pids of the agent's data processes, by the root of the tier that each has open."""
    parent = agent_pid()
    found = {}
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        pids: list[str] = []
        # Descriptors are closed, threads and processes end, while this looks.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pids = path.read_text().split()
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(FileNotFoundError):
                        found[os.readlink(f"/proc/{pid}/fd/{fd}")] = int(pid)
    return found


def status_of(run: str = "r") -> protocol.RunStatus | None:
    with AgentClient(ensure_agent(20.0), 20.0) as client:
        found = client.call("/status", None, protocol.AgentStatus)
    return next((r for r in found.runs if r.run == run), None)


def until(what: Callable[[], Any], timeout_s: float = 45.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)
    return found


def steps_in(root: Path, run: str = "r", *, name: str = "disk") -> list[int]:
    """Steps that are whole in a tier, read without the agent and byte by byte."""
    tier = LocalTier(root, name=name, sync=False, read_only=True)
    try:
        inventory = _inventory.scan(tier, _manifest.run_key(run))
    finally:
        tier.close()
    steps = []
    for save in inventory.saves.values():
        if not save.records:
            continue
        assert save.problems == []
        assert save.complete
        path = root / _manifest.run_key(run) / str(save.name) / _manifest.shard_file(0)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue  # retention deletes it just now, the record first
        body = body_of(save.name.step, len(data) - save.records[0].shard.data_start)
        assert data.endswith(body), f"{save.name} is torn"
        steps.append(save.name.step)
    return sorted(steps)


def ram_root() -> Path:
    return Path(protocol.ram_base())
