"""Canaries as credentials, through every way in which a store can fail: nothing shows them.

Errors with their causes, logs at the loudest level, every file of the run and of the agent, what
the agent says of itself, and the list of processes are read in whole. ``tiers`` has the same for
single calls of a tier.
"""

from __future__ import annotations

import logging
import os
import stat
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import ram_root
from click.testing import CliRunner
from fault_proxy import Fault, FaultProxy

import mtckpt
from mtckpt.agent.client import AgentClient
from mtckpt.agent.spawn import ensure_agent
from mtckpt.cli import main
from mtckpt.errors import CheckpointError, TierError, UsageError
from mtckpt.tiers import ObjectStoreTier

pytestmark = pytest.mark.timeout(90)

CANARY = "canary" + os.urandom(12).hex()
KEYS = {"key": CANARY, "secret": CANARY, "token": CANARY}
# A token of GCS is not looked up, whatever a variable holds is as secret as an option, and what a
# command finds here is no other identity.
ENVIRONMENT = {
    "FETCH_RAW_TOKEN_EXPIRY": "false",
    "MTCKPT_LOG_LEVEL": "DEBUG",
    "AWS_ACCESS_KEY_ID": CANARY,
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "AWS_SESSION_TOKEN": CANARY,
    "AWS_EC2_METADATA_DISABLED": "true",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_GCE_CHECK": "true",
}


def shown_by(error: BaseException) -> str:
    """All that a person or a log could see of an error."""
    seen: list[str] = []
    while error is not None:
        seen += [*traceback.format_exception(error), repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "".join(seen)


@pytest.mark.parametrize(
    ("url", "options", "kind"),
    [
        (f"s3://user:{CANARY}@bucket/x", {}, UsageError),
        (f"s3://bucket/x?token={CANARY}", {}, UsageError),
        (f"file:///nowhere/x?sig={CANARY}#{CANARY}", {}, UsageError),
        ("s3://bucket/x", {"sekret": CANARY}, UsageError),
        ("s3://bucket/x", {**KEYS, "endpoint_url": f"http://u:{CANARY}@127.0.0.1:9"}, TierError),
        ("s3://bucket/x", {**KEYS, "endpoint_url": CANARY}, TierError),
        ("gs://bucket/x", {"token": f"/nowhere/{CANARY}.json"}, TierError),
        ("gs://bucket/x", {"token": {"type": "service_account", "private_key": CANARY}}, TierError),
        ("gs://bucket/x", {"token": {"refresh_token": CANARY, "client_id": CANARY}}, TierError),
        ("az://container/x", {"account_key": CANARY}, UsageError),
        ("ftp://127.0.0.1/x", {"port": 9, "username": "u", "password": CANARY}, TierError),
        ("github://org:repo@main/x", {"username": "u", "token": CANARY}, CheckpointError),
        ("nowhere://bucket/x", {"secret": CANARY}, UsageError),
    ],
    ids=[f"way {number}" for number in range(1, 14)],
)
def test_what_cannot_be_opened_shows_nothing(
    url: str,
    options: dict[str, Any],
    kind: type[CheckpointError],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(kind) as raised:
        tier = ObjectStoreTier(url, storage_options=options, timeout_s=0.3, stall_s=0.2)
        assert CANARY not in repr(tier)
        tier.stat("a")
    assert CANARY not in shown_by(raised.value)
    assert CANARY not in caplog.text


@pytest.mark.parametrize(
    "store",
    [
        "s3 obstore",
        pytest.param("s3 fsspec", marks=pytest.mark.torture),
        pytest.param("gs auto", marks=pytest.mark.torture),
    ],
)
def test_a_run_whose_store_refuses_shows_nothing(
    store: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    runtime_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme, _, engine = store.partition(" ")
    server: Any = request.getfixturevalue("gcs" if scheme == "gs" else "s3")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    with FaultProxy(server.url) as proxy:
        proxy.set(Fault("answer", times=None, status=403, code="AccessDenied"))
        given = {"token": CANARY, "project": "test"} if scheme == "gs" else KEYS
        options = {**server.options, **given, "endpoint_url": proxy.url}
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        url = f"{scheme}://{server.new_prefix()}"
        tiers = [
            mtckpt.Ram(every=1),
            mtckpt.ObjectStore(url, storage_options=options, engine=engine),  # type: ignore[arg-type]
        ]
        run = mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)
        shown += [repr(run), repr(tiers)]
        save = run.save(1, {"w": np.zeros(10, np.float32)})
        for call in (
            lambda: save.wait("durable", timeout_s=30),
            lambda: run.save(2, {"w": np.zeros(10, np.float32)}),
            lambda: run.close(timeout_s=20),
        ):
            with pytest.raises(CheckpointError) as raised:
                call()
            shown.append(shown_by(raised.value))
        shown += [repr(save), repr(save.exception())]
        with AgentClient(ensure_agent(20.0), 20.0) as client:
            shown += [client.text(p) for p in ("/status", "/metrics", "/events?follow=0")]
        for words in (["status"], ["status", "--json"], ["ls", url], ["doctor", "--json"]):
            result = CliRunner().invoke(main, words)
            shown += [result.output, repr(result.exception)]
        assert "AccessDenied" in "".join(shown)
        shown += [text.decode(errors="replace") for text in command_lines()]
        places = [runtime_dir, ram_root(), tmp_path]
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        assert (runtime_dir / "agent.log") in files
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
            shown.append(path.read_bytes().decode("latin1"))
    assert CANARY not in "".join(shown) + caplog.text


def command_lines() -> Iterator[bytes]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it has ended
