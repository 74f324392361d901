"""What a fresh process has empty: lists, deques and dicts take what was saved, or say why not."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from state_harness import plan, restore, save

from mtckpt import _codecs
from mtckpt._node import Fields
from mtckpt._state import flatten, refill
from mtckpt.adapters import active_adapters
from mtckpt.errors import FormatError, StateMismatch

Transition = namedtuple("Transition", ["state", "action", "next_state"])


class Holder:
    """An object with state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def differing(saved: Any, live: Any) -> str:
    with pytest.raises(StateMismatch) as caught:
        plan(save(saved), live)
    found = vars(caught.value)
    return "\n".join((*found["differing"], *found["unused"], *found["missing"]))


def items() -> list[Any]:
    return [torch.arange(3.0), np.arange(2), jnp.arange(4), {"deep": [torch.ones(1), "x", None]}]


@pytest.mark.parametrize("empty", [list, deque])
def test_what_is_empty_takes_all_that_was_saved(empty: Any) -> None:
    live = {"buffer": empty()}
    buffer = live["buffer"]
    for kind in (list, deque):
        restored = restore(save({"buffer": kind(items())}), live)
        assert restored["buffer"] is buffer
        assert type(buffer) is empty
        assert [type(each) for each in buffer] == [type(each) for each in items()]
        assert buffer[0].tolist() == [0, 1, 2]
        assert buffer[2].tolist() == [0, 1, 2, 3]
        assert buffer[3]["deep"][0].tolist() == [1]
        assert buffer[3]["deep"][1:] == ["x", None]
        buffer.clear()


def test_an_empty_dict_takes_all_that_was_saved() -> None:
    lists: Any = defaultdict(list)
    live: dict[str, Any] = {"cache": {}, "lists": lists}
    cache = live["cache"]
    restore(save({"cache": {7: torch.ones(2), "n": 1}, "lists": {"a": [np.ones(1)]}}), live)
    assert live["cache"] is cache
    assert list(cache) == [7, "n"]
    assert cache[7].tolist() == [1, 1]
    assert live["lists"] is lists
    assert lists["a"][0].tolist() == [1]
    assert lists["b"] == []


def test_a_replay_buffer_goes_on_in_a_fresh_process() -> None:
    """As in PyTorch's tutorial: states are the next states of those before them."""
    states = [torch.full((2,), float(i)) for i in range(5)]
    memory: Any = deque(maxlen=3)
    for before, after in itertools.pairwise(states):
        memory.append(Transition(before, torch.tensor([[1]]), after))
    fresh: Any = deque(maxlen=3)
    restore(save({"memory": memory}), {"memory": fresh})
    batch = Transition(*zip(*fresh, strict=True))
    assert torch.equal(torch.stack(batch.state), torch.stack(states[1:4]))
    assert fresh[0].next_state is fresh[1].state  # one tensor, as it was
    assert fresh[2]._fields == Transition._fields
    saved_again = save({"memory": fresh})
    assert saved_again.structure == save({"memory": memory}).structure


def test_a_deque_is_taken_as_it_was_saved_whatever_is_in_it() -> None:
    """Rolled back in the process that went on: it has moved on since."""
    kept = torch.full((1,), 9.0)
    live: dict[str, Any] = {"last": deque([kept] * 5, maxlen=5), "losses": deque([0.5], maxlen=2)}
    restore(save({"last": deque([torch.ones(1)]), "losses": deque([1.5, 2.5])}), live)
    assert [each.item() for each in live["last"]] == [1]
    assert list(live["losses"]) == [1.5, 2.5]
    assert live["last"].maxlen == 5
    assert kept.item() == 9


def test_what_does_not_fit_is_said() -> None:
    tensors = [torch.ones(1)] * 3
    assert "at most 2 items here, 3" in differing({"b": deque(tensors)}, {"b": deque(maxlen=2)})
    longer = differing({"b": tensors}, {"b": [torch.zeros(1)]})
    assert "1 items here, 3 in the checkpoint; an empty one takes all" in longer
    # A named tuple has as many as it has names, also of plain values.
    named = {"b": [Transition(0, 0, 0)]}
    assert differing({"b": [(1, 2)]}, named).endswith("3 items here, 2 in the checkpoint")
    assert "deque here" in differing({"b": torch.ones(1)}, {"b": deque()})
    assert "tuple here" not in differing({"b": tuple(tensors)}, {"b": ()})


@pytest.mark.parametrize("empty", [[], deque(), {}])
def test_tensors_in_what_is_empty_are_on_the_cpu_whatever_the_default(empty: Any) -> None:
    tensors = {0: torch.ones(1)} if isinstance(empty, dict) else [torch.ones(1)]
    saved = save({"b": tensors})
    with torch.device("meta"):
        restore(saved, {"b": empty})
    assert empty[0].device.type == "cpu"


@pytest.mark.parametrize("live", [deque(), None, []])
def test_a_deque_with_more_items_than_it_can_have_had_is_refused(live: Any) -> None:
    saved = save({"b": deque([1, 2, 3], maxlen=77)})
    hostile = dataclasses.replace(saved, plain=saved.plain.replace("77", "2"))
    with pytest.raises(FormatError, match="a deque of at most 2 items has 3"):
        restore(hostile, {"b": live})
    with pytest.raises(FormatError, match="a deque of at most 2 items has 3"):
        _codecs.codec_named("deque", "b").decode({"items": [1, 2, 3], "maxlen": 2})


@pytest.mark.parametrize("empty", [[], deque(), {}])
def test_objects_are_not_made_of_what_was_saved_of_them(empty: Any) -> None:
    """A dict of parameters in the place of a module would be no module."""
    modules: Any = [torch.nn.Linear(1, 1), Holder({"n": 1})]
    saved = {"m": dict(enumerate(modules)) if isinstance(empty, dict) else modules}
    assert "m" in differing(saved, {"m": empty})
    assert not empty
    if not isinstance(empty, dict):
        assert "make as many before restore()" in differing(saved, {"m": empty})
    assert restore(save(saved), {"m": None})["m"]  # a place left open takes their states


def test_deques_that_the_user_has_described_come_back_that_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_codecs.CODECS, deque, _codecs.CODECS[deque])
    monkeypatch.setitem(_codecs._by_name, "own", _codecs.CODECS[deque])  # both are put back
    _codecs.register_codec(deque, name="own", encode=list, decode=deque)
    saved = save({"d": deque([1, 2])})
    assert restore(saved, {"d": deque()})["d"] == deque([1, 2])


def test_fields_whose_names_are_one_to_python_stay_two() -> None:
    fields = Fields({"\ufb01": 1, "fi": 2, "class": 3})
    assert tuple(restore(save({"f": fields}), {"f": None})["f"]) == (1, 2, 3)


def test_an_object_gets_deques_and_named_tuples_as_they_were() -> None:
    state = {"memory": deque([Transition(1, torch.ones(1), None)], maxlen=7), "d": OrderedDict(a=1)}
    live = Holder()
    restore(save({"h": Holder(state)}), {"h": live})
    assert live.state["memory"].maxlen == 7
    (only,) = live.state["memory"]
    assert (only.state, only.action.item(), only.next_state) == (1, 1, None)
    assert only[:1] == (1,)
    assert type(live.state["d"]) is OrderedDict


def test_renaming_keeps_deques_and_named_tuples() -> None:
    state = {
        "a": deque([Transition(torch.ones(1), 2, 3)], maxlen=4),
        "o": [Holder({"x": 1, "y": 2})],
    }
    live: dict[str, Any] = {"b": deque(), "o": [Holder()]}
    restore(save(state), live, rename=lambda path: path.replace("a/", "b/").replace("/x", "/z"))
    assert live["b"][0].action == 2
    with pytest.raises(StateMismatch, match="make as many"):
        plan(save(state), {"b": deque(), "o": []}, rename=lambda path: path.replace("a/", "b/"))


def test_a_deque_that_grows_is_another_structure() -> None:
    adapters = active_adapters()
    flat = flatten({"d": deque([torch.ones(1)])}, adapters)
    assert flat.paths == ["d/items/0"]
    assert refill(flat.root, {"d": deque([torch.ones(1)])}, adapters, [], [])
    assert not refill(flat.root, {"d": deque([torch.ones(1)] * 2)}, adapters, [], [])
    assert not refill(flat.root, {"d": [torch.ones(1)]}, adapters, [], [])


def test_what_is_called_a_deque_and_is_none() -> None:
    saved = save({"d": Holder(deque([1], maxlen=3))})
    lying = type(saved)(saved.structure, saved.arrays, saved.data, "[-3, 1]", saved.plain_paths)
    with pytest.raises(FormatError, match="called a deque"):
        restore(lying, {"d": Holder()})


def test_plain_containers_inside_are_filled_in_their_place() -> None:
    """Whoever holds one of them as well goes on with what was saved."""
    losses, shape = [9.0], torch.Size([9])
    seen: Any = defaultdict(int, old=1)
    live: Any = {"log": {"losses": losses, "by": [seen, {"sizes": (shape, [])}]}}
    by = live["log"]["by"]
    kept = {"log": {"losses": [1.0, 2.0], "by": [{"a": 3}, {"sizes": (torch.Size([1]), [4])}, 5]}}
    restore(save(kept), live)
    assert live == kept
    assert live["log"]["losses"] is losses
    assert live["log"]["by"] is by
    assert by[0] is seen
    assert seen["new"] == 0
    assert type(by[1]["sizes"][0]) is torch.Size
    # Of another kind than what was saved: as before, what was saved comes.
    live = {"log": {"losses": (9.0,), "by": {}}}
    restore(save(kept), live)
    assert live == kept


@pytest.mark.parametrize("here", [0.0, 7, np.float64(9), np.int8(9)])
@pytest.mark.parametrize("there", [0.5, 3, np.float32(0.5), np.float64(0.5), np.int8(3)])
def test_a_number_of_numpys_is_a_number(here: Any, there: Any) -> None:
    """A best loss begins as a float, and is what NumPy's mean() gave from the first pass on."""
    live = {"best": here, "all": [here]}
    result = restore(save({"best": there, "all": [there]}), live)
    assert result is live
    assert [type(found) for found in (live["best"], live["all"][0])] == [type(there)] * 2
    assert live == {"best": there, "all": [there]}


def test_a_tensor_of_one_number_takes_the_place_of_a_number() -> None:
    live: Any = {"best": float("inf"), "steps": 0}
    restore(save({"best": torch.tensor(0.5), "steps": torch.tensor(3)}), live)
    assert (live["best"], list(range(live["steps"]))) == (torch.tensor(0.5), [0, 1, 2])
    assert differing({"best": torch.ones(1)}, {"best": 0.0}) == (
        "best: float here, array in the checkpoint"
    )
    assert "an array here" in differing({"best": 0.5}, {"best": torch.tensor(0.0)})
    assert "str here" in differing({"best": np.float64(1)}, {"best": ""})
