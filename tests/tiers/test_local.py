"""LocalTier beyond what every tier must do: places, links, leases, leftovers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtckpt import errors
from mtckpt.tiers import BytesSource, LocalTier, read_all


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "root")


def test_root_is_private_even_with_an_open_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        tier = LocalTier(tmp_path / "a" / "root")
        tier.put("run/step/object", BytesSource(b"x"))
    finally:
        os.umask(old)
    for path, mode in (("", 0o700), ("run", 0o700), ("run/step", 0o700)):
        assert (tmp_path / "a" / "root" / path).stat().st_mode & 0o7777 == mode
    assert tier.path_of("run/step/object").stat().st_mode & 0o7777 == 0o600


def test_group_access_opens_to_the_group_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        tier = LocalTier(tmp_path / "root", group_access=True)
        tier.put("run/object", BytesSource(b"x"))
    finally:
        os.umask(old)
    for path in ("", "run"):
        assert (tmp_path / "root" / path).stat().st_mode & 0o7777 == 0o2770
    assert tier.path_of("run/object").stat().st_mode & 0o7777 == 0o660


def test_lease_and_exclusive_exclude_one_another(tier: LocalTier) -> None:
    tier.put("a", BytesSource(b"abc"))
    with tier.lease("a") as lease, tier.lease("a") as second:
        assert (lease.size_bytes, os.pread(second.fd, 9, 0)) == (3, b"abc")
        with tier.try_exclusive("a") as fd:
            assert fd is None
    with tier.try_exclusive("a") as fd:
        assert fd is not None
        with pytest.raises(errors.TierUnavailable) as raised:
            tier.lease("a", timeout_s=0.05)
        assert raised.value.details["timeout_s"] == 0.05
    lease.close()
    with pytest.raises(errors.UsageError):
        _ = lease.fd


def test_a_leased_object_keeps_its_bytes_when_deleted(tier: LocalTier) -> None:
    tier.put("a", BytesSource(b"old"))
    with tier.lease("a") as lease:
        tier.delete("a")
        tier.put("a", BytesSource(b"new"))
        assert os.pread(lease.fd, 9, 0) == b"old"
    assert read_all(tier, "a", max_bytes=9) == b"new"


def test_quarantine_frees_the_key_and_is_found_again(tier: LocalTier) -> None:
    tier.put("run/a.b", BytesSource(b"bad"))
    item = tier.quarantine("run/a.b", "Digest of chunk 3 differs")
    assert list(tier.list()) == []
    tier.put("run/a.b", BytesSource(b"good"))
    assert list(tier.quarantined()) == [item]
    assert (item.key, item.size_bytes, item.path.read_bytes()) == ("run/a.b", 3, b"bad")
    tier.drop_quarantined(item)
    tier.drop_quarantined(item)
    assert list(tier.quarantined()) == []
    assert read_all(tier, "run/a.b", max_bytes=9) == b"good"
    with pytest.raises(errors.ObjectNotFound):
        tier.quarantine("run/absent", "x")


def test_delete_removes_empty_directories_but_never_the_root(tier: LocalTier) -> None:
    tier.put("run/1/a", BytesSource(b""))
    tier.put("run/2/a", BytesSource(b""))
    tier.delete("run/1/a")
    assert not tier.path_of("run/1").exists()
    assert tier.path_of("run/2").exists()
    tier.delete("run/2/a")
    assert os.listdir(tier.path_of("x").parent) == []
