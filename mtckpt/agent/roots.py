"""The directories of slots that an agent has: taken for itself alone, noted for the next agent.

Knows the list of them, which is kept beside the agent's socket. One may lie on a disk that does not
answer: then that directory is not usable, and nothing else waits for it. Does not know runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import TypeVar

from mtckpt.agent import beside
from mtckpt.agent.holding import NOTE, Lock, lock, noted
from mtckpt.errors import AgentUnavailable, CheckpointError, TierUnavailable, UsageError
from mtckpt.tiers._os_errors import tier_error

__all__ = ["Roots", "aside"]

logger = logging.getLogger(__name__)

ROOTS_NAME = "ram-roots.json"
MAX_ROOTS = 64
# An agent that ends may still be writing there.
WAIT_S = 3.0
MAX_MADE = 10
_POLL_S = 0.05
ANSWER_S = 10.0
# What a run may wait for at its start. Another of its tiers may have all that it needs; and a disk
# that is slow to wake up may have the newest of it.
LOOK_S, MIN_LOOK_S, LOOK_SHARE = 5.0, 0.3, 0.2
RENEW_S = 0.3
MAX_HANGING = 4
_T = TypeVar("_T")
_hanging: Counter[str] = Counter()  # threads that were left behind, by what they wait for


async def aside(work: Callable[[], _T], where: str, timeout_s: float = ANSWER_S) -> _T:
    """``work`` in a thread that is left behind where a disk hangs. Raises TierUnavailable then, and
    at once where some have been left there already."""
    if _hanging[where] >= MAX_HANGING:
        raise TierUnavailable(f"{where} does not answer", tier="ram")
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if done.cancelled():  # nobody waits: it was left behind
            _hanging[where] -= 1
        elif error is None:
            done.set_result(result)  # type: ignore[arg-type]  # of a work that has ended
        else:
            done.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    try:
        threading.Thread(target=run, name=f"mtckpt-{where}", daemon=True).start()
    except RuntimeError as error:
        raise TierUnavailable(f"{where} was not asked: {error}", tier="ram") from error
    try:
        return await asyncio.wait_for(done, timeout_s)
    except asyncio.TimeoutError:
        raise TierUnavailable(
            f"{where} did not answer within {timeout_s:g} s", tier="ram"
        ) from None
    finally:
        _hanging[where] += done.cancelled()


class Roots:
    """The directories of slots that this agent has. ``directory`` is where it is reached.

    ``loaded`` are those whose runs it has taken in.
    """

    def __init__(self, directory: str, default: str = "", boot_id: str = "") -> None:
        self.loaded: list[str] = []
        self._directory = directory
        self._default = default
        self._boot_id = boot_id
        self._path = os.path.join(directory, ROOTS_NAME)
        self._locks: dict[str, Lock | None] = {}  # None where nothing can be locked
        self._changing = threading.Lock()  # of that, and nobody waits for a disk with it
        self._noted: list[str] = []
        self.unlooked: dict[str, str] = {}  # by run: why what may be left of it was not looked for
        self._lost: set[str] = set()
        self._looking: set[str] = set()  # those that a look has not come back from

    def known(self) -> list[str]:
        """Those of this agent and of the one before it; the default one first."""
        self._read()
        return list(dict.fromkeys([self._default, *self._noted]))

    async def check(self, root: str) -> None:
        """Raises TierUnavailable where one does not say whether it is there."""
        await aside(functools.partial(_is_there, root), root)

    async def there(self, roots: Collection[str]) -> dict[str, TierUnavailable | None]:
        """Those of them that are there, or why that is not known."""
        looks = [aside(functools.partial(_is_there, root), root) for root in roots]
        found: dict[str, TierUnavailable | None] = {}
        for root, look in zip(
            roots, await asyncio.gather(*looks, return_exceptions=True), strict=True
        ):
            if isinstance(look, TierUnavailable):
                found[root] = look
            elif isinstance(look, BaseException):
                raise look
            elif look:
                found[root] = None
        return found

    async def may_have_runs(self) -> bool:
        """Whether any of them has a run, or does not say in time that it has none."""
        looks = [aside(functools.partial(_is_empty, root), root) for root in self.known()]
        looked = await asyncio.gather(*looks, return_exceptions=True)
        return any(is_empty is not True for is_empty in looked)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), open(self._path, "rb") as file:
            paths = [path for path in json.load(file)[:MAX_ROOTS] if isinstance(path, str)]
            self._noted = list(dict.fromkeys(paths))

    def named(self, ram_path: str) -> str:
        """The one that a job asks for; "" is the default one. Raises UsageError."""
        root = os.path.normpath(ram_path or self._default)
        if not os.path.isabs(root):
            raise UsageError("the RAM directory must be an absolute path", path=root)
        return root

    def note(self, root: str) -> None:
        """Have the next agent look there too. Raises UsageError where there are too many."""
        if root in (self._default, *self._noted):
            return
        if len(self._noted) >= MAX_ROOTS:
            raise UsageError(f"this agent has {MAX_ROOTS} RAM directories already")
        self._write([*self._noted, root])

    def _write(self, noted: list[str]) -> None:
        self._noted = noted
        temporary = f"{self._path}.{os.getpid()}"
        with contextlib.suppress(OSError):  # the default directory is always looked at
            with open(temporary, "w") as file:
                json.dump(noted, file)
            os.replace(temporary, self._path)

    async def own(self, place: str) -> str:
        """This agent's directory beside a disk, made where it has none yet. Raises TierUnavailable,
        TierError."""
        ours = dict.fromkeys([*self.loaded, *self._noted, *self._locks])
        there = [root for root in ours if os.path.dirname(root) == place]
        for root in filter(beside.is_one, there):
            # What was empty as the agent before this one ended went with it.
            if root in self.loaded or await aside(functools.partial(os.path.isdir, root), place):
                return root
        try:
            return await aside(functools.partial(self._make, place), place)
        except OSError as error:
            raise tier_error(error, doing="open", tier="ram", key=None, place=place) from error

    def _make(self, place: str) -> str:
        """A new one, which is this agent's. Until it is, whoever looks there for what dead agents
        have left takes it for one that has nothing, and tidies it away."""
        for _ in range(MAX_MADE):
            with contextlib.suppress(FileNotFoundError, TierUnavailable):  # so it was
                root = beside.make(place, self._boot_id)
                if self._try(root):
                    beside.tidy(place, root, self._boot_id)
                    return root
        raise TierUnavailable(f"{place} is being tidied up by other agents", tier="ram")

    async def take_over(
        self,
        run_key: str,
        place: str,
        patience_s: float = 60.0,
        known: str = "",
        *,
        alone: bool = False,
    ) -> str:
        """Where a run that agents which are gone have left beside a disk is from now on: this
        agent's directory there, ``known`` if the run is in that. "" where nothing came that could
        be taken over, or where the disk does not say so within a part of ``patience_s``. Whose
        agent lives is another rank's, unless there is ``alone`` this one."""
        try:
            look = functools.partial(beside.has_left, place, run_key)
            look_s = min(LOOK_S, max(MIN_LOOK_S, LOOK_SHARE * patience_s))
            if not await aside(look, place, look_s):
                return ""
            own = known or await self.own(place)
            self.note(own)
            await self.take(own)  # before anything is in it
            take_over = functools.partial(beside.take_over, place, run_key, own, self._boot_id)
            taken = await aside(take_over, place)
        except (OSError, CheckpointError) as error:
            what = error.what if isinstance(error, CheckpointError) else error
            self._pass_over(run_key, f"{place} is not looked into: {what}")
            return ""
        for root in taken.living if alone else ():
            self._pass_over(
                run_key,
                f"another agent, at {noted(root) or 'another directory'}, lives and has slots of it"
                f" in {root}: end that one, and start again",
            )
        for root in taken.left:
            self._pass_over(
                run_key,
                f"an agent of another host has left slots in {root}, and nobody can tell from here"
                " whether its job lives: remove that directory if it does not",
            )
        for root, why in taken.refused.items():
            self._pass_over(
                run_key, f"what an agent that is gone has left in {root} is not taken over: {why}"
            )
        return own if taken.brought or (taken.here and not known) else ""

    def _pass_over(self, run_key: str, why: str) -> None:
        logger.warning("run %s: %s", run_key, why)
        known = self.unlooked.get(run_key, "")
        if why not in known:
            self.unlooked[run_key] = f"{known}; {why}" if known else why

    async def take(self, root: str) -> None:
        """Have a directory that is there for this agent alone. Raises AgentUnavailable."""
        deadline_s = time.monotonic() + WAIT_S
        while root not in self._locks and not await aside(lambda: self._try(root), root):
            if time.monotonic() >= deadline_s:
                other = noted(root) or "another directory"
                raise AgentUnavailable(
                    f"another agent of this user, at {other}, has the memory in {root}",
                    state="nothing was done",
                    actions=[
                        f"let this job use that one: MTCKPT_RUNTIME_DIR={other}",
                        "or give it memory of its own: MTCKPT_RAM_DIR",
                    ],
                    path=root,
                )
            await asyncio.sleep(_POLL_S)

    async def renew(self) -> None:
        """Take directories again that somebody has removed, and that were made anew."""
        for root, held in list(self._locks.items()):
            if held is None or root in self._looking:
                continue  # a disk that hangs has one thread, not one more every time
            with contextlib.suppress(TierUnavailable):
                await aside(functools.partial(self._renew, root, held), root, RENEW_S)

    def _renew(self, root: str, held: Lock) -> None:
        self._looking.add(root)
        try:
            if self._locks.get(root) is not held:
                return  # it was let go of
            if held.is_of(root) or self._try(root, instead_of=held):
                self._lost.discard(root)
            elif root not in self._lost and self._locks.get(root) is held:
                self._lost.add(root)
                logger.warning("%s was made anew, and another agent has it", root)
        except (OSError, TierUnavailable):
            return  # it is not there: nobody has it
        finally:
            self._looking.discard(root)

    async def let_go(self, used: Collection[str]) -> None:
        """Let others have those where nothing is, or that are gone themselves."""

        async def leave(root: str) -> None:
            with contextlib.suppress(TierUnavailable):
                # A look that comes back late says nothing of what is there by then.
                if await aside(functools.partial(_is_empty, root), root):
                    self.loaded = [path for path in self.loaded if path != root]
                    self._write([path for path in self._noted if path != root])
                    await aside(functools.partial(self._release, root), root)

        # Of those that are locked alone nobody was told: a disk had not answered in time.
        roots = {*self.loaded, *self._noted, *self._locks} - {*used, self._default}
        await asyncio.gather(*map(leave, roots))  # none later because another one hangs

    def _release(self, root: str) -> None:
        """Unlock a directory; one beside a disk goes, if it has no run."""
        with self._changing:
            held = self._locks.pop(root, None)
        with contextlib.suppress(OSError):
            if noted(root) == self._directory:
                os.unlink(os.path.join(root, NOTE))
        if held is not None:
            if beside.is_one(root):
                beside.remove(root, held)
            held.close()

    async def close(self) -> None:
        """Let others have them, none later because another one hangs. Idempotent."""
        leaves = [aside(functools.partial(self._release, root), root) for root in self._locks]
        for error in await asyncio.gather(*leaves, return_exceptions=True):
            if isinstance(error, BaseException):  # its lock ends with this process
                logger.info("%s", error)

    def _put(self, root: str, held: Lock | None, instead_of: Lock | None) -> bool:
        with self._changing:
            before = self._locks.get(root)
            if instead_of is not None and before is not instead_of:
                return False
            self._locks[root] = held
        if before is not None:
            before.close()
        return True

    def _try(self, root: str, instead_of: Lock | None = None) -> bool:
        """Whether a directory is this agent's from now on; not if it was to have it ``instead_of``
        a lock that was let go of meanwhile."""
        try:
            held = lock(root)
        except OSError as error:
            logger.warning("%s cannot be locked: %s; one agent alone must use it", root, error)
            return self._put(root, None, instead_of)
        if held is None:
            return False
        if not self._put(root, held, instead_of):
            held.close()
            return False
        with contextlib.suppress(OSError):  # full: a hint less
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(os.path.join(root, NOTE), flags, 0o600), "wb") as file:
                file.write(os.fsencode(self._directory))
        return True


def _is_there(root: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(root).st_mode)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return False
        raise TierUnavailable(f"{root} is not looked into: {error.strerror}", tier="ram") from error


def _is_empty(root: str) -> bool:
    """Whether a directory of slots has no run, or is gone itself. Directories with nothing in them
    are of what was deleted while somebody still had it open."""
    try:
        with os.scandir(root) as entries:
            runs = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    unreadable: list[OSError] = []
    found = (files for run in runs for _, _, files in os.walk(run, onerror=unreadable.append))
    return not any(found) and not unreadable
