"""Trees of state: what flatten takes apart, refill follows or refuses, and JSON carries."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import json
import math
import types
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from state_harness import restore, save
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from mtckpt import _codecs
from mtckpt._state import (
    decode_plain,
    encode_plain,
    flatten,
    node_from_json,
    node_to_json,
    refill,
    register_codec,
)
from mtckpt.adapters import active_adapters
from mtckpt.errors import CaptureFailed, FormatError, StateMismatch, UnsupportedState

Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Point:
    """A value of a user's."""

    x: Any
    y: Any


@dataclass(frozen=True)
class Unknown:
    """A value that nobody described."""


class Colour(enum.IntEnum):
    """A number, for a template that has none."""

    RED = 1
    BLUE = 2


class Kind(enum.Enum):
    """A name for what it stands for."""

    A = "a"


@pytest.fixture(autouse=True)
def _own_codecs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_codecs, "_by_name", {})
    with mock.patch.dict(_codecs.CODECS, clear=True):
        yield


class Counter:
    """An object with state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


# -- what comes back ----------------------------------------------------------------------------

plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
)
keys = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.integers(-3, 3),
)
arrays = st.sampled_from(
    [torch.ones(2), torch.ones(2, 2).t(), torch.zeros(0), np.ones(3), np.float32(2)]
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.builds(Counter, inner),
    )


plain_trees = st.recursive(plain_values, containers, max_leaves=8)
trees = st.recursive(st.one_of(plain_values, arrays), containers, max_leaves=8)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Counter):
        return alike(one.value, other.value if isinstance(other, Counter) else other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


def unique_paths(tree: Any) -> bool:
    try:
        flatten(tree, active_adapters())
    except UnsupportedState as error:
        if "have the same path" in str(error) or "__metadata__" in str(error):
            return False
        raise
    return True


@given(tree=trees.filter(unique_paths))
def test_every_tree_comes_back_where_the_template_is_open(tree: Any) -> None:
    assert alike(tree, restore(save({"a": tree}), {"a": None})["a"])


@given(value=plain_values)
def test_plain_values_survive_json(value: Any) -> None:
    assert alike(value, decode_plain(json.loads(json.dumps(encode_plain(value), allow_nan=False))))


@pytest.mark.parametrize(
    "value",
    [
        *({}, {"bytes": 3}, {"bytes": "?"}, {"float": "1.0"}, {"int": "x"}, {"int": "9" * 5000}),
        *([], [1], {"bytes": "", "int": ""}, {"other": "x"}),
    ],
)
def test_what_encode_plain_would_not_write_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        decode_plain(value)


@given(tree=trees.filter(unique_paths))
def test_structures_survive_json(tree: Any) -> None:
    flat = flatten(tree, active_adapters())
    text = json.dumps(node_to_json(flat.root))
    again = node_from_json(json.loads(text), len(flat.arrays), len(flat.plain))
    assert json.dumps(node_to_json(again)) == text


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_an_object_that_is_an_array_is_one_when_it_is_written_again(kind: str) -> None:
    place: Any = {"object": {"array": 0}}
    structure = {kind: [["a", place]] if kind == "dict" else [place]}
    assert node_to_json(node_from_json(structure, 1, 0)) == structure


@pytest.mark.parametrize(
    "structure",
    [
        *(None, 3, [], {}, {"array": 1}, {"array": -1}, {"array": True}, {"plain": 0.0}),
        *(
            {"array": 0, "plain": 0},
            {"dict": {}},
            {"dict": [["a"]]},
            {"dict": [[[], {"array": 0}]]},
        ),
        *({"list": 3}, {"object": []}, {"codec": ["x"]}, {"codec": [3, {"array": 0}]}),
        *({"dropped": []}, {"__import__": ["os"]}),
    ],
)
def test_structures_that_were_never_written_are_refused(structure: Any) -> None:
    with pytest.raises(FormatError):
        node_from_json(structure, 1, 1)


def test_a_structure_cannot_be_too_deep() -> None:
    structure: Any = {"array": 0}
    for _ in range(500):
        structure = {"list": [structure]}
    with pytest.raises(FormatError):
        node_from_json(structure, 1, 0)


# -- refill -------------------------------------------------------------------------------------


def refilled(root: Any, tree: Any) -> tuple[bool, list[Any], list[Any]]:
    found: list[Any] = []
    plain: list[Any] = []
    return refill(root, tree, active_adapters(), found, plain), found, plain


def described(tree: Any) -> tuple[str, list[str], list[type]]:
    flat = flatten(tree, active_adapters())
    return json.dumps(node_to_json(flat.root)), flat.paths, [type(a) for a in flat.arrays]


@given(tree=trees.filter(unique_paths))
def test_refill_finds_what_flatten_finds(tree: Any) -> None:
    flat = flatten(tree, active_adapters())
    fits, found, plain = refilled(flat.root, tree)
    assert fits
    assert [id(a) for a in found] == [id(a) for a in flat.arrays]
    assert all(map(alike, plain, flat.plain))


@given(first=trees.filter(unique_paths), second=trees.filter(unique_paths))
def test_refill_never_takes_another_structure(first: Any, second: Any) -> None:
    flat = flatten(first, active_adapters())
    fits, found, plain = refilled(flat.root, second)
    if fits:
        assert described(first) == described(second)
        again = flatten(second, active_adapters())
        assert [id(a) for a in found] == [id(a) for a in again.arrays]
        assert all(map(alike, plain, again.plain))


STATE = {"a": torch.ones(2), "b": {"c": [torch.ones(1), 3]}, "t": (1, "x"), "o": Counter({1: 2})}


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("key order", lambda s: {"b": s["b"], "a": s["a"], "t": s["t"], "o": s["o"]}),
        ("added leaf", lambda s: {**s, "new": torch.ones(1)}),
        ("removed leaf", lambda s: {"a": s["a"], "b": s["b"], "t": s["t"]}),
        ("longer list", lambda s: {**s, "b": {"c": [torch.ones(1), 3, 4]}}),
        ("array for plain", lambda s: {**s, "b": {"c": [torch.ones(1), torch.ones(1)]}}),
        ("plain for array", lambda s: {**s, "a": 3}),
        ("parameter for tensor", lambda s: {**s, "a": torch.nn.Parameter(torch.ones(2))}),
        ("numpy for torch", lambda s: {**s, "a": np.ones(2)}),
        ("list for tuple", lambda s: {**s, "t": [1, "x"]}),
        ("another dict", lambda s: {**s, "b": OrderedDict(s["b"])}),
        ("another object", lambda s: {**s, "o": {1: 2}}),
        ("other state inside", lambda s: {**s, "o": Counter({1: 2, 3: 4})}),
        ("equal key, other type", lambda s: {**s, "o": Counter({True: 2})}),
        ("unsavable text", lambda s: {**s, "t": (1, "\ud800")}),
    ],
)
def test_refill_refuses(why: str, change: Any) -> None:
    flat = flatten(STATE, active_adapters())
    assert refilled(flat.root, dict(STATE))[0]
    assert not refilled(flat.root, change(STATE))[0], why


def test_refill_takes_other_plain_values() -> None:
    flat = flatten(STATE, active_adapters())
    fits, _, plain = refilled(flat.root, {**STATE, "t": (None, 2.5)})
    assert fits
    assert plain == [3, None, 2.5, 2]


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 1j, Unknown(), lambda: 0, range(3), bytearray(b"x"), int]
)
def test_unknown_values_are_named_with_what_to_do(value: Any) -> None:
    with pytest.raises(UnsupportedState) as caught:
        flatten({"a": [0, {"b/c": value}]}, active_adapters())
    assert caught.value.details["path"] == "a/1/b%2Fc"
    assert caught.value.details["type_name"] == type(value).__qualname__
    assert "register_codec" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "action"),
    [
        ({1, 2}, "sorted(value)"),
        (1j, "[value.real, value.imag]"),
        (bytearray(b"x"), "bytes(value)"),
        (datetime.datetime(2020, 1, 1), "value.isoformat()"),
        (decimal.Decimal(1), "str(value)"),
        (Path("x"), "os.fspath(value)"),
        (Kind.A, "value.value"),
        (Unknown(), "vars(value)"),
        (types.SimpleNamespace(a=1), "vars(value)"),
        ((i for i in "x"), "how far it has come"),
        (iter("x"), "how far it has come"),
        (DataLoader(TensorDataset(torch.zeros(1))), "StatefulDataLoader"),
        (RandomSampler(TensorDataset(torch.zeros(1))), "value.generator"),
        (slice(1, 2), "value.stop"),
    ],
)
def test_what_to_save_in_the_place_of_some_values(value: Any, action: str) -> None:
    with pytest.raises(UnsupportedState) as caught:
        flatten({"a": value}, active_adapters())
    assert action in caught.value.actions[0]


def test_fields_of_a_named_tuple_are_names() -> None:
    flat = flatten({"at": Pair(np.zeros(2), 3)}, active_adapters())
    assert (flat.paths, flat.plain_paths) == (["at/left"], ["at/right"])
    assert refill(flat.root, {"at": Pair(np.zeros(2), 4)}, active_adapters(), [], [])
    assert not refill(flat.root, {"at": (np.zeros(2), 4)}, active_adapters(), [], [])


def test_an_integer_that_could_not_be_read_again() -> None:
    flat = flatten({"a": {"n": 1}}, active_adapters())
    huge = {"a": {"n": 2**20_000}}
    assert not refill(flat.root, huge, active_adapters(), [], [])
    with pytest.raises(UnsupportedState, match="20,001 bits") as caught:
        flatten(huge, active_adapters())
    assert caught.value.details["path"] == "a/n"


def test_fields_are_filled_in_their_place() -> None:
    """What the error says of dataclasses and namespaces."""
    kept, live = Unknown(), Unknown()
    vars(kept).update(step=3, seen={"a": 1})
    vars(live).update(step=0, seen={}, more=np.zeros(2))
    vars(kept)["more"] = np.ones(2)
    restore(save({"fields": vars(kept)}), {"fields": vars(live)})
    assert (vars(live)["step"], vars(live)["seen"]) == (3, {"a": 1})
    assert vars(live)["more"].tolist() == [1, 1]


def test_an_object_that_cannot_tell_its_state_is_named() -> None:
    class Loader:
        def state_dict(self, samples_seen: int) -> dict[str, int]:
            return {"seen": samples_seen}

        def load_state_dict(self, state: dict[str, int]) -> None:
            del state

    with pytest.raises(
        CaptureFailed, match=r"state of a .*Loader could not be read: TypeError"
    ) as e:
        flatten({"data": [Loader()]}, active_adapters())
    assert e.value.details["path"] == "data/0"


def test_a_container_that_holds_itself() -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(UnsupportedState, match="holds itself"):
        flatten(state, active_adapters())


@pytest.mark.parametrize("state", [{"\ud800": torch.ones(1)}, {"a": "\udfff"}, {"\ud800": 1}])
def test_text_that_no_file_can_hold(state: Any) -> None:
    with pytest.raises(UnsupportedState, match="lone surrogate") as caught:
        flatten(state, active_adapters())
    str(caught.value).encode()


def test_the_name_that_safetensors_keeps_for_itself() -> None:
    with pytest.raises(UnsupportedState, match="__metadata__"):
        flatten({"__metadata__": torch.ones(1)}, active_adapters())
    flatten({"a": {"__metadata__": torch.ones(1)}}, active_adapters())


def test_components_of_paths_are_escaped() -> None:
    flat = flatten({"a/b": {"c@d": torch.ones(1)}, "%2F": torch.ones(1)}, active_adapters())
    assert flat.paths == ["a%2Fb/c%40d", "%252F"]


def test_named_tuples_and_numbers_with_names() -> None:
    saved = save({"p": Pair(torch.ones(1), 2), "c": Colour.RED})
    live = {"p": Pair(torch.zeros(1), 0), "c": Colour.BLUE}
    restore(saved, live)
    assert isinstance(live["p"], Pair)
    assert (live["p"].left.item(), live["p"].right) == (1, 2)
    assert live["c"] is Colour.RED
    with pytest.raises(StateMismatch, match="Colour here"):
        restore(save({"c": 77}), {"c": Colour.RED})


def test_dicts_that_can_do_more_than_a_dict_stay_what_they_are_in_an_object() -> None:
    ordered = OrderedDict(b=torch.ones(2), a=collections.Counter("aab"))
    saved = save({"o": Counter(ordered), "p": Counter([collections.Counter({7: 2})])})
    live = {"o": Counter(None), "p": Counter(None)}
    restore(saved, live)
    found = live["o"].value
    assert type(found) is OrderedDict
    assert list(found) == ["b", "a"]
    assert found["b"].tolist() == [1, 1]
    assert found["a"] == collections.Counter(a=2, b=1)
    assert sorted(found["a"].elements()) == ["a", "a", "b"]
    assert list(live["p"].value[0].elements()) == [7, 7]
    restore(saved, live, rename=lambda path: path.replace("/a/a", "/a/c"))
    assert list(live["o"].value["a"].elements()) == ["b", "c", "c"]


# -- codecs -------------------------------------------------------------------------------------


def register_point(name: str = "point") -> None:
    register_codec(
        Point, name=name, encode=lambda p: {"x": p.x, "y": p.y}, decode=lambda tree: Point(**tree)
    )


def test_a_codec_carries_values_of_a_type() -> None:
    register_point()
    saved = save({"p": [Point(1, torch.ones(2)), Point((1, 2), None)]})
    assert saved.paths == ["p/0/y"]
    live = {"p": [Point(0, None), Point(0, None)]}
    restore(saved, live)
    assert live["p"][1] == Point((1, 2), None)
    assert live["p"][0].y.tolist() == [1, 1]
    into_object = Counter(None)
    restore(save(Counter(Point(1, 2))), into_object)
    assert into_object.value == Point(1, 2)


def test_codecs_nest_and_are_refilled() -> None:
    register_point()
    state = {"p": Point(Point(1, np.ones(2)), 2)}
    flat = flatten(state, active_adapters())
    fits, found, plain = refilled(flat.root, {"p": Point(Point(5, np.ones(2)), 6)})
    assert (fits, len(found), plain) == (True, 1, [5, 6])
    assert not refilled(flat.root, {"p": Point(Point(5, 3), 6)})[0]
    assert restore(save(state), {"p": None})["p"].x.x == 1


def test_a_codec_goes_before_what_an_adapter_refuses() -> None:
    register_codec(
        np.ma.MaskedArray,
        name="masked",
        encode=lambda m: {"data": m.data, "mask": np.asarray(m.mask)},
        decode=lambda tree: np.ma.masked_array(tree["data"], tree["mask"]),
    )
    masked = np.ma.masked_array([1, 2], [True, False])
    restored = restore(save({"m": masked}), {"m": None})["m"]
    assert restored.mask.tolist() == [True, False]


def test_a_name_belongs_to_one_type() -> None:
    register_point()
    register_point()  # the same again, as a reloaded module does
    with pytest.raises(UnsupportedState, match="is taken"):
        register_codec(Unknown, name="point", encode=str, decode=str)


def test_a_codec_that_this_process_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    register_point()
    saved = save({"p": Point(1, 2)})
    monkeypatch.setattr(_codecs, "_by_name", {})
    with pytest.raises(UnsupportedState, match="has not registered it") as caught:
        restore(saved, {"p": Point(0, 0)})
    assert caught.value.details["path"] == "p"
