"""A session knows when its courier is idle, and what there is where nobody has room for slots."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._handle import Save
from mtckpt._saver import Saver
from mtckpt._session import Session
from mtckpt._slots import BESIDE
from mtckpt.agent import protocol
from mtckpt.errors import AgentTooOld, AgentUnavailable, TierFull


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
    """And no error that is none of ours."""
    (tmp_path / BESIDE).write_bytes(b"a file")
    run = SimpleNamespace(members=SimpleNamespace(world_size=1), name="r", short=None)
    saver = SimpleNamespace(
        run=run,
        _insists=False,
        _session=SimpleNamespace(ram_path="/memory"),
        _disk_path=lambda: str(tmp_path),
        _with_advice=lambda error: error,
    )
    with pytest.raises(TierFull, match="no page is left"):
        Saver._move_slots(cast(Any, saver), TierFull("no page is left", tier="ram"))


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
