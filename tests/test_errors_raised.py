"""Every error of the tree, raised through a public door by something that really went wrong: its
text alone has to be enough: what, where, the state left, what to do."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from builders import build_save
from device_scene import step_in_a_graph
from fake_trainer import TrainerProcess

import mtckpt
from mtckpt import _manifest, _shard, errors
from mtckpt.agent import drains, protocol
from mtckpt.agent.client import agent_client
from mtckpt.errors import CheckpointError
from mtckpt.testing.groups import local_groups
from mtckpt.tiers import BytesSource, LocalTier

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]

PACKAGE = Path(errors.__file__).parent

# Classes that only gather others, and are themselves raised nowhere.
GATHERING = ("RestoreError",)

Scenario = Callable[["Stage"], object]
SCENARIOS: dict[str, tuple[Scenario, tuple[str, ...]]] = {}


def raises(name: str, *details: str) -> Callable[[Scenario], Scenario]:
    """Register the scenario that ends in this error, which carries ``details``."""

    def register(scenario: Scenario) -> Scenario:
        assert name not in SCENARIOS
        SCENARIOS[name] = (scenario, details)
        return scenario

    return register


class Stage:
    """What scenarios need: directories, a run, and an end of whatever they started."""

    def __init__(self, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp_path, self.runtime, self.monkeypatch = tmp_path, runtime, monkeypatch
        self.stack = contextlib.ExitStack()
        self.disk = tmp_path / "disk"

    def open_run(self, **settings: Any) -> mtckpt.Checkpointer:
        tiers = settings.pop("tiers", None) or [mtckpt.Ram(every=1), mtckpt.Disk(self.disk)]
        limits = {"timeout_s": 20, "max_stall_s": 10, **settings}
        checkpointer = mtckpt.Checkpointer("r", tiers, **limits)
        self.stack.callback(self._close, checkpointer)
        return checkpointer

    def tier(self, name: str = "tier", **settings: Any) -> LocalTier:
        tier = LocalTier(self.tmp_path / name, **settings)
        self.stack.callback(tier.close)
        return tier

    def stop_agent(self) -> None:
        pid = int((self.runtime / "agent.pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        self.stack.callback(os.kill, pid, signal.SIGCONT)

    def saved(self, **options: Any) -> Path:
        """A checkpoint at rest, of step 10."""
        w = np.arange(1000, dtype=np.float32)
        return build_save(self.disk, "r", 10, {"w": w}, {"n": 1}, **options)

    def _close(self, checkpointer: mtckpt.Checkpointer) -> None:
        with contextlib.suppress(CheckpointError):
            checkpointer.close(timeout_s=0.5)


def state(fill: float = 0.0) -> dict[str, Any]:
    return {"w": np.full(1000, fill, np.float32)}


def in_record(save_dir: Path, **changes: Any) -> None:
    """Change fields of a record, as somebody can who knows how to digest it."""
    path = save_dir / _manifest.record_file(0)
    record = _manifest.decode_sealed(path.read_bytes(), _manifest.Record)
    path.write_bytes(_manifest.encode_sealed(msgspec.structs.replace(record, **changes)))


# -- the call --------------------------------------------------------------------------------------


@raises("UsageError")
def _(stage: Stage) -> None:
    stage.open_run(tiers=[mtckpt.Ram(), mtckpt.Ram()])


@raises("UnsupportedState", "path", "type_name")
def _(stage: Stage) -> None:
    stage.open_run().save(1, {"model": {"callback": object()}})


@raises("StageNotPlanned", "stage", "step")
def _(stage: Stage) -> None:
    stage.open_run().save(1, state()).wait("durable")


@raises("StepExists", "step")
def _(stage: Stage) -> None:
    checkpointer = stage.open_run()
    for _ in range(2):
        checkpointer.save(1, state(), tiers="all")


@raises("GroupMissing", "world_size")
def _(stage: Stage) -> None:
    stage.monkeypatch.setenv("WORLD_SIZE", "4")
    stage.open_run().restore(state())


@raises("RankTimeout", "rank", "stage")
def _(stage: Stage) -> None:
    run = stage.open_run(group=local_groups(2)[0], timeout_s=1.0)
    run._session.timeout_s = 20.0  # it is the other rank that has only so long
    run.restore(state())


@raises("StepDisagreement", "stage")
def _(stage: Stage) -> None:
    ranks = [stage.open_run(group=group) for group in local_groups(2)]
    with ThreadPoolExecutor(2) as pool:
        saves = [pool.submit(each.save, step, state()) for step, each in enumerate(ranks, 1)]
    with pytest.raises(errors.SaveFailed) as raised:
        saves[0].result().wait("staged")
    raise raised.value.__cause__ or raised.value


@raises("PlacementImpossible", "copies", "warnings")
def _(stage: Stage) -> None:
    stage.open_run(tiers=[mtckpt.Ram(), mtckpt.Peers(strict_placement=True)]).restore(state())


@raises("UnsupportedPlatform")
def _(stage: Stage) -> None:
    stage.monkeypatch.setattr(sys, "platform", "darwin")
    stage.open_run()


@raises("ForkedProcess", "owner_pid", "pid")
def _(stage: Stage) -> None:
    checkpointer = stage.open_run()
    checkpointer.save(1, state())
    read_fd, write_fd = os.pipe()
    stage.stack.callback(os.close, read_fd)
    child = os.fork()
    if child == 0:
        try:
            checkpointer.save(2, state())
        except CheckpointError as error:
            os.write(write_fd, pickle.dumps(error))
        finally:
            os._exit(0)
    os.close(write_fd)
    os.waitpid(child, 0)
    raise pickle.loads(os.read(read_fd, 65536))


# -- saving ----------------------------------------------------------------------------------------


@raises("SaveFailed", "stage", "tier", "step")
def _(stage: Stage) -> None:
    checkpointer = stage.open_run()
    stage.disk.write_text("a file where a directory should be")
    checkpointer.save(1, state()).wait("local", timeout_s=20)


@raises("CaptureFailed", "stage", "step")
def _(stage: Stage) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("a hook of the user's")

        def load_state_dict(self, _: Any) -> None: ...

    stage.open_run().save(1, {"odd": Odd()})


@raises("CaptureStuck", "stage")
def _(stage: Stage) -> None:
    step_in_a_graph(stage.tmp_path, stage.monkeypatch)


@raises("CloseFailed", "run")
def _(stage: Stage) -> None:
    checkpointer = stage.open_run()
    stage.disk.write_text("a file where a directory should be")
    checkpointer.save(1, state()).wait("staged", timeout_s=20)
    with pytest.raises(errors.CloseFailed) as raised:
        checkpointer.close(timeout_s=0.5)
    assert raised.value.errors[0].what in str(raised.value)
    raise raised.value


@raises("WaitTimeout", "stage", "step", "timeout_s")
def _(stage: Stage) -> None:
    checkpointer = stage.open_run(max_stall_s=0.2)
    checkpointer.save(1, state()).wait("staged", timeout_s=20)
    checkpointer._session.wait_idle(20)  # the next slot is here
    stage.stop_agent()
    checkpointer.save(2, state()).wait("staged", timeout_s=0.2)


# -- restoring -------------------------------------------------------------------------------------


@raises("NoHealthyStep", "reasons")
def _(stage: Stage) -> None:
    record = stage.saved() / _manifest.record_file(0)
    record.write_bytes(record.read_bytes().replace(b'"step":10', b'"step":11'))
    stage.open_run().restore(state())


@raises("StepNotFound", "step")
def _(stage: Stage) -> None:
    stage.saved()
    stage.open_run().restore(state(), step=99)


@raises("RestoreUnavailable", "tiers")
def _(stage: Stage) -> None:
    stage.disk.mkdir(mode=0o700)
    (stage.disk / "r").symlink_to("/etc")
    stage.open_run().restore(state())


@raises("StateMismatch", "missing", "differing")
def _(stage: Stage) -> None:
    stage.saved()
    live: dict[str, Any] = {"w": np.ones(7, np.float32), "more": np.ones(2)}
    try:
        stage.open_run().restore(live)
    finally:
        assert np.all(live["w"] == 1)


@raises("RestoreFailed", "live_state", "step")
def _(stage: Stage) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, _: Any) -> None:
            raise KeyError("a hook of the user's")

    checkpointer = stage.open_run()
    checkpointer.save(1, {"odd": Odd()}).wait("staged", timeout_s=20)
    checkpointer.restore({"odd": Odd()})


@raises("RestoreIgnored")
def _(stage: Stage) -> None:
    stage.saved()
    jax = pytest.importorskip("jax")
    live = {"w": jax.numpy.zeros(1000, jax.numpy.float32)}
    checkpointer = stage.open_run()
    checkpointer.restore(live)
    checkpointer.save(11, live)


# -- the agent -------------------------------------------------------------------------------------


@raises("RunLocked", "run", "owner_pid", "owner_host")
def _(stage: Stage) -> None:
    stage.monkeypatch.setenv("MTCKPT_TAKEOVER_S", "0.2")
    other = TrainerProcess("r")
    stage.stack.callback(other.close)
    other.do("open")
    with pytest.raises(errors.RunLocked) as raised:
        stage.open_run().restore(state())
    assert raised.value.details["owner_pid"] == other.pid
    raise raised.value


@raises("AgentUnavailable", "socket", "timeout_s")
def _(stage: Stage) -> None:
    stage.monkeypatch.setenv("MTCKPT_AGENT_SOCKET", str(stage.tmp_path / "agent.sock"))
    stage.open_run(timeout_s=0.5).restore(state())


@raises("AgentTooOld", "agent_version", "wanted_version")
def _(stage: Stage) -> None:
    stage.open_run().restore(state())  # its agent stays, and a newer library comes
    later = protocol.PROTOCOL_VERSION + 1
    stage.monkeypatch.setattr(protocol, "PROTOCOL_VERSION", later)
    mtckpt.Checkpointer("other", [mtckpt.Ram(every=1)], timeout_s=20).restore(state())


@raises("NodeDraining")
def _(stage: Stage) -> None:
    stage.open_run().restore(state())
    with agent_client(20.0) as client:
        client.call("/v1/drain", drains.Drain(5.0), drains.Drained)
    mtckpt.Checkpointer("other", [mtckpt.Ram(every=1)], timeout_s=20).restore(state())


# -- tiers -----------------------------------------------------------------------------------------


@raises("TierError", "tier", "os_error")
def _(stage: Stage) -> None:
    stage.tier("x" * 300)


@raises("ObjectNotFound", "tier", "key")
def _(stage: Stage) -> None:
    stage.tier().stat("run/object")


@raises("AlreadyExists", "tier", "key")
def _(stage: Stage) -> None:
    tier = stage.tier()
    for _ in range(2):
        tier.put("run/object", BytesSource(b"x"))


@raises("CommitConflict", "tier", "step", "other_save_id")
def _(stage: Stage) -> None:
    """Another job was here: the marker of step 1 is of a save of its own."""
    marker = _manifest.Commit(1, "r", 1, 1, "0" * 8 + "-0000" * 3 + "-" + "0" * 12, "0" * 32)
    path = stage.tmp_path / "store" / "r" / _manifest.commit_file(1, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(_manifest.encode_sealed(marker))
    store = mtckpt.ObjectStore(f"file://{stage.tmp_path}/store")
    save = stage.open_run(tiers=[mtckpt.Ram(every=1), store]).save(1, state())
    with pytest.raises(errors.SaveFailed) as raised:
        save.wait("durable", timeout_s=20)
    assert not list(path.parent.parent.glob("step-*/*.json"))  # nothing of it is offered
    assert raised.value.__cause__ is not None
    raise raised.value.__cause__


@raises("TierUnavailable", "tier")
def _(stage: Stage) -> None:
    tier = stage.tier()
    (stage.tmp_path / "tier").rename(stage.tmp_path / "gone")
    list(tier.list())


class _Endless:
    size_bytes = 1 << 60

    def read(self, offset: int, size_bytes: int) -> memoryview:
        raise AssertionError("there is no room for it: nobody asks")


@raises("TierFull", "tier", "key", "needed_bytes", "free_bytes")
def _(stage: Stage) -> None:
    stage.tier().put("run/object", _Endless())


@raises("TierReadOnly", "tier")
def _(stage: Stage) -> None:
    stage.tier()
    stage.tier(read_only=True).put("run/object", BytesSource(b"x"))


@raises("AccessDenied", "tier")
def _(stage: Stage) -> None:
    (stage.tmp_path / "tier").mkdir()
    (stage.tmp_path / "tier").chmod(0o777)
    stage.tier()


@raises("ShortRead", "tier", "key", "wanted_bytes", "got_bytes")
def _(stage: Stage) -> None:
    tier = stage.tier()
    tier.put("run/object", BytesSource(b"x" * 10))
    tier.read_into("run/object", memoryview(bytearray(11)))


# -- the bytes -------------------------------------------------------------------------------------


@raises("FormatError", "step", "tier", "key")
def _(stage: Stage) -> None:
    in_record(stage.saved(), structure=msgspec.Raw(b'{"odd":[]}'))
    with mtckpt.load(stage.disk) as checkpoint:
        checkpoint.tree()


@raises("Damaged", "tier", "key", "step", "tensor")
def _(stage: Stage) -> None:
    shard = stage.saved() / _manifest.shard_file(0)
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with mtckpt.load(stage.disk) as checkpoint:
        checkpoint["w"]


@raises("FormatTooNew", "version", "supported", "tier", "key")
def _(stage: Stage) -> None:
    save_dir = stage.saved()
    table = bytearray((save_dir / _manifest.table_file(0)).read_bytes())
    table[8] = 2
    (save_dir / _manifest.table_file(0)).write_bytes(table)
    record = _manifest.decode_sealed(
        (save_dir / _manifest.record_file(0)).read_bytes(), _manifest.Record
    )
    shard = msgspec.structs.replace(record.shard, table_digest=_shard.table_digest(bytes(table)))
    in_record(save_dir, shard=shard)
    with pytest.raises(errors.NoHealthyStep) as raised:
        mtckpt.load(stage.disk)
    # What is wrong with the newest step is the cause of there being none.
    assert raised.value.__cause__ is not None
    raise raised.value.__cause__


# -- the table -------------------------------------------------------------------------------------

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value)
    and issubclass(value, CheckpointError)
    and value is not CheckpointError
}


@pytest.fixture
def stage(tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    made = Stage(tmp_path, runtime_dir, monkeypatch)
    yield made
    monkeypatch.undo()
    # The fixture's own variables are gone with that: what is closed here needs them again.
    monkeypatch.setenv("MTCKPT_RUNTIME_DIR", str(runtime_dir))
    made.stack.close()


def test_every_error_has_a_scenario() -> None:
    assert SCENARIOS.keys() | set(GATHERING) == CLASSES.keys()
    assert not SCENARIOS.keys() & set(GATHERING)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_it_is_raised(name: str, stage: Stage) -> None:
    scenario, details = SCENARIOS[name]
    with pytest.raises(CheckpointError) as raised:
        scenario(stage)
    error = raised.value
    assert type(error) is CLASSES[name], error
    text = str(error)
    for detail in details:
        value = getattr(error, detail)
        if detail in error.details:
            assert f"{detail}={value!r}" in text
        else:  # too much for one line: a line each
            assert value
            assert all(item in text for item in value)
    assert error.state, f"it does not say what state the user is in: {text}"
    assert f"\n  state: {error.state}\n" in text
    assert error.actions, f"it does not say what to do: {text}"
    assert all(f"\n  try: {action}\n" in text for action in error.actions)
    assert text.endswith(f"\n  docs: {errors.DOCS}#{name.lower()}")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(again), str(again), again.args) == (type(error), text, error.args)
        assert repr(vars(again)) == repr(vars(error))  # errors within have no equality


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_attribute_goes_along(cls: type[CheckpointError]) -> None:
    error: Any = cls("what", state="state", actions=("do",), step=3, tier="disk", missing=("a",))
    error.__dict__.update(errors=(ValueError("x"),), differing=("b", "c"))
    copies: list[Any] = [pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)]
    for again in copies:
        assert type(again).__name__ == cls.__name__
        assert repr(vars(again)) == repr(vars(error))
        assert (again.step, again.tier, again.missing) == (3, "disk", ("a",))
        assert again.differing == ("b", "c")


def test_classes_that_only_gather_are_never_raised() -> None:
    for path in PACKAGE.rglob("*.py"):
        for name in GATHERING:
            assert not re.search(rf"(?<!class )\b{name}\(", path.read_text()), (name, path)
