"""One run as this process takes part in it: its places to read from, and its incarnation.

Knows the session with the agent, the tiers' directories and how an incarnation starts. Does not
know state. Every look into a tier is bounded: a tier that hangs is an error that names it.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mtckpt import _inventory, _manifest, _restore
from mtckpt._manifest import Incarnation
from mtckpt._restore import Place
from mtckpt.agent import protocol
from mtckpt.errors import RestoreUnavailable, TierUnavailable
from mtckpt.tiers import LocalTier, Survives

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory
    from mtckpt._schedule import Disk
    from mtckpt._session import Session

__all__ = ["Run"]

_MIN_BYTES_PER_S = 20e6


class Run:
    """See the module. ``parent`` is the (incarnation, step) that a restore went on from."""

    def __init__(
        self,
        name: str,
        run_key: str,
        session: Session,
        disks: Sequence[Disk],
        labels: Sequence[str],
        timeout_s: float,
    ) -> None:
        self.name = name
        self.key = run_key
        self.session = session
        self.disks = list(disks)
        self.labels = list(labels)
        self.timeout_s = timeout_s
        self.incarnation: Incarnation | None = None
        self.parent: tuple[int, int] | None = None
        self._highest = 0
        self._scanned = False

    def places(self) -> list[Place]:
        opened = self.session.open()
        ram = LocalTier(opened.ram_root, name="ram", survives=Survives.PROCESS, read_only=True)
        disks = [
            Place(label, LocalTier(disk.path, read_only=True), mapped=False)
            for label, disk in zip(self.labels, self.disks, strict=True)
            if os.path.isdir(disk.path)
        ]
        return [Place("ram", ram, mapped=True), *disks]

    def scan(self, places: Sequence[Place]) -> tuple[dict[str, Inventory], dict[str, str]]:
        inventories, silent = _restore.scan_places(places, self.key, self.within)
        known = _inventory.all_incarnations(inventories.values())
        numbers = [i.number for i in known]
        numbers += [name.incarnation for inv in inventories.values() for name in inv.saves]
        self._highest = max([self._highest, *numbers])
        self._scanned = True
        return inventories, silent

    def within(self, label: str, work: Callable[[], Any], size_bytes: int = 0) -> Any:
        """Run ``work`` in a thread that may be left behind, so that a stuck tier is an error.

        It gets ``timeout_s``, and more for what it has to read at a rate that any disk has.
        """
        timeout_s = self.timeout_s + size_bytes / _MIN_BYTES_PER_S
        result: list[Any] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                result.append(work())
            except BaseException as error:  # noqa: BLE001 - raised by the caller below
                failure.append(error)

        thread = threading.Thread(target=run, name=f"mtckpt-read-{label}", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if failure:
            raise failure[0]
        if not result:
            raise TierUnavailable(
                f"tier {label} did not answer", tier=label, timeout_s=round(timeout_s, 1)
            )
        return result[0]

    def source(
        self, source: str | os.PathLike[str], places: Sequence[Place]
    ) -> tuple[list[Place], str]:
        """Another run of these tiers, or a directory of checkpoints."""
        text = os.fspath(source)
        if not isinstance(source, os.PathLike) and "/" not in text:
            return list(places), _manifest.run_key(text)
        root, _, key = os.path.abspath(text).rpartition("/")
        if not os.path.isdir(text):
            raise RestoreUnavailable(
                f"there is no directory {text}", tiers="source", state="live state unchanged"
            )
        return [Place("disk", LocalTier(root, read_only=True), mapped=False)], key

    def begin(self) -> None:
        """Start an incarnation before the first save of this start of the job."""
        if self.incarnation is not None:
            return
        self.session.open()
        if not self._scanned:
            self.scan(self.places())
        incarnation = Incarnation(
            version=_manifest.FORMAT_VERSION,
            run=self.name,
            number=self._highest + 1,
            id=str(uuid.uuid4()),
            parent=self.parent,
        )
        self.send_begin(incarnation)
        self._highest = incarnation.number
        self.session.incarnation = incarnation.number
        self.incarnation = incarnation

    def send_begin(self, incarnation: Incarnation) -> None:
        message = protocol.Begin(
            self.session.holder, incarnation.number, incarnation.id, incarnation.parent
        )
        self.session.call("incarnation", message, protocol.Begun)
