"""A session knows when its courier is idle, and what there is where nobody has room for slots."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._saver import Saver
from mtckpt._session import Session
from mtckpt._slots import BESIDE
from mtckpt.errors import TierFull


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
