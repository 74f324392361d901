"""What the kernel's files say, read from samples; and the measurements, run once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mtckpt import _probe
from mtckpt._probe import Mount

MOUNTS = r"""
24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,size=12334460k,nr_inodes=3083615,mode=755
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684084k
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 25 0:27 / /dev/shm rw,nosuid - tmpfs huge rw,huge=within_size
31 27 8:1 / /mnt/with\040space rw - xfs /dev/sda1 rw
32 27 0:44 / /home rw,relatime master:5 propagate_from:2 - nfs4 server:/home rw,vers=4.2
garbage
33 27 0:45 / /broken
"""


@pytest.mark.parametrize(
    ("path", "kind", "source"),
    [
        ("/", "ext4", "/dev/vda"),
        ("/devices", "ext4", "/dev/vda"),
        ("/dev/null", "devtmpfs", "devtmpfs"),
        ("/dev/shm", "tmpfs", "huge"),
        ("/dev/shm/mtckpt-0/run", "tmpfs", "huge"),
        ("/mnt/with space/x", "xfs", "/dev/sda1"),
        ("/home/me", "nfs4", "server:/home"),
        ("/broken", "ext4", "/dev/vda"),
    ],
)
def test_mount_of(path: str, kind: str, source: str) -> None:
    mount = _probe.mount_of(path, _probe.parse_mounts(MOUNTS))
    assert mount is not None
    assert (mount.kind, mount.source) == (kind, source)


def test_mount_options_and_nothing_at_all() -> None:
    mount = _probe.mount_of("/dev/shm", _probe.parse_mounts(MOUNTS))
    assert mount is not None
    assert mount.option("huge") == "within_size"
    assert mount.option("size") is None
    assert _probe.mount_of("/x", []) is None
    assert _probe.mount_of("/x", [Mount("/y", "xfs", "s", frozenset())]) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("always within_size advise [never] deny force\n", "never"),
        ("[always] within_size", "always"),
        ("", ""),
        ("always never", ""),
    ],
)
def test_shmem_enabled(text: str, word: str) -> None:
    assert _probe.shmem_enabled(text) == word


SMAPS = """\
7f0000000000-7f0000400000 rw-s 00000000 00:1b 12 /dev/shm/x
Size:               4096 kB
ShmemPmdMapped:     4096 kB
FilePmdMapped:         0 kB
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
ShmemPmdMapped:        0 kB
7f0000500000-7f0000600000 r--p 00000000 00:00 0 [vdso]
Size:               1024 kB
"""


@pytest.mark.parametrize(
    ("address", "mapped_bytes"),
    [
        (0x7F0000000000, 4 << 20),
        (0x7F00003FFFFF, 4 << 20),
        (0x7F0000400000, 0),
        (0x7F0000500000, None),
        (0x1, None),
    ],
)
def test_pmd_mapped_bytes(address: int, mapped_bytes: int | None) -> None:
    assert _probe.pmd_mapped_bytes(SMAPS, address) == mapped_bytes


LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            1024                 524288               files
Max locked memory         unlimited            unlimited            bytes
Max file locks            unlimited            unlimited            locks
"""


def test_limit_of() -> None:
    assert _probe.limit_of(LIMITS, "Max open files") == 1024
    assert _probe.limit_of(LIMITS, "Max locked memory") is None
    assert _probe.limit_of(LIMITS, "Max of something") is None
    assert _probe.limit_of("", "Max open files") is None


@pytest.mark.parametrize(
    ("environ", "markers", "cgroup", "kind"),
    [
        ([], [], "0::/user.slice", ""),
        (["HOME"], ["/.dockerenv"], "0::/", "docker"),
        ([], [], "0::/system.slice/docker-3fa.scope", "docker"),
        ([], ["/run/.containerenv"], "0::/", "podman"),
        (["KUBERNETES_SERVICE_HOST"], ["/.dockerenv"], "0::/", "kubernetes"),
        ([], [], "0::/kubepods.slice/pod1", "kubernetes"),
        ([], [], "0::/lxc/box", "lxc"),
    ],
)
def test_container_of(environ: list[str], markers: list[str], cgroup: str, kind: str) -> None:
    assert _probe.container_of(environ, markers, cgroup) == kind


def test_this_machine() -> None:
    assert 1 <= _probe.num_cores() <= (os.cpu_count() or 1)
    assert _probe.num_numa_nodes() >= 1
    assert isinstance(_probe.has_peer_pidfd(), bool)
    assert _probe.read_text("/no/such/file") == ""
    assert _probe.free_and_total_bytes("/no/such/dir") == (0, 0)
    free_bytes, total_bytes = _probe.free_and_total_bytes("/")
    assert 0 <= free_bytes <= total_bytes


def test_measurements_leave_nothing(tmp_path: Path, ram_dir: Path) -> None:
    assert _probe.copy_bytes_per_s(1 << 20, repeats=1) > 0
    before = set(ram_dir.iterdir())
    assert _probe.tmpfs_bytes_per_s(str(ram_dir), 1 << 20).bytes_per_s > 0
    assert _probe.write_bytes_per_s(str(tmp_path), 8 << 20).bytes_per_s > 0
    assert set(ram_dir.iterdir()) == before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        _probe.write_bytes_per_s(str(tmp_path / "nowhere"))


def test_measurements_work_without_nameless_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    written = _probe.write_bytes_per_s(str(tmp_path), 8 << 20)
    assert not written.direct
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_measured_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    _probe.write_bytes_per_s(str(tmp_path), 1 << 40, limit_s=3.0)
    assert now[0] < 10


def test_tier_label(tmp_path: Path) -> None:
    assert _probe.tier_label(str(tmp_path)) in ("disk", "ram")
    if Path("/dev/shm").is_dir():
        assert _probe.tier_label("/dev/shm/not/there") == "ram"


def test_gvisor_is_known_by_its_kernel() -> None:
    assert _probe.is_gvisor("Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016")
    assert _probe.is_gvisor("Linux version 4.19.0-gvisor #1 SMP")
    assert not _probe.is_gvisor("Linux version 6.8.0-139-generic (gcc) #1 SMP")


def test_lists_of_cores() -> None:
    assert _probe.core_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert _probe.core_list("\n") == set()
    assert _probe.numa_node_of_pci("not/there") is None
    assert _probe.cores_of_numa_node(4096) == set()
    assert len(_probe.cores()) == _probe.num_cores()
