"""The public suite, run against object stores: real servers, each engine, and plain fsspec."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import AzureServer, GcsServer, S3Server

from mtckpt.errors import AlreadyExists, TierError
from mtckpt.testing import TierSuite
from mtckpt.tiers import BytesSource, ObjectStoreTier, Survives, Tier, read_all

MIB = 1 << 20
CLUSTER = Survives.PROCESS | Survives.POWER | Survives.NODE | Survives.CLUSTER


class TestFile(TierSuite):
    survives = CLUSTER

    def make_tier(self, tmp_path: Path) -> Tier:
        return ObjectStoreTier(f"file://{tmp_path}/objects")


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("where", ["", "/run"])
def test_what_cannot_be_looked_at_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    """fsspec's own ways to look leave out what fails: a job would begin at nought, or replace."""
    tier = ObjectStoreTier(f"file://{tmp_path}/objects", timeout_s=0.2)
    tier.put("run/a", BytesSource(b"x"))
    there = f"{tmp_path}/objects{where}"

    def failing(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).startswith(there):
                raise OSError(code, "not to be had")
            return ask(path, *args, **options)

        return asked

    monkeypatch.setattr(os, "scandir", failing(os.scandir))
    with pytest.raises(TierError, match="not to be had"):
        list(tier.list())
    monkeypatch.setattr(os, "stat", failing(os.stat))
    with pytest.raises(TierError, match="not to be had"):
        tier.put("run/a", BytesSource(b"y"))
    monkeypatch.undo()
    assert read_all(tier, "run/a", max_bytes=1) == b"x"


def test_nothing_lies_inside_an_object_of_a_directory(tmp_path: Path) -> None:
    tier = ObjectStoreTier(f"file://{tmp_path}/objects")
    tier.put("run/a", BytesSource(b"x"))
    with pytest.raises(AlreadyExists):
        tier.put("run/a/c", BytesSource(b"y"))
    assert list(tier.list("run/a/b/")) == []


class TestMemory(TierSuite):
    survives = CLUSTER
    several_processes = False

    def make_tier(self, tmp_path: Path) -> Tier:
        return ObjectStoreTier(f"memory://{tmp_path}")


class _S3(TierSuite):
    survives = CLUSTER
    num_sequences = 4
    sizes = (0, 1, 4097, 11 * MIB + 17)
    engine = "auto"

    @pytest.fixture(autouse=True)
    def bucket(self, s3: S3Server) -> None:
        self._server = s3
        self._place = s3.new_prefix()

    def make_tier(self, tmp_path: Path) -> Tier:
        return ObjectStoreTier(
            f"s3://{self._place}/{tmp_path.name}",
            engine=self.engine,  # type: ignore[arg-type]
            storage_options=self._server.options,
            part_bytes=5 * MIB,
            timeout_s=20,
        )


class TestS3Obstore(_S3):
    engine = "obstore"
    several_processes = False  # Not in forks: obstore's threads do not live on in them.


class TestS3Fsspec(_S3):
    engine = "fsspec"
    several_processes = False


class TestGcs(TierSuite):
    survives = CLUSTER
    num_sequences = 4
    sizes = (0, 1, 4097, 11 * MIB + 17)
    several_processes = False

    @pytest.fixture(autouse=True)
    def bucket(self, gcs: GcsServer) -> None:
        self._server = gcs
        self._place = gcs.new_prefix()

    def make_tier(self, tmp_path: Path) -> Tier:
        return ObjectStoreTier(
            f"gs://{self._place}/{tmp_path.name}",
            storage_options=self._server.options,
            part_bytes=5 * MIB,
            timeout_s=20,
        )


class TestAzure(TierSuite):
    survives = CLUSTER
    num_sequences = 2
    sizes = (0, 1, 11 * MIB + 17)
    several_processes = False

    @pytest.fixture(autouse=True)
    def bucket(self, azure: AzureServer) -> None:
        self._server = azure
        self._place = azure.new_prefix()

    def make_tier(self, tmp_path: Path) -> Tier:
        return ObjectStoreTier(
            f"az://{self._place}/{tmp_path.name}",
            storage_options=self._server.options,
            part_bytes=5 * MIB,
            timeout_s=20,
        )
