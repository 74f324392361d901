"""Orbax's manager on mtckpt's tiers: its policies decide, its steps come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt.errors import FormatError, StepExists, StepNotFound, UnsupportedState, UsageError

jax = pytest.importorskip("jax")
ocp = pytest.importorskip("orbax.checkpoint")
jnp = jax.numpy

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("runtime_dir"),
    pytest.mark.filterwarnings("ignore::Warning:orbax"),
]


def make_state(fill: float) -> dict[str, Any]:
    return {"w": jnp.full((300, 7), fill), "key": jax.random.key(int(fill)), "n": int(fill)}


def open_run(tmp_path: Path, run: str = "r") -> mtckpt.Checkpointer:
    tiers = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=1, keep=10)]
    return mtckpt.Checkpointer(run, tiers, timeout_s=20, max_stall_s=10)


def open_manager(tmp_path: Path, checkpointer: mtckpt.Checkpointer, **options: Any) -> Any:
    from mtckpt.adapters.jax.orbax import registry

    stage = options.pop("stage", "staged")
    return ocp.CheckpointManager(
        tmp_path / "orbax",
        options=ocp.CheckpointManagerOptions(**options),
        handler_registry=registry(checkpointer, stage=stage),
    )


def bits(state: Any) -> list[bytes]:
    plain = {**state, "key": jax.random.key_data(state["key"]), "n": int(state["n"])}
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(plain)]


def test_a_manager_saves_and_restores_through_the_tiers(tmp_path: Path) -> None:
    with (
        open_run(tmp_path, "team/r") as checkpointer,
        # What is not waited for on its way down, a newer step may take the place of.
        open_manager(
            tmp_path, checkpointer, stage="local", save_interval_steps=2, max_to_keep=2
        ) as manager,
    ):
        for step in range(9):
            state = make_state(step)
            saved = manager.save(step, args=ocp.args.StandardSave(state))
            assert saved == (step % 2 == 0)
            state["w"].delete()  # it may be donated once save() has returned
        manager.wait_until_finished()
        assert manager.all_steps() == [6, 8]
        assert {each.step for each in checkpointer.steps()} >= {6, 8}
    files = sorted(path.name for path in (tmp_path / "orbax" / "8" / "default").iterdir())
    assert "mtckpt.json" in files
    assert not any("ocdbt" in name for name in files)

    with (
        open_run(tmp_path, "team/r") as checkpointer,
        open_manager(tmp_path, checkpointer) as manager,
    ):
        template = jax.eval_shape(lambda: make_state(0))
        found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(template))
        assert bits(found) == bits(make_state(8))
        found = manager.restore(6, args=ocp.args.StandardRestore(make_state(0)))
        assert bits(found) == bits(make_state(6))
        found = manager.restore(6, args=ocp.args.StandardRestore())
        assert bits(found) == bits(make_state(6))
        manager.save(10, args=ocp.args.StandardSave(make_state(10)))
        manager.wait_until_finished()
        assert manager.latest_step() == 10


def test_what_cannot_be_saved_or_restored_is_said(tmp_path: Path) -> None:
    from mtckpt.adapters.jax.orbax import Handler

    with (
        open_run(tmp_path) as checkpointer,
        open_manager(tmp_path, checkpointer, stage="local") as manager,
    ):
        gone = make_state(1)
        gone["w"].delete()
        with pytest.raises(UnsupportedState, match="donated or deleted"):
            manager.save(1, args=ocp.args.StandardSave(gone))
        options = jax.tree.map(lambda _: ocp.SaveArgs(dtype=jnp.bfloat16), make_state(1))
        with pytest.raises(UsageError, match="saves arrays as they are"):
            manager.save(1, args=ocp.args.PyTreeSave(make_state(1), save_args=options))
        manager.save(2, args=ocp.args.StandardSave(make_state(2)))
        manager.wait_until_finished()
        assert manager.all_steps() == [2]
        with pytest.raises(ValueError, match="more"):  # as Orbax raises; it is a StateMismatch
            manager.restore(
                2, args=ocp.args.StandardRestore({**make_state(0), "more": jnp.zeros(2)})
            )
        for odd, text in [
            (ocp.args.PyTreeRestore(make_state(0), restore_args={"w": 1}), "not a tree like item"),
            (ocp.args.PyTreeRestore(make_state(0), transforms={}), "transforms"),
            (ocp.args.StandardRestore(make_state(0), strict=False), "strict=False"),
        ]:
            with pytest.raises(UsageError, match=text):
                manager.restore(2, args=odd)
    with (
        ocp.CheckpointManager(tmp_path / "orbax") as plain,
        pytest.raises(UsageError, match="not told where to find it"),
    ):
        plain.restore(2)
    with open_run(tmp_path, "another") as checkpointer:
        handler = Handler(checkpointer)
        other = tmp_path / "orbax" / "2" / "default"
        checkpointer.save(1, make_state(1), tiers="all").wait("local", timeout_s=30)
        assert bits(handler.restore(other, make_state(0))) == bits(make_state(2))
        assert bits(handler.restore(other)) == bits(make_state(2))
        # What was read of another run is nothing that this one begins anew from.
        with pytest.raises(StepExists):
            checkpointer.save(1, make_state(1), tiers="all")
        checkpointer.save(3, make_state(3), tiers="all").wait("local", timeout_s=30)
        assert [step.step for step in checkpointer.steps()] == [1, 3]
        pointer = other / "mtckpt.json"
        text = pointer.read_text()
        for run, error, said in (
            ("gone", StepNotFound, "keep= of the tiers"),
            ("../r", FormatError, "not to a run"),
            ("~", FormatError, "not to a run"),
        ):
            pointer.write_text(text.replace('"r"', f'"{run}"'))
            with pytest.raises(error, match=said):
                handler.restore(other, make_state(0))
        with pytest.raises(FormatError):
            handler.restore(tmp_path, make_state(0))
        (tmp_path / "mtckpt.json").write_text("[]")
        with pytest.raises(FormatError, match="points to a save"):
            handler.restore(tmp_path, make_state(0))
