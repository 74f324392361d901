"""What /status and /metrics say, and what may end the agent before the node does.

Reads the state of the runs and this process's cgroup; changes nothing and waits for nothing.
"""

from __future__ import annotations

import functools
import os
import re
import time
from typing import TYPE_CHECKING

from mtckpt.agent import protocol
from mtckpt.agent.protocol import AgentStatus, RunStatus, SlotStatus, TierStatus
from mtckpt.agent.saves import RAM, SaveState
from mtckpt.errors import UnsupportedPlatform

if TYPE_CHECKING:
    from mtckpt.agent.registry import Registry
    from mtckpt.agent.runs import RunState

__all__ = ["agent_status", "bounded_by", "prometheus_text"]

_STARTED_S = time.monotonic()


def agent_status(registry: Registry) -> AgentStatus:
    """All that an operator asks for."""
    return AgentStatus(
        protocol.PROTOCOL_VERSION,
        _version(),
        registry.agent_id,
        registry.boot_id,
        os.getpid(),
        "service" if registry.service else "own",
        registry.host,
        round(time.monotonic() - _STARTED_S, 3),
        bounded_by(),
        [_run_status(run) for _, run in sorted(registry.runs.items())],
        registry.drainer.reason,
    )


@functools.cache
def _version() -> str:
    """The installed version; "unknown" where mtckpt is on PYTHONPATH and not installed."""
    from importlib import metadata

    try:
        return metadata.version("mtckpt")
    except metadata.PackageNotFoundError:
        return "unknown"


def _run_status(run: RunState) -> RunStatus:
    owner = next(iter(run.owners.values()), None)
    tiers = [_tier_status(run, RAM, "ram", run.ram.path)]
    for tier in run.tiers.values():
        problem = tier.problem
        tiers.append(
            _tier_status(
                run,
                tier.label,
                tier.config.kind,
                tier.config.path,
                problem=problem,
                bytes_per_s=round(tier.bytes_per_s),
                done_bytes=tier.done_bytes,
                total_bytes=tier.total_bytes,
                keep=tier.config.keep,
                not_deleted=tier.denied,
                weak=any(tier.label in save.weak for save in run.saves.values()),
            )
        )
    slots = [
        SlotStatus(
            slot.slot_id,
            slot.state.value,
            slot.shard_bytes,
            run.saves[slot.save].name.step if slot.save in run.saves else None,
        )
        for slot in run.slots.values()
    ]
    return RunStatus(
        run.run,
        run.incarnation,
        owner.pid if owner else 0,
        bool(owner and not owner.dead),
        tiers,
        slots,
        dict(run.counters),
    )


def _tier_status(run: RunState, label: str, kind: str, path: str, **rest: object) -> TierStatus:
    held = sorted(complete(run, label), key=lambda save: save.order)
    newest = held[-1] if held else None
    owed = sorted(save.name.step for save in run.saves.values() if label in save.owed)
    facts = {
        "label": label,
        "kind": kind,
        "path": path,
        "steps": [save.name.step for save in held],
        "newest_step": newest.name.step if newest else None,
        "newest_age_s": round(max(0.0, time.time() - newest.seen_at), 3) if newest else None,
        "size_bytes": sum(save.size_bytes for save in held),
        "owed": owed,
        **rest,
    }
    return TierStatus(**facts)  # type: ignore[arg-type]  # the fields are those of the struct


def complete(run: RunState, label: str) -> list[SaveState]:
    """Saves that are whole in a tier."""
    return [save for save in run.saves.values() if save.is_complete(label)]


# -- what bounds the agent's life ------------------------------------------------------------------


def bounded_by(cgroup: str | None = None) -> str:
    """What ends this process before the node does; "" if nothing that can be seen.

    Files stay: the next agent goes on.
    """
    path = _own_cgroup() if cgroup is None else cgroup
    if os.environ.get("KUBERNETES_SERVICE_HOST") or "kubepods" in path:
        return "the Kubernetes pod: it ends with its container"
    if re.search(r"docker|containerd|crio|libpod|/lxc", path) or os.path.exists("/.dockerenv"):
        return "the container: `docker stop` ends it"
    if match := re.search(r"slurm.*/job_(\d+)(?:/step_([^/]+))?", path):
        step = f", step {match[2]}" if match[2] else ""
        return f"Slurm job {match[1]}{step}: it ends with it"
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"Slurm job {job}, if its cgroups kill what is left"
    if match := re.search(r"/([^/]+\.service)(?:/|$)", path.rpartition("user@")[0] or path):
        return f"the systemd service {match[1]}"
    if match := re.search(r"user-(\d+)\.slice", path):
        if os.path.exists(f"/var/lib/systemd/linger/{_user_name(int(match[1]))}"):
            return ""
        return f"the login session of user {match[1]}: logout may end it (loginctl enable-linger)"
    return ""


def memory_limit_bytes() -> int | None:
    """What the agent's cgroup may use; slots count there. None without a limit."""
    path = _own_cgroup()
    for name in (
        f"/sys/fs/cgroup{path}/memory.max",
        f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory.max",
    ):
        try:
            with open(name) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 2**62:
            return int(text)
    return None


def _own_cgroup() -> str:
    """The cgroup path: of version 2, or of the memory controller of version 1."""
    try:
        with open("/proc/self/cgroup") as file:
            rows = [line.strip().split(":", 2) for line in file]
    except OSError:
        return ""
    paths = {controllers: path for _, controllers, path in (row for row in rows if len(row) == 3)}
    return next((p for c, p in paths.items() if "memory" in c.split(",")), paths.get("", ""))


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# -- metrics ---------------------------------------------------------------------------------------


def prometheus_text(registry: Registry) -> bytes:
    """The counters and gauges in Prometheus' text format.

    Raises UnsupportedPlatform where prometheus_client is not installed, with what to install.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError as error:
        raise UnsupportedPlatform(
            "/metrics needs the package prometheus-client",
            actions=['pip install "mtckpt[metrics]"'],
        ) from error

    class Collected:
        """Made anew for each request: the state itself is the source."""

        def collect(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
            return [*_counters(), *_gauges()]

    def _counters() -> list[CounterMetricFamily]:
        families: dict[str, CounterMetricFamily] = {}
        for (name, label), value in sorted(registry.tools.totals.items()):
            labels = ["tier"] if label else []
            family = families.get(name)
            if family is None:
                family = families[name] = CounterMetricFamily(
                    f"mtckpt_{name}", _HELP.get(name, name), labels=labels
                )
            family.add_metric([label] if label else [], value)
        return list(families.values())

    def _gauges() -> list[GaugeMetricFamily]:
        rows = (
            ("owed", "Saves that a tier is still owed."),
            ("newest_step", "The newest step that a tier holds."),
            ("newest_step_age_seconds", "How long ago that step was saved."),
            ("held_bytes", "Bytes of the saves that a tier holds."),
        )
        found = {
            name: GaugeMetricFamily(f"mtckpt_{name}", h, labels=["tier", "run"]) for name, h in rows
        }
        for run in registry.runs.values():
            for tier in _run_status(run).tiers:
                labels = [tier.label, run.run]
                found["owed"].add_metric(labels, len(tier.owed))
                found["held_bytes"].add_metric(labels, tier.size_bytes)
                if tier.newest_step is not None and tier.newest_age_s is not None:
                    found["newest_step"].add_metric(labels, tier.newest_step)
                    found["newest_step_age_seconds"].add_metric(labels, tier.newest_age_s)
        return list(found.values())

    collectors = CollectorRegistry(auto_describe=False)
    collectors.register(Collected())
    return bytes(generate_latest(collectors))


_HELP = {
    "save_staged": "Saves that were sealed in RAM.",
    "save_flushed": "Saves that were copied to a slower tier.",
    "save_failed": "Saves that did not reach a tier.",
    "save_called_off": "Saves that a rank took no part in, so that nobody saved them.",
    "saves_superseded": "Saves that a busy tier left out for a newer one.",
    "save_deleted": "Saves that retention deleted.",
    "replicas_diverged": "Leaves that ranks hold alike, of which their copies were not equal.",
    "save_damaged": "Copies that did not match their digests.",
    "save_healed": "Damaged copies replaced by good ones.",
    "bytes": "Bytes written to a tier.",
    "scrubs": "Times that all saves of a run were read back.",
}
