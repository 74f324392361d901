"""Faults on purpose: a tier that fails as told, and processes that die at a named place.

It knows verbs, counts, bytes and signals. It does not know what a caller should do about a fault.
Everything drawn at random comes from the seed, so a failing run can be had again.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtckpt._crash import CRASH_VARIABLE
from mtckpt.errors import ShortRead, TierError

if TYPE_CHECKING:
    from mtckpt.tiers.base import ObjectInfo, PutResult, Source, Tier

__all__ = ["CrashPoint", "Fault", "FaultyTier", "Injected"]

Verb = Literal["put", "read_into", "stat", "list", "delete"]
Corruption = Literal["flip", "zero_page", "truncate"]

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Args:
        verb: the method it happens in.
        error: a class of our tree (made with tier and key) or a function that makes the exception.
        nth: the first call that it hits, counted from 1 over calls whose key matches.
        times: how many calls in a row; None is for ever.
        after_call: the inner tier does its work first, and the answer is lost.
        corrupt: for reads: one bit flipped, one page zeroed, or the end missing.
        delay_s: wait before anything else.
        key_prefix: only keys that start with it.
    """

    verb: Verb
    error: type[TierError] | Callable[[], Exception] | None = None
    nth: int = 1
    times: int | None = 1
    after_call: bool = False
    corrupt: Corruption | None = None
    delay_s: float = 0.0
    key_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Injected:
    """One fault that did happen."""

    fault: Fault
    key: str
    call: int


class FaultyTier:
    """The inner tier, with faults. ``injected`` lists those that have happened, in order."""

    def __init__(self, inner: Tier, *, seed: int = 0, rules: Sequence[Fault] = ()) -> None:
        self.inner = inner
        self.name = inner.name
        self.survives = inner.survives
        self.injected: list[Injected] = []
        self._rules = tuple(rules)
        self._seen: Counter[Fault] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def put(self, key: str, source: Source) -> PutResult:
        """Store, or fail as told."""
        faults = self._due("put", key)
        result = self.inner.put(key, source)
        self._lose_answer(faults, key)
        return result

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """Read, then damage what was read; or fail as told."""
        faults = self._due("read_into", key)
        self.inner.read_into(key, out, offset)
        view = memoryview(out).cast("B")
        for fault in faults:
            self._corrupt(fault, key, view, offset)
        self._lose_answer(faults, key)

    def stat(self, key: str) -> ObjectInfo:
        """Look up, or fail as told."""
        faults = self._due("stat", key)
        info = self.inner.stat(key)
        self._lose_answer(faults, key)
        return info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List, or fail as told: at once, or with ``after_call`` in the middle."""
        faults = self._due("list", prefix)
        entries = self.inner.list(prefix)
        if not any(fault.after_call for fault in faults):
            return entries
        return self._broken_off([*entries], faults, prefix)

    def _broken_off(
        self, entries: Sequence[ObjectInfo], faults: Sequence[Fault], prefix: str
    ) -> Iterator[ObjectInfo]:
        yield from entries[: len(entries) // 2]
        self._lose_answer(faults, prefix)

    def delete(self, key: str) -> None:
        """Delete, or fail as told."""
        faults = self._due("delete", key)
        self.inner.delete(key)
        self._lose_answer(faults, key)

    def close(self) -> None:
        """Close the inner tier."""
        self.inner.close()

    def _due(self, verb: Verb, key: str) -> Sequence[Fault]:
        """The faults of this call. Those that need no inner call have happened on return."""
        due = []
        with self._lock:
            for fault in self._rules:
                if fault.verb != verb or not key.startswith(fault.key_prefix):
                    continue
                self._seen[fault] += 1
                call = self._seen[fault]
                last = float("inf") if fault.times is None else fault.nth + fault.times - 1
                if fault.nth <= call <= last:
                    self.injected.append(Injected(fault, key, call))
                    due.append(fault)
        for fault in due:
            if fault.delay_s:
                time.sleep(fault.delay_s)
            if fault.error is not None and not fault.after_call:
                raise self._made(fault, key)
        return due

    def _lose_answer(self, faults: Sequence[Fault], key: str) -> None:
        for fault in faults:
            if fault.error is not None and fault.after_call:
                raise self._made(fault, key)

    def _made(self, fault: Fault, key: str) -> Exception:
        error = fault.error
        assert error is not None
        if isinstance(error, type):
            made: Exception = error("injected fault", tier=self.name, key=key)
            return made
        return error()

    def _corrupt(self, fault: Fault, key: str, view: memoryview, offset: int) -> None:
        if fault.corrupt is None or not len(view):
            return
        with self._lock:
            place = self._random.randrange(len(view))
            bit = 1 << self._random.randrange(8)
        if fault.corrupt == "flip":
            view[place] ^= bit
        elif fault.corrupt == "zero_page":
            start = max(0, place - (offset + place) % PAGE_BYTES)
            stop = min(len(view), place - (offset + place) % PAGE_BYTES + PAGE_BYTES)
            view[start:stop] = bytes(stop - start)
        else:
            raise ShortRead(
                f"{key} ends early",
                tier=self.name,
                key=key,
                offset=offset,
                wanted_bytes=len(view),
                got_bytes=place,
            )


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """SIGKILL for a process at the ``nth`` pass of a named place in mtckpt.

    Give ``environment()`` to the process when it starts; a process that runs already cannot be
    told. The places are the calls of ``crash_point`` in the sources.
    """

    name: str
    nth: int = 1

    def environment(self) -> dict[str, str]:
        """This process's environment with the crash point in it."""
        return {**os.environ, CRASH_VARIABLE: f"{self.name}:{self.nth}"}
