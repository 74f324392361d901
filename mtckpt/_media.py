"""What the directories of Disk tiers lie on, and what that does not survive. Refuses nothing.

Knows mounts and devices. A directory that is not there yet will lie where its parents do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mtckpt import _probe

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Medium", "medium_of", "warn_of_media", "warnings_of"]

logger = logging.getLogger(__name__)

_said: set[str] = set()


class Medium(NamedTuple):
    """``device`` is the number that the kernel has for it; ``kind`` the type of file system."""

    device: int
    kind: str


def warn_of_media(paths: Mapping[str, str], media: Mapping[str, Medium]) -> None:
    """Log what the Disk tiers of these, label to path, do not survive; each thing once."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # another rank of this node says it
    for warning in warnings_of(paths, media):
        if warning not in _said:
            _said.add(warning)
            logger.warning("%s", warning)


def warnings_of(paths: Mapping[str, str], media: Mapping[str, Medium]) -> list[str]:
    """What is to be said of tiers on these media. Pure."""
    warnings: list[str] = []
    first: dict[int, str] = {}
    for label, medium in media.items():
        where = f"{label} at {paths[label]}"
        if medium.kind in ("tmpfs", "ramfs"):
            warnings.append(
                f"{where} is memory ({medium.kind}): what is called local there does not survive"
                " a reboot or a power cut. Choose a directory on a device"
            )
        elif (other := first.setdefault(medium.device, label)) != label:
            warnings.append(
                f"{where} and {other} at {paths[other]} are on one device: both are lost with it."
                " Choose directories on devices that fail apart, or leave one out"
            )
    return warnings


def medium_of(path: Path) -> Medium | None:
    """What a directory lies on; None where that cannot be known. Blocks where a device hangs."""
    try:
        there = next(each for each in (path, *path.parents) if each.exists())
        mount = _probe.mount_at(str(there))
        return Medium(there.stat().st_dev, mount.kind if mount is not None else "")
    except OSError:
        return None
