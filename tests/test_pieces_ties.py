"""Arrays with several names, in jobs of several ranks: all names come back, whoever ties them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from test_ranks import Job, job  # noqa: F401  # a fixture

import mtckpt
from mtckpt import _restore
from mtckpt._boxes import share_of
from mtckpt.errors import StateMismatch

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("runtime_dir")]
SMALL, LARGE = (30,), (600, 700)


def saved(job: Job, step: int, states: list[Any]) -> None:  # noqa: F811
    for each in job(lambda rank, checkpointer: checkpointer.save(step, states[rank])):
        assert isinstance(each, mtckpt.Save), each
        each.wait("local", timeout_s=30)


def restored(job: Job, step: int, lives: list[Any]) -> list[Any]:  # noqa: F811
    found = job(lambda rank, checkpointer: checkpointer.restore(lives[rank]))
    for each in found:
        assert isinstance(each, mtckpt.Restored), each
        assert each.step == step
    return [each.state for each in found]


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_private_name_of_what_is_replicated(
    job: Callable[..., Job],  # noqa: F811
    shape: tuple[int, ...],
    order: tuple[str, str],
) -> None:
    two = job(2)
    shared, own = order
    array = np.random.default_rng(5).standard_normal(shape)
    saved(two, 1, [{shared: mtckpt.replicated(array), own: array}] * 2)
    lives = [{shared: mtckpt.replicated(np.zeros(shape)), own: np.zeros(shape)} for _ in range(2)]
    for state in restored(two, 1, lives):
        assert np.array_equal(state[shared].value, array)
        assert np.array_equal(state[own], array)


def test_names_that_are_replicated_over_different_ranks(job: Callable[..., Job]) -> None:  # noqa: F811
    three = job(3)
    array = np.random.default_rng(5).standard_normal(LARGE)

    def state(rank: int, array: Any) -> dict[str, Any]:
        pair = (0, 1) if rank < 2 else (2,)
        return {"a": mtckpt.replicated(array), "b": mtckpt.replicated(array, pair)}

    saved(three, 1, [state(rank, array) for rank in range(3)])
    for found in restored(three, 1, [state(rank, np.zeros(LARGE)) for rank in range(3)]):
        assert np.array_equal(found["a"].value, array)
        assert np.array_equal(found["b"].value, array)


@pytest.mark.parametrize("is_same", [True, False])
def test_one_array_for_names_that_are_replicated_over_different_ranks(
    job: Callable[..., Job],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    is_same: bool,
) -> None:
    """How they are cut differs, so that their digests say nothing: they are read."""
    monkeypatch.setattr(_restore, "_COMPARED_BYTES", 1_000_000)
    three = job(3)
    array = np.random.default_rng(5).standard_normal(LARGE)
    other = array.copy()
    other[-1, -1] += 0 if is_same else 1

    def state(rank: int, one: Any, two: Any) -> dict[str, Any]:
        pair = (0, 1) if rank < 2 else (2,)
        return {"a": mtckpt.replicated(one), "b": mtckpt.replicated(two, pair)}

    saved(three, 1, [state(rank, array, other) for rank in range(3)])
    lives = [np.zeros(LARGE) for _ in range(3)]
    states = [state(rank, live, live) for rank, live in enumerate(lives)]
    if is_same:
        restored(three, 1, states)
    else:
        for found in three(lambda rank, checkpointer: checkpointer.restore(states[rank])):
            assert isinstance(found, StateMismatch), found
            assert "a and b: one array here, two in the checkpoint" in str(found)
    for live in lives:
        assert np.array_equal(live, array) if is_same else not live.any()


def test_names_of_all_ranks_share_their_bytes_however_that_is_said(
    job: Callable[..., Job],  # noqa: F811
    tmp_path: Any,
) -> None:
    two = job(2)
    array = np.random.default_rng(5).standard_normal(LARGE)
    state = {"a": mtckpt.replicated(array), "b": mtckpt.replicated(array, (0, 1))}
    saved(two, 1, [state] * 2)
    two.close()
    sizes = [path.stat().st_size for path in tmp_path.glob("disk/run/step-*/*.safetensors")]
    assert len(sizes) == 2
    assert array.nbytes <= sum(sizes) < array.nbytes + 40_000


def tied(array: Any, name: str, *, by: bool) -> dict[str, Any]:
    """An array under two names, of one memory or of two."""
    other = array if by else array.copy()
    return {"x" + name: mtckpt.replicated(array), "a" + name: mtckpt.replicated(other)}


def name_owned_by(rank: int) -> str:
    """The small array "x" + name goes to this rank of two, "a" + name to the other."""

    def has(name: str, member: int) -> bool:
        return not share_of(SMALL, 1, name, member, 2).is_empty

    return next(n for n in map(str, range(99)) if has("x" + n, rank) and not has("a" + n, rank))


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("first", [False, True])
def test_a_tie_that_comes_or_goes_between_two_saves(
    job: Callable[..., Job],  # noqa: F811
    first: bool,
    owner: int,
) -> None:
    """A rank that stores neither of two tied names sees no memory move when that ends."""
    two = job(2)
    name = name_owned_by(owner)
    arrays = [np.full(SMALL, 7.0) for _ in range(2)]
    saved(two, 1, [tied(array, name, by=first) for array in arrays])
    saved(two, 2, [tied(array, name, by=not first) for array in arrays])
    for state in restored(two, 2, [tied(np.zeros(SMALL), name, by=False) for _ in range(2)]):
        assert np.array_equal(state["x" + name].value, arrays[0])
        assert np.array_equal(state["a" + name].value, arrays[0])


@pytest.mark.parametrize("name", [name_owned_by(0), name_owned_by(1)])
def test_a_tie_on_one_rank_only(job: Callable[..., Job], name: str) -> None:  # noqa: F811
    two = job(2)
    array = np.full(SMALL, 7.0)
    saved(two, 1, [tied(array, name, by=rank == 0) for rank in range(2)])
    for state in restored(two, 1, [tied(np.zeros(SMALL), name, by=False) for _ in range(2)]):
        assert np.array_equal(state["x" + name].value, array)
        assert np.array_equal(state["a" + name].value, array)


def test_one_rank_stores_a_random_key_of_all(job: Callable[..., Job]) -> None:  # noqa: F811
    two = job(2)

    def state(seed: int) -> dict[str, Any]:
        key = jax.random.key(seed)
        keys = {
            "one": key,
            "many": jax.random.split(key, 3),
            "rbg": jax.random.key(seed, impl="rbg"),
        }
        return {name: mtckpt.replicated(value) for name, value in keys.items()}

    for step in (1, 2):
        saved(two, step, [state(step)] * 2)
    wanted = state(2)
    for found in restored(two, 2, [state(0) for _ in range(2)]):
        for name, value in wanted.items():
            assert (found[name].value == value.value).all()
