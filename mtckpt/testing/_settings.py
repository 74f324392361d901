"""What all jobs of one simulated story have alike: the tiers, and how long who waits.

Knows the settings that a user would give. Knows no trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtckpt._schedule import Disk, ObjectStore, Peers

__all__ = ["RUN", "Settings"]

RUN = "simulated"  # no name of anything beneath the root of the machine that this runs on
URL = "s3://bucket/sim"


@dataclass(frozen=True, slots=True)
class Settings:
    """What all jobs of one simulation have alike."""

    has_disk: bool = True
    has_store: bool = False
    copies: int = 0
    slots: int = 2
    disk_every: int = 1
    store_every: int = 1
    keep: int = 2
    timeout_s: float = 20.0
    max_stall_s: float = 3.0

    def tiers(self) -> list[tuple[str, Any]]:
        """Label and settings of the slower tiers."""
        tiers: list[tuple[str, Any]] = []
        if self.has_disk:
            tiers.append(("disk", Disk("/", every=self.disk_every, keep=self.keep)))
        if self.copies:
            tiers.append(("peers", Peers(copies=self.copies)))
        if self.has_store:
            tiers.append(("store", ObjectStore(URL, every=self.store_every)))
        return tiers

    def due(self, step: int) -> list[str]:
        """The slower tiers of a step."""
        every = {"disk": self.disk_every, "peers": 1, "store": self.store_every}
        return [label for label, _ in self.tiers() if step % every[label] == 0]
