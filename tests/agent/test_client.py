"""Calls end by their deadline, say what went wrong, and trust only the right listener."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtckpt.agent import address, known_runs, protocol
from mtckpt.agent.client import AgentClient, agent_client
from mtckpt.agent.protocol import AgentStatus, Done, WireError
from mtckpt.agent.spawn import ensure_agent
from mtckpt.errors import (
    AccessDenied,
    AgentTooOld,
    AgentUnavailable,
    FormatError,
    RunLocked,
    UsageError,
)


class Listener:
    """Something that listens where an agent would, and answers as it is told."""

    def __init__(self, path: Path, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._socket = address.bind(str(path))
        self.accepted: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.accepted.append(connection)
            try:
                self._answer(connection)
            except OSError:
                pass

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self.accepted:
            connection.close()
        self._thread.join(5)


def http(body: bytes, status: str = "200 OK", *, close: bool = False) -> bytes:
    end = "Connection: close\r\n" if close else ""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{end}\r\n".encode() + body


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Callable[[Callable[[socket.socket], None]], AgentClient]]:
    made: list[Listener] = []
    clients: list[AgentClient] = []

    def start(answer: Callable[[socket.socket], None]) -> AgentClient:
        path = tmp_path / "s"
        made.append(Listener(path, answer))
        clients.append(AgentClient(str(path), 5.0))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    for listener in made:
        listener.close()


Listen = Callable[[Callable[[socket.socket], None]], AgentClient]


def once(answer: bytes) -> Callable[[socket.socket], None]:
    """Read a request, send this, and close."""

    def serve(connection: socket.socket) -> None:
        request = connection.recv(65536)
        if b"Content-Length" in request and request.endswith(b"\r\n\r\n"):
            connection.recv(65536)  # the body comes by itself
        connection.sendall(answer)
        connection.close()

    return serve


def test_a_stopped_agent_is_an_error_by_the_deadline(runtime_dir: Path) -> None:
    path = ensure_agent(20.0)
    with AgentClient(path, 20.0) as client:
        pid = client.call("/status", None, AgentStatus).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(3):  # on a kept connection, and on new ones
                started_s = time.monotonic()
                with pytest.raises(AgentUnavailable, match="did not answer in time") as caught:
                    client.call("/status", None, AgentStatus, timeout_s=0.4)
                assert time.monotonic() - started_s < 1.0
                assert caught.value.details["socket"] == path
            started_s = time.monotonic()
            assert ensure_agent(5.0) == path  # it is there: another one must not be started
            assert time.monotonic() - started_s < 2.0
        finally:
            os.kill(pid, signal.SIGCONT)
        assert client.call("/status", None, AgentStatus).pid == pid


def test_a_slow_answer_is_bounded_as_a_whole(listen: Listen) -> None:
    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(40):  # each byte is in time, all of them are not
            time.sleep(0.05)
            connection.sendall(b"x")

    client = listen(drip)
    started_s = time.monotonic()
    with pytest.raises(AgentUnavailable, match="in time"):
        client.call("/status", None, AgentStatus, timeout_s=0.4)
    assert time.monotonic() - started_s < 1.0


@pytest.mark.usefixtures("runtime_dir")  # where no test before has left one
def test_no_agent_is_an_error_at_once(tmp_path: Path) -> None:
    client = AgentClient(str(tmp_path / "none"), 5.0)
    with pytest.raises(AgentUnavailable, match="does not run"):
        client.call("/status", None, AgentStatus)
    with agent_client(1.0) as other, pytest.raises(AgentUnavailable):
        other.call("/status", None, AgentStatus)


def test_typed_errors_come_through(listen: Listen) -> None:
    wire = WireError("RunLocked", "taken", "nothing", ["wait"], {"owner_pid": 7})
    client = listen(once(http(protocol.encode(wire), "409 Conflict")))
    with pytest.raises(RunLocked) as caught:
        client.call("/v1/runs/r/open", Done(), Done)
    assert caught.value.details == {"owner_pid": 7}
    assert caught.value.actions == ("wait",)


def test_an_agent_of_another_version_is_named(runtime_dir: Path) -> None:
    message = protocol.Open(99, "r", "h", 0, 1, os.getpid(), 1, 1, "", [])
    with AgentClient(ensure_agent(20.0), 20.0) as client, pytest.raises(AgentTooOld) as caught:
        client.call("/v1/runs/r/open", message, protocol.Opened)
    assert caught.value.details["agent_version"] == protocol.PROTOCOL_VERSION
    assert "mtckpt agent stop" in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        http(b"<html>", "500 Oops"),
        http(b"<html>", "200 OK"),
    ],
)
def test_nonsense_is_a_typed_error(listen: Listen, answer: bytes) -> None:
    client = listen(once(answer))
    with pytest.raises((AgentUnavailable, FormatError)):
        client.call("/status", None, AgentStatus)


def test_an_endless_answer_is_cut(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_MESSAGE_BYTES", 100_000)
    client = listen(once(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 3_000_000))
    with pytest.raises(AgentUnavailable, match="larger than any"):
        client.call("/status", None, AgentStatus)


def test_an_idle_connection_that_was_closed_is_replaced(listen: Listen) -> None:
    client = listen(once(http(b"{}")))  # says keep-alive, and closes
    for _ in range(5):
        assert client.call("/x", Done(), Done) == Done()


def test_connections_are_kept(listen: Listen) -> None:
    count = 0

    def serve(connection: socket.socket) -> None:
        nonlocal count
        count += 1
        while connection.recv(65536):
            connection.sendall(http(b"{}"))

    client = listen(serve)
    for _ in range(20):
        client.call("/x", Done(), Done)
    client.close()
    assert count == 1


def test_many_threads_share_a_client(runtime_dir: Path) -> None:
    pids: list[int] = []
    with AgentClient(ensure_agent(20.0), 20.0) as client:

        def ask() -> None:
            for _ in range(10):
                pids.append(client.call("/status", None, AgentStatus).pid)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(pids) == 80
    assert len(set(pids)) == 1


def test_a_fork_does_not_speak_on_its_parents_connection(listen: Listen) -> None:
    served: list[int] = []

    def serve(connection: socket.socket) -> None:
        served.append(address.peer_of(connection).pid)
        connection.settimeout(5)
        if connection.recv(65536):
            connection.sendall(http(b"{}"))
        if len(served) == 1:
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(65536):
                connection.sendall(http(b'{"detail":"the parent\'s"}'))

    client = listen(serve)
    client.call("/x", Done(), Done)
    # The child is a program of its own in every respect but its memory.
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if client.call("/x", Done(), Done) == Done() else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert served == [os.getpid(), pid]


def test_paths_are_quoted(runtime_dir: Path) -> None:
    client = AgentClient(ensure_agent(20.0), 20.0)
    with client, pytest.raises((UsageError, AgentUnavailable)):
        client.call("/v1/runs/a b\r\nX: y/flush", protocol.Flush("h"), Done)


LISTEN_AS = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777); s.listen()
print("ready", flush=True)
c, _ = s.accept()
print("got", c.recv(100), flush=True)
"""


@pytest.mark.root
def test_nothing_is_sent_to_a_stranger(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = runtime_dir / "shared"
    home.mkdir()
    home.chmod(0o777)
    runtime_dir.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN_AS, str(home / "agent.sock")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        client = AgentClient(str(home / "agent.sock"), 5.0)
        with pytest.raises(AccessDenied, match="belongs to user 65534"):
            client.call("/status", None, AgentStatus)
        assert process.stdout.readline() == "got b''\n"
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
    # The owner of a directory that only it can write is a service, and trusted.
    os.chown(home, 65534, 65534)
    home.chmod(0o755)
    assert 65534 in address.trusted_uids(str(home / "agent.sock"))
    # Not where this user's own agent would be: in /tmp, anybody can make that directory first.
    monkeypatch.delenv("MTCKPT_RUNTIME_DIR")
    assert 65534 not in address.trusted_uids(str(home / "agent.sock"))
    (home / "runs.json").write_text('[{"run": "r", "tiers": []}]')
    assert [each.run for each in known_runs.read(str(home))] == ["r"]
    os.chown(home / "runs.json", 65534, 65534)
    assert known_runs.read(str(home)) == []
