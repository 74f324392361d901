"""Runs of JAX end to end: donation, functional restores, errors that leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import mtckpt
from mtckpt.errors import RestoreIgnored, StateMismatch, UnsupportedState

jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("runtime_dir")]


def open_run(tmp_path: Path, **settings: Any) -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=1)]
    return mtckpt.Checkpointer("r", tiers, timeout_s=20, max_stall_s=10, **settings)


def make_state(fill: float) -> dict[str, Any]:
    return {"params": {"w": jnp.full((300, 7), fill)}, "rng": jax.random.key(int(fill)), "n": 1}


def test_donated_arrays_are_saved_as_they_were(tmp_path: Path) -> None:
    step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    params = {"w": jnp.zeros((1000, 1000)), "b": jnp.zeros(3, jnp.bfloat16)}
    with open_run(tmp_path) as checkpointer:
        for i in range(1, 6):
            old, params = params, step(params)
            assert old["w"].is_deleted()
            save = checkpointer.save(i, {"params": params})
            assert save.skipped is None
        jax.tree.map(lambda x: x.delete(), step(step(params)))
        save.wait("staged", timeout_s=20)
        assert params["w"].is_deleted()
        restored = checkpointer.restore({"params": params}).state
        for leaf in jax.tree.leaves(restored):
            assert np.all(np.asarray(leaf) == 5)


def test_what_was_restored_has_to_be_read(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        state = make_state(3)
        assert not checkpointer.restore(state)
        checkpointer.save(1, state).wait("local", timeout_s=20)  # nothing was restored: no error
    with open_run(tmp_path) as checkpointer:
        template = make_state(0)
        restored = checkpointer.restore(template)
        with pytest.raises(RestoreIgnored, match="never read"):
            checkpointer.save(2, template)
        state = restored.state
        assert np.all(np.asarray(state["params"]["w"]) == 3)
        assert state["rng"] == jax.random.key(3)
        checkpointer.save(2, state).wait("staged", timeout_s=20)


def test_an_array_that_is_gone_is_named_and_the_next_save_works(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        for step in (1, 3):  # by a new plan, then by the one that is kept
            state = make_state(step)
            state["params"]["w"].delete()
            with pytest.raises(UnsupportedState, match="donated or deleted") as caught:
                checkpointer.save(step, state)
            assert caught.value.details["path"] == "params/w"
            checkpointer.save(step + 1, make_state(step + 1)).wait("staged", timeout_s=20)
        assert [each.step for each in checkpointer.steps()] == [2, 4]


def test_a_template_that_differs_changes_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(3)).wait("staged", timeout_s=20)
        template = make_state(0)
        arrays = jax.tree.leaves(template)
        template["params"]["more"] = jnp.zeros(2)
        with pytest.raises(StateMismatch, match="params/more"):
            checkpointer.restore(template)
        del template["params"]["more"]
        assert all(x is y for x, y in zip(jax.tree.leaves(template), arrays, strict=True))
        checkpointer.save(2, template).wait("staged", timeout_s=20)


def test_frameworks_share_a_state(tmp_path: Path) -> None:
    def make(fill: int) -> dict[str, Any]:
        return {
            "torch": torch.nn.Linear(3, 2),
            "jax": (jnp.full(3, float(fill)), [jnp.full((2, 2), fill, jnp.bfloat16)]),
            "numpy": np.full(4, fill),
            "plain": fill,
        }

    state = make(1)
    with open_run(tmp_path) as checkpointer:
        checkpointer.save(1, state).wait("staged", timeout_s=20)
        live = make(2)
        module, array = live["torch"], live["numpy"]
        restored = checkpointer.restore(live).state
        assert restored["torch"] is module
        assert restored["numpy"] is array
        assert torch.equal(module.weight, state["torch"].weight)
        assert (array.tolist(), restored["plain"]) == ([1] * 4, 1)
        assert np.all(np.asarray(restored["jax"][0]) == 1)
        assert np.all(np.asarray(restored["jax"][1][0]) == 1)
        # As another framework's: torch's parameters in JAX, and the reverse.
        swapped = {
            "torch": {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(2)},
            "jax": (np.zeros(3, np.float32), [torch.zeros((2, 2), dtype=torch.bfloat16)]),
        }
        crossed = checkpointer.restore(swapped).state
        assert np.array_equal(crossed["torch"]["weight"], state["torch"].weight.detach().numpy())
        assert crossed["jax"][0].tolist() == [1, 1, 1]
        assert crossed["jax"][1][0].tolist() == [[1, 1], [1, 1]]


BOTH = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "bool"]
BOTH += ["float8_e8m0fnu", "float16", "float32", "complex64", "int8", "uint16", "uint32"]


def test_what_one_framework_saved_the_other_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    host = {name: rng.integers(0, 2, (3, 4 * 8), np.uint8) for name in BOTH}
    tensors = {name: torch.from_numpy(raw).view(getattr(torch, name)) for name, raw in host.items()}
    arrays = {
        name: jax.device_put(raw.view(getattr(ml_dtypes, name, name))) for name, raw in host.items()
    }
    with open_run(tmp_path) as checkpointer:
        state = {"torch": tensors, "jax": arrays, "key": jax.random.key(3), "weak": jnp.asarray(1)}
        checkpointer.save(1, state).wait("local", timeout_s=20)
        crossed = checkpointer.restore(
            {
                "torch": {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()},
                "jax": {n: torch.zeros_like(tensor) for n, tensor in tensors.items()},
            }
        ).state
    for name, raw in host.items():
        assert np.asarray(crossed["torch"][name]).tobytes() == raw.tobytes()
        assert crossed["jax"][name].view(torch.uint8).numpy().tobytes() == raw.tobytes()
    for framework in ("torch", "jax", "numpy"):
        with mtckpt.load(tmp_path / "disk", framework=framework) as checkpoint:
            for path in [f"{whose}/{name}" for name in BOTH for whose in ("torch", "jax")]:
                found, wanted = checkpoint[path], host[path.partition("/")[2]]
                assert str(found.dtype).removeprefix("torch.") == path.partition("/")[2]
                found = found.view(torch.uint8) if framework == "torch" else np.asarray(found)
                assert np.asarray(found).tobytes() == wanted.tobytes()
            if framework == "jax":
                assert checkpoint["key"] == jax.random.key(3)
                assert checkpoint["weak"].weak_type
            else:
                assert checkpoint["key"].tolist() == [0, 3]


NO_JAX = """
import sys
sys.modules["jax"] = None  # an import would raise
import numpy as np, torch
import mtckpt
model = torch.nn.Linear(3, 2)
with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1)], timeout_s=20) as checkpointer:
    checkpointer.save(1, {"model": model, "n": np.zeros(3)}).wait("staged", timeout_s=20)
    assert checkpointer.restore({"model": model, "n": np.ones(3)})
"""
NO_TORCH = """
import sys
sys.modules["torch"] = None
import jax, numpy as np
import mtckpt
state = {"w": jax.numpy.ones(3), "key": jax.random.key(1)}
with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1)], timeout_s=20) as checkpointer:
    checkpointer.save(1, state).wait("staged", timeout_s=20)
    state = checkpointer.restore(jax.eval_shape(lambda: state)).state
assert state["w"].tolist() == [1, 1, 1] and state["key"] == jax.random.key(1)
assert not any(name.startswith("flax") for name in sys.modules)
"""
# JAX would take most of a GPU's memory for itself when it starts: importing it must not be enough.
UNUSED = """
import jax, torch
import mtckpt
from jax._src import xla_bridge
model = torch.nn.Linear(3, 2)
with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1)], timeout_s=20) as checkpointer:
    checkpointer.save(1, {"model": model}).wait("staged", timeout_s=20)
    assert checkpointer.restore({"model": model})
assert not xla_bridge.backends_are_initialized()
"""
NEITHER = """
import sys
import numpy as np
import mtckpt
with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1)], timeout_s=20) as checkpointer:
    checkpointer.save(1, {"n": np.zeros(3)}).wait("staged", timeout_s=20)
    assert checkpointer.restore({"n": np.ones(3)})
assert not {"jax", "jaxlib", "torch"} & sys.modules.keys()
"""


@pytest.mark.parametrize("code", [NO_JAX, NO_TORCH, UNUSED, NEITHER])
def test_no_framework_is_imported_or_started_for_another(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
