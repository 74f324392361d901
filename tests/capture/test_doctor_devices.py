"""What doctor finds of CUDA devices: on a driver of the tests' own, as its command does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda, Mode

from mtckpt.capture import driver as driver_module
from mtckpt.cli import _devices
from mtckpt.cli._devices import device_facts


@pytest.fixture
def known_driver(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(driver_module.Driver.__init__, "__defaults__", (str(fake_cuda.path),))
    return fake_cuda


def test_the_command_measures_each_device(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    program = "from mtckpt.cli import main; main()"
    command = [sys.executable, "-c", program, "doctor", "--json", f"--disk={tmp_path}"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_cuda.folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    body = json.loads(done.stdout)
    facts = body["facts"]
    assert facts["gpu_driver"] == "13.0"
    assert [gpu["name"] for gpu in facts["gpus"]] == ["Fake 0", "Fake 1"]
    first = facts["gpus"][0]
    assert first["to_host_bytes_per_s"] > 0 < first["to_device_bytes_per_s"]
    assert first["kernels"] == "kernels.sm_90.cubin.zlib"
    assert first["memory_bytes"] == 80 << 30
    assert facts["slot_bytes_per_s"] > 0
    names = [finding["name"] for finding in body["findings"]]
    assert [name for name in names if "GPU" in name] == ["GPU 0", "GPU 1", "GPU slots"]


def test_nothing_is_held_afterwards(known_driver: FakeCuda, ram_dir: Path) -> None:
    facts = device_facts(str(ram_dir))
    assert facts["slot_bytes_per_s"] > 0
    assert all(gpu.to_host_bytes_per_s for gpu in facts["gpus"])
    assert sum(known_driver.counts()) == 0
    assert list(ram_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "code", "told"),
    [
        ("cuMemHostRegister_v2", 801, {"slot_problem": "cuMemHostRegister_v2"}),
        ("cuMemAlloc_v2", 2, {"gpu 0": "OUT_OF_MEMORY"}),
        ("cuDevicePrimaryCtxRetain", 46, {"slot_problem": "cuDevicePrimaryCtxRetain"}),
        ("cuDeviceGetAttribute", 999, {"gpu_problem": "cuDeviceGetAttribute"}),
        ("cuInit", 999, {"gpu_problem": "cuInit"}),
    ],
)
def test_what_is_refused_is_told(
    known_driver: FakeCuda, ram_dir: Path, call: str, code: int, told: dict[str, str]
) -> None:
    known_driver.fail(call, code)
    facts: dict[str, Any] = device_facts(str(ram_dir))
    facts |= {f"gpu {i}": gpu.problem for i, gpu in enumerate(facts["gpus"])}
    for field, text in told.items():
        assert text in facts[field]
    others = {"slot_problem", "gpu_problem", "gpu 0", "gpu 1"} - set(told)
    assert not any(facts.get(field) for field in others)
    assert sum(known_driver.counts()) == 0


def test_rates_are_those_of_the_way_that_is_taken(
    known_driver: FakeCuda, ram_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device copies to memory that its driver refused."""
    known_driver.mode(Mode.LAZY)
    known_driver.fail("cuMemHostRegister_v2", 801)
    registered: list[int] = []
    targets: list[int] = []
    register, to_host = driver_module.Driver.register, driver_module.Driver.to_host

    def refused(self: Any, address: int, *rest: Any) -> None:
        registered.append(address)
        register(self, address, *rest)

    def noted(self: Any, target: int, *rest: Any) -> None:
        targets.append(target)
        to_host(self, target, *rest)

    monkeypatch.setattr(driver_module.Driver, "register", refused)
    monkeypatch.setattr(driver_module.Driver, "to_host", noted)
    monkeypatch.setattr(_devices, "_LIMIT_S", 60.0)  # however slow this machine is, both of them
    facts = device_facts(str(ram_dir))
    assert [bool(gpu.to_host_bytes_per_s) for gpu in facts["gpus"]] == [True, True]
    assert [bool(gpu.to_device_bytes_per_s) for gpu in facts["gpus"]] == [True, True]
    assert not set(registered) & set(targets)
    assert sum(known_driver.counts()) == 0


def test_without_devices_or_room(
    known_driver: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = device_facts(str(tmp_path / "nowhere"))
    assert [gpu.name for gpu in facts["gpus"]] == ["Fake 0", "Fake 1"]
    assert facts["slot_bytes_per_s"] is None
    assert not facts["slot_problem"]
    known_driver.reset(num_devices=0)
    assert "NO_DEVICE" in device_facts(str(tmp_path))["gpu_problem"]
    absent = str(tmp_path / "no.so")
    monkeypatch.setattr(driver_module.Driver.__init__, "__defaults__", (absent,))
    assert "no.so" in device_facts(str(tmp_path))["gpu_problem"]
