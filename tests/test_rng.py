"""Every global generator goes on exactly where it was."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from state_harness import restore, save

from mtckpt._rng import rng

GLOBAL: Any = np.random  # its stub lacks the functions that exchange the generator


def draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # the global generator is the point
        float(np.random.randn()),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
    ]


@pytest.fixture(autouse=True)
def _keep_generators() -> object:
    before = rng().state_dict()
    yield
    rng().load_state_dict(before)


def test_generators_go_on_where_they_were() -> None:
    random.gauss(0, 1)  # leaves half a pair behind, which is part of the state
    np.random.randn()
    saved = save({"rng": rng()})
    expected = draw()
    assert draw() != expected
    restore(saved, {"rng": rng()})
    assert draw() == expected


def test_another_global_bit_generator_of_numpy() -> None:
    before = GLOBAL.get_bit_generator()
    try:
        GLOBAL.set_bit_generator(np.random.PCG64(5))
        saved = save({"rng": rng()})  # its state is two integers of 128 bits
        expected = draw()
        restore(saved, {"rng": rng()})
        assert draw() == expected
    finally:
        GLOBAL.set_bit_generator(before)


def test_a_part_of_a_framework_that_is_absent_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save(rng())
    state = random.getstate()
    expected = [random.random() for _ in range(3)]
    modules = dict(sys.modules)
    del modules["torch"]
    monkeypatch.setattr(sys, "modules", modules)
    restore(saved, rng())
    assert [random.random() for _ in range(3)] == expected
    assert "has not imported torch" in caplog.text
    random.setstate(state)


def test_python_alone_imports_nothing() -> None:
    script = (
        "import sys\n"
        "from mtckpt._rng import rng\n"
        "state = rng().state_dict()\n"
        "rng().load_state_dict(state)\n"
        "assert list(state) == ['python'], list(state)\n"
        "assert not {'numpy', 'torch', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=50)


def test_fewer_devices_than_saved_is_said(caplog: pytest.LogCaptureFixture) -> None:
    state = rng().state_dict()
    state["torch"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    if torch.cuda.device_count():
        pytest.skip("would set the generators of real devices")
    rng().load_state_dict(state)
    assert "1 CUDA devices in the checkpoint, 0 devices here" in caplog.text
