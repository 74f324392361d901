"""Renaming: leaves of a checkpoint at other paths, for warm starts from another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from state_harness import plan, restore, save

from mtckpt import _codecs
from mtckpt.errors import StateMismatch, UsageError


def test_a_prefix_is_exchanged() -> None:
    live: dict[str, Any] = {"backbone": {"0.w": torch.zeros(2)}, "step": 0}
    saved = save({"model": {"0.w": torch.ones(2), "head": torch.ones(1)}, "n": 5})

    def rename(path: str) -> str | None:
        if path == "model/head":
            return None
        return {"n": "step"}.get(path, path.replace("model/", "backbone/"))

    restore(saved, live, rename=rename)
    assert live["backbone"]["0.w"].tolist() == [1, 1]
    assert live["step"] == 5


def test_a_renamed_optimizer_keeps_its_lists_and_numbers() -> None:
    def make(value: float) -> torch.optim.Optimizer:
        parameter = torch.nn.Parameter(torch.full((2,), value))
        parameter.grad = torch.ones(2)
        return torch.optim.Adam([parameter], lr=value)

    old, live = make(0.5), make(0.25)
    old.step()
    restore(save({"optim": old}), {"opt": live}, rename=lambda p: p.replace("optim/", "opt/"))
    assert live.param_groups[0]["lr"] == 0.5
    assert live.param_groups[0]["betas"] == (0.9, 0.999)
    (moments,) = live.state.values()
    assert moments["step"].item() == 1


def test_a_dropped_item_leaves_a_gap() -> None:
    saved = save({"l": [torch.ones(1), torch.ones(1) * 2, torch.ones(1) * 3]})
    live: dict[str, Any] = {"l": [torch.zeros(1), torch.zeros(1), torch.zeros(1)]}

    def drop(path: str) -> str | None:
        return None if path == "l/1" else path

    with pytest.raises(StateMismatch) as caught:
        plan(saved, live, rename=drop)
    assert vars(caught.value)["missing"] == ("l/1",)
    restore(saved, live, rename=drop, partial=True)
    assert [t.item() for t in live["l"]] == [1, 0, 3]


def test_items_move_within_a_list() -> None:
    saved = save({"l": [torch.ones(1), torch.ones(1) * 2]})
    live: dict[str, Any] = {"l": [torch.zeros(1), torch.zeros(1)]}
    restore(saved, live, rename=lambda p: {"l/0": "l/1", "l/1": "l/0"}[p])
    assert [t.item() for t in live["l"]] == [2, 1]


def test_components_are_escaped_on_both_sides() -> None:
    live: dict[str, Any] = {"x@y": {"a/b": torch.zeros(1)}}
    restore(save({"z": {"a/b": torch.ones(1)}}), live, rename=lambda p: p.replace("z/", "x%40y/"))
    assert live["x@y"]["a/b"].item() == 1


def test_a_leaf_moves_deeper_and_up() -> None:
    live: dict[str, Any] = {"a": {"b": {"c": torch.zeros(1)}}, "d": torch.zeros(1)}
    saved = save({"c": torch.ones(1), "x": {"y": torch.ones(1)}})
    restore(saved, live, rename=lambda p: {"c": "a/b/c", "x/y": "d"}[p])
    assert live["a"]["b"]["c"].item() == live["d"].item() == 1


def test_tied_leaves_stay_tied_when_moved() -> None:
    tensor = torch.ones(2)
    live: dict[str, Any] = {"new": None, "b": None}
    restore(save({"a": tensor, "b": tensor}), live, rename=lambda p: "new" if p == "a" else p)
    assert live["new"] is live["b"]


@dataclass(frozen=True)
class Point:
    """A value of a user's."""

    x: Any


def test_codecs_move_with_their_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_codecs, "_by_name", {})
    live: dict[str, Any] = {"b": {"p": Point(0)}}
    with mock.patch.dict(_codecs.CODECS, clear=True):
        _codecs.register_codec(
            Point, name="point", encode=lambda p: {"x": p.x}, decode=lambda tree: Point(**tree)
        )
        restore(save({"a": {"p": Point(7)}}), live, rename=lambda p: p.replace("a/", "b/"))
    assert live["b"]["p"] == Point(7)


def test_empty_containers_move_too() -> None:
    live: dict[str, Any] = {"b": {"e": {"x": 1}, "f": [1]}}
    restore(save({"a": {"e": {}, "f": []}}), live, rename=lambda p: p.replace("a/", "b/"))
    assert live == {"b": {"e": {}, "f": []}}


@pytest.mark.parametrize(
    "rename",
    [
        lambda p: "same",
        lambda p: "l" if p == "a" else p,
        lambda p: "a/b" if p == "l/0" else p,
        lambda p: "l/x" if p == "a" else p,
        lambda p: "l/900000000" if p == "a" else p,
        lambda p: "l/0/deeper" if p == "a" else p,
    ],
)
def test_paths_that_cannot_all_be(rename: Any) -> None:
    saved = save({"a": torch.ones(1), "l": [torch.ones(1)]})
    with pytest.raises(UsageError):
        plan(saved, {"a": torch.zeros(1)}, rename=rename)


def test_everything_dropped_is_everything_missing() -> None:
    with pytest.raises(StateMismatch) as caught:
        plan(save({"a": torch.ones(1)}), {"a": torch.zeros(1)}, rename=lambda p: None)
    assert vars(caught.value)["missing"] == ("a",)
