"""The agent over HTTP: curl works, strangers and nonsense do not, and neither ends it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeTrainer, disk

from mtckpt._events import EventStream
from mtckpt.agent import address, protocol, status
from mtckpt.agent.client import AgentClient
from mtckpt.agent.pool import Pool
from mtckpt.agent.protocol import AgentStatus, Done
from mtckpt.agent.queue import Limits
from mtckpt.agent.registry import Registry
from mtckpt.agent.server import AgentServer
from mtckpt.agent.spawn import ensure_agent
from mtckpt.agent.tools import Tools
from mtckpt.agent.verbs import Verbs
from mtckpt.errors import AgentUnavailable, CheckpointError, FormatError, UsageError


@pytest.fixture
def client(runtime_dir: Path) -> Iterator[AgentClient]:
    with AgentClient(ensure_agent(20.0), 20.0) as made:
        made.call("/status", None, AgentStatus)
        yield made


def curl(client: AgentClient, path: str, *options: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    command = ["curl", "-sS", "--unix-socket", client.socket_path, *options, f"http://agent{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout


def raw(client: AgentClient, data: bytes, timeout_s: float = 5.0) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(client.socket_path)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except (ConnectionResetError, TimeoutError):
            pass
        return found


def test_curl_reads_the_status(client: AgentClient, tmp_path: Path) -> None:
    trainer = FakeTrainer("curl run", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin()
    trainer.save(10, ["disk"])
    trainer.wait_stage(10, "local")
    found = json.loads(curl(client, "/status"))
    assert found["version"] == protocol.PROTOCOL_VERSION
    (run,) = found["runs"]
    assert (run["run"], run["owner_pid"], run["owner_alive"]) == ("curl run", os.getpid(), True)
    tiers = {tier["label"]: tier for tier in run["tiers"]}
    assert tiers["ram"]["steps"] == tiers["disk"]["steps"] == [10]
    assert tiers["disk"]["size_bytes"] == trainer.layout.size_bytes
    assert tiers["disk"]["owed"] == []
    trainer.close()


def test_events_are_lines_and_follow(client: AgentClient, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    process = subprocess.Popen(
        ["curl", "-sSN", "--unix-socket", client.socket_path, "http://agent/events"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline())["name"] == "agent.started"
        # Nothing happens, and whoever listens sees that the agent is there: twice, at least.
        for _ in range(2):
            alive = json.loads(process.stdout.readline())
            assert alive["name"] == "alive"
            assert alive["time"] > 0
        trainer = FakeTrainer("r", [disk(tmp_path / "d")])
        trainer.open()
        trainer.begin()
        trainer.save(5, ["disk"])
        names = []
        while "save.flushed" not in names:
            event = json.loads(process.stdout.readline())
            if event["name"] == "alive":
                continue
            names.append(event["name"])
            assert event["seq"] > 0
        assert "run.opened" in names
        assert names.index("save.staged") < names.index("save.flushed")
        assert event["tier"] == "disk"
        assert event["step"] == 5
        trainer.close()
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
    lines = client.text("/events?follow=0").splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))


def test_metrics_have_base_units_and_labels(client: AgentClient, tmp_path: Path) -> None:
    trainer = FakeTrainer("m", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin()
    trainer.save(7, ["disk"])
    trainer.wait_stage(7, "local")
    text = client.text("/metrics")
    assert "mtckpt_save_staged_total 1.0" in text
    assert f'mtckpt_bytes_total{{tier="ram"}} {float(trainer.layout.size_bytes)}' in text
    assert 'mtckpt_owed{run="m",tier="disk"} 0.0' in text
    assert 'mtckpt_newest_step{run="m",tier="disk"} 7.0' in text
    assert 'mtckpt_newest_step_age_seconds{run="m",tier="ram"}' in text
    assert "text/plain" in curl(client, "/metrics", "-o", "/dev/null", "-w", "%{content_type}")
    trainer.close()


def test_metrics_without_the_package_say_what_to_install(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    with AgentClient(ensure_agent(20.0), 20.0) as client:
        with pytest.raises(UsageError, match="prometheus-client") as caught:
            client.text("/metrics")
        assert "mtckpt[metrics]" in str(caught.value)
        assert curl(client, "/metrics", "-o", "/dev/null", "-w", "%{http_code}") == "501"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 5000,
        b"GET",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
        b"POST /v1/runs/r/open HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{}",
        b"POST /v1/runs/r/open HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/runs/r/open HTTP/1.1\r\nHost: x\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nfffffff0\r\n",
        b"POST /v1/runs/r/open HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n[[[[[",
        b"GET /v1/runs/../../etc/changes?since=x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/runs/%00/changes HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x80\x80\x80\x80 pickle \x80\x04.",
    ],
)
def test_nonsense_never_ends_it(client: AgentClient, data: bytes) -> None:
    pid = client.call("/status", None, AgentStatus).pid
    answer = raw(client, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.")
    assert b"200 OK" not in answer
    assert client.call("/status", None, AgentStatus).pid == pid


@pytest.mark.parametrize("verb", ["open", "incarnation", "slots", "seal", "close", "rm", "flush"])
def test_a_message_that_does_not_parse_is_refused(client: AgentClient, verb: str) -> None:
    with pytest.raises(FormatError):
        client.call(f"/v1/runs/r/{verb}", ["not", "it"], Done)


def test_unknown_verbs_and_runs(client: AgentClient) -> None:
    with pytest.raises(UsageError, match="Not Found"):
        client.call("/v1/runs/r/dance", Done(), Done)
    with pytest.raises(AgentUnavailable, match="does not know the run"):
        client.call("/v1/runs/r/flush", protocol.Flush("h"), Done)
    # An answer that was lost: there is nothing left to close then.
    said = client.call("/v1/runs/r/close", protocol.Close("h", free_ram=True), Done)
    assert said.detail == "was closed before"
    with pytest.raises(UsageError, match="name and its key differ"):
        message = protocol.Open(1, "other", "h", 0, 1, 1, 1, 1, "", [])
        client.call("/v1/runs/r/open", message, protocol.Opened)


def test_a_ram_path_is_absolute_and_a_tier_known(client: AgentClient) -> None:
    message = protocol.Open(1, "r", "h", 0, 1, 1, 1, 1, "relative/dir", [])
    with pytest.raises(UsageError, match="absolute"):
        client.call("/v1/runs/r/open", message, protocol.Opened)
    tape = protocol.TierConfig("tape", "tape", "/x")
    message = protocol.Open(1, "r", "h", 0, 1, 1, 1, 1, protocol.ram_base(), [tape])
    with pytest.raises(UsageError, match="'tape'"):
        client.call("/v1/runs/r/open", message, protocol.Opened)


def test_connections_are_capped(client: AgentClient) -> None:
    opened: list[socket.socket] = []
    try:
        for _ in range(600):
            connection = socket.socket(socket.AF_UNIX)
            opened.append(connection)
            connection.connect(client.socket_path)  # waits while the backlog is full
            connection.settimeout(2)
        refused = 0
        for connection in opened[-20:]:
            try:
                connection.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
                refused += connection.recv(10) == b""
            except OSError:
                refused += 1
        assert refused == 20
        # Whoever was connected before is still served.
        opened[0].sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert opened[0].recv(12) == b"HTTP/1.1 200"
    finally:
        for connection in opened:
            connection.close()
    time.sleep(0.1)
    assert client.call("/status", None, AgentStatus).pid


CONNECT = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(5)
try:
    s.connect(sys.argv[1])
    s.sendall(b"GET /status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    print(s.recv(100))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.root
def test_another_user_is_refused(client: AgentClient, runtime_dir: Path) -> None:
    def ask() -> str:
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c",
             CONNECT, client.socket_path],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert ask() == "PermissionError"  # the directory
    runtime_dir.chmod(0o755)
    os.chmod(client.socket_path, 0o666)
    assert ask() in ("b''", "ConnectionResetError", "BrokenPipeError")  # and its credentials
    assert client.call("/status", None, AgentStatus).pid


def test_stop_and_drain(client: AgentClient, tmp_path: Path, ram_dir: Path) -> None:
    trainer = FakeTrainer("r", [disk(tmp_path / "d")])
    trainer.open()
    trainer.begin()
    trainer.save(3, ["disk"])
    pid = trainer.status().pid
    assert client.call("/v1/stop", protocol.Stop(drain=True, timeout_s=10.0), Done) == Done()
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert list((tmp_path / "d" / "r").glob("step-*/rank-00000.json"))
    assert not Path(client.socket_path).exists()
    opened = trainer.open()  # the next agent goes on with what is there
    assert opened.pid != pid
    assert trainer.run_status().tiers[0].steps == [3]
    trainer.close()


def test_a_second_service_in_the_same_place_is_refused(
    client: AgentClient, runtime_dir: Path
) -> None:
    from mtckpt.agent.life import run_service

    before = os.umask(0o022)
    try:
        with pytest.raises(AgentUnavailable, match="serves here already"):
            run_service(str(runtime_dir))
        assert os.umask(0o022) == 0o022  # it is the caller's
    finally:
        os.umask(before)


def service(runtime_dir: Path, *arguments: Any, **environment: str) -> subprocess.Popen[bytes]:
    text = "import sys; from mtckpt.agent.life import run_service; sys.exit(run_service(*{!r}))"
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", text.format(arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_a_service_runs_in_the_foreground_until_it_is_ended(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = service(runtime_dir, str(runtime_dir), MTCKPT_AGENT_IDLE_S="0.2")
    try:
        path = runtime_dir / protocol.SOCKET_NAME
        deadline_s = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        monkeypatch.setenv("MTCKPT_AGENT_SOCKET", str(path))
        with AgentClient(ensure_agent(10.0), 10.0) as client:
            assert client.call("/status", None, AgentStatus).pid == process.pid
            time.sleep(1.0)  # an own agent would have left
            assert client.call("/status", None, AgentStatus).pid == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(
    ("cgroup", "names"),
    [
        ("/kubepods/burstable/pod12", "Kubernetes pod"),
        ("/system.slice/docker-abc.scope", "container"),
        ("/slurm/uid_0/job_77/step_0/task_0", "Slurm job 77, step 0"),
        ("/system.slice/mtckpt-agent.service", "service mtckpt-agent.service"),
        ("/user.slice/user-4242.slice/session-3.scope", "login session of user 4242"),
        ("/user.slice/user-4242.slice/user@4242.service/app.slice/x.scope", "login session"),
    ],
)
def test_what_bounds_its_life_is_said(
    cgroup: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: p != "/.dockerenv" and exists(p))
    for name in ("KUBERNETES_SERVICE_HOST", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert names in status.bounded_by(cgroup)
    assert status.bounded_by("/") == ""


def test_every_error_has_a_status() -> None:
    from mtckpt.agent.serving import http_status

    assert http_status(CheckpointError("x")) == 500
    assert http_status(UsageError("x")) == 400


def test_it_is_healthy_before_it_is_ready(tmp_path: Path) -> None:
    """An agent that has not read what was left is neither replaced nor sent trainers."""
    found = []

    def ask(path: str) -> str:
        with AgentClient(str(tmp_path / "s"), 5.0) as client:
            try:
                return client.call(path, None, Done).detail
            except AgentUnavailable as error:
                return error.what

    async def serve() -> None:
        pool = Pool()
        registry = Registry(Tools(pool, Limits(), EventStream()), str(tmp_path), service=False)
        server = AgentServer(registry, Verbs(registry))
        await server.start(address.bind(str(tmp_path / "s"), 0o600))
        for is_ready in (False, True):
            if is_ready:
                await registry.start()
            found.extend([await asyncio.to_thread(ask, path) for path in ("/healthz", "/readyz")])
        await registry.stop(5.0)
        await server.stop()
        await pool.close()
        await registry.held.close()

    asyncio.run(serve())
    waiting = "the agent is still reading what an earlier one left"
    assert found == ["it answers", waiting, "it answers", "it is ready"]
