"""What is said of a node that is about to go: the messages of ``POST /v1/drain``."""

from __future__ import annotations

import msgspec

__all__ = ["Drain", "Drained", "DrainedRun"]


class Drain(msgspec.Struct, frozen=True):
    """The node is about to go: nothing new is taken, and what is here is brought elsewhere within
    ``timeout_s``. ``cancel``: it stays after all."""

    timeout_s: float = 60.0
    cancel: bool = False


class DrainedRun(msgspec.Struct, frozen=True):
    """``step`` is the newest that is whole, with its stages; ``safe`` whether the loss of this node
    takes nothing along, ``detail`` where it is, ``lacking`` what did not get where it should."""

    run: str
    step: int | None
    stages: list[str]
    safe: bool
    detail: str
    lacking: list[str] = []


class Drained(msgspec.Struct, frozen=True):
    safe: bool
    runs: list[DrainedRun] = []
