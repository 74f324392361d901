"""Placing: what of a checkpoint goes where in a template, and that nothing lives changes before."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from state_harness import fills, plan, restore, save

from mtckpt._placing import Diff, settle
from mtckpt.errors import StateMismatch


class Box:
    """An object with state that counts how often it is loaded."""

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.loaded = 0

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state
        self.loaded += 1


def differences(saved: Any, live: Any, **options: Any) -> dict[str, Any]:
    with pytest.raises(StateMismatch) as caught:
        plan(save(saved), live, **options)
    names = ("missing", "unused", "differing")
    return {k: vars(caught.value)[k] for k in names if vars(caught.value)[k]}


def test_plain_values_are_written_back_into_the_dict_that_was_given() -> None:
    live: dict[str, Any] = {"step": 0, "best": None, "name": "x", "in": {"deep": [1]}}
    inner = live["in"]
    assert (
        restore(save({"step": 7, "best": 0.5, "name": None, "in": {"deep": [2, 3]}}), live) is live
    )
    assert live == {"step": 7, "best": 0.5, "name": None, "in": {"deep": [2, 3]}}
    assert live["in"] is inner


class Pair(NamedTuple):
    """Two values with names."""

    left: Any
    right: Any


def test_a_named_tuple_is_matched_by_its_fields() -> None:
    inner = np.zeros(2)
    live = {"at": Pair(inner, 0)}
    restored = restore(save({"at": Pair(np.ones(2), 7)}), live)["at"]
    assert type(restored) is Pair
    assert restored.left is inner
    assert (inner.tolist(), restored.right) == ([1, 1], 7)
    assert differences({"at": {"left": 1, "more": 2}}, live) == {
        "missing": ("at/right",),
        "unused": ("at/more",),
        "differing": ("at/left: an array here, plain in the checkpoint",),
    }
    # Saved as a plain tuple, as early versions did.
    assert restore(save({"at": (np.full(2, 5.0), 8)}), live)["at"] == Pair(inner, 8)


def test_objects_with_get_state_and_set_state() -> None:
    one, other = np.random.RandomState(1), np.random.RandomState(2)
    one.normal(size=7)
    saved = save({"rng": one})
    live = {"rng": other}
    assert restore(saved, live)["rng"] is other
    assert other.normal() == one.normal()
    assert differences({"rng": one}, {"rng": np.zeros(2)})["differing"]


def test_grain_iterators_go_on_where_they_were() -> None:
    grain = pytest.importorskip("grain")

    def start() -> list[Any]:
        data = grain.MapDataset.range(100).shuffle(seed=3).to_iter_dataset().batch(4)
        sampler = grain.samplers.IndexSampler(
            20, shard_options=grain.sharding.NoSharding(), shuffle=True, seed=1, num_epochs=1
        )
        loader = grain.DataLoader(data_source=range(20), sampler=sampler, worker_count=0)
        return [iter(data), iter(loader)]

    trained, resumed = start(), start()
    for iterator in trained:
        for _ in range(3):
            next(iterator)
    restore(save({"data": trained}), {"data": resumed})
    for iterator, twin in zip(trained, resumed, strict=True):
        assert np.array_equal(next(iterator), next(twin))


def test_a_dict_of_plain_values_becomes_what_was_saved() -> None:
    live: dict[str, Any] = {"config": {"old": 1, "both": 2}}
    restore(save({"config": {"both": 3, "new": {"x": b"y"}}}), live)
    assert live == {"config": {"both": 3, "new": {"x": b"y"}}}


def test_containers_keep_their_identity_and_kind() -> None:
    class Tree(dict[str, Any]):
        """A dict of a kind of its own."""

    live: dict[str, Any] = {
        "tree": Tree(a=torch.zeros(1), n=0),
        "ordered": OrderedDict(b=torch.zeros(1)),
        "list": [torch.zeros(1), [0]],
        "tuple": (torch.zeros(1), 0),
        "frozen": MappingProxyType({"c": torch.zeros(1), "n": 0}),
    }
    before = dict(live)
    tensor = live["tuple"][0]
    one = torch.ones(1)
    saved = save(
        {
            "tree": {"a": one, "n": 5},
            "ordered": {"b": one + 0},
            "list": [one + 0, [6, 7]],
            "tuple": (one + 0, 8),
            "frozen": {"c": one + 0, "n": 9},
        }
    )
    restore(saved, live)
    for name in ("tree", "ordered", "list"):
        assert live[name] is before[name]
    assert live["tree"] == {"a": one, "n": 5}
    assert live["list"][1] == [6, 7]
    assert live["tuple"] == (one, 8)
    assert live["tuple"][0] is tensor
    assert isinstance(live["frozen"], MappingProxyType)
    assert dict(live["frozen"]) == {"c": one, "n": 9}


def test_a_tuple_in_which_nothing_changes_stays_the_same_object() -> None:
    live: dict[str, Any] = {"t": (torch.zeros(1), torch.zeros(1))}
    before = live["t"]
    restore(save({"t": (torch.ones(1), torch.ones(1))}), live)
    assert live["t"] is before
    assert before[0].item() == 1


def test_keys_at_the_top_that_the_template_lacks_are_not_read() -> None:
    live: dict[str, Any] = {"a": torch.zeros(2)}
    placing, _ = plan(save({"a": torch.ones(2), "big": torch.ones(100)}), live)
    assert sum(fill.size_bytes for fill in fills(placing)) == 8


def test_inside_a_key_everything_differs_loudly() -> None:
    saved = {"m": {"a": torch.ones(2), "gone": torch.ones(1)}, "x": 1}
    live: dict[str, Any] = {"m": {"a": torch.zeros(3), "new": torch.zeros(1)}, "y": 2}
    assert differences(saved, live) == {
        "missing": ("m/new", "y"),
        "unused": ("m/gone",),
        "differing": ("m/a: float32[3] here, float32[2] in the checkpoint",),
    }
    assert live["m"]["a"].tolist() == [0, 0, 0]


def test_a_long_difference_is_cut_in_the_text_only() -> None:
    saved = {"m": {"first": torch.ones(1), **{f"old{i}": 1 for i in range(200)}}}
    live: dict[str, Any] = {"m": {"first": torch.ones(1), **{f"new{i}": 1 for i in range(120)}}}
    with pytest.raises(StateMismatch) as caught:
        plan(save(saved), live)
    assert len(vars(caught.value)["missing"]) == 120
    assert len(vars(caught.value)["unused"]) == 200
    assert "and 220 more, in the attributes" in str(caught.value)
    assert len(str(caught.value)) < 10_000


def test_partial_takes_what_both_have_and_still_minds_shapes() -> None:
    saved = save({"m": {"a": torch.ones(2), "gone": torch.ones(1)}})
    live: dict[str, Any] = {"m": {"a": torch.zeros(2), "new": torch.zeros(1)}, "y": 2}
    restore(saved, live, partial=True)
    assert live["m"]["a"].tolist() == [1, 1]
    assert live["y"] == 2
    other = {"m": {"a": torch.zeros(3)}}
    with pytest.raises(StateMismatch) as caught:
        plan(save({"m": {"a": torch.ones(2)}}), other, partial=True)
    assert len(vars(caught.value)["differing"]) == 1
    # It was given already, and alone is no help.
    assert not [action for action in caught.value.actions if action.startswith("what is new")]


def test_what_is_found_twice_is_said_once() -> None:
    found = Diff(unused=["m/a", "m/b", "m/a"], differing=["m/c: 1 here, 2 in the checkpoint"] * 2)
    with pytest.raises(StateMismatch) as caught:
        found.raise_any(step=1)
    assert vars(caught.value)["unused"] == ("m/a", "m/b")
    assert str(caught.value).count("m/c") == 1


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (3, torch.zeros(1)),
        (torch.ones(1), 3),
        ({"x": torch.ones(1)}, torch.zeros(1)),
        (torch.ones(1), {"x": torch.zeros(1)}),
        ([torch.ones(1)], [torch.zeros(1)] * 2),
        ([torch.ones(1)], {"0": torch.zeros(1)}),
        ({"0": torch.ones(1)}, [torch.zeros(1)]),
        ({"x": 1}, 3),
        (torch.ones(1), object()),
    ],
)
def test_kinds_that_do_not_go_together(saved: Any, live: Any) -> None:
    assert list(differences({"a": saved}, {"a": live})) == ["differing"]


def test_an_open_place_takes_anything() -> None:
    tree = {"t": (torch.ones(1), np.ones(2)), "n": [1, {"x": None}]}
    live: dict[str, Any] = {"a": None}
    restore(save({"a": tree}), live)
    assert live["a"]["t"][0].tolist() == [1]
    assert live["a"]["t"][1].tolist() == [1, 1]
    assert live["a"]["n"] == [1, {"x": None}]


def test_objects_get_fresh_arrays_once_and_only_in_finish() -> None:
    box = Box()
    saved = save({"box": Box({"a": torch.ones(3), "s": np.float32(2), "l": [1, None]})})
    placing, result = plan(saved, {"box": box})
    assert box.loaded == 0
    restore(saved, {"box": box})
    assert box.loaded == 1
    assert box.state["a"].tolist() == [1, 1, 1]
    assert type(box.state["s"]) is np.float32
    assert box.state["l"] == [1, None]
    assert settle(result)["box"] is box
    del placing


def test_two_objects_never_share_memory_and_tied_arrays_stay_tied() -> None:
    tensor = torch.ones(2)
    one, other = Box(), Box()
    restore(save({"a": Box([tensor, tensor]), "b": Box([tensor.clone()])}), {"a": one, "b": other})
    assert one.state[0] is one.state[1]
    assert one.state[0].data_ptr() != other.state[0].data_ptr()


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_ties_do_not_depend_on_the_order_of_the_template(order: list[str]) -> None:
    tensor = torch.ones(2)
    live: dict[str, Any] = dict.fromkeys(order)
    saved = save({"a": tensor, "b": tensor})
    placing, _ = plan(saved, dict(live))
    assert len(fills(placing)) == 1
    restore(saved, live)
    assert live["a"] is live["b"]


def test_an_error_before_finish_has_changed_nothing() -> None:
    live: dict[str, Any] = {
        "a": {"x": torch.zeros(2), "n": 1},
        "box": Box(),
        "b": {"x": torch.zeros(2)},
    }
    saved = save({"a": {"x": torch.ones(2), "n": 2}, "box": Box(3), "b": {"x": torch.ones(3)}})
    with pytest.raises(StateMismatch):
        plan(saved, live)
    assert live["a"]["x"].tolist() == [0, 0]
    assert live["a"]["n"] == 1
    assert live["box"].loaded == 0


def test_arrays_of_no_bytes_are_not_wanted() -> None:
    placing, _ = plan(save({"a": torch.zeros(0, 3)}), {"a": torch.zeros(0, 3)})
    assert fills(placing) == []


def test_arrays_that_cannot_be_written_into_are_replaced_in_their_container() -> None:
    frozen = np.zeros(2)
    frozen.flags.writeable = False
    live: dict[str, Any] = {"l": [frozen], "t": (frozen, np.float64(0))}
    restore(save({"l": [np.ones(2)], "t": (np.ones(2), np.float64(3))}), live)
    assert live["l"][0].tolist() == live["t"][0].tolist() == [1, 1]
    assert live["t"][1] == 3
    assert frozen.tolist() == [0, 0]


def test_a_state_that_is_one_object_or_one_array() -> None:
    box = Box()
    assert restore(save(Box([1])), box) is box
    assert box.state == [1]
    live = torch.zeros(2)
    restore(save(torch.ones(2)), live)
    assert live.tolist() == [1, 1]


def test_an_empty_view_takes_no_bytes_from_the_tensor_whose_storage_it_has() -> None:
    base = torch.zeros(6)
    live = {"all": base, "none": base[0:0], "other": torch.zeros(2)}
    wanted = {"all": torch.arange(6.0), "none": torch.zeros(0), "other": torch.ones(2)}
    restore(save(wanted), live)
    assert torch.equal(base, wanted["all"])
    assert torch.equal(live["other"], wanted["other"])


class Nothing(NamedTuple):
    """What Optax has where there is no state."""


def test_named_tuples_without_arrays_stay_what_they_are() -> None:
    frozen = MappingProxyType({"n": 1})
    saved = save({"s": (Nothing(), Nothing()), "l": [Pair(1, 2)], "d": {"p": Pair(3, 4)}})
    live: dict[str, Any] = {"s": (Nothing(), Nothing()), "l": [Pair(0, 0)], "d": {"p": Pair(0, 0)}}
    assert restore(saved, live) == {
        "s": (Nothing(), Nothing()),
        "l": [Pair(1, 2)],
        "d": {"p": Pair(3, 4)},
    }
    assert [type(each) for each in live["s"]] == [Nothing, Nothing]
    assert [type(live["l"][0]), type(live["d"]["p"])] == [Pair, Pair]
    again = restore(save([frozen]), [MappingProxyType({"n": 0})])
    assert again == [frozen]
    assert type(again[0]) is MappingProxyType


def test_a_container_at_several_places_is_divided_where_they_differ() -> None:
    """A template that was made in haste: Optax has one dict of zeros for several moments."""
    zeros = {"in": {"w": np.float32(0)}, "l": [0], "e": {}}
    saved = save(
        {
            "a": Pair({"in": {"w": np.float32(1)}, "l": [1], "e": {}}, 1),
            "b": Pair({"in": {"w": np.float32(2)}, "l": [2], "e": {}}, 2),
        }
    )
    template = {"a": Pair(zeros, 0), "b": Pair(zeros, 0)}
    placing, _ = plan(saved, template)
    assert placing.replaced
    restored = restore(saved, template)
    assert restored["a"] == Pair({"in": {"w": np.float32(1)}, "l": [1], "e": {}}, 1)
    assert restored["b"] == Pair({"in": {"w": np.float32(2)}, "l": [2], "e": {}}, 2)
    assert restored["a"].left is zeros


def test_a_container_at_several_places_stays_one_where_they_are_equal() -> None:
    shared = {"w": torch.ones(2), "n": [1, 2]}
    saved = save({"a": shared, "b": {"c": shared}})
    live = {"w": torch.zeros(2), "n": [0]}
    template = {"a": live, "b": {"c": live}}
    placing, _ = plan(saved, template)
    assert not placing.replaced
    restored = restore(saved, template)
    assert restored["a"] is live is restored["b"]["c"]
    assert (live["w"].tolist(), live["n"]) == ([1, 1], [1, 2])


class Strict(dict[str, Any]):
    """As everybody writes it."""

    __getattr__ = dict.__getitem__


class Growing(dict[str, Any]):
    """As addict and Munch have it: whatever is asked for is there."""

    def __getattr__(self, name: str) -> Any:
        return self.setdefault(name, Growing())


@pytest.mark.parametrize("kind", [Strict, Growing])
def test_dicts_whose_items_are_attributes_are_dicts(kind: Any) -> None:
    def make(count: int) -> dict[str, Any]:
        inner = kind(n=count, seen=kind(a=count))
        return {"own": kind(n=count, inner=inner), "log": {"by": [inner, OrderedDict(c=kind())]}}

    live = make(0)
    own = live["own"]
    restore(save(make(3)), live)
    assert live == make(3)
    assert live["own"] is own
    assert type(live["log"]["by"][0]) is kind
    assert own.inner.seen.a == 3
    opened: dict[str, Any] = {"own": kind(), "log": None}
    restore(save(make(3)), opened)
    assert opened == make(3)
    ordered = {"own": kind(n=0)}
    restore(save({"own": OrderedDict(n=1)}), ordered)
    assert ordered["own"] == {"n": 1}
