"""A store that does not let everything be done: no right to delete, no credentials at hand."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import kill_agent, status_of, until
from builders import build_save
from fake_trainer import FakeTrainer
from fault_proxy import Fault, FaultProxy
from stores import S3Server

import mtckpt
from mtckpt import _inventory
from mtckpt._access import access_of
from mtckpt._manifest import SaveName
from mtckpt._source import Place
from mtckpt._transfer import copy_shard, write_manifest
from mtckpt.agent.protocol import TierConfig, TierStatus
from mtckpt.errors import CommitConflict
from mtckpt.tiers import LocalTier, ObjectStoreTier

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]

NO_DELETES = Fault("answer", match="^DELETE", times=None, status=403, code="AccessDenied")


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTCKPT_DELETE_GRACE_S", "0.01")


def open_run(tmp_path: Path, url: str, options: dict[str, Any]) -> mtckpt.Checkpointer:
    tiers = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1),
        mtckpt.ObjectStore(url, every=1, keep=2, storage_options=options),
    ]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10)


def state(fill: float) -> dict[str, Any]:
    return {"w": np.full(1000, fill, np.float32)}


def steps_at(url: str, server: S3Server) -> list[int]:
    with contextlib.closing(ObjectStoreTier(url, storage_options=server.options)) as there:
        saves = _inventory.scan(there, "r").saves.values()
        return sorted(save.name.step for save in saves if save.complete)


def not_deleted() -> str:
    found = status_of()
    return found.tiers[2].not_deleted if found else ""


def test_without_the_right_to_delete_saves_go_on_and_are_not_read_over_and_over(
    tmp_path: Path, runtime_dir: Path, s3: S3Server
) -> None:
    url = f"s3://{s3.new_prefix()}"
    with FaultProxy(s3.url) as proxy:
        options = {**s3.options, "endpoint_url": proxy.url}
        proxy.set(NO_DELETES)
        with open_run(tmp_path, url, options) as run:
            for step in (1, 2, 3):
                run.save(step, state(step)).wait("durable", timeout_s=20)
            assert "AccessDenied" in until(not_deleted)
            asked = len(proxy.seen)
            for step in (4, 5, 6):
                run.save(step, state(step)).wait("durable", timeout_s=20)
        lines = [one.line for one in proxy.seen]
        assert len([line for line in lines if line.startswith("DELETE")]) == 1
        assert not [line for line in lines[asked:] if line.startswith("GET") and ".safet" in line]
        log = (runtime_dir / "agent.log").read_text()
        assert log.count("deletes nothing") == 1
        assert steps_at(url, s3) == [1, 2, 3, 4, 5, 6]
        proxy.set()
        asked = len(proxy.seen)
        with open_run(tmp_path, url, options) as run:  # with other rights, perhaps
            assert run.restore(state(0)).step == 6
            run.save(7, state(7)).wait("durable", timeout_s=20)
            until(lambda: steps_at(url, s3) == [6, 7])
            assert not not_deleted()
        lines = [one.line for one in proxy.seen[asked:]]
        deletes = [number for number, line in enumerate(lines) if line.startswith("DELETE")]
        before = "\n".join(lines[: deletes[0]])
        assert re.search(r"^GET \S*/step-000000000007\.\S*safetensors", before, re.MULTILINE)


def test_who_loses_a_step_is_told_so_though_its_save_cannot_be_withdrawn(
    tmp_path: Path, s3: S3Server
) -> None:
    """Both saves are there in whole then; the one that was committed is the step."""
    names = []
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(s3.url))
        proxy.set(NO_DELETES)
        options = {**s3.options, "endpoint_url": proxy.url}
        store = ObjectStoreTier(f"s3://{s3.new_prefix()}", storage_options=options)
        stack.callback(store.close)
        target = Place(store, store)
        for job in ("one", "other"):
            path = build_save(tmp_path / job, job, 1, state(1))
            names.append(SaveName.parse(path.name))
            name = names[-1]
            assert name is not None
            path.parent.rename(path.parent.with_name("r"))
            local = stack.enter_context(contextlib.closing(LocalTier(tmp_path / job)))
            copied = copy_shard(Place(local, local), target, "r", name, 0)
            if job == "one":
                write_manifest(target, "r", name, copied.record)
                continue
            with pytest.raises(CommitConflict):
                write_manifest(target, "r", name, copied.record)
        saves = _inventory.scan(store, "r").saves
        assert [name for name, save in saves.items() if save.complete] == names[:1]


def test_credentials_are_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that starts without a Checkpointer was not given any. What is owed meanwhile has
    failed after a time, so that memory and agent are let go of; who brings some has it stored."""
    monkeypatch.setenv("MTCKPT_OWED_S", "1")
    place = tmp_path / "store"
    url = f"file://{place}"
    access = access_of(url, "auto", {"auto_mkdir": True})  # options are secret, whatever they are

    def status() -> TierStatus:
        found = until(status_of)
        tier: TierStatus = found.tiers[1]
        return tier

    trainer = FakeTrainer("r", [TierConfig("store", "store", url, access=access)])
    place.write_bytes(b"no directory can be made here")
    trainer.open()
    trainer.begin(1)
    trainer.save(1, ["store"])
    kill_agent()
    until(lambda: "no credentials" in status().problem)
    assert status().owed == [1]
    until(lambda: status().owed == [])
    found = status_of()
    assert found is not None
    assert found.counters["failed"] == 1
    place.unlink()
    trainer.open()
    assert trainer.wait_stage(1, "durable").failed == {}
    assert status().problem == ""
    trainer.close()
    assert [step.step for step in mtckpt.steps(url)] == [1]
