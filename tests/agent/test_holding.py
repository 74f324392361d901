"""One agent has a directory of slots, though jobs of its user look for it at different places."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from mtckpt.agent import address, holding, protocol
from mtckpt.agent.holding import Roots, noted
from mtckpt.errors import AgentUnavailable


@pytest.fixture
def root(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of this user, and no word of where the agent is."""
    monkeypatch.delenv("MTCKPT_RUNTIME_DIR")
    monkeypatch.setattr(holding, "WAIT_S", 0.1)
    monkeypatch.setattr(address, "SERVICE_DIRECTORY", str(runtime_dir / "none"))
    path = Path(protocol.ram_base())
    path.mkdir(mode=0o700)
    return path


def test_two_agents_never_have_the_same_memory(root: Path) -> None:
    first, second = Roots("/run/first"), Roots("/run/second")
    asyncio.run(first.take(str(root)))
    with pytest.raises(AgentUnavailable, match="at /run/first, has the memory") as raised:
        asyncio.run(second.take(str(root)))
    assert "MTCKPT_RUNTIME_DIR=/run/first" in raised.value.actions[0]
    first.close()
    asyncio.run(second.take(str(root)))
    assert noted(str(root)) == "/run/second"
    second.close()
    assert list(root.iterdir()) == []


def test_memory_that_was_made_anew_is_the_agents_again(root: Path) -> None:
    first, second = Roots("/run/first"), Roots("/run/second")
    asyncio.run(first.take(str(root)))
    shutil.rmtree(root)
    first.renew()
    root.mkdir()
    first.renew()
    with pytest.raises(AgentUnavailable):
        asyncio.run(second.take(str(root)))
    first.close()


def test_a_job_finds_the_agent_that_has_its_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from a login session; the job that comes next is none of one."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    there = address.find()
    address.make_directory(there.directory)
    roots = Roots(there.directory)
    asyncio.run(roots.take(str(root)))
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    own = address.find()
    assert own != there  # nobody listens
    with address.bind(there.socket_path):
        assert address.find() == there
        for bad in (b"relative\0path", os.fsencode(root / ".agent" / "is a file")):
            (root / ".agent").write_bytes(bad)
            assert address.find() == own
    roots.close()
