"""The end of a run: the newest save goes to every tier whatever is due, and its memory is freed.

Knows the conversation with the agent that this takes. Does not know when a run ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mtckpt._handle import stage_of_tier
from mtckpt.agent import protocol
from mtckpt.errors import AgentUnavailable, CheckpointError

if TYPE_CHECKING:
    from mtckpt._handle import Save
    from mtckpt._saver import Saver

__all__ = ["bring_home", "left_s", "let_go"]

logger = logging.getLogger(__name__)

# What the last words with the agent may take, though the deadline has passed.
_GRACE_S = 1.0
# How long close() waits until memory is free.
_FREEING_S = 5.0


def bring_home(
    saver: Saver,
    labels: Sequence[str],
    deadline_s: float,
    failed: Callable[[Save, CheckpointError], None],
) -> list[CheckpointError]:
    """Bring the newest save to all tiers; what did not come there in time.

    ``failed`` is told of the newest save's error. Raises CheckpointError where the agent does not
    answer, and RunLocked.
    """
    session = saver.run.session
    if session.opened is None:
        return []
    if not session.wait_idle(max(0.0, deadline_s - time.monotonic())):
        run = saver.run.name
        raise AgentUnavailable("the node agent did not take the last save", run=run)
    errors: list[CheckpointError] = []
    last = saver.last  # all that was captured is handed over by now
    if last is not None and session.fenced is None:
        last._plan({label: stage_of_tier(label) for label in labels})
        session.watch(last)
        most_s = left_s(deadline_s, saver.run.timeout_s)
        session.call("flush", protocol.Flush(session.holder), protocol.Done, most_s)
        errors += saver.await_newest(last, deadline_s)
    if last is not None and (error := last.exception()) is not None:
        failed(last, error)  # told before perhaps, and open all the same
    return errors


def let_go(saver: Saver, deadline_s: float, *, free_ram: bool) -> None:
    """End the run with the agent, which may have been done before. Raises CheckpointError."""
    session = saver.run.session
    if session.opened is None:
        return
    session.stop_listening()
    # The agent answers once memory is free; what still reads it is the newest save's check.
    wait_s = min(_FREEING_S, max(0.0, deadline_s - time.monotonic() - _GRACE_S))
    closed = session.call(
        "close",
        protocol.Close(session.holder, free_ram=free_ram, wait_s=wait_s),
        protocol.Closed,
        left_s(deadline_s, saver.run.timeout_s + wait_s),
    )
    if closed.kept:
        logger.warning("run %s: its memory is not free yet: %s", saver.run.name, closed.kept)


def left_s(deadline_s: float, most_s: float) -> float:
    """For one more call before a deadline: what is left, but never too little for an answer."""
    return min(most_s, max(_GRACE_S, deadline_s - time.monotonic()))
