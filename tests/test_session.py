"""A session knows when its courier is idle, and what there is where nobody has room for slots."""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt import _pieces, _room, _session
from mtckpt._handle import Save
from mtckpt._joining import Needs
from mtckpt._run import Run
from mtckpt._saver import Saver
from mtckpt._session import Session
from mtckpt._slots import BESIDE
from mtckpt.agent import protocol
from mtckpt.agent.roots import Roots
from mtckpt.errors import AgentTooOld, AgentUnavailable, TierFull, TierUnavailable
from mtckpt.testing.groups import local_groups


class Jobs(queue.SimpleQueue[Any]):
    """Lets somebody come between the look whether anything is left and what is made of it."""

    between: Callable[[], None] | None = None

    def empty(self) -> bool:
        empty = super().empty()
        between, self.between = self.between, None
        if between is not None:
            between()
        return empty


@pytest.mark.timeout(30)
def test_a_job_that_comes_as_the_last_one_ends_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Session, "_listener", lambda _: None)
    session = Session("r", "r", [], "", timeout_s=10, on_error=lambda *_: None)
    jobs = session._jobs = Jobs()
    may_end, ended = threading.Event(), threading.Event()

    def second() -> None:
        may_end.wait(10)
        ended.set()

    handing = threading.Thread(target=session._hand, args=(second,))

    def come() -> None:
        handing.start()
        handing.join(0.3)  # what has come, or waits for its turn

    jobs.between = come
    session._hand(lambda: None)
    while not handing.ident:
        threading.Event().wait(0.01)
    handing.join(10)
    assert not session.wait_idle(0.2)
    may_end.set()
    assert session.wait_idle(10)
    assert ended.is_set()
    jobs.put(None)


def test_where_the_disk_takes_no_slots_either_it_is_memory_that_is_full(tmp_path: Path) -> None:
    """And no error that is none of ours. The agent alone looks at the disk, which may hang."""
    (tmp_path / BESIDE).write_bytes(b"a file")

    def move_slots(path: str) -> None:
        assert path == str(tmp_path / BESIDE)
        asyncio.run(Roots(str(tmp_path)).own(path))

    run = SimpleNamespace(members=SimpleNamespace(world_size=1), name="r", short=None)
    saver = SimpleNamespace(
        run=run,
        _insists=False,
        _session=SimpleNamespace(ram_path="/memory", move_slots=move_slots),
        _disk_path=lambda: str(tmp_path),
        _with_advice=lambda error: error,
    )
    with pytest.raises(TierFull, match="no page is left"):
        Saver._move_slots(cast(Any, saver), TierFull("no page is left", tier="ram"))


def test_no_page_at_all_is_a_number_and_not_the_lack_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no rank would say that memory is short, and none could move to the disk."""
    monkeypatch.setattr(_pieces, "shared_bytes", lambda *_: 0)
    monkeypatch.setattr(_room, "memory_left_bytes", lambda: (0, "the limit"))
    layout = SimpleNamespace(size_bytes=100, table_bytes=10)
    captured = SimpleNamespace(plan=SimpleNamespace(layout=layout, recipe=None))
    opened = SimpleNamespace(ram_root=str(tmp_path))
    saver = SimpleNamespace(
        run=SimpleNamespace(
            lacks_layout=True, key="r", members=None, within=lambda _, look: look()
        ),
        _session=SimpleNamespace(open=lambda: opened),
        _ram=SimpleNamespace(slots=2),
    )
    assert Saver._needs(cast(Any, saver), cast(Any, captured)) == Needs(110, 0, 2, 0)
    monkeypatch.setattr(_room, "memory_left_bytes", lambda: (None, ""))
    assert Saver._needs(cast(Any, saver), cast(Any, captured)) is None


def test_why_no_agent_took_the_run_is_told_also_where_the_time_ends_amid_a_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session("r", "r", [], "", timeout_s=10, on_error=lambda *_: None)
    errors = iter([AgentUnavailable("another has the memory"), AgentUnavailable("not in time")])
    now_s = iter([0.0, 9.8])

    def refuse(_: float) -> protocol.Opened:
        raise next(errors)

    clock = SimpleNamespace(monotonic=lambda: next(now_s), sleep=lambda _: None)
    monkeypatch.setattr(session, "_open_once", refuse)
    monkeypatch.setattr(_session, "time", clock)
    with pytest.raises(AgentUnavailable, match="has the memory"):
        session._open(10.0)


@pytest.mark.timeout(30)
def test_an_older_agent_is_not_given_a_seal_of_what_it_would_not_look_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has taken the place of one that would have, between a capture and its seal."""
    monkeypatch.setattr(Session, "_listener", lambda _: None)
    session = Session("r", "r", [], "", timeout_s=10, on_error=lambda *_: None)
    heard: list[str] = []

    class Agent:
        def __init__(self, *, is_old: bool) -> None:
            self.is_old = is_old

        def call(self, path: str, message: Any, reply_type: type, _: float) -> Any:
            heard.append(path.rpartition("/")[2])
            if not self.is_old:
                raise AgentUnavailable("went away")
            return protocol.Sealed("s") if reply_type is protocol.Sealed else protocol.Done()

        def close(self) -> None:
            """Nothing is open."""

    def opened(deadline_s: float) -> protocol.Opened:
        session._client = cast(Any, Agent(is_old=True))
        return protocol.Opened(1, "old", "boot", 1, "/ram")

    session._client = cast(Any, Agent(is_old=False))
    session.opened = protocol.Opened(1, "new", "boot", 1, "/ram", checks_left=True)
    session._open = opened  # type: ignore[method-assign]
    seal = protocol.Seal(session.holder, "slot", 7, "6ba7b810-9dad-51d1-80b4-00c04fd430c8", 3)
    for left, failed in ((b"\1", AgentTooOld), (b"", type(None))):
        save = Save(3, seal.save_id, planned={"ram": "staged"})
        session.submit(seal, save, lambda: None, lambda: left)  # noqa: B023
        assert session.wait_idle(10)
        assert type(save.exception()) is failed
    assert heard == ["seal", "release", "seal"]
    session._jobs.put(None)


def test_a_save_that_nobody_can_hand_over_is_called_off_on_other_ranks_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a limit of processes is reached."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    session = Session("r", "r", [], "", timeout_s=10, on_error=lambda *_: None)
    heard: list[str] = []
    agent = SimpleNamespace(call=lambda path, *_: heard.append(path))
    session._client, session.opened = cast(Any, agent), cast(Any, SimpleNamespace())
    session.call_off(Save(3, "6ba7b810-9dad-51d1-80b4-00c04fd430c8"), "the reason")
    assert heard == ["/v1/runs/r/calloff"]


class HungPath(os.PathLike[str]):
    """Nobody who looks there comes back before ``free`` is set."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def __fspath__(self) -> str:
        self.free.wait(30)
        return "/"


@pytest.mark.timeout(30)
def test_ranks_do_not_wait_for_memory_beside_a_disk_that_hangs_nor_meet_without_one(
    tmp_path: Path,
) -> None:
    for root, timeout_s, why in (
        (HungPath(), 0.1, "did not answer within"),
        (tmp_path / "gone", 10.0, "No such file"),
    ):
        opened = SimpleNamespace(ram_root=root, boot_id="boot", agent_id="agent")
        session = SimpleNamespace(open=lambda: opened, opened=None, rank=0, world_size=1)  # noqa: B023
        run = Run("r", "r", cast(Any, session), [], [], timeout_s, local_groups(2)[0])
        with pytest.raises(TierUnavailable, match=why):
            run.join()
        if isinstance(root, HungPath):
            root.free.set()


def test_an_interrupt_as_the_threads_start_leaves_one_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session("r", "r", [], "", timeout_s=1, on_error=lambda *_: None)
    monkeypatch.setattr(Session, "_listener", lambda _: None)
    start, done = threading.Thread.start, queue.SimpleQueue[int]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threading.Thread, "start", interrupted)
        session.start()
    for number in range(2):
        session._hand(functools.partial(done.put, number))
    assert [done.get(timeout=20) for _ in range(2)] == [0, 1]
    session.close(20)
    for each in [each for each in threading.enumerate() if each.name == "mtckpt-courier"]:
        each.join(20)  # the one that was interrupted as it started ends by itself
        assert not each.is_alive()


@pytest.mark.parametrize("is_put", [False, True])
def test_an_interrupt_as_a_job_is_handed_over_leaves_no_wait_and_no_job_unwaited_for(
    monkeypatch: pytest.MonkeyPatch, is_put: bool
) -> None:
    session = Session("r", "r", [], "", timeout_s=1, on_error=lambda *_: None)
    monkeypatch.setattr(Session, "_listener", lambda _: None)
    told: list[object] = []

    class Interrupted(queue.SimpleQueue[Any]):
        """Of the first call, as it begins or as it ends."""

        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            told.append(item)
            if len(told) > 1 or is_put:
                super().put(item)
            if len(told) == 1:
                raise KeyboardInterrupt

    session._jobs, ready = Interrupted(), threading.Event()

    def job() -> None:
        ready.wait(20)

    with pytest.raises(KeyboardInterrupt):
        session._hand(job)
    if is_put:
        assert not session.wait_idle(0.05)
        ready.set()
    assert session.wait_idle(20)
    session.close(20)
