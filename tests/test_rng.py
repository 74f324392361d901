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
from mtckpt.errors import StateMismatch

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


BITS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]


@pytest.mark.parametrize("kind", BITS)
def test_generators_of_numpy_that_the_user_made(kind: Any) -> None:
    state = {"rng": np.random.Generator(kind(1)), "bits": kind(2)}
    for generator in (state["rng"], np.random.Generator(state["bits"])):
        generator.random(3, dtype=np.float32)  # leaves half a word behind
    saved = save(state)
    expected = [state["rng"].random(5), state["bits"].random_raw(5)]
    again = {"rng": np.random.Generator(kind(7)), "bits": kind(8)}
    before = dict(again)
    restore(saved, again)
    assert again == before  # the same objects
    assert np.array_equal(again["rng"].random(5), expected[0])
    assert np.array_equal(again["bits"].random_raw(5), expected[1])


def test_a_generator_of_another_kind_is_a_difference() -> None:
    saved = save({"rng": np.random.default_rng(1), "weights": np.ones(2)})
    other, weights = np.random.Generator(np.random.MT19937(1)), np.zeros(2)
    with pytest.raises(StateMismatch, match="rng: a generator of kind MT19937 here, PCG64 in"):
        restore(saved, {"rng": other, "weights": weights})
    assert not weights.any()
    with pytest.raises(StateMismatch, match="rng: a generator of kind MT19937 here, array in"):
        restore(save({"rng": np.ones(1)}), {"rng": other})


def test_generators_of_python_and_of_old_numpy_that_the_user_made() -> None:
    python, numpy = random.Random(1), np.random.RandomState(1)
    python.gauss(0, 1)
    numpy.randn()
    saved = save({"python": python, "numpy": numpy})
    expected = [python.gauss(0, 1), python.random(), numpy.randn(), numpy.rand()]
    python, numpy = random.Random(5), np.random.RandomState(5)
    restore(saved, {"python": python, "numpy": numpy})
    assert [python.gauss(0, 1), python.random(), numpy.randn(), numpy.rand()] == expected


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
