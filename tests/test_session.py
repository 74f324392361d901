"""The courier of a session says that it is idle only where nothing waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mtckpt._session import Session


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
