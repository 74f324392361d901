"""What the facts about a machine mean for checkpoints. Pure: facts in, findings out."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mtckpt._handle import size_text

if TYPE_CHECKING:
    from mtckpt.agent.beside import Left

__all__ = ["Facts", "Finding", "Gpu", "judge"]

Level = Literal["ok", "note", "wrong"]

GIB = 1 << 30
MIB = 1 << 20
_CONTAINER_SHM_BYTES = 64 * MIB
_MORE_SHM = {
    "docker": ("docker run --shm-size=32g (two to three times the state of this node's ranks)",),
    "kubernetes": (
        "mount memory of the node, or an emptyDir with medium: Memory, and name it MTCKPT_RAM_DIR",
        "deploy/ has manifests for both: https://mtckpt.readthedocs.io/kubernetes",
    ),
}
_SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
# A container may not mount: what lies outside of it has to.
_MOUNT_OUTSIDE = {
    "docker": ("in a container: on the host, and docker run --ipc=host or -v /dev/shm:/dev/shm",),
    "kubernetes": ("or deploy/overlays/daemonset-huge-pages, which mounts it on the node",),
}
_FEW_FILES = 4096
_NETWORK_KINDS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "beegfs",
    "ceph",
    "gpfs",
    "9p",
    "virtiofs",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device. Rates are those of copies between it and memory as slots have it.

    ``is_near``: some core of this process is on its NUMA node. ``kernels``: the file they are from.
    """

    name: str
    capability: str
    numa_node: int | None = None
    is_near: bool = True
    memory_bytes: int | None = None
    kernels: str = ""
    to_host_bytes_per_s: float | None = None
    to_device_bytes_per_s: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read and measured. None where the machine does not say or it was not possible."""

    platform: str
    kernel: str
    versions: dict[str, str]
    num_cores: int
    num_numa_nodes: int
    copy_bytes_per_s: float
    memory_left_bytes: int | None
    memory_limit_bytes: int | None
    memory_bounded_by: str
    memlock_bytes: int | None
    open_files: int | None
    peer_pidfd: bool
    ram_path: str
    ram_kind: str
    ram_mount: str
    ram_free_bytes: int
    ram_total_bytes: int
    ram_bytes_per_s: float | None
    ram_huge: bool
    ram_huge_option: str
    ram_problem: str
    disk_path: str
    disk_kind: str
    disk_free_bytes: int
    disk_bytes_per_s: float | None
    disk_direct: bool
    disk_problem: str
    container: str
    gvisor: bool
    gpu_driver: str  # the CUDA version it is for; "" without one
    gpu_problem: str
    gpu_nodes: bool  # whether devices show in /dev
    gpus: tuple[Gpu, ...]
    slot_bytes_per_s: float | None  # of registering memory with a device
    slot_problem: str
    bounded_by: str
    agent: dict[str, Any] | None = None
    agent_problem: str = ""
    left: tuple[Left, ...] = ()  # beside the disk, of agents that cannot be seen to live


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the page. ``actions`` say what would make it better."""

    name: str
    value: str
    level: Level = "ok"
    why: str = ""
    actions: tuple[str, ...] = field(default=())


def judge(facts: Facts) -> list[Finding]:
    """All findings, in the order of the page."""
    if facts.platform != "linux":
        why = "saving needs Linux; reading with mtckpt.load() works"
        return [Finding("system", facts.platform, "wrong", why)]
    return [
        _ram(facts),
        _huge_pages(facts),
        *_gpus(facts),
        _memory(facts),
        _disk(facts),
        *(_left(one) for one in facts.left),
        _machine(facts),
        _memlock(facts),
        _open_files(facts),
        _pidfd(facts),
        _agent(facts),
        _life(facts),
    ]


def _ram(facts: Facts) -> Finding:
    name = "RAM tier"
    if facts.ram_problem:
        return Finding(
            name,
            facts.ram_path,
            "wrong",
            f"{facts.ram_problem}; saves go to disk alone, and save() waits for it",
            ("set MTCKPT_RAM_DIR to a directory on tmpfs that this user can write",),
        )
    if facts.ram_kind not in ("tmpfs", "ramfs"):
        return Finding(
            name,
            f"{facts.ram_path} is {facts.ram_kind or 'not a mount that is known'}",
            "wrong",
            "no tmpfs: its slots would be written to a device",
            ("mount -t tmpfs tmpfs /dev/shm", "or set MTCKPT_RAM_DIR to a tmpfs"),
        )
    rate = f", first write {_rate(facts.ram_bytes_per_s)}" if facts.ram_bytes_per_s else ""
    sizes = f"{size_text(facts.ram_free_bytes)} free of {size_text(facts.ram_total_bytes)}"
    value = f"{facts.ram_path}: {sizes}{rate}"
    if 0 < facts.ram_total_bytes <= _CONTAINER_SHM_BYTES:
        return Finding(
            name,
            value,
            "wrong",
            "this is the size that containers are given; two slots of a model do not fit: saves are"
            " captured on the disk, or refused where Ram() was named",
            _MORE_SHM.get(facts.container, _MORE_SHM["docker"]),
        )
    if facts.ram_free_bytes < facts.ram_total_bytes // 10:
        return Finding(
            name,
            value,
            "note",
            "nearly full: a save that does not fit is refused",
            ("look what dead runs left: mtckpt status, mtckpt rm RUN",),
        )
    return Finding(name, value)


def _huge_pages(facts: Facts) -> Finding:
    if facts.ram_huge:
        return Finding("huge pages", "yes: 2 MiB pages back the RAM tier")
    option = facts.ram_huge_option or "never"
    command = f"mount -o remount,huge=within_size {facts.ram_mount}"
    if option == "deny":  # of the whole machine: no mount option changes it
        command = f"echo never > {_SHMEM_ENABLED} && {command}"
    return Finding(
        "huge pages",
        f"no (tmpfs huge={option})",
        "note",
        "falls back to 4 KiB pages: slots are allocated and registered more slowly, once a start",
        (f"as root: {command}", *_MOUNT_OUTSIDE.get(facts.container, ())),
    )


def _gpus(facts: Facts) -> list[Finding]:
    """A line for each device, one for slots; or one that says why there is no device."""
    if not facts.gpus:
        value = f"none: {facts.gpu_problem}"
        if not facts.gpu_nodes and not facts.gpu_driver:
            return [Finding("GPU", value)]
        return [
            Finding(
                "GPU",
                value,
                "note",
                "there seems to be one, and a save of arrays on it would fail",
                (
                    "docker run --gpus all, or a pod with nvidia.com/gpu in its limits",
                    "look whether nvidia-smi works here",
                ),
            )
        ]
    return [*(_gpu(i, gpu) for i, gpu in enumerate(facts.gpus)), _gpu_slots(facts)]


def _gpu(number: int, gpu: Gpu) -> Finding:
    name = f"GPU {number}"
    parts = [f"{gpu.name}, compute capability {gpu.capability}"]
    if gpu.memory_bytes is not None:
        parts.append(size_text(gpu.memory_bytes))
    if gpu.numa_node is not None:
        parts.append(f"NUMA node {gpu.numa_node}")
    value = ", ".join(parts)
    if gpu.problem:
        return Finding(name, value, "note", f"could not be measured: {gpu.problem}")
    if gpu.to_host_bytes_per_s is not None:
        there, back = _rate(gpu.to_host_bytes_per_s), _rate(gpu.to_device_bytes_per_s)
        value += f": to slots {there}, from slots {back}"
    if not gpu.is_near:
        why = "this process runs on cores of other NUMA nodes: copies cross between them"
        action = f"numactl --cpunodebind={gpu.numa_node} --membind={gpu.numa_node} COMMAND"
        return Finding(name, value, "note", why, (action,))
    if gpu.kernels.endswith(".ptx"):
        why = "the driver compiles the kernels of mtckpt for it, once a start: half a second"
        return Finding(name, value, "note", why, ("keep ~/.nv/ComputeCache between starts",))
    return Finding(name, value)


def _gpu_slots(facts: Facts) -> Finding:
    name = "GPU slots"
    if facts.slot_bytes_per_s is not None:
        return Finding(name, f"can be registered, {_rate(facts.slot_bytes_per_s)}")
    if not facts.slot_problem:
        why = f"{facts.ram_path} has no room for a file to try it with"
        return Finding(name, "not tried", "note", why)
    actions = ("docker run --ulimit memlock=-1, or ulimit -l unlimited",)
    if facts.gvisor:
        actions = ("this is gVisor: run the pod under another runtimeClassName",)
    return Finding(
        name,
        "cannot be registered",
        "note",
        f"{facts.slot_problem}; copies pass through pinned memory and threads of the host",
        actions,
    )


def _memory(facts: Facts) -> Finding:
    left = "unknown" if facts.memory_left_bytes is None else size_text(facts.memory_left_bytes)
    value = f"{left} left" + (f" by {facts.memory_bounded_by}" if facts.memory_bounded_by else "")
    if facts.memory_limit_bytes is not None:
        limit = size_text(facts.memory_limit_bytes)
        return Finding(
            "memory",
            f"{value}; cgroup limit {limit}",
            "note",
            "RAM slots count against the limit of the agent's cgroup",
            ("leave room in it for two or three times the state of this node's ranks",),
        )
    return Finding("memory", value)


def _disk(facts: Facts) -> Finding:
    name = "disk tier"
    if facts.disk_problem:
        return Finding(
            name,
            facts.disk_path,
            "wrong",
            f"{facts.disk_problem}; a Disk tier there would fail",
            ("choose another directory: mtckpt doctor --disk PATH",),
        )
    how = "past the page cache" if facts.disk_direct else "through the page cache"
    rate = f", {_rate(facts.disk_bytes_per_s)} {how}" if facts.disk_bytes_per_s else ""
    value = f"{facts.disk_path} ({facts.disk_kind}): {size_text(facts.disk_free_bytes)} free{rate}"
    if facts.disk_kind in ("tmpfs", "ramfs"):
        return Finding(
            name,
            value,
            "wrong",
            "this is memory: a power cut or reboot takes it",
            ("choose a directory on a device: mtckpt doctor --disk PATH",),
        )
    if facts.disk_kind == "overlay":
        return Finding(
            name,
            value,
            "note",
            "the container's own layer goes when the container is removed",
            ("mount a volume and put Disk(path) there",),
        )
    if facts.disk_kind in _NETWORK_KINDS or facts.disk_kind.startswith("fuse"):
        return Finding(
            name, value, "note", "a network or FUSE file system: fsync means what its server says"
        )
    if not facts.disk_direct:
        return Finding(name, value, "note", "no O_DIRECT here: writes fall back to the page cache")
    return Finding(name, value)


def _left(one: Left) -> Finding:
    value = f"{one.run_key}: {size_text(one.size_bytes)} in {one.root}"
    disk = shlex.quote(os.path.dirname(os.path.dirname(one.root)))
    if one.agent == "unknown":
        return Finding(
            "left slots",
            value,
            "note",
            "an agent of another host has left them, and whether its job lives cannot be told here",
            (f"if it does not: rm -r {shlex.quote(one.root)}",),
        )
    return Finding(
        "left slots",
        value,
        "note",
        "the container that had them is gone; its newest step may be there and nowhere else",
        (
            "open the run again with this disk: it goes on with them",
            f"or free them: mtckpt rm {one.run_key} --beside {disk}",
        ),
    )


def _machine(facts: Facts) -> Finding:
    nodes = f", {facts.num_numa_nodes} NUMA nodes" if facts.num_numa_nodes > 1 else ""
    value = f"{facts.num_cores} cores{nodes}, memcpy {_rate(facts.copy_bytes_per_s)} a core"
    if facts.num_cores < 2:
        why = "the agent shares the training loop's only core"
        return Finding("machine", value, "note", why, ("give the job two cores or more",))
    return Finding("machine", value)


def _memlock(facts: Facts) -> Finding:
    if facts.memlock_bytes is None:
        return Finding("memlock", "unlimited")
    return Finding(
        "memlock",
        size_text(facts.memlock_bytes),
        "note",
        "slots are not locked in memory: with swap in use a save may wait for it",
        ("ulimit -l unlimited (docker run --ulimit memlock=-1)",),
    )


def _open_files(facts: Facts) -> Finding:
    if facts.open_files is None or facts.open_files >= _FEW_FILES:
        return Finding("open files", str(facts.open_files or "unlimited"))
    return Finding(
        "open files",
        str(facts.open_files),
        "note",
        "reading a save of more ranks than this needs more",
        (f"ulimit -n {_FEW_FILES * 4}",),
    )


def _pidfd(facts: Facts) -> Finding:
    if facts.peer_pidfd:
        return Finding("pidfd", f"yes (Linux {facts.kernel})")
    return Finding(
        "pidfd",
        f"no (Linux {facts.kernel})",
        "note",
        "needs Linux 6.5; a trainer's death is seen by its pid and start time instead",
    )


def _agent(facts: Facts) -> Finding:
    if facts.agent_problem:
        return Finding(
            "agent",
            "does not answer",
            "wrong",
            facts.agent_problem,
            ("mtckpt agent stop", "or look at its log beside the socket"),
        )
    if facts.agent is None:
        return Finding("agent", "none runs; the first Checkpointer starts one")
    mine = facts.versions.get("mtckpt", "")
    value = f"process {facts.agent['pid']}, {facts.agent['mode']}, mtckpt {facts.agent['mtckpt']}"
    if facts.agent["mtckpt"] != mine:
        return Finding(
            "agent",
            value,
            "note",
            f"this command is mtckpt {mine}",
            ("mtckpt agent stop; the next Checkpointer starts the new one",),
        )
    return Finding("agent", value)


def _life(facts: Facts) -> Finding:
    where = f", in {facts.container}" if facts.container else ""
    if not facts.bounded_by:
        return Finding("agent's life", f"nothing seen that ends it before the node{where}")
    return Finding(
        "agent's life",
        facts.bounded_by,
        "note",
        "what was staged stays in tmpfs as long as that is mounted; the next agent goes on from it",
        ("for an agent that outlives the job, run it as a service: mtckpt agent run",),
    )


def _rate(bytes_per_s: float | None) -> str:
    return f"{size_text(bytes_per_s or 0)}/s"
