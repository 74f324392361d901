"""One run as this process takes part in it: its places to read from, and its incarnation.

Knows the session with the agent, the tiers' directories and how an incarnation starts. Does not
know state. Every look into a tier is bounded: a tier that hangs is an error that names it.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from mtckpt import _coordination, _holdings, _joining, _manifest, _restore
from mtckpt._access import Access, check_url, open_store, scheme_of
from mtckpt._coordination import Group, Single
from mtckpt._handshake import new_secret
from mtckpt._joining import Needs
from mtckpt._manifest import Incarnation, SaveName
from mtckpt._patience import NoThread, in_time
from mtckpt._pieces import ALONE, Members
from mtckpt._places import is_directory
from mtckpt._probe import tier_label
from mtckpt._restore import Place
from mtckpt._schedule import ObjectStore, Peers
from mtckpt.adapters import find_group
from mtckpt.agent import protocol
from mtckpt.errors import (
    CheckpointError,
    GroupMissing,
    RestoreUnavailable,
    RunLocked,
    StepDisagreement,
    TierUnavailable,
    UsageError,
)
from mtckpt.tiers import LocalTier, Survives

if TYPE_CHECKING:
    from mtckpt._holdings import Holdings
    from mtckpt._inventory import Inventory
    from mtckpt._schedule import SlowTier
    from mtckpt._session import Session
    from mtckpt.tiers import Tier

__all__ = ["Run"]

logger = logging.getLogger(__name__)

_MIN_BYTES_PER_S = 20e6
# What a store gets to say what it has, where this node has a step: a crash of the training process
# is not to be waited out because the network is.
_STORE_PATIENCE_S = 10.0
# Over a network, where a tier gives up by itself when nothing comes any more.
_MIN_FAR_BYTES_PER_S = 1e6
# Of one thread: what is looked at in another may still need its time.
_hurries = contextvars.ContextVar("_hurries", default=False)


class Run:
    """See the module. ``parent`` is the (incarnation, step) that a restore went on from."""

    def __init__(
        self,
        name: str,
        run_key: str,
        session: Session,
        tiers: Sequence[SlowTier],
        labels: Sequence[str],
        timeout_s: float,
        group: object = None,
    ) -> None:
        self.name = name
        self.key = run_key
        self.session = session
        self.tiers = list(tiers)
        self.labels = list(labels)
        self.timeout_s = timeout_s
        self.group: Group = Single()
        self._given = group
        self._lock = threading.Lock()  # threads may look at a run while one saves
        self._entered = self._joined = self._has_layout = False
        self._meeting = _coordination.Meeting()
        self.members = ALONE
        self.short: tuple[int, int] | None = None  # what all ranks of a node need, of what is left
        self.incarnation: Incarnation | None = None
        self.parent: tuple[int, int] | None = None
        # To name in errors.
        self._paths = {
            label: tier.place for label, tier in zip(self.labels, self.tiers, strict=True)
        }
        self._stores: dict[str, Tier] = {}
        self.connections = contextlib.ExitStack()  # to stores: closed with the Checkpointer
        self._highest = 0
        self._starting: Incarnation | None = None  # agreed on, and not yet known to the agent
        self._scanned = False
        self._newest: SaveName | None = None  # of earlier starts
        self.is_restored = False  # somebody asked what there is to go on from

    # -- the ranks of the job --------------------------------------------------------------------

    def enter(self) -> None:
        """Find out which rank this is, when somebody first needs to know. Raises GroupMissing."""
        with self._lock:
            if self._entered:
                return
            self.group = group = _coordination.choose(self._given, lambda: find_group(self.key))
            self.session.rank, self.session.world_size = group.rank, group.world_size
            self._entered = True

    def join(self) -> None:
        """Learn which ranks are on this node, and let the agents of several nodes know each other;
        all ranks do, before the first restore or save.

        Raises GroupMissing where their agents cannot be joined, RankTimeout, UsageError, and
        PlacementImpossible where copies are insisted on that these nodes cannot hold.
        """
        self.enter()
        if self._joined:
            return
        with self.meeting():
            if self.group.world_size == 1:
                self._check_placement([protocol.NodeOfRun(_joining.nowhere(""), [0])])
            else:
                self._join_ranks()
        self._joined = True

    def _join_ranks(self) -> None:
        group = self.group
        opened = self.session.open()
        node = self.within("ram", lambda: _joining.node_of(opened))
        told = self.exchange("join", [node, opened.agent_id, ["ram", *self.labels]])
        nodes = _joining.nodes_of(told)
        here = tuple(rank for rank, node in enumerate(nodes) if node == nodes[group.rank])
        if len(here) < group.world_size:
            agents = {agent: node for (_, agent, _), node in zip(told, nodes, strict=True)}
            if len(set(agents.values())) < len(set(nodes)):
                raise UsageError(
                    "ranks of one node have their memory in different directories",
                    state="nothing was done",
                    actions=("give Ram() the same path on all ranks of a node",),
                )
            self.join_nodes(nodes)
        else:
            self._check_placement(
                [protocol.NodeOfRun(_joining.nowhere(opened.boot_id), list(here))]
            )
        self.members = Members(group.rank, group.world_size, here)

    def join_nodes(self, nodes: Sequence[str]) -> None:
        """Have the agents of all nodes told of one another, or of where each is by now. The secret
        that they prove to each other is drawn by rank 0, and travels through the group only."""
        before, secret = self.session.joined, ""
        failure: CheckpointError | None = None
        address: protocol.PeerAddress | None = None
        try:
            address = self.session.listen(_coordination.host_of(self.group))
        except CheckpointError as error:
            failure = error
        if self.group.rank == 0:
            secret = new_secret().hex() if before is None else before.secret
        told = self.exchange(
            "listen",
            [
                None if address is None else msgspec.to_builtins(address),
                secret,
                failure.what if failure else "",
            ],
        )
        if failure is not None:
            raise failure
        for rank, (_, _, why) in enumerate(told):
            if why:
                raise GroupMissing(
                    f"other nodes cannot reach the agent of rank {rank}: {why}",
                    rank=rank,
                    state="nothing was done",
                )
        joined = _joining.joined_of(nodes, told)
        self._check_placement(joined.nodes)
        self.session.join(joined)
        # No agent is spoken to by one that has not been told of it.
        self.exchange("joined", None)

    def _check_placement(self, nodes: Sequence[protocol.NodeOfRun]) -> None:
        """Say what copies on these nodes cannot survive. Raises PlacementImpossible."""
        for warning in _joining.warnings_of(self.tiers, nodes):
            if self.group.rank == 0:
                logger.warning("run %s: %s", self.name, warning)

    @property
    def lacks_layout(self) -> bool:
        """Whether ranks are still to agree on who captures what, and where."""
        return not self._has_layout and self.members.world_size > 1

    def _agree_on_layout(self, told: Sequence[Needs | None]) -> None:
        """Where memory does not hold on each node all that its ranks hold, nodes share out what
        they hold alike; one that has too little even so is ``short``. Decided once, at the first
        save, from what all ranks told of themselves."""
        lacked, self._has_layout = self.lacks_layout, True
        needs = [each for each in told if each is not None]
        if not lacked or len(needs) < len(told):
            return
        joined = self.session.joined
        nodes = [node.ranks for node in joined.nodes] if joined else [self.members.node]
        layouts = _joining.layouts_of(needs, nodes, self.tiers)
        own = next(at for at, ranks in enumerate(nodes) if self.members.rank in ranks)
        if not layouts[own].fits:
            room_bytes = min(needs[rank].room_bytes for rank in nodes[own])
            self.short = layouts[own].needed_bytes, room_bytes
        layout = _joining.layout_of(layouts)
        if joined and layout.name == "spread":
            ring, copies = _joining.ring_of(joined.nodes, self.tiers)
            self.members = replace(self.members, spread=ring, copies=copies)
            if self.group.rank == 0:
                logger.warning("run %s: %s", self.name, layout.reason)

    def exchange(self, stage: str, value: object, *, patient: bool = False) -> list[Any]:
        """What every rank gave; ``patient`` where some may wait for their tiers meanwhile.

        Raises RankTimeout.
        """
        timeout_s = self._patience_s() if patient else self.timeout_s
        with self._meeting.hearing():
            return _coordination.exchange(self.group, stage, value, timeout_s)

    def _patience_s(self) -> float:
        return self.timeout_s * (2 + len(self.tiers))

    @contextlib.contextmanager
    def together(
        self, stage: str, foreign: Callable[[int, str, str], CheckpointError], reading_s: float = 0
    ) -> Iterator[None]:
        """See ``_coordination.together``. Others may have to wait for each of their tiers, and to
        read for so long, while this rank had luck."""
        patience_s = self._patience_s() + reading_s
        done = _coordination.together(self.group, stage, patience_s, foreign)
        with self._meeting.hearing(), done:
            yield

    def meeting(self) -> contextlib.AbstractContextManager[None]:
        """Around what all ranks do together; see ``_coordination.Meeting``."""
        return self._meeting.of(self.group)

    def places(self) -> list[Place]:
        """Every tier that there is, fastest first. One that hangs says so when it is scanned."""
        self.enter()
        opened = self.session.open()

        def look() -> Place:
            root = opened.ram_root
            tier = LocalTier(root, name="ram", survives=Survives.PROCESS, read_only=True)
            # Beside a disk that fails, a mapping would end this process with SIGBUS.
            return Place("ram", tier, mapped=tier_label(root) == "ram")

        ram = self._or_silent("ram", look)
        found = [ram if isinstance(ram, Place) else Place("ram", ram, mapped=False)]
        for label, settings in zip(self.labels, self.tiers, strict=True):
            tier = self._opened(label, settings)
            if tier is not None:
                near = not isinstance(settings, ObjectStore)
                found.append(Place(label, tier, mapped=False, near=near))
        return found

    def _opened(self, label: str, settings: SlowTier) -> Tier | None:
        """The tier, None where there is no directory yet; opened in a thread, as it may hang."""
        if isinstance(settings, Peers):
            return None  # other nodes' memory, which their agents serve

        def look() -> Tier | None:
            if isinstance(settings, ObjectStore):
                # Kept open: a connection that stands is not made again at the next look.
                if label in self._stores:
                    return self._stores[label]
                store = open_store(
                    settings.place, settings.access, name=label, timeout_s=self.timeout_s
                )
                self.connections.callback(store.close)
                return self._stores.setdefault(label, store)  # another thread may be faster
            if not is_directory(Path(settings.place), label):
                return None
            return LocalTier(settings.place, name=label, read_only=True)

        return cast("Tier | None", self._or_silent(label, look))

    def _or_silent(self, label: str, look: Callable[[], Any]) -> Any:
        try:
            return self.within(label, look)
        except CheckpointError as error:  # nothing but ``list`` is called before it answered
            return _restore.Silent(label, Survives.PROCESS | Survives.POWER, error)

    def scan(self, places: Sequence[Place]) -> tuple[dict[str, Inventory], dict[str, str]]:
        """Every place's inventory, and the reason of each that does not answer."""
        inventories: dict[str, Inventory] = {}
        silent: dict[str, str] = {}
        for place in places:
            held = [save for inv in inventories.values() for save in inv.saves.values()]
            with self.hurrying(any(save.complete for save in held)):
                found, without = _restore.scan_places([place], self.key, self.within)
            inventories.update(found)
            silent.update(without)
        self.note([_holdings.holdings_of(each) for each in inventories.values()])
        return inventories, silent

    @contextlib.contextmanager
    def hurrying(self, hurries: bool) -> Iterator[None]:
        """While this is held, a store does not get long to answer."""
        before = _hurries.get()
        try:
            _hurries.set(hurries)
            yield
        finally:
            _hurries.set(before)

    def note(self, holdings: Sequence[Holdings]) -> None:
        """Take in which incarnations there have been."""
        numbers = [each.number for held in holdings for each in held.incarnations]
        saves = [SaveName.parse(save.save) for held in holdings for save in held.saves]
        names = [name for name in saves if name is not None]
        numbers += [name.incarnation for name in names]
        with self._lock:
            self._highest = max([self._highest, *numbers])
            self._newest = max(names, key=lambda name: (name.incarnation, name.step), default=None)
            self._scanned = True

    def reading_s(self, label: str, size_bytes: int) -> float:
        """How long so many bytes may take from a tier that is to count as one that answers."""
        is_far = label.partition("-")[0] in ("peers", "store")
        return size_bytes / (_MIN_FAR_BYTES_PER_S if is_far else _MIN_BYTES_PER_S)

    def within(self, label: str, work: Callable[[], Any], size_bytes: int = 0) -> Any:
        """Run ``work`` in a thread that may be left behind, so that a stuck tier is an error.

        It gets ``timeout_s``, and more for what it has to read at a rate that any disk has.
        """
        timeout_s = self.timeout_s + self.reading_s(label, size_bytes)
        if _hurries.get() and label in self._stores:
            timeout_s = min(timeout_s, _STORE_PATIENCE_S)
        try:
            result = in_time(work, timeout_s, name=f"mtckpt-read-{label}")
        except NoThread as error:
            raise TierUnavailable(f"tier {label} was not asked: {error}", tier=label) from error
        if not result:
            path = self._place_of(label)
            where = f" at {path}" if path else ""
            raise TierUnavailable(
                f"tier {label}{where} did not answer within {timeout_s:.1f} s",
                tier=label,
                path=path,
                timeout_s=round(timeout_s, 1),
            )
        return result[0]

    def _place_of(self, label: str) -> str | None:
        opened = self.session.opened
        return opened.ram_root if label == "ram" and opened else self._paths.get(label)

    def source(
        self, source: str | os.PathLike[str], places: Sequence[Place]
    ) -> tuple[list[Place], str]:
        """Another run of these tiers, or the place of one: a directory, or the URL of a store."""
        text = os.path.expanduser(source)
        if not isinstance(source, os.PathLike) and "/" not in text:
            return list(places), _manifest.run_key(text)
        is_store = "://" in text
        root, _, key = (check_url(text) if is_store else os.path.abspath(text)).rpartition("/")
        self._paths["source"] = root

        def look() -> tuple[Tier | None, str]:
            if is_store:
                access = self._access_like(text)
                return open_store(root, access, name="store", timeout_s=self.timeout_s), key
            for name in (key, _manifest.run_key(key or "run")):  # whose name may be no file name
                if is_directory(Path(root, name)):
                    return LocalTier(root, read_only=True), name
            return None, key

        try:
            tier, key = self.within("source", look)
        except CheckpointError as error:
            raise RestoreUnavailable(
                error.what, tiers="source", state="live state unchanged"
            ) from error
        if tier is None:
            raise RestoreUnavailable(
                f"there is no directory {text}",
                tiers="source",
                state="live state unchanged",
                actions=("give the directory of the run itself, as in source='checkpoints/RUN'",),
            )
        return [Place("store" if is_store else "disk", tier, mapped=False)], key

    def _access_like(self, url: str) -> Access:
        """As a store of that kind among the tiers is reached, else as the environment says."""
        stores = [tier for tier in self.tiers if isinstance(tier, ObjectStore)]
        alike = [each.access for each in stores if scheme_of(each.place) == scheme_of(url)]
        return alike[0] if alike else Access()

    def restart(self, parent: tuple[int, int] | None) -> None:
        """Go on from another step: the next save starts an incarnation."""
        self.parent, self.incarnation, self._starting = parent, None, None

    def prepare(self, needs: Needs | None = None) -> Incarnation:
        """Agree with the other ranks on the incarnation that is to start, and on who captures what.
        ``needs`` is what this rank is about to capture, None where it cannot tell: each node
        captures all then."""
        self.session.open()
        if self._starting is None:
            self._starting = self._agree_on_start(needs)
            self._warn_of_what_is_left()
        return self._starting

    def begin(self) -> None:
        """Start an incarnation before the first save of this start of the job."""
        if self.incarnation is not None:
            return
        starting = self.prepare()
        try:
            self.send_begin(starting)
        except RunLocked:
            self._starting = None  # somebody else took that number
            raise
        self.incarnation, self._starting = starting, None
        with self._lock:
            self._highest = self.session.incarnation = starting.number

    def _warn_of_what_is_left(self) -> None:
        """Who forgets to restore loses what earlier starts have saved, one save after another."""
        if self._newest is not None and not self.is_restored and self.group.rank == 0:
            logger.warning(
                "run %s: restore() was not called, so this start begins anew: step %d and all that"
                " was saved before is abandoned, and deleted first. Call restore() before the first"
                " save, or give this job another run name",
                self.name, self._newest.step,
            )  # fmt: skip

    def _agree_on_start(self, needs: Needs | None) -> Incarnation:
        """The same incarnation on every rank: a number above all that any of them has seen."""
        with self.meeting():
            if not self._scanned:
                self.scan(self.places())
            host = [socket.gethostname(), self.session.pid]
            highest = max(self._highest, self.session.open().highest)
            mine = [highest, str(uuid.uuid4()), self.parent, host, needs]
            told = self.exchange("begin", mine)
        parents = [parent and tuple(parent) for _, _, parent, _, _ in told]
        if len(set(parents)) > 1:
            raise StepDisagreement(
                f"ranks go on from different steps: {parents[:8]} (incarnation, step)",
                stage="begin",
                state="nothing was saved",
                actions=("call restore on every rank, with the same arguments",),
            )
        self._agree_on_layout([each and Needs(*each) for *_, each in told])
        return Incarnation(
            version=_manifest.FORMAT_VERSION,
            run=self.name,
            number=max(highest for highest, *_ in told) + 1,
            id=told[0][1],
            parent=self.parent,
            host=told[0][3][0],
            pid=told[0][3][1],
        )

    def fetch(
        self, name: SaveName, ranks: Sequence[int], show: Callable[[int], None]
    ) -> str | None:
        """Have the shards of some ranks brought from a store to this node; the tier that has them
        now, None if none.

        ``show`` is told how many bytes have come. Restoring goes on without it: from the store.
        """
        message = protocol.Fetch(self.session.holder, str(name), ranks=list(ranks))
        try:
            while not (news := self.session.call("fetch", message, protocol.Fetched)).label:
                show(news.done_bytes)
        except CheckpointError as error:
            logger.info("run %s: %s is not fetched: %s", self.name, name, error.what)
            return None
        return str(news.label)

    def send_begin(self, incarnation: Incarnation) -> None:
        message = protocol.Begin(
            self.session.holder,
            incarnation.number,
            incarnation.id,
            incarnation.parent,
            incarnation.host,
            incarnation.pid,
        )
        self.session.call("incarnation", message, protocol.Begun)
