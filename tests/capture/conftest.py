"""A fake driver, and devices for JAX in the processes that run these tests."""

from __future__ import annotations

import os

import pytest
from fake_cuda import WHY_NOT, FakeCuda

from mtckpt.capture.driver import Driver

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


@pytest.fixture(scope="session")
def built_fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    return FakeCuda(tmp_path_factory.mktemp("fake-cuda"))


@pytest.fixture
def fake_cuda(built_fake_cuda: FakeCuda) -> FakeCuda:
    """A machine with two devices that nobody has used; everything waits until it is waited for."""
    built_fake_cuda.reset()
    return built_fake_cuda


@pytest.fixture
def driver(fake_cuda: FakeCuda) -> Driver:
    return Driver(str(fake_cuda.path))
