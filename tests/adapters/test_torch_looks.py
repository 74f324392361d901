"""What a save asks every tensor: whatever changed is seen, and that nothing did too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtckpt.adapters.torch import TorchAdapter, looks

NUM_LOOKS = 3  # the first makes the columns, the second compares them, the third is guarded
MEMORY = bytearray(64)


def shorter_storage(_: torch.Tensor) -> torch.Tensor:
    """The same type, shape and address, in a storage that ends with the tensor."""
    return torch.frombuffer(MEMORY, dtype=torch.int32, count=4).view(2, 2)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "type": lambda t: t.view(torch.float32),
    "shape": lambda t: t.view(4),
    "strides": lambda t: t.t(),
    "sign": torch._neg_view,
    "memory": lambda t: t.clone(),
    "length of the storage": shorter_storage,
    "device": lambda t: t.to("meta"),
    "kind": lambda t: t.to_sparse(),
}


@pytest.fixture(params=["guards", "columns"])
def _looking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "columns":
        monkeypatch.setattr(looks, "guarding", lambda: None)
    else:
        assert looks.guarding() is not None


def looked_at(values: list[torch.Tensor]) -> tuple[TorchAdapter, object]:
    adapter = TorchAdapter()
    for _ in range(NUM_LOOKS):
        known = adapter.fingerprint(values)
        adapter.addresses(values, (), known)
    return adapter, known


def make_tensors() -> list[torch.Tensor]:
    tensors = [torch.full((3,), float(i)) for i in range(300)]
    tensors[200] = torch.frombuffer(MEMORY, dtype=torch.int32)[:4].view(2, 2)
    return tensors


@pytest.mark.usefixtures("_looking")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_is_seen(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = make_tensors()
    adapter, known = looked_at(tensors)
    assert adapter.fingerprint(tensors) is known
    assert isinstance(known, looks.Layouts)
    tensors[200] = change(tensors[200])
    assert not looks.unchanged(tensors, known)
    assert not looks.unchanged(tensors[:-1], known)


@pytest.mark.usefixtures("_looking")
def test_a_tensor_that_changes_under_its_name_is_seen() -> None:
    tensors = make_tensors()
    adapter, known = looked_at(tensors)
    tensors[7].data = tensors[7].view(torch.int32)
    assert adapter.fingerprint(tensors) != known


@pytest.mark.usefixtures("_looking")
def test_what_is_no_part_of_a_layout_is_no_change() -> None:
    tensors = make_tensors()
    tensors[1] = tensors[0]  # twice the same
    adapter, known = looked_at(tensors)
    tensors[5].requires_grad_()
    tensors[6].add_(1)
    assert adapter.fingerprint(tensors) == known


def memory_given_back(tensor: torch.Tensor) -> torch.Tensor:
    """Of the same type, shape and layout, with half of its bytes."""
    other = tensor.clone()
    other.untyped_storage().resize_(8)
    return other


@pytest.mark.usefixtures("_looking")
@pytest.mark.parametrize("what", ["nothing", *CHANGES, "memory given back"])
def test_of_many_of_one_kind_the_one_that_cannot_be_filled_is_seen(what: str) -> None:
    tensors = [torch.zeros(2, 2, dtype=torch.int32) for _ in range(300)]
    spec = TorchAdapter().spec(tensors[0], "", template=True)
    if what != "nothing":
        tensors[200] = {"memory given back": memory_given_back, **CHANGES}[what](tensors[200])
    found = TorchAdapter().writable_addresses(tensors, [spec] * 300)
    if what in ("nothing", "memory", "length of the storage"):
        assert found == [tensor.data_ptr() for tensor in tensors]
    else:
        assert found is None


@pytest.mark.usefixtures("_looking")
def test_a_conjugated_one_of_many_cannot_be_filled() -> None:
    tensors = [torch.zeros(2, dtype=torch.complex64) for _ in range(300)]
    spec = TorchAdapter().spec(tensors[0], "", template=True)
    tensors[200] = tensors[200].conj()
    assert TorchAdapter().writable_addresses(tensors, [spec] * 300) is None


@pytest.mark.parametrize("answer", [True, False, None])
def test_guards_that_do_not_tell_apart_are_not_believed(
    monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    class Guards:
        def __init__(self, *tensors: torch.Tensor, **more: Any) -> None:
            assert tensors
            assert more

        def check(self, *tensors: torch.Tensor) -> Any:
            assert tensors
            return answer

    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Guards)
    assert looks.guarding.__wrapped__() is None


def test_a_torch_without_guards_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert looks.guarding.__wrapped__() is None
