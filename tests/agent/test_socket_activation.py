"""A service on a socket that somebody else holds, as systemd does: LISTEN_FDS, descriptor 3."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_trainer import FakeTrainer, disk

from mtckpt.agent import address, protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.protocol import AgentStatus

# The shell's pid is that of the program that it becomes; the socket is moved to descriptor 3.
START = 'exec 3<&"$1"; LISTEN_FDS=1 LISTEN_PID=$$ exec "$2" -m mtckpt.cli agent run'


@pytest.fixture
def listener(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What systemd binds before anything runs."""
    path = str(runtime_dir / protocol.SOCKET_NAME)
    monkeypatch.setenv("MTCKPT_AGENT_SOCKET", path)
    with address.bind(path) as listener:
        yield listener


def start(listener: socket.socket) -> subprocess.Popen[bytes]:
    fd = listener.fileno()
    return subprocess.Popen(
        ["bash", "-c", START, "bash", str(fd), sys.executable],
        pass_fds=(fd,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_a_service_takes_the_socket_that_it_is_given(
    listener: socket.socket, runtime_dir: Path, tmp_path: Path
) -> None:
    """Whoever connects while none runs waits in the backlog; the socket outlives every agent."""
    path = runtime_dir / protocol.SOCKET_NAME
    process = start(listener)
    try:
        with AgentClient(str(path), 30.0) as client:
            assert client.call("/status", None, AgentStatus).pid == process.pid
        trainer = FakeTrainer("r", [disk(tmp_path / "d")])
        trainer.open()
        trainer.begin()
        trainer.save(1, ["disk"])
        trainer.wait_stage(1, "local")
        process.kill()
        process.wait(10)
        answers: list[AgentStatus] = []

        def ask() -> None:
            with AgentClient(str(path), 40.0) as client:
                answers.append(client.call("/status", None, AgentStatus))

        asking = threading.Thread(target=ask)
        asking.start()
        process = start(listener)
        asking.join(40.0)
        assert [answer.pid for answer in answers] == [process.pid]
        trainer.open()
        trainer.save(2, ["disk"])
        trainer.wait_stage(2, "local")
        trainer.close()
        process.terminate()
        assert process.wait(20) == 0
        assert path.exists()  # it is not the agent's to remove
    finally:
        process.kill()
        process.wait(10)


def test_variables_for_another_process_are_not_ours(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child of an activated program inherits them: it binds a socket of its own."""
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    process = subprocess.Popen(
        [sys.executable, "-m", "mtckpt.cli", "agent", "run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    path = runtime_dir / protocol.SOCKET_NAME
    try:
        done = threading.Event()
        while not address.answers(str(path), 1.0):
            assert process.poll() is None
            done.wait(0.05)
        with AgentClient(str(path), 30.0) as client:
            assert client.call("/status", None, AgentStatus).pid == process.pid
        process.terminate()
        assert process.wait(20) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait(10)
