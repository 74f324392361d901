"""What a store keeps, and what it gets when it was away: rules, backlog, best steps, prune."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import status_of, until
from builders import build_manifest, build_save
from click.testing import CliRunner, Result
from stores import S3Server

import mtckpt
from mtckpt import _commit, _inventory, _manifest
from mtckpt._manifest import SaveName
from mtckpt.agent.queue import MAX_BACKLOG, SaveFacts, backlog, pick_flush
from mtckpt.cli import main
from mtckpt.errors import RestoreUnavailable
from mtckpt.tiers import ObjectStoreTier

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]

ARRAYS: dict[str, Any] = {"w": np.arange(1000, dtype=np.float32)}


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTCKPT_DELETE_GRACE_S", "0.01")


def open_run(tmp_path: Path, *, disk_keep: Any = 3, **store: Any) -> mtckpt.Checkpointer:
    tiers = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1, keep=disk_keep),
        mtckpt.ObjectStore(f"file://{tmp_path}/store", **{"every": 1, **store}),
    ]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def state(fill: float) -> dict[str, Any]:
    return {"w": np.full(1000, fill, np.float32)}


def steps_at(root: Path) -> list[int]:
    return [step.step for step in mtckpt.steps(root)] if root.exists() else []


def counter(run: mtckpt.Checkpointer, name: str) -> int:
    return run.status().counters.get(name, 0)


# -- rules -----------------------------------------------------------------------------------------


def test_nothing_is_deleted_from_a_store_unless_keep_is_given(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for step in range(1, 6):
            run.save(step, state(step)).wait("durable", timeout_s=20)
        until(lambda: steps_at(tmp_path / "disk") == [3, 4, 5])
    assert steps_at(tmp_path / "store") == [1, 2, 3, 4, 5]


def test_a_rule_lets_steps_go_markers_and_all(tmp_path: Path) -> None:
    with open_run(tmp_path, keep=[mtckpt.KeepLast(2), mtckpt.KeepEvery(3)]) as run:
        for step in range(1, 8):
            run.save(step, state(step)).wait("durable", timeout_s=20)
            until(lambda: not run.status().tiers[2]["owed"])
        until(lambda: steps_at(tmp_path / "store") == [1, 3, 6, 7])
        until(lambda: len(list((tmp_path / "store/r").glob("step-*/*.safetensors"))) == 4)
    markers = sorted(path.name for path in (tmp_path / "store/r/commit").iterdir())
    assert markers == [f"{step:012d}.000001" for step in (1, 3, 6, 7)]


def test_readers_of_what_goes_keep_no_job_from_its_end(
    tmp_path: Path, ram_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Records have gone and data goes in a minute: memory is free before, and nothing is warned."""
    monkeypatch.setenv("MTCKPT_DELETE_GRACE_S", "60")
    shards = tmp_path / "store/r"
    with open_run(tmp_path, keep=2) as run:
        for step in range(1, 5):
            run.save(step, state(step)).wait("durable", timeout_s=20)
        until(lambda: steps_at(tmp_path / "store") != [1, 2, 3, 4])
    assert "not free yet" not in caplog.text
    assert not list(ram_dir.rglob("*.safetensors"))
    assert len(list(shards.glob("step-*/*.safetensors"))) == 4
    with open_run(tmp_path, keep=2) as run:
        restored = run.restore(state(0))
        assert (restored.step, list(restored.sources)) == (4, ["disk"])
        run.save(5, state(5)).wait("durable", timeout_s=20)


def test_the_best_step_goes_to_the_store_though_it_is_not_due(tmp_path: Path) -> None:
    keep = [mtckpt.KeepLast(2), mtckpt.KeepBest(1, "loss")]
    with open_run(tmp_path, every=1000, keep=keep) as run:
        run.save(1, state(1), metrics={"loss": 3.0}).wait("local", timeout_s=20)
        until(lambda: steps_at(tmp_path / "store") == [1])
        run.save(2, state(2), metrics={"loss": 5.0}).wait("local", timeout_s=20)
        run.save(3, state(3)).wait("local", timeout_s=20)
        run.report(3, {"loss": 1.0})
        until(lambda: steps_at(tmp_path / "store") == [1, 3])
        assert counter(run, "failed") == 0


def test_what_comes_to_be_wanted_while_it_is_let_go_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1 is let go, and is the best one before its time is over: it is brought there again."""
    monkeypatch.setenv("MTCKPT_DELETE_GRACE_S", "3")
    keep = [mtckpt.KeepLast(2), mtckpt.KeepBest(1, "loss")]
    with open_run(tmp_path, disk_keep=None, keep=keep) as run:
        for step in (1, 2, 3):
            run.save(step, state(step)).wait("durable", timeout_s=20)
        until(lambda: steps_at(tmp_path / "store") == [2, 3])
        (shard,) = (tmp_path / "store").glob("r/step-000000000001.*/*.safetensors")
        run.report(1, {"loss": 1.0})
        until(lambda: steps_at(tmp_path / "store") == [1, 2, 3])
        before = shard.stat().st_ino, shard.stat().st_mtime_ns
    until(lambda: status_of() is None)  # nothing is under way any more
    assert (
        shard.stat().st_ino,
        shard.stat().st_mtime_ns,
    ) == before  # it was not deleted, and brought there once more
    assert steps_at(tmp_path / "store") == [1, 2, 3]
    with mtckpt.load(f"file://{tmp_path}/store", step=1) as checkpoint:
        assert (checkpoint["w"] == 1).all()


# -- backlog ---------------------------------------------------------------------------------------


def facts(count: int, **more: Any) -> list[SaveFacts]:
    return [
        SaveFacts(str(i), (1, i), staged=True, owed=frozenset({"store"}), **more)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "wanted", "kept"),
    [
        (0, set(), []),
        (1, set(), ["0"]),
        (9, set(), ["8"]),
        (9, {"2", "5"}, ["8", "5", "2"]),
        (9, set("012345678"), ["8", "7", "6", "5"]),
        (9, {"8"}, ["8"]),
    ],
)
def test_a_backlog_is_bounded(count: int, wanted: set[str], kept: list[str]) -> None:
    saves = facts(count)
    assert backlog("store", saves, wanted) == kept
    assert len(kept) <= MAX_BACKLOG
    pick = pick_flush("store", saves, wanted)
    if not kept:
        assert pick is None
        return
    assert pick is not None
    assert pick.name == kept[0]
    assert set(pick.superseded) == {save.name for save in saves} - set(kept)


def test_what_is_being_written_is_never_superseded() -> None:
    assert pick_flush("store", facts(3, writing=frozenset({"store"})), {"0"}) is None


class Line:
    """What lies between the agent and a server: it can be cut, and mended."""

    def __init__(self, url: str) -> None:
        host, _, port = url.partition("://")[2].partition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.cut()

    def cut(self) -> None:
        self._listener.close()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                here = listener.accept()[0]
                there = socket.create_connection(self._server)
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with source, target, contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


def test_a_store_that_was_away_gets_the_newest_and_what_it_keeps(
    tmp_path: Path, s3: S3Server
) -> None:
    """Training and the disk go on meanwhile; the disk holds on to a few steps more than its own."""
    line = Line(s3.url)
    options = {**s3.options, "endpoint_url": line.url}
    url = f"s3://{s3.new_prefix()}"
    keep = [mtckpt.KeepLast(2), mtckpt.KeepEvery(4)]
    tiers = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1, keep=2),
        mtckpt.ObjectStore(url, every=1, keep=keep, storage_options=options),
    ]
    with mtckpt.Checkpointer("r", tiers, timeout_s=3, max_stall_s=10) as run:
        run._session.timeout_s = 20.0  # what is short is the patience with the store
        for step in range(1, 13):
            save = run.save(step, state(step))
            save.wait("local", timeout_s=20)
        assert "durable" not in save.reached
        until(lambda: len(steps_at(tmp_path / "disk")) <= 2 + MAX_BACKLOG)
        line.mend()
        save.wait("durable", timeout_s=40)
        until(lambda: not run.status().tiers[2]["owed"], timeout_s=30)
        until(lambda: counter(run, "superseded") > 0)
        until(lambda: steps_at(tmp_path / "disk") == [11, 12])
        with contextlib.closing(ObjectStoreTier(url, storage_options=s3.options)) as there:
            steps = sorted(name.step for name in _inventory.scan(there, "r").saves)
    assert steps[-2:] == [11, 12]
    assert set(steps) >= {8}  # what KeepEvery wants of what was held


def test_a_store_gets_from_memory_what_a_disk_that_has_gone_does_not_give(
    tmp_path: Path, s3: S3Server
) -> None:
    """The step had come to the disk, which is where a store gets it from as a rule."""
    line = Line(s3.url)
    disk, url = tmp_path / "disk", f"s3://{s3.new_prefix()}"
    options = {**s3.options, "endpoint_url": line.url}
    tiers = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(disk),
        mtckpt.ObjectStore(url, storage_options=options),
    ]
    run = mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)
    run._link.timeout_s = 1.0
    with pytest.raises(RestoreUnavailable, match="store"):
        run.restore(state(0), step=1)  # which may be there
    run._link.timeout_s = 20.0  # for what follows, too: close() asks an agent that looks at tiers
    save = run.save(1, state(1))
    save.wait("local", timeout_s=20)
    disk.rename(tmp_path / "unmounted")
    line.mend()
    run.close(timeout_s=30)
    assert "durable" in save.reached


# -- two jobs --------------------------------------------------------------------------------------


def test_of_two_saves_of_one_step_the_committed_one_counts(tmp_path: Path) -> None:
    """Both are whole, as when the loser was killed before it withdrew its own."""
    root = tmp_path / "store"
    dirs = [build_save(root, "gpt", 10, ARRAYS, {})]
    other = build_save(tmp_path / "other", "of-another-job", 10, ARRAYS, {})
    dirs.append(other.rename(root / "gpt" / other.name))
    names = [SaveName.parse(path.name) for path in dirs]
    assert len(set(names)) == 2
    for path, name in zip(dirs, names, strict=True):
        assert name is not None
        data = (path / _manifest.record_file(0)).read_bytes()
        record = _manifest.decode_sealed(data, _manifest.Record)
        marker = _manifest.Commit(1, "gpt", 10, name.incarnation, record.save_id, "0" * 32)
        key = root / _commit.marker_key("gpt", name)
        key.parent.mkdir(exist_ok=True)
        key.write_bytes(_manifest.encode_sealed(marker))
        listed = mtckpt.steps(f"file://{root}")
        assert [step.id for step in listed if not step.damaged] == [record.save_id]
        assert [bool(step.damaged) for step in listed].count(True) == 1


# -- prune -----------------------------------------------------------------------------------------


def prune(*words: object) -> Result:
    result = CliRunner().invoke(main, ["prune", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("kind", ["file://", ""])
def test_prune_explains_then_deletes(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "tier"
    for step in range(1, 7):
        metrics = {"loss": float(step)}
        build_manifest(build_save(root, "gpt", step, ARRAYS, {}, metrics=metrics))
    before = sorted(root.rglob("*"))
    where = f"{kind}{root}"
    explained = json.loads(
        prune(where, "--keep", 2, "--keep-best", "1:loss", "--dry-run", "--json").stdout
    )
    assert sorted(root.rglob("*")) == before
    assert [s["step"] for s in explained["steps"] if s["delete"]] == [2, 3, 4]
    reasons = {s["step"]: s["reason"] for s in explained["steps"]}
    assert "KeepBest" in reasons[1]
    assert reasons[3] == "no rule wants it"
    assert prune(where, "--keep", 2).exit_code == 2  # nobody is there to be asked
    done = prune(where, "--keep", 2, "--keep-best", "1:loss", "--yes")
    assert done.exit_code == 0
    assert "3 of 6 steps" in done.stdout
    assert steps_at(root) == [1, 5, 6]
    assert len(list(root.rglob("*.safetensors"))) == 3


def test_prune_does_nothing_where_the_newest_is_damaged(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    for step in (1, 2, 3):
        save_dir = build_save(root, "gpt", step, ARRAYS, {})
    shard = save_dir / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 2
    shard.write_bytes(data)
    result = prune(root, "--keep", 2, "--yes")
    assert result.exit_code == 1
    assert "the newest step is damaged" in result.stdout
    assert steps_at(root) == [1, 2, 3]


def test_prune_needs_a_rule(tmp_path: Path) -> None:
    build_save(tmp_path / "tier", "gpt", 1, ARRAYS, {})
    for words in ([], ["--keep", "1"], ["--keep-best", "loss"], ["--keep-every", "often"]):
        assert prune(tmp_path / "tier", *words, "--yes").exit_code == 2
