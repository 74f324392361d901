"""One array at several places of a template: it gets what was saved, or nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from state_harness import plan, restore, save
from torch import nn

import mtckpt
from mtckpt._aliases import Aliases
from mtckpt._renaming import Stored
from mtckpt._state import ArraySpec
from mtckpt.errors import StateMismatch

Make = Callable[[float], Any]
NUMPY: Make = lambda value: np.full(3, float(value))  # noqa: E731  # a name for the ids of tests
KINDS = {
    "numpy": NUMPY,
    "torch": lambda value: torch.full((3,), float(value)),
    "columns": lambda value: np.asfortranarray(np.full((2, 3), float(value))),
    "strided": lambda value: torch.full((6,), float(value))[::2],
    "replicated": lambda value: mtckpt.replicated(np.full(3, float(value))),
}
made_by = pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))


def one_dict(array: Any) -> Any:
    shared = {"w": array, "n": 0}
    return {"a": shared, "b": shared}


def two_dicts(array: Any) -> Any:
    return {"a": {"w": array, "n": 0}, "b": {"w": array, "n": 0}}


def one_list(array: Any) -> Any:
    return {"a": {"w": array, "n": 0}, "b": {"w": array, "n": 0}, "l": [array, array]}


def two(make: Make, first: float, second: float) -> Any:
    return {"a": {"w": make(first), "n": 1}, "b": {"w": make(second), "n": 2}}


def differing(saved: Any, live: Any, **options: Any) -> list[str]:
    with pytest.raises(StateMismatch) as caught:
        plan(save(saved), live, **options)
    return list(vars(caught.value)["differing"])


def line(first: str, second: str) -> str:
    return f"{first} and {second}: one array here, two in the checkpoint"


@made_by
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("share", [one_dict, two_dicts])
def test_two_arrays_do_not_go_into_one(make: Make, share: Any, partial: bool) -> None:
    live = share(make(0))
    assert differing(two(make, 1, 2), live, partial=partial) == [line("a/w", "b/w")]
    array = getattr(live["a"]["w"], "value", live["a"]["w"])
    assert not array.any()
    assert live["a"]["n"] == 0


@made_by
@pytest.mark.parametrize("share", [one_dict, two_dicts])
def test_equal_ones_do(make: Make, share: Any) -> None:
    restored = restore(save(two(make, 1, 1)), share(make(0)))
    for name in "ab":
        array = getattr(restored[name]["w"], "value", restored[name]["w"])
        assert (array == 1).all()
    assert (restored["a"]["n"], restored["b"]["n"]) == (1, 2)


def test_every_pair_is_told_at_once() -> None:
    saved = two(NUMPY, 1, 2) | {"l": [NUMPY(2), NUMPY(3)]}
    assert differing(saved, one_list(NUMPY(0))) == [
        line("a/w", "b/w"),
        line("l/0", "l/1"),
    ]


def test_what_cannot_be_written_to_is_replaced_at_each_place() -> None:
    read_only = NUMPY(0)
    read_only.flags.writeable = False
    nowhere = torch.zeros(3, device="meta")
    for make, array in ((NUMPY, read_only), (KINDS["torch"], nowhere)):
        restored = restore(save(two(make, 1, 2)), two_dicts(array))
        assert [restored[name]["w"].tolist() for name in "ab"] == [[1] * 3, [2] * 3]


class Net(nn.Module):
    """A model whose last layer may be its first one."""

    def __init__(self, first: float, second: float, *, tied: bool) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        nn.init.constant_(self.emb.weight, first)
        nn.init.constant_(self.head.weight, second)
        if tied:
            self.head.weight = self.emb.weight


class Hooked(Net):
    """One whose tensors go through ``load_state_dict``."""

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return super().load_state_dict(*args, **options)


@pytest.mark.parametrize(("kind", "device"), [(Net, "cpu"), (Net, "meta"), (Hooked, "cpu")])
def test_a_module_that_was_not_tied_does_not_go_into_a_tied_one(kind: Any, device: str) -> None:
    live = kind(0, 0, tied=True)
    if device == "meta":
        live = live.to("meta")
        live.head.weight = live.emb.weight
    told = differing({"m": kind(1, 2, tied=False)}, {"m": live})
    assert told == [line("m/emb.weight", "m/head.weight")]
    assert device == "meta" or not live.emb.weight.any()
    restore(save({"m": kind(1, 1, tied=False)}), {"m": live})
    assert live.head.weight is live.emb.weight
    assert bool((live.emb.weight == 1).all())


def test_one_module_at_two_places() -> None:
    live = Net(0, 0, tied=False)
    saved = {"model": Net(1, 2, tied=False), "ema": Net(1, 3, tied=False)}
    told = differing(saved, {"model": live, "ema": live})
    assert told == [line("model/head.weight", "ema/head.weight")]


def test_boxes_are_compared_by_digests_where_they_are_the_same_boxes_and_read_where_not() -> None:
    def array(path: str, offsets: tuple[int, ...] | None, shape: tuple[int, ...]) -> Stored:
        whole = None if offsets is None else (8, 8)
        return Stored(path, ArraySpec("float32", shape, "torch", offsets, whole), len(path))

    shapes: list[tuple[tuple[int, ...] | None, tuple[int, ...]]] = [
        ((0, 0), (4, 8)), ((0, 0), (8, 4)), ((4, 0), (4, 8)), ((0, 0), (0, 8)), (None, (4, 8)),
    ]  # fmt: skip
    for number, (offsets, shape) in enumerate(shapes):
        aliases = Aliases([array("a", (0, 0), (4, 8)), array("bb", offsets, shape)], [])
        aliases.share(0, 1)
        told = [line("a", "bb")]
        no, yes = (lambda *_: False), (lambda *_: True)
        assert aliases.apart(no, yes) == (told if number == 0 else [])
        assert aliases.apart(yes, no) == (told if number in (1, 2) else [])


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("runtime_dir")
def test_what_was_saved_is_compared_by_its_digests() -> None:
    """Chunks that differ are the last ones; equal bytes that lie in two places are the same."""
    num = 300_000
    last = np.zeros(num)
    last[-1] = 1
    with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1)], timeout_s=20) as checkpointer:
        checkpointer.save(1, {"a": np.zeros(num), "b": last, "c": np.zeros(num)}).wait("staged")
        live = np.full(num, 7.0)
        with pytest.raises(StateMismatch) as caught:
            checkpointer.restore({"a": live, "b": live, "c": live})
        assert vars(caught.value)["differing"] == (line("a", "b"), line("b", "c"))
        assert (live == 7).all()
        assert checkpointer.restore({"a": live, "b": NUMPY(0).repeat(num // 3), "c": live})
        assert not live.any()
