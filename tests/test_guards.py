"""What planted bugs showed to be held by no other test: each is one promise, and one test of it."""

from __future__ import annotations

import array
import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import msgspec
import numpy as np
import pytest
from agent_checks import Own, Trainers, ram_root, status_of, steps_in, until
from fake_trainer import FakeTrainer, TrainerProcess
from shard_maker import RUN, fill_slot, flip, make_shard, ram_place, slots_of
from xxhash import xxh3_64_intdigest

import mtckpt
from mtckpt import _inventory, _manifest, _node, _save, _shard, _writing
from mtckpt._choice import plan_restore
from mtckpt._holdings import holdings_of
from mtckpt._manifest import (
    SaveName,
)
from mtckpt._retention import Held, decide
from mtckpt.adapters import active_adapters
from mtckpt.agent import protocol
from mtckpt.capture.base import Span
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import (
    AccessDenied,
    Damaged,
    FormatError,
    SaveFailed,
    StepNotFound,
    TierUnavailable,
    UnsupportedState,
)
from mtckpt.tiers import LocalTier

pytestmark = pytest.mark.timeout(60)

PAGE_BYTES = mmap.PAGESIZE


@pytest.fixture
def trainers(runtime_dir: Path, ram_dir: Path) -> Iterator[Trainers]:
    started: list[TrainerProcess] = []

    def start(run: str = "r") -> TrainerProcess:
        started.append(TrainerProcess(run))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()


@pytest.fixture
def own(runtime_dir: Path, ram_dir: Path) -> Iterator[Own]:
    made: list[FakeTrainer] = []

    def make(kind: type[FakeTrainer] = FakeTrainer) -> FakeTrainer:
        made.append(kind("r"))
        return made[-1]

    yield make
    for trainer in made:
        trainer.client.close()


def open_run(tmp_path: Path, **settings: Any) -> mtckpt.Checkpointer:
    tiers: list[mtckpt.Ram | mtckpt.Disk] = [
        mtckpt.Ram(every=1),
        mtckpt.Disk(tmp_path / "disk", every=1, keep=9),
    ]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10, **settings)


# -- capture ---------------------------------------------------------------------------------------


def test_the_digest_is_of_the_source_and_not_of_the_copy() -> None:
    """Memory that loses what is written to it: two addresses of the target are one page."""
    chunk_bytes = _shard.CHUNK_BYTES
    sizes = [2 * chunk_bytes, chunk_bytes // 2, chunk_bytes + 5]
    source = np.random.default_rng(0).integers(0, 255, sum(sizes), dtype=np.uint8)
    spans, start, chunk = [], 0, 0
    for size in sizes:
        spans.append(Span(start, size, chunk))
        start += 4 * chunk_bytes
        chunk += -(-size // chunk_bytes)
    sources = list(source.ctypes.data + np.cumsum([0, *sizes[:-1]]))
    digests = memoryview(array.array("Q", [0] * chunk))
    with _pages(3 * 4 * chunk_bytes, aliased=[span.start for span in spans]) as target:
        engine = CpuEngine(1)
        engine.capture([int(address) for address in sources], spans, target, digests)
        assert engine.verify(target, spans, digests) == [0, 1, 2]
    for span, address in zip(spans, sources, strict=True):
        begin = int(address) - source.ctypes.data
        first = source[begin : begin + min(span.size_bytes, chunk_bytes)]
        assert digests[span.chunk] == xxh3_64_intdigest(first.tobytes())


@contextlib.contextmanager
def _pages(size_bytes: int, aliased: list[int]) -> Iterator[int]:
    """Memory in which the page at each offset of ``aliased`` is the same as the one behind it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.memfd_create("aliased")
    shared, fixed = mmap.MAP_SHARED, 0x10
    try:
        os.ftruncate(fd, size_bytes)
        base = libc.mmap(None, size_bytes, 3, shared, fd, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        for at in aliased:
            there = base + at + PAGE_BYTES
            assert libc.mmap(there, PAGE_BYTES, 3, shared | fixed, fd, at) == there
        yield base
        libc.munmap(base, size_bytes)
    finally:
        os.close(fd)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.T], ids=["as-they-lie", "copied"])
def test_what_is_no_longer_tied_is_stored_twice(make: Any) -> None:
    """Same types, same shapes, same layouts: only the memory is another."""
    planner = _save.Planner()
    one, two = np.zeros((3, 4)), np.ones((3, 4))
    tied = planner.prepare({"a": make(one), "b": make(one)}, active_adapters())
    assert tied.plan.same_as == {1: 0}
    apart = planner.prepare({"a": make(one), "b": make(two)}, active_adapters())
    assert apart.plan.same_as == {}
    stored = [ctypes.string_at(address, one.nbytes) for address in apart.sources]
    assert stored == [make(one).tobytes(), make(two).tobytes()]


class _Fails(CpuEngine):
    def capture(self, *_: Any, **__: Any) -> Any:
        raise MemoryError("while the state is copied")


def test_a_capture_cut_short_is_no_finished_one(tmp_path: Path, ram_dir: Path) -> None:
    """The word goes first: whoever looks at a slot meanwhile finds no finished capture in it."""
    slots = slots_of(ram_place(ram_dir / "root"))
    state = {"w": np.arange(1000.0)}
    captured = _save.Planner().prepare(state, active_adapters())
    layout = captured.plan.layout
    slot = slots.allocate(RUN, "a", layout.size_bytes, layout.table_bytes)
    ring = _save.SlotRing(CpuEngine())
    paths = (slot.data_path, slot.table_path, slot.record_path)
    held = ring.adopt(protocol.SlotGrant("a", slot.inode, *paths), layout)
    more: dict[str, Any] = {"due": (), "metrics": {}, "every": 0}

    def identity(step: int) -> _save.Identity:
        id_ = builders.incarnation_id(RUN, 1)
        return _save.Identity(RUN, step, 1, id_, _manifest.save_id(id_, step, 0))

    _writing.Writing(captured, held, identity(1), CpuEngine(), **more).finish()
    (found,) = slots.scan(RUN, repair=False).slots
    assert found.record is not None
    assert found.record.step == 1
    with pytest.raises(MemoryError):
        _writing.Writing(captured, held, identity(2), _Fails(), **more)
    (found,) = slots.scan(RUN, repair=False).slots
    assert (found.generation, found.record) == (0, None)
    ring.clear()


def test_a_slot_that_another_rank_had_meanwhile_gets_its_header_again(ram_dir: Path) -> None:
    """Slots of one size go from rank to rank, and the arrays of these are called otherwise."""
    slots = slots_of(ram_place(ram_dir / "root"))
    ranks = []
    for name in ("v", "w"):
        planned = _save.Planner().prepare({name: np.arange(1000.0)}, active_adapters())
        ranks.append((planned, _save.SlotRing(CpuEngine())))
    layout = ranks[0][0].plan.layout
    slot = slots.allocate(RUN, "a", layout.size_bytes, layout.table_bytes)
    grant = protocol.SlotGrant("a", slot.inode, slot.data_path, slot.table_path, slot.record_path)
    id_ = builders.incarnation_id(RUN, 1)
    for step, rank in enumerate((0, 1, 0)):
        captured, ring = ranks[rank]
        held = ring.adopt(grant, captured.plan.layout)
        identity = _save.Identity(RUN, step, 1, id_, _manifest.save_id(id_, step, 0), rank, 2)
        _writing.Writing(
            captured, held, identity, CpuEngine(), due=(), metrics={}, every=0
        ).finish()
        assert Path(slot.data_path).read_bytes().startswith(captured.plan.layout.header)
    for _, ring in ranks:
        ring.clear()


def test_a_finished_capture_whose_table_changed_is_none(tmp_path: Path, ram_dir: Path) -> None:
    shard = make_shard(tmp_path)
    slots = slots_of(ram_place(ram_dir / "root"))
    slot = slots.allocate(RUN, "a", len(shard.data), len(shard.table))
    fill_slot(slot, shard)
    assert slots.scan(RUN, repair=False).slots[0].record is not None
    flip(Path(slot.table_path), _shard.TABLE_HEADER.size + 3)
    assert slots.scan(RUN, repair=False).slots[0].record is None


@pytest.mark.parametrize("bits", [64, 13_599, 13_600])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_large_integer_that_is_written_can_be_read(bits: int, sign: int) -> None:
    value = sign * ((1 << bits) - 1)
    assert _node.decode_plain(_node.encode_plain(value)) == value


@pytest.mark.usefixtures("runtime_dir")
def test_an_integer_that_nobody_could_read_is_not_saved(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        for step, bits in ((1, 13_601), (2, 100_000)):
            with pytest.raises(UnsupportedState, match="bits"):
                checkpointer.save(step, {"w": np.zeros(3), "n": 1 << bits})
        checkpointer.save(3, {"w": np.ones(3), "n": 1 << 2000}).wait("local", timeout_s=20)
        state = {"w": np.zeros(3), "n": 0}
        assert checkpointer.restore(state).step == 3
        assert state["n"] == 1 << 2000


def test_with_one_newer_save_nothing_is_deleted() -> None:
    rule = mtckpt.KeepBest(1, "loss")
    saves = [
        Held(SaveName(step, 1, "0" * 12), verified=True, metrics={"loss": -step})
        for step in (1, 2, 3)
    ]
    assert not any(decision.delete for decision in decide(saves[:2], [rule]).values())
    deleted = [name.step for name, d in decide(saves, [rule]).items() if d.delete]
    assert deleted == [1]


# -- who may save ----------------------------------------------------------------------------------


class _SecondRank(FakeTrainer):
    """The second rank of a job of two."""

    def open(self) -> protocol.Opened:
        message = protocol.Open(
            protocol.PROTOCOL_VERSION, self.run, self.holder, 1, 2, os.getpid(), 1, os.getppid(),
            self.ram_path, self.tiers,
        )  # fmt: skip
        opened: protocol.Opened = self.call("open", message, protocol.Opened)
        return opened


def test_a_slot_of_another_rank_cannot_be_sealed(own: Own) -> None:
    first, second = own(), own(_SecondRank)
    id_ = str(uuid.uuid4())  # all ranks have the one
    for trainer in (first, second):
        trainer.open()
        trainer.call("incarnation", protocol.Begin(trainer.holder, 1, id_), protocol.Begun)
        trainer.incarnation, trainer.incarnation_id = 1, id_
    grant = first.slot().grant
    assert grant is not None
    seal = first.capture(1, grant, [])
    with pytest.raises(Damaged, match="not one that this process was given"):
        second.seal(msgspec.structs.replace(seal, holder=second.holder))
    first.seal(seal)  # and nothing has happened to it
    assert steps_in(ram_root(), name="ram") == [1]


def test_what_a_fenced_trainer_had_finished_is_never_offered(trainers: Trainers) -> None:
    first, second = trainers(), trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    first.do("capture", 2, [], True)
    os.kill(first.pid, signal.SIGSTOP)
    assert second.do("open")["fenced_pid"] == first.pid
    first.kill()
    until(lambda: all(slot.state != "capturing" for slot in until(status_of).slots))
    assert steps_in(ram_root(), name="ram") == [1]
    second.do("begin", 2)
    second.do("save", 3, [])
    assert set(steps_in(ram_root(), name="ram")) <= {1, 3}


def test_a_damaged_capture_of_a_dead_trainer_is_never_offered(trainers: Trainers) -> None:
    first = trainers()
    first.do("open")
    first.do("begin", 1)
    first.do("save", 1, [])
    seal_of = first.do("capture", 2, [], True)
    del seal_of
    (data,) = [
        path
        for path in (ram_root() / "r" / ".slots").glob("*.safetensors")
        if path.with_suffix(".json").exists()
    ]
    flip(data, data.stat().st_size - 7)
    first.kill()
    second = trainers()
    assert second.do("open")["finished"] == []
    assert sorted(path.name for path in (ram_root() / "r").glob("step-*/*.json")) == [
        _manifest.record_file(0)
    ]
    assert steps_in(ram_root(), name="ram") == [1]


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runtime_dir")
def test_a_resumed_incarnation_names_its_parent(tmp_path: Path) -> None:
    """Without it, a start that left no save behind would hide every step before it."""
    for step, restored in ((10, None), (20, 10), (30, 10)):
        with open_run(tmp_path) as checkpointer:
            state = {"w": np.zeros(3)}
            if restored is not None:
                assert checkpointer.restore(state, step=restored).step == restored
            state["w"][:] = step
            checkpointer.save(step, state).wait("local", timeout_s=20)
    (newest,) = (tmp_path / "disk" / "r").glob("step-000000000030.*")
    shutil.rmtree(newest)
    with open_run(tmp_path) as checkpointer:
        restored_now = checkpointer.restore(state)
        assert restored_now.step == 10  # neither the branch of 20 nor a fresh start
        assert (state["w"] == 10).all()


@pytest.mark.usefixtures("runtime_dir")
def test_a_failure_is_raised_once(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        (tmp_path / "disk").write_text("a file where a directory should be")
        save = checkpointer.save(1, {"w": np.zeros(3)})
        until(save.exception)
        (tmp_path / "disk").unlink()
        until(lambda: checkpointer._pending)
        with pytest.raises(SaveFailed, match="step 1"):
            checkpointer.save(2, {"w": np.zeros(3)})
        checkpointer.save(2, {"w": np.zeros(3)})
        checkpointer.save(3, {"w": np.zeros(3)}).wait("local", timeout_s=20)


def test_a_save_called_off_is_passed_over(tmp_path: Path) -> None:
    builders.build_save(tmp_path, "r", 10, {"w": np.zeros(3)})
    builders.build_save(tmp_path, "r", 20, {"w": np.ones(3)}, aborted="rank 1 had no slot")
    tier = LocalTier(tmp_path, read_only=True)
    inventory = _inventory.scan(tier, "r")
    tier.close()
    held = holdings_of(inventory)
    plan = plan_restore([held], "latest")
    assert [candidate.name.step for candidate in plan.candidates] == [10]
    assert "rank 1 had no slot" in plan.skipped["step 20"]
    assert not plan_restore([held], 20).candidates
    with pytest.raises(StepNotFound):
        plan_restore([held], 30)


def test_ids_from_a_trainer_do_not_become_names_of_files(own: Own) -> None:
    trainer = own()
    trainer.open()
    for id_ in ("../../x", "a/b", "", "/etc", "x" * 5000, f"{uuid.UUID(int=1)}\n"):
        with pytest.raises(FormatError):
            trainer.call("incarnation", protocol.Begin(trainer.holder, 1, id_), protocol.Begun)
    trainer.begin(1)
    seal = trainer.capture(1, until(lambda: trainer.slot().grant), [])
    for id_ in ("../../../x", "", "a/b"):
        with pytest.raises(FormatError):
            trainer.seal(msgspec.structs.replace(seal, save_id=id_))
    trainer.seal(seal)
    assert steps_in(ram_root(), name="ram") == [1]


@pytest.mark.parametrize("timeout", ["nan", "-inf", "-1"])
def test_a_poll_for_no_time_ends_at_once(timeout: str, own: Own) -> None:
    trainer = own()
    trainer.open()
    path = f"changes?since=99&timeout_s={timeout}&holder={trainer.holder}"
    assert trainer.call(path, None, protocol.Changes, 20.0).saves == []


def test_an_incarnation_that_was_not_written_can_be_tried_again(own: Own, ram_dir: Path) -> None:
    trainer = own()
    trainer.open()
    run_dir = ram_root() / "r"
    until(run_dir.is_dir)
    aside = run_dir.with_name("aside")
    run_dir.rename(aside)
    run_dir.symlink_to(aside)  # a refusal that is none of the trainer's doing
    with pytest.raises(AccessDenied):
        trainer.begin(1)
    run_dir.unlink()
    aside.rename(run_dir)
    id_ = str(uuid.uuid4())  # a new one, as every try of a Checkpointer has
    trainer.call("incarnation", protocol.Begin(trainer.holder, 1, id_), protocol.Begun)
    trainer.incarnation, trainer.incarnation_id = 1, id_
    trainer.save(1)
    assert steps_in(ram_root(), name="ram") == [1]


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_large_array_that_is_damaged_is_not_restored(
    tier: str, tmp_path: Path, ram_dir: Path
) -> None:
    """In the second chunk of several, and in the last one, which is cut short."""
    num_elements = 3 * _shard.CHUNK_BYTES // 4 + 3
    with open_run(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            state = {"w": np.full(num_elements, step, np.float32)}
            checkpointer.save(step, state).wait("local", timeout_s=20)
        root = {"ram": ram_root(), "disk": tmp_path / "disk"}[tier]
        if tier == "disk":
            shutil.rmtree(ram_root() / "r")
        for step, back_bytes in ((3, 4), (2, 4 + _shard.CHUNK_BYTES)):
            for place in {root, tmp_path / "disk"}:
                for path in place.glob(f"r/step-{step:012d}.*/*.safetensors"):
                    flip(path, path.stat().st_size - back_bytes)
        live = {"w": np.zeros(num_elements, np.float32)}
        restored = checkpointer.restore(live)
        assert restored.step == 1
        assert (live["w"] == 1).all()
        assert {"step 2", "step 3"} <= restored.skipped.keys()


@pytest.mark.usefixtures("runtime_dir")
def test_a_look_into_a_tier_that_hangs_ends_by_its_deadline(tmp_path: Path) -> None:
    checkpointer = mtckpt.Checkpointer("r", [mtckpt.Disk(tmp_path / "disk")], timeout_s=0.3)
    answer = threading.Event()
    with pytest.raises(TierUnavailable, match="disk did not answer") as raised:
        checkpointer._link.within("disk", answer.wait)
    assert raised.value.details["timeout_s"] == 0.3
    answer.set()
    assert checkpointer._link.within("disk", answer.wait) is True
    checkpointer.close()
