"""Scripts for Orbax's manager, run on its own handlers and on mtckpt's: both say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtckpt
from mtckpt.errors import StateMismatch, WaitTimeout

jax = pytest.importorskip("jax")
ocp = pytest.importorskip("orbax.checkpoint")
optax = pytest.importorskip("optax")
nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")
train_state = pytest.importorskip("flax.training.train_state")
jnp = jax.numpy
policies = ocp.checkpoint_managers

from orbax_both import Both, Options, told  # noqa: E402

# What Orbax and absl do on their way is theirs.
pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.usefixtures("runtime_dir"),
    pytest.mark.filterwarnings("ignore::Warning:orbax"),
    pytest.mark.filterwarnings("ignore::Warning:jax"),
]


def state_of(step: int) -> dict[str, Any]:
    return {"w": jnp.full((3, 2), float(step)), "n": jnp.asarray(step)}


def save(manager: Any, step: int, **more: Any) -> bool:
    return bool(manager.save(step, args=ocp.args.StandardSave(state_of(step)), **more))


# -- when a step is saved, and how long it is kept -------------------------------------------------


def score(metrics: Any) -> float:
    return float(metrics["loss"])


DECISIONS: dict[str, Options] = {
    "interval": {"save_interval_steps": 3},
    "steps": {"save_interval_steps": 100, "save_on_steps": {2, 4}},
    "function": {"should_save_fn": lambda step, last: step % 4 == 1},
    "policy": {
        "save_decision_policy": policies.AnySavePolicy(
            [
                policies.InitialSavePolicy(),
                policies.FixedIntervalPolicy(3),
                policies.SpecificStepsPolicy([5]),
            ]
        )
    },
    "newest": {"max_to_keep": 2},
    "period": {"max_to_keep": 2, "keep_period": 3},
    "best": {"max_to_keep": 2, "best_fn": score, "best_mode": "min"},
    "best of those": {
        "max_to_keep": 1,
        "best_fn": score,
        "keep_checkpoints_without_metrics": False,
    },
    "preserved": {
        "preservation_policy": policies.AnyPreservationPolicy(
            [policies.LatestN(1), policies.EveryNSteps(3), policies.CustomSteps([2])]
        )
    },
    "preserved best": {
        "preservation_policy": policies.BestN(get_metric_fn=score, n=2, reverse=True),
        "best_fn": score,
    },
    "named": {"step_prefix": "at", "step_format_fixed_length": 6, "max_to_keep": 3},
    "synchronous": {"enable_async_checkpointing": False, "max_to_keep": 2},
    "set aside": {"max_to_keep": 2, "todelete_subdir": "gone"},
    "read only": {"read_only": True},
    "named by a format": {
        "step_name_format": ocp.path.step.standard_name_format(
            step_prefix="v1.2-run", step_format_fixed_length=4
        ),
        "max_to_keep": 3,
    },
    "largest": {"max_to_keep": 2, "best_fn": score, "best_mode": "max"},
}


def test_the_same_steps_are_saved_and_kept(
    tmp_path: Path, runtime_dir: Path, subtests: pytest.Subtests
) -> None:
    def script(manager: Any) -> Any:
        saved = []
        for step in range(6):
            wanted = bool(manager.should_save(step))
            loss = float(abs(step - 3))
            saved.append((wanted, save(manager, step, metrics={"loss": loss})))
        manager.wait_until_finished()
        steps = list(manager.all_steps())
        found = [manager.restore(step) for step in {*steps[:1], *steps[-1:]}]
        return {
            "saved": saved,
            "steps": steps,
            "newest": str(manager.latest_step()),
            "best": str(manager.best_step()),
            "again": list(manager.all_steps(read=True)),
            "arrays": found,
            "metrics": [str(manager.metrics(step)) for step in steps],
            "items": [str(manager.item_metadata(step)["w"].shape) for step in steps],
        }

    for number, (name, options) in enumerate(DECISIONS.items()):
        settings = [mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "disk", every=1, keep=50)]
        with (
            subtests.test(name),
            mtckpt.Checkpointer(f"r{number}", settings, timeout_s=30, max_stall_s=20) as tiers,
        ):
            Both(tmp_path / str(number), tiers).same(script, **options)


def test_steps_are_deleted_reloaded_and_never_written_over(both: Both) -> None:
    def script(manager: Any) -> Any:
        said: list[Any] = [save(manager, 1), save(manager, 2)]
        manager.wait_until_finished()
        said.append(save(manager, 2))  # no step that is older or the same is wanted
        with pytest.raises(ocp.checkpoint_manager.StepAlreadyExistsError):
            save(manager, 2, force=True)
        said.append(save(manager, 7, force=True))
        manager.wait_until_finished()
        manager.delete(2)
        said += [list(manager.all_steps()), manager.is_saving_in_progress()]
        with pytest.raises(FileNotFoundError):
            manager.restore(2, args=ocp.args.StandardRestore(state_of(0)))
        for step in (1, 7):
            manager.delete(step)
        said += [list(manager.all_steps()), str(manager.latest_step())]
        with pytest.raises(FileNotFoundError, match="No steps"):
            manager.restore(None)
        said.append(save(manager, 9))
        manager.wait_until_finished()
        with both.open(manager.directory.name) as beside:  # another process would see it so
            said.append(list(beside.all_steps()))
            beside.delete(9)
        manager.reload()
        said.append(list(manager.all_steps()))
        return said

    both.same(script)


def test_what_is_restored_says_nothing_of_what_is_saved_next(both: Both) -> None:
    """As to evaluate the best step amid training: no step that is listed is abandoned."""

    def script(manager: Any) -> Any:
        def look(*steps: int) -> list[Any]:
            manager.wait_until_finished()
            if manager.directory.name == "mtckpt":
                kept = [step.step for step in both.tiers.steps() if not step.abandoned]
                assert kept == list(manager.all_steps())
            found = [manager.restore(s, args=ocp.args.StandardRestore(state_of(0))) for s in steps]
            return [list(manager.all_steps()), *found]

        for step in (1, 2, 3):
            save(manager, step)
        said = look(1)
        save(manager, 4)
        said += look(1, 2, 3, 4, 2)
        if manager.directory.name == "mtckpt":  # one start of the job, as it is
            records = [both.tiers._records(step) for step in (3, 4)]
            assert len({one.incarnation for each in records for one in each.values()}) == 1
        with both.open(manager.directory.name) as beside:  # as after a start that restored none
            save(beside, 7)
            beside.wait_until_finished()
        manager.reload()
        said += look(1, 2, 3, 4, 7)
        for step in (3, 4, 7):
            manager.delete(step)
        save(manager, 3)
        said += look(1, 2, 3)
        manager.delete(3)
        save(manager, 3)
        return said + look(1, 2, 3)

    both.same(script)


# -- what is restored ------------------------------------------------------------------------------


def test_every_way_to_ask_for_a_step(both: Both) -> None:
    abstract = jax.eval_shape(lambda: state_of(0))
    placed = jax.tree.map(ocp.utils.to_shape_dtype_struct, state_of(0))
    halves = {**abstract, "w": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)}
    arrays = ocp.checkpoint_utils.construct_restore_args(placed)
    hosts = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    cast = {**arrays, "w": ocp.ArrayRestoreArgs(dtype=jnp.bfloat16)}

    def script(manager: Any) -> Any:
        for step in (3, 4):
            save(manager, step)
        manager.wait_until_finished()
        return [
            manager.restore(step, args=arguments)
            for step in (3, None)
            for arguments in (
                ocp.args.StandardRestore(state_of(0)),
                ocp.args.StandardRestore(placed),
                ocp.args.StandardRestore(),
                ocp.args.PyTreeRestore(placed),
                ocp.args.PyTreeRestore(placed, restore_args=arrays),
                ocp.args.PyTreeRestore(abstract, restore_args=hosts),
                ocp.args.PyTreeRestore(halves, restore_args=cast),
                ocp.args.PyTreeRestore({"n": placed["n"]}, partial_restore=True),
            )
        ] + [manager.restore(4), manager.restore(3, directory=manager.directory)]

    found = both.same(script)
    assert found[5]["w"].dtype == np.float32
    assert found[6]["w"].dtype == jnp.bfloat16
    assert isinstance(found[0]["w"], jax.Array)


def test_templates_that_do_not_fit(both: Both) -> None:
    """Both refuse them; what mtckpt refuses beside is said in the documentation."""
    one_more = {**state_of(0), "more": jnp.zeros(2)}
    one_less = {"w": state_of(0)["w"]}
    partial = ocp.args.PyTreeRestore(one_more, partial_restore=True)

    def script(manager: Any) -> Any:
        save(manager, 3)
        manager.wait_until_finished()
        with pytest.raises((ValueError, StateMismatch), match="more"):
            manager.restore(3, args=ocp.args.StandardRestore(one_more))
        with pytest.raises((ValueError, StateMismatch), match="n"):
            manager.restore(3, args=ocp.args.StandardRestore(one_less))
        return manager.restore(3, args=partial)

    assert both.same(script)["more"].tolist() == [0, 0]


def test_another_mesh_and_other_axes(both: Both) -> None:
    devices = jax.devices()[:8]
    if len(devices) < 8:
        pytest.skip("JAX has started with fewer than 8 devices in this process")
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=devices)
    P = jax.sharding.PartitionSpec
    before, after = (jax.sharding.NamedSharding(mesh, P(*axes)) for axes in ("xy", (None, "x")))
    state = {"w": jax.device_put(jnp.arange(32.0).reshape(4, 8), before)}
    wanted = jax.ShapeDtypeStruct((4, 8), "float32", sharding=after)
    axes = ocp.ArrayRestoreArgs(mesh=mesh, mesh_axes=P("y"))

    def script(manager: Any) -> Any:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        found = [
            manager.restore(1, args=ocp.args.StandardRestore({"w": wanted})),
            manager.restore(1, args=ocp.args.PyTreeRestore(state, restore_args={"w": axes})),
        ]
        return found, [str(each["w"].sharding.spec) for each in found]

    both.same(script)


def test_several_items_in_one_step(both: Both) -> None:
    params, moments = state_of(1), {"m": jnp.ones(3)}

    def script(manager: Any) -> Any:
        for step in (1, 2):
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                moments=ocp.args.PyTreeSave(moments),
                meta=ocp.args.JsonSave({"step": step, "text": "ä", "none": None}),
            )
            manager.save(step, args=items, custom_metadata={"by": "test"})
        manager.wait_until_finished()
        some = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), meta=ocp.args.JsonRestore()
        )
        one = ocp.args.Composite(moments=ocp.args.PyTreeRestore(moments))
        found = [
            dict(manager.restore(step, args=arguments).items())
            for step in (1, 2)
            for arguments in (some, one)
        ]
        return found, dict(manager.metadata(2).custom_metadata)

    both.same(script)


# -- what a tree may have --------------------------------------------------------------------------


class Net(linen.Module):  # type: ignore[misc, name-defined]  # Flax was asked for, not imported
    @linen.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        return linen.Dense(2)(linen.BatchNorm(use_running_average=True)(x))


def trees() -> dict[str, Any]:
    params = {"w": jnp.full((2, 3), 1.5), "b": jnp.full(3, 0.5, jnp.bfloat16)}
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 3)))
    chain = optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 9)))
    return {
        "scalars": {"i": 3, "f": 2.5, "b": True, "a": jnp.asarray(2)},
        "numpy": {"a": np.arange(6.0).reshape(2, 3), "s": np.float32(1.5)},
        "none": {"x": None, "w": jnp.ones(1)},
        "empty": {"d": {}, "l": [], "t": (), "w": jnp.ones(1)},
        "sequences": {"l": [jnp.ones(1), jnp.zeros(2)], "t": (jnp.ones(3), {"x": jnp.ones(1)})},
        "keys": {"new": jax.random.key(7), "rbg": jax.random.key(7, impl="rbg"), "many": _many()},
        "optax": {"params": params, "opt": chain.init(params)},
        "linen": variables,
        "train state": train_state.TrainState.create(
            apply_fn=Net().apply, params=variables["params"], tx=optax.sgd(0.1, momentum=0.9)
        ),
        "nnx": nnx.state(nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), _dropout())),
        "pure nnx": nnx.to_pure_dict(nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))),
    }


def _many() -> Any:
    return jax.random.split(jax.random.key(7), 3)


def _dropout() -> Any:
    return nnx.Dropout(0.5, rngs=nnx.Rngs(1))


def test_trees_of_every_kind_come_back(both: Both, subtests: pytest.Subtests) -> None:
    made = trees()

    def blank(leaf: Any) -> Any:
        if isinstance(leaf, (bool, int, float)):
            return type(leaf)(0)
        if isinstance(leaf, (np.ndarray, np.generic)):
            return np.zeros_like(leaf)
        return leaf

    def script(manager: Any) -> Any:
        for step, tree in enumerate(made.values()):
            manager.save(step, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        return [
            manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(blank, tree)))
            for step, tree in enumerate(made.values())
        ]

    found = {}
    for whose in ("orbax", "mtckpt"):
        with both.open(whose) as manager:
            found[whose] = script(manager)
    for number, (name, tree) in enumerate(made.items()):
        with subtests.test(name):
            assert told(found["mtckpt"][number]) == told(tree)
            assert told(found["orbax"][number]) == told(tree)


# -- errors ----------------------------------------------------------------------------------------


def test_an_error_of_the_background_is_raised_at_the_next_call(
    tmp_path: Path, runtime_dir: Path
) -> None:
    from mtckpt.adapters.jax.orbax import registry

    disk = tmp_path / "disk"
    tiers = mtckpt.Checkpointer("r", [mtckpt.Disk(disk, every=1)], timeout_s=20, max_stall_s=10)
    with ocp.CheckpointManager(
        tmp_path / "orbax", handler_registry=registry(tiers, stage="local", timeout_s=0.0)
    ) as manager:
        save(manager, 1)
        with pytest.raises(TimeoutError) as caught:  # Orbax makes one of its own of ours
            manager.wait_until_finished()
        assert isinstance(caught.value.__cause__, WaitTimeout)
        assert list(manager.all_steps(read=True)) == []
        manager.check_for_errors()  # once
        save(manager, 2)
        with pytest.raises(TimeoutError):
            save(manager, 3)
    tiers.close()
