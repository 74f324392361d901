"""Runs whose last tier is an object store, end to end: a real agent, real files, a real store."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import agent_pid, ram_root, until
from stores import GcsServer, S3Server

import mtckpt
from mtckpt import _access, _run
from mtckpt.errors import (
    AccessDenied,
    CloseFailed,
    RestoreUnavailable,
    SaveFailed,
    TierUnavailable,
    UsageError,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


@pytest.fixture(params=["file", "s3 by options", "s3 by environment"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Arguments of ObjectStore."""
    if request.param == "file":
        return {"url": f"file://{tmp_path}/store"}
    server: S3Server = request.getfixturevalue("s3")
    url = f"s3://{server.new_prefix()}"
    if request.param == "s3 by options":
        return {"url": url, "storage_options": server.options}
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return {"url": url}


def open_run(
    tmp_path: Path, store: dict[str, Any], run: str = "r", **settings: Any
) -> mtckpt.Checkpointer:
    tiers = settings.pop("tiers", None) or [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1),
        mtckpt.ObjectStore(**{"every": 2, **store}),
    ]
    return mtckpt.Checkpointer(run, tiers, timeout_s=20, max_stall_s=10, **settings)


def file_store(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    return {"url": f"file://{tmp_path}/store", "every": 1, **settings}


def steps_at(url: str) -> list[int]:
    with contextlib.suppress(UsageError):  # no directory yet
        return [step.step for step in mtckpt.steps(url)]
    return []


def make_state(fill: float = 0.0) -> dict[str, Any]:
    return {"w": np.full((300, 7), fill, np.float32), "n": np.zeros((), np.int64), "note": "x"}


def wipe_local(tmp_path: Path) -> None:
    """The agent may be deleting there by its rules, just now."""

    def is_gone() -> bool:
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        return not (tmp_path / "disk").exists()

    until(is_gone)


def test_everything_local_is_wiped_and_the_store_resumes(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    with open_run(tmp_path, store) as checkpointer:
        assert not checkpointer.restore(make_state())
        save = checkpointer.save(2, make_state(2.0))
        save.wait("durable", timeout_s=20)
        assert "durable" in save.reached
        # A file system lets the second of two writers win, if they come at the same moment.
        assert ("durable (weak)" in repr(save)) == store["url"].startswith("file:")
        checkpointer.save(3, make_state(3.0)).wait("local", timeout_s=20)
    wipe_local(tmp_path)
    with open_run(tmp_path, store) as checkpointer:
        state = make_state()
        restored = checkpointer.restore(state)
        assert restored.step == 3  # close() sent the newest step, though it was not due
        assert list(restored.sources) == ["store"]
        assert (state["w"] == 3.0).all()
        assert [step.step for step in checkpointer.steps()] == [2, 3]
        until(lambda: steps_at(str(tmp_path / "disk")) == [3])  # filled on the way
        state["w"][:] = 0.0
        again = checkpointer.restore(state)
        assert (again.step, list(again.sources)) == (3, ["ram"])
        assert (state["w"] == 3.0).all()
        for step in range(4, 9):  # what was fetched is recycled like any other slot
            checkpointer.save(step, make_state(step)).wait("staged", timeout_s=20)
    with open_run(tmp_path, store, "tuned") as checkpointer:
        state = make_state()
        warm = checkpointer.restore(state, source=f"{store['url']}/r", step=3)
        assert (warm.step, list(warm.sources)) == (3, ["store"])
        assert (state["w"] == 3.0).all()


def test_no_secret_is_left_anywhere(
    tmp_path: Path, runtime_dir: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of the run, the agent's log and configuration, process list, repr: nothing has it."""
    caplog.set_level("DEBUG")
    store: dict[str, Any] = {"url": f"s3://{s3.new_prefix()}", "storage_options": s3.options}
    shown = [repr(mtckpt.ObjectStore(**store))]
    with open_run(tmp_path, store) as checkpointer:
        checkpointer.save(2, make_state(2.0)).wait("durable", timeout_s=20)
        shown += [repr(checkpointer.status()), repr(checkpointer._session.tiers)]
        shown += [text.decode(errors="replace") for text in command_lines()]
        places = [runtime_dir, Path(ram_root()), tmp_path]
        shown += [p.read_bytes().decode("latin1") for place in places for p in files(place)]
    shown.append(caplog.text)
    assert any("gpt" in text or "store" in text for text in shown)
    assert not [text for text in shown if s3.secret in text]


def files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())


def command_lines() -> Iterator[bytes]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it has ended


def test_new_credentials_need_no_new_agent(tmp_path: Path, s3: S3Server) -> None:
    """The wrong ones are told to the loop; the next Checkpointer brings others."""
    url = f"s3://{s3.new_prefix()}"
    wrong = {"url": url, "every": 1, "storage_options": {**s3.options, "secret": "not-it-at-all"}}
    run = open_run(tmp_path, wrong)
    save = run.save(1, make_state(1.0))
    with pytest.raises(SaveFailed) as raised:
        save.wait("durable", timeout_s=20)
    assert isinstance(raised.value.__cause__, AccessDenied)
    assert "not-it-at-all" not in str(raised.value) + str(raised.value.__cause__)
    with pytest.raises(CloseFailed):
        run.close(timeout_s=20)
    agent, processes = agent_pid(), store_processes()
    assert processes
    with open_run(tmp_path, {**wrong, "storage_options": s3.options}) as run:
        assert run.restore(make_state()).step == 1
        run.save(2, make_state(2.0)).wait("durable", timeout_s=20)
        assert agent_pid() == agent
        until(lambda: not processes & store_processes())


def store_processes() -> set[int]:
    """Data processes that can speak to a store over a network."""
    found = set()
    for path in Path(f"/proc/{agent_pid()}/task").glob("*/children"):
        pids: list[str] = []
        with contextlib.suppress(OSError):  # threads and processes end while this looks
            pids = path.read_text().split()
        for pid in pids:
            with contextlib.suppress(OSError):
                if "botocore" in open_files(pid) or "_ssl." in open_files(pid):
                    found.add(int(pid))
    return found


def open_files(pid: str) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_step_of_this_node_does_not_wait_for_a_silent_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "_STORE_PATIENCE_S", 0.5)
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9"}
    store = mtckpt.ObjectStore("s3://bucket/x", storage_options=options)
    disk = mtckpt.Disk(tmp_path / "disk")
    with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), disk], timeout_s=20) as run:
        run.save(1, make_state(1.0)).wait("local", timeout_s=20)
    run = mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), disk, store], timeout_s=50)
    restored = run.restore(make_state())
    assert restored.step == 1
    assert "did not answer within 0.5 s" in restored.skipped["tier store"]
    run.close(timeout_s=1)


def test_what_is_sent_keeps_within_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTCKPT_STORE_BYTES_PER_S", str(8 << 20))
    with open_run(tmp_path, file_store(tmp_path)) as run:
        started_s = time.monotonic()
        save = run.save(1, {"w": np.zeros(24 << 20, np.uint8)})
        save.wait("durable", timeout_s=20)
        assert time.monotonic() - started_s > 0.9  # all but a part's worth, which goes at once


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    wrong = (
        "bucket/x",
        "s3://",
        "s3://key:hush@bucket/x",
        "s3://bucket/x?token=hush",
        "k:hush@b?hush",
        "",
    )
    # The agent has another working directory and another home, and memory: ends with its process.
    for url in (*wrong, "file://there/x", "file://~/x", "local://x", "memory://x"):
        with pytest.raises(UsageError) as raised:
            mtckpt.ObjectStore(url)
        assert "hush" not in str(raised.value)
    twice = [mtckpt.Disk(tmp_path / "d"), mtckpt.ObjectStore(f"file://{tmp_path}/d", every=2)]
    with pytest.raises(UsageError, match="one directory"):
        open_run(tmp_path, {}, tiers=twice)
    with pytest.raises(UsageError, match="engine"):
        mtckpt.ObjectStore("s3://b/x", engine="curl")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"storage_options\['session'\] is a object") as raised:
        mtckpt.ObjectStore("s3://b/x", storage_options={"session": object()})
    with pytest.raises(UsageError, match="first tier needs steps"):
        open_run(tmp_path, {}, tiers=[mtckpt.ObjectStore("s3://b/x", every="1h")])


def test_a_silent_store_is_no_fresh_start(tmp_path: Path) -> None:
    """Nobody else has a step: it could be there."""
    options = {"key": "k", "secret": "hush-hush", "endpoint_url": "http://127.0.0.1:9"}
    store = mtckpt.ObjectStore("s3://bucket/x", storage_options=options)
    run = mtckpt.Checkpointer("r", [mtckpt.Ram(every=1), store], timeout_s=3)
    run._session.timeout_s = 30.0  # it is the store that has only so long
    state = make_state(1.0)
    with pytest.raises(RestoreUnavailable, match="store") as raised:
        run.restore(state)
    assert "hush-hush" not in str(raised.value)
    assert (state["w"] == 1.0).all()
    run.close(timeout_s=1)


def test_the_store_of_a_source_is_not_taken_for_the_runs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = file_store(tmp_path), file_store(tmp_path, url=f"file://{tmp_path}/other")
    for store, run, step in ((own, "tuned", 7), (other, "base", 3)):
        with open_run(tmp_path, store, run, tiers=[mtckpt.ObjectStore(**store)]) as checkpointer:
            checkpointer.save(step, make_state(step)).wait("durable", timeout_s=20)

    def refused(url: str, *args: Any, **more: Any) -> Any:
        if url == own["url"]:
            raise TierUnavailable("not now", tier="store")
        return _access.open_store(url, *args, **more)

    with open_run(tmp_path, own, "tuned", tiers=[mtckpt.ObjectStore(**own)]) as checkpointer:
        monkeypatch.setattr(_run, "open_store", refused)
        assert checkpointer.restore(make_state(), source=f"{other['url']}/base").step == 3
        monkeypatch.undo()
        assert [step.step for step in checkpointer.steps()] == [7]


def connections_to(port: int) -> int:
    """How many this process has open."""
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            own.add(os.readlink(f"/proc/self/fd/{fd}"))
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(w[2].endswith(f":{port:04X}") and f"socket:[{w[9]}]" in own for w in lines)


def test_a_closed_run_leaves_no_connection_open(
    tmp_path: Path, gcs: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in gcs.environment.items():
        monkeypatch.setenv(name, value)
    port = int(gcs.url.rpartition(":")[2])
    before = connections_to(port)
    run = open_run(tmp_path, {"url": f"gs://{gcs.new_prefix()}", "every": 1})
    assert not run.restore(make_state())
    run.save(1, make_state(1.0)).wait("durable", timeout_s=20)
    assert connections_to(port) > before
    run.close()
    assert connections_to(port) <= before
    left = open_run(tmp_path, {"url": f"gs://{gcs.new_prefix()}", "every": 1})
    assert left.restore(make_state())
    assert connections_to(port) > before
    with open_run(tmp_path, {"url": f"gs://{gcs.new_prefix()}", "every": 1}):
        assert connections_to(port) <= before  # it is the older one's turn no more
