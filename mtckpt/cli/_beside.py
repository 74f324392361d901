"""What containers that are gone have left beside a disk: named by ``doctor``, deleted by ``rm``.

Knows how that is said. Which of it is nobody's any more, ``mtckpt.agent.beside`` decides.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mtckpt.cli import _output
from mtckpt.cli._output import confirmed, print_line, print_removed
from mtckpt.errors import StepNotFound

if TYPE_CHECKING:
    from mtckpt.agent.beside import Left

__all__ = ["delete_left", "left_at", "remove_left"]


def left_at(disk_path: str) -> list[Left]:
    """What there is beside a disk whose agent cannot be seen to live."""
    from mtckpt.agent import beside
    from mtckpt.agent.owners import boot_id

    return [one for one in beside.left(_place(disk_path), boot_id()) if one.agent != "lives"]


def remove_left(run: str, disk_path: str, *, yes: bool, as_json: bool) -> int:
    """``mtckpt rm RUN --beside DISK``: that alone, which needs no agent."""
    from mtckpt._handle import size_text
    from mtckpt._manifest import run_key

    left = left_at(disk_path)
    key = run if any(one.run_key == run for one in left) else run_key(run)
    there = [one for one in left if one.run_key == key]
    if not there:
        raise StepNotFound(
            f"no container that is gone has left anything of {run} in {_place(disk_path)}",
            state="nothing was removed",
            actions=[f"see what is left there: mtckpt doctor --disk {disk_path}"],
            run=run,
        )
    lines = [f"  {one.root} ({size_text(one.size_bytes)})" for one in there]
    if not yes and not confirmed([f"delete the slots of {run} from:", *lines], as_json=as_json):
        print_line("nothing was removed", err=True)
        return _output.WRONG
    removed, kept = delete_left(key, disk_path)
    return print_removed(run, removed, kept, as_json=as_json)


def delete_left(run_key: str, disk_path: str) -> tuple[list[str], list[str]]:
    """Delete what is nobody's any more: lines on what was deleted, and on what was kept."""
    from mtckpt._handle import size_text
    from mtckpt.agent import beside
    from mtckpt.agent.owners import boot_id

    deleted, kept = beside.delete(_place(disk_path), run_key, boot_id())
    return [f"left: {one.root} ({size_text(one.size_bytes)})" for one in deleted], [
        f"left: {one.root} {_why(one)}" for one in kept
    ]


def _why(one: Left) -> str:
    if one.agent == "unknown":
        return f"is of another host, and its job may live; if it does not: rm -r {one.root}"
    return "is kept while a job has the run" if one.agent == "gone" else "is in use"


def _place(disk_path: str) -> str:
    from mtckpt._slots import BESIDE

    return os.path.join(os.path.abspath(os.path.expanduser(disk_path)), BESIDE)
