"""``mtckpt doctor``: one page on what this machine gives to checkpoints, and what falls back.

Reads and measures; what it writes for that has no name and is gone at once. Starts no agent.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from mtckpt.cli import _output
from mtckpt.cli._output import json_option, print_json, print_line, reporting
from mtckpt.cli._target import agent_status
from mtckpt.errors import CheckpointError

if TYPE_CHECKING:
    from mtckpt.cli._judge import Facts, Finding

__all__ = ["doctor", "gather"]

_PACKAGES = ("mtckpt", "numpy", "torch", "jax", "rich", "obstore", "prometheus-client")
_MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG"}


@click.command(short_help="Say what this machine gives to checkpoints.")
@click.option(
    "--disk",
    "disk_path",
    type=click.Path(),
    help="The directory that a Disk tier is to use. Default: ./checkpoints, or where that will be.",
)
@json_option
@reporting
def doctor(disk_path: str | None, as_json: bool) -> int:
    """Say what this machine gives to checkpoints, what falls back, and what to do about it.

    Takes a few seconds: it measures copies and writes. Where there is a CUDA driver, it takes some
    hundred MiB of each device for a moment. Exit status 1 if something is wrong.
    """
    from mtckpt.cli._judge import judge

    facts = gather(disk_path)
    findings = judge(facts)
    if as_json:
        print_json(
            {
                "facts": dataclasses.asdict(facts),
                "findings": [dataclasses.asdict(finding) for finding in findings],
            }
        )
    else:
        _print_page(facts, findings)
    wrong = any(finding.level == "wrong" for finding in findings)
    return _output.WRONG if wrong else _output.FINE


def _print_page(facts: Facts, findings: list[Finding]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    print_line(f"{versions}\n")
    for finding in findings:
        print_line(f"{_MARKS[finding.level]:<6} {finding.name:<13} {finding.value}")
    others = [finding for finding in findings if finding.level != "ok"]
    if not others:
        print_line("\nnothing falls back")
        return
    print_line("\nWhat falls back, and what to do")
    for finding in others:
        print_line(f"\n{finding.name}: {finding.why}")
        for action in finding.actions:
            print_line(f"    {action}")


def gather(disk_path: str | None = None) -> Facts:
    """Read and measure everything that the page needs."""
    from mtckpt import _probe
    from mtckpt.cli._beside import left_at
    from mtckpt.cli._devices import device_facts
    from mtckpt.cli._judge import Facts

    is_linux = sys.platform.startswith("linux")
    limits = _probe.read_text("/proc/self/limits")
    ram = _ram()
    return Facts(
        platform="linux" if is_linux else sys.platform,
        kernel=os.uname().release.partition("-")[0] if hasattr(os, "uname") else "",
        versions=_versions(),
        num_cores=_probe.num_cores(),
        num_numa_nodes=_probe.num_numa_nodes(),
        copy_bytes_per_s=_probe.copy_bytes_per_s(),
        memlock_bytes=_probe.limit_of(limits, "Max locked memory"),
        open_files=_probe.limit_of(limits, "Max open files"),
        peer_pidfd=_probe.has_peer_pidfd(),
        container=_probe.container(),
        gvisor=_probe.is_gvisor(_probe.read_text("/proc/version")),
        **_memory(),
        **ram,
        **device_facts(ram["ram_path"]),
        **_disk(disk_path or "checkpoints"),
        left=tuple(left_at(disk_path or "checkpoints")),
        **_agent(),
    )


def _versions() -> dict[str, str]:
    """Of what is installed; read from metadata, so that nothing is imported for it."""
    from importlib import metadata

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "mtckpt":
                versions[package] = "unknown"  # on PYTHONPATH, not installed
    return versions


def _memory() -> dict[str, Any]:
    from mtckpt._room import memory_left_bytes
    from mtckpt.agent.status import memory_limit_bytes

    left_bytes, bounded_by = memory_left_bytes()
    return {
        "memory_left_bytes": left_bytes,
        "memory_limit_bytes": memory_limit_bytes(),
        "memory_bounded_by": bounded_by,
    }


def _ram() -> dict[str, Any]:
    from mtckpt import _probe
    from mtckpt.agent.protocol import ram_base

    # The user's own directory there is made by the first agent: look at what it will lie in.
    path = os.environ.get("MTCKPT_RAM_DIR") or os.path.dirname(ram_base())
    mount = _probe.mount_at(path)
    free_bytes, total_bytes = _probe.free_and_total_bytes(path)
    facts = {
        "ram_path": path,
        "ram_kind": mount.kind if mount else "",
        "ram_mount": mount.path if mount else path,
        "ram_free_bytes": free_bytes,
        "ram_total_bytes": total_bytes,
        "ram_bytes_per_s": None,
        "ram_huge": False,
        "ram_huge_option": _huge_option(mount.option("huge") if mount else None),
        "ram_problem": "",
    }
    try:
        written = _probe.tmpfs_bytes_per_s(path)
    except OSError as error:
        return {**facts, "ram_problem": f"cannot be written: {error.strerror}"}
    return {**facts, "ram_bytes_per_s": written.bytes_per_s, "ram_huge": written.huge}


def _huge_option(mounted: str | None) -> str:
    """What the kernel does on this tmpfs: the switch of all of them wins where it is set."""
    from mtckpt import _probe

    switch = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    everywhere = _probe.shmem_enabled(_probe.read_text(switch))
    return everywhere if everywhere in ("force", "deny") else mounted or "never"


def _disk(path: str) -> dict[str, Any]:
    from mtckpt import _probe

    directory = os.path.abspath(os.path.expanduser(path))
    while not os.path.isdir(directory) and os.path.dirname(directory) != directory:
        directory = os.path.dirname(directory)  # it is made by the first save
    mount = _probe.mount_at(directory)
    free_bytes, _ = _probe.free_and_total_bytes(directory)
    facts = {
        "disk_path": directory,
        "disk_kind": mount.kind if mount else "unknown",
        "disk_free_bytes": free_bytes,
        "disk_bytes_per_s": None,
        "disk_direct": False,
        "disk_problem": "",
    }
    try:
        written = _probe.write_bytes_per_s(directory)
    except OSError as error:
        return {**facts, "disk_problem": f"cannot be written: {error.strerror}"}
    return {**facts, "disk_bytes_per_s": written.bytes_per_s, "disk_direct": written.direct}


def _agent() -> dict[str, Any]:
    from mtckpt.agent.status import bounded_by

    # An agent that is started from here is bounded as this process is.
    here = bounded_by()
    try:
        found = agent_status()
    except CheckpointError as error:
        return {"agent": None, "agent_problem": error.what, "bounded_by": here}
    if found is None:
        return {"agent": None, "bounded_by": here}
    agent = {
        "pid": found.pid,
        "mode": found.mode,
        "mtckpt": found.mtckpt,
        "uptime_s": found.uptime_s,
        "num_runs": len(found.runs),
    }
    return {"agent": agent, "bounded_by": found.bounded_by}
