"""Tensors as leaves: every type, layout and kind of device that is saved comes back bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from state_harness import plan, restore, save

from mtckpt._state import ArraySpec
from mtckpt.adapters.torch import TorchAdapter, leaves
from mtckpt.errors import StateMismatch, UnsupportedState

ADAPTER = TorchAdapter()
INT4 = leaves.DTYPE_OF["int4"]


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    """Random bit patterns, NaNs with payload among them."""
    item_bytes = torch.empty(0, dtype=torch.uint8).view(dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    flat = torch.randint(0, high, (*shape, item_bytes), generator=generator).to(torch.uint8)
    return flat.view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    """The elements in C order, by a way that shares nothing with the code under test."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    pieces = [plain[i] for i in np.ndindex(*plain.shape)]
    return b"".join(bytes(p.reshape(1).view(torch.uint8).tolist()) for p in pieces)


@pytest.fixture(autouse=True)
def _complex_half_may_warn_here() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf")
        yield


@pytest.mark.parametrize("dtype", list(leaves.NAME_OF))
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_every_type_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = values(dtype, shape)
    saved = save({"a": tensor})
    assert saved.data[0] == raw(tensor)
    live = values(dtype, shape, seed=2)
    result = restore(saved, {"a": live})
    assert result["a"] is live
    assert raw(live) == raw(tensor)


def test_all_types_that_torch_can_hold_are_known() -> None:
    known = set(leaves.NAME_OF)
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    unknown = {str(dtype) for dtype in found - known}
    assert not {name for name in unknown if "float" in name or "complex" in name}
    assert {"torch.qint8", "torch.quint8", "torch.qint32"} <= unknown


LAYOUTS: dict[str, Any] = {
    "transposed": lambda t: t.t(),
    "every other column": lambda t: t[:, ::2],
    "a column": lambda t: t[:, 3],
    "a row": lambda t: t[2],
    "the lower rows": lambda t: t[3:],
    "one element": lambda t: t[4, 4],
    "expanded": lambda t: t[:1].expand(5, -1),
    "expanded scalar": lambda t: t[0, 0].expand(2, 3),
    "empty slice": lambda t: t[6:],
    "unsqueezed": lambda t: t[:, None, ::3],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, INT4])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout(layout: str, dtype: torch.dtype) -> None:
    view = LAYOUTS[layout]
    tensor = view(values(dtype, (6, 8)))
    saved = save([tensor])
    assert saved.data[0] == raw(tensor)
    base = values(dtype, (6, 8), seed=2)
    live = view(base)
    before = raw(base)
    assert restore(saved, [live])[0] is live
    assert raw(live) == raw(tensor)
    assert live.stride() == tensor.stride()
    assert (raw(base) == before) is (tensor.numel() == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex32, INT4])
def test_a_place_left_open_gets_the_memory_order_too(dtype: torch.dtype) -> None:
    base = values(dtype, (2, 3, 4))
    saved = save({"a": base.permute(2, 0, 1), "b": base.transpose(0, 1)[:, :1], "c": base})
    kinds = [stored.spec.framework for stored in saved.arrays]
    assert kinds == ["torch.order.1.2.0", "torch", "torch"]
    found = restore(saved, {"a": None, "b": None, "c": None})
    assert found["a"].stride() == (1, 12, 4)
    assert raw(found["a"]) == raw(base.permute(2, 0, 1))
    assert found["b"].is_contiguous()  # a part of something larger comes without the rest
    live, _ = leaves.new_tensor(ArraySpec(leaves.NAME_OF[dtype], (4, 2, 3), "torch"))
    restore(saved, {"a": live, "b": None, "c": None})
    assert live.is_contiguous()  # a live tensor keeps its own
    assert raw(live) == raw(found["a"])


@pytest.mark.parametrize(
    "kind", ["torch.order", "torch.order.", "torch.order.0.0", "torch.order.1", "torch.order.x.y"]
)
def test_an_order_that_is_none_is_passed_over(kind: str) -> None:
    assert leaves.order_in(ArraySpec("float32", (2, 3), kind)) == ()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.conj(),
        lambda t: t.conj().imag,
        lambda t: t.conj().t(),
        lambda t: t.conj().imag[::2],
        lambda t: torch._neg_view(t.real.contiguous()),
        lambda t: t.real,
    ],
)
def test_lazy_conjugation_and_negation(dtype: torch.dtype, view: Any) -> None:
    tensor = view(torch.randn(4, 5, dtype=dtype))
    saved = save([tensor])
    assert saved.data[0] == raw(tensor)
    plain = torch.zeros(tensor.shape, dtype=tensor.dtype)
    restore(saved, [plain])
    assert torch.equal(plain, tensor.resolve_conj().resolve_neg())
    lazy = view(torch.zeros(4, 5, dtype=dtype))
    assert restore(saved, [lazy])[0] is lazy
    assert torch.equal(lazy.resolve_conj().resolve_neg(), plain)


def test_an_expanded_tensor_that_was_not_expanded_when_saved() -> None:
    saved = save([torch.arange(6.0).reshape(2, 3)])
    live = torch.zeros(3).expand(2, 3)
    assert restore(saved, [live])[0] is live
    assert live.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_is_expanded_stays_expanded() -> None:
    base = torch.zeros(1, 3)
    restore(save([torch.ones(1, 3).expand(4, 3)]), [base.expand(4, 3)])
    assert base.tolist() == [[1, 1, 1]]


def test_requires_grad_leaves_are_written_in_place_and_noticed() -> None:
    live = torch.zeros(3, requires_grad=True)
    strided = torch.nn.Parameter(torch.zeros(3, 2).t())
    loss = (live * live).sum()
    versions = live._version, strided._version
    restore(save([torch.ones(3), torch.ones(2, 3)]), [live, strided])
    assert (live.requires_grad, live.is_leaf, live.tolist()) == (True, True, [1, 1, 1])
    assert live._version > versions[0]
    assert strided._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]  # torch's, untyped


def test_inference_tensors_are_restored_too() -> None:
    with torch.inference_mode():
        live, strided = torch.zeros(3), torch.zeros(2, 3).t()
    saved = save([torch.ones(3), torch.ones(3, 2)])
    restore(saved, [live, strided])
    assert live.tolist() == [1, 1, 1]
    assert strided.sum().item() == 6
    assert restore(save([live]), [torch.zeros(3)])[0].tolist() == [1, 1, 1]


def test_tensors_are_saved_under_a_default_device_and_inside_inference_mode() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    live = torch.zeros(2, 3).t()
    with torch.device("meta"):
        saved = save([tensor])
        restore(saved, [live])
    assert torch.equal(live, tensor)
    with torch.inference_mode():
        restore(saved, [live.zero_()])
    assert torch.equal(live, tensor)


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


class Wrapped(torch.Tensor):
    """A tensor that is more than its bytes."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves func out
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


UNSAVABLE = {
    "sparse": (sparse, "to_dense"),
    "nested": (nested, "unbind"),
    "jagged": (jagged, "unbind"),
    "quantised": (quantised, "int_repr"),
    "meta": (lambda: torch.empty(3, device="meta"), "to_empty"),
    "fake": (fake, "register_codec"),
    "wrapped": (lambda: torch.ones(3).as_subclass(Wrapped), "register_codec"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, "forward pass"),
}


@pytest.mark.parametrize("kind", list(UNSAVABLE))
def test_what_cannot_be_saved_is_named_with_what_to_do(kind: str) -> None:
    make, action = UNSAVABLE[kind]
    with pytest.raises(UnsupportedState) as caught:
        save({"outer": [torch.ones(2), {"inner": make()}]})
    assert caught.value.details["path"] == "outer/1/inner"
    assert caught.value.details["type_name"]
    assert action in str(caught.value)


# Subclasses have a type of their own, which the walk over the structure compares.
@pytest.mark.parametrize("kind", ["sparse", "nested", "quantised", "meta"])
def test_the_fingerprint_of_a_plain_tensor_is_that_of_nothing_else(kind: str) -> None:
    other = UNSAVABLE[kind][0]()
    assert ADAPTER.fingerprint([torch.ones(3)]) != ADAPTER.fingerprint([other])


class Named(torch.Tensor):
    """A subclass that is no more than its bytes."""


def test_a_plain_subclass_is_saved() -> None:
    live = torch.zeros(3).as_subclass(Named)
    restore(save([torch.ones(3).as_subclass(Named)]), [live])
    assert type(live) is Named
    assert live.sum().item() == 3


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t[5:], lambda t: t[::2]])
@pytest.mark.parametrize("left_bytes", [0, 4])
def test_a_tensor_whose_memory_was_given_back_is_an_error(make: Any, left_bytes: int) -> None:
    base = torch.ones(20)
    tensor = make(base)
    other = torch.ones(2)
    base.untyped_storage().resize_(left_bytes)
    for known in (None, ADAPTER.fingerprint([other, tensor])):
        with pytest.raises(UnsupportedState, match="given back") as caught:
            ADAPTER.addresses([other, tensor], ["a", "b"], known)
        assert caught.value.details["path"] == "b"
    assert ADAPTER.writable_address(tensor) is None


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.t(), torch._neg_view])
def test_zeros_without_memory_are_an_error(make: Any) -> None:
    """Forward derivatives are made of them: all of their storage lies at no address."""
    tensor = make(torch._efficientzerotensor((2, 3)))
    for known in (None, ADAPTER.fingerprint([torch.ones(2), tensor])):
        with pytest.raises(UnsupportedState, match="never was") as caught:
            ADAPTER.addresses([torch.ones(2), tensor], ["a", "b"], known)
        assert caught.value.details["path"] == "b"
    assert ADAPTER.writable_address(tensor) is None
    specs = [ADAPTER.spec(tensor, "", template=True)]
    assert ADAPTER.writable_addresses([tensor], specs) is None


def test_memory_given_back_between_two_saves_is_noticed() -> None:
    adapter = TorchAdapter()
    tensors = [torch.ones(4), torch.ones(8)[4:]]

    def addresses() -> list[int]:
        found, _ = adapter.addresses(tensors, (), adapter.fingerprint(tensors))
        return found

    known = adapter.fingerprint(tensors)
    assert addresses() == addresses() == [tensor.data_ptr() for tensor in tensors]
    tensors[0] = torch.zeros(4)
    assert addresses()[0] == tensors[0].data_ptr()
    tensors[1].untyped_storage().resize_(0)
    assert adapter.fingerprint(tensors) == known
    with pytest.raises(UnsupportedState, match="given back"):
        addresses()


def test_plain_tensors_are_not_copied_and_others_are() -> None:
    plain, view, strided = torch.ones(4), torch.ones(8)[4:], torch.ones(4, 4).t()
    addresses, keep = ADAPTER.addresses([plain, view, strided])
    assert addresses[:2] == [plain.data_ptr(), view.data_ptr()]
    assert addresses[2] != strided.data_ptr()
    assert len(keep) == 1  # type: ignore[arg-type]  # what keeps copies alive is a list here


def test_addresses_are_the_same_with_and_without_a_fingerprint() -> None:
    tensors = [torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(0), torch.ones(3).conj()]
    without, _keep = ADAPTER.addresses(tensors)
    with_it, _keep2 = ADAPTER.addresses(tensors, (), ADAPTER.fingerprint(tensors))
    assert without[0] == with_it[0]
    assert without[2:] == with_it[2:]
    assert with_it[2] == 0


BASE = torch.zeros(4, 6)
CHANGED = {
    "dtype": torch.zeros(4, 6, dtype=torch.int32),
    "shape": torch.zeros(6, 4),
    "strides": torch.zeros(6, 4).t(),
    "expanded": torch.zeros(1, 6).expand(4, 6),
    "device": torch.empty(4, 6, device="meta"),
    "negated": torch.zeros(4, 6, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("what", list(CHANGED))
@pytest.mark.parametrize("place", [0, 1])
def test_the_fingerprint_changes_with(what: str, place: int) -> None:
    before = [BASE, BASE.t()]
    after = [BASE, BASE.t()]
    after[place] = CHANGED[what] if place == 0 else CHANGED[what].t()
    assert ADAPTER.fingerprint(before) == ADAPTER.fingerprint([BASE.clone(), BASE.clone().t()])
    same_layout = place == 1 and after[1].stride() == BASE.t().stride() and what == "strides"
    assert (ADAPTER.fingerprint(before) == ADAPTER.fingerprint(after)) is same_layout


def test_the_fingerprint_sees_conjugation_and_negation() -> None:
    plain = torch.zeros(3, dtype=torch.complex64)
    assert ADAPTER.fingerprint([plain]) != ADAPTER.fingerprint([plain.conj()])
    assert ADAPTER.fingerprint([plain.conj()]) == ADAPTER.fingerprint([plain.clone().conj()])
    assert ADAPTER.fingerprint([plain.real]) != ADAPTER.fingerprint([plain.imag.contiguous()])
    assert ADAPTER.fingerprint([plain.conj().imag]) != ADAPTER.fingerprint([plain.imag])
    real = torch.ones(3)
    assert ADAPTER.fingerprint([real]) != ADAPTER.fingerprint([torch._neg_view(real)])


def test_identity_is_the_same_bytes_seen_alike() -> None:
    tensor = torch.zeros(2, 3)
    assert leaves.identity(tensor) == leaves.identity(tensor.detach())
    for other in (tensor.t(), tensor[:1], tensor.view(torch.int32), torch.zeros(2, 3)):
        assert leaves.identity(tensor) != leaves.identity(other)
    assert leaves.identity(torch.zeros(0)) is None
    complex_ = torch.zeros(2, dtype=torch.complex64)
    assert leaves.identity(complex_) != leaves.identity(complex_.conj())


def test_a_meta_tensor_in_a_dict_gets_memory() -> None:
    live = {"a": torch.empty(3, device="meta", requires_grad=True)}
    restore(save({"a": torch.ones(3)}), live)
    assert live["a"].tolist() == [1, 1, 1]
    assert live["a"].requires_grad


def test_shape_and_type_differ_loudly_and_change_nothing() -> None:
    saved = save({"in": {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(2)}})
    live = {"in": {"a": torch.zeros(4), "b": torch.zeros(3).half(), "c": torch.zeros(2)}}
    with pytest.raises(StateMismatch) as caught:
        plan(saved, live)
    lines = vars(caught.value)["differing"]
    assert lines == (
        "in/a: float32[4] here, float32[3] in the checkpoint",
        "in/b: float16[3] here, float32[3] in the checkpoint",
    )
    assert live["in"]["c"].tolist() == [0, 0]


def test_arrays_cross_between_frameworks() -> None:
    live: dict[str, Any] = {"a": np.zeros(3, np.float32), "b": torch.zeros(2, dtype=torch.bfloat16)}
    import ml_dtypes

    saved = save({"a": torch.ones(3), "b": np.ones(2, ml_dtypes.bfloat16)})
    restore(saved, live)
    assert live["a"].tolist() == [1, 1, 1]
    assert live["b"].tolist() == [1, 1]
