"""PyTorch: tensors, modules, optimizers and generators. Imported only once torch has been."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mtckpt.adapters.torch import leaves, looks, objects, sharded, surveying

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt._placing import Placing
    from mtckpt._state import ArraySpec, Node, Part

__all__ = ["TorchAdapter"]


class TorchAdapter:
    """``StateAdapter`` of PyTorch. Holds no tensor, only where those of the last save lay."""

    framework = leaves.FRAMEWORK
    replaces = False

    def __init__(self) -> None:
        self._last: looks.Layouts | None = None

    def is_array(self, value: object) -> bool:
        """True for every tensor, those that cannot be saved too: ``spec`` says why not."""
        return isinstance(value, (torch.Tensor, sharded.Boxes))

    def spec(self, value: Any, path: str, *, template: bool = False) -> ArraySpec:
        """Raises UnsupportedState for tensors that are not dense bytes."""
        if sharded.is_sharded(value):
            return sharded.spec_of(value, path, template=template)
        return leaves.spec_of(value, path, template=template)

    def specs(
        self, values: Sequence[Any], paths: Sequence[str]
    ) -> tuple[list[ArraySpec], object | None]:
        """By columns where all are plain."""
        return leaves.specs_of(values) or (list(map(self.spec, values, paths)), None)

    def misfit(self, live: Any) -> str:
        """Empty: a tensor is filled where it is."""
        del live
        return ""

    def survey(self, state: object) -> None:
        """Find the modules that are replicated or FSDP1, for the sake of their optimizers."""
        surveying.survey(state)

    def parts(self, value: Any, path: str, *, template: bool = False) -> Sequence[Part] | None:
        """The local shard of a DTensor."""
        return sharded.parts_of(value, path, template=template)

    def rows(self, array: Any, first: int, stop: int) -> Any:
        """A view without a graph."""
        return array.detach()[first:stop]

    def assembled(self, live: Any, arrays: Sequence[Any]) -> Any:
        """The DTensor itself: its shard was filled, or gets the memory that it had none of."""
        return sharded.assembled(live, arrays)

    def fingerprint(self, values: Sequence[Any]) -> object:
        """By columns, for speed; the very last one if nothing at all is new."""
        last = self._last
        if last is not None and looks.unchanged(values, last):
            return last
        found = looks.fingerprint(values)
        if last is not None and found == last:
            # Lists of the same objects: whoever compares them again is done at once.
            found.dtypes, found.shapes = last.dtypes, last.shapes
        return found

    def addresses(
        self, values: Sequence[Any], paths: Sequence[str] = (), fingerprint: object = None
    ) -> tuple[list[int], object]:
        """The live memory of plain host tensors, and of copies for all others."""
        addresses, copies, last = leaves.addresses_of(values, paths, fingerprint, self._last)
        self._last = last or self._last
        return addresses, copies

    def identity(self, value: Any) -> object | None:
        """The same memory seen with the same type, shape and strides."""
        return sharded.identity(value) if sharded.is_sharded(value) else leaves.identity(value)

    def state_of(self, value: object) -> object | None:
        """The state of modules, optimizers and generators."""
        inner: object | None = objects.state_of(value)
        return inner

    def writable_address(self, value: Any) -> int | None:
        """The address of a plain host tensor."""
        return leaves.writable_address(value)

    def writable_addresses(
        self, values: Sequence[Any], specs: Sequence[ArraySpec]
    ) -> list[int] | None:
        """The addresses of plain host tensors, by columns."""
        return leaves.writable_addresses(values, specs)

    def new(self, spec: ArraySpec, like: object | None = None) -> tuple[Any, int]:
        """An empty host tensor."""
        del like
        return leaves.new_tensor(spec)

    def reserved(self, freshes: Sequence[Any]) -> list[int]:
        """Nothing: what is new has its memory at once."""
        del freshes
        return []

    def finished(self, fresh: Any, spec: ArraySpec) -> Any:
        """The tensor itself, in the memory order that it was saved in."""
        return leaves.laid_out(fresh, spec)

    def assign(self, live: Any, fresh: Any) -> Any:
        """Copy into a live tensor of any layout and device."""
        return leaves.assign(live, fresh)

    def keeps(self, live: Any) -> bool:
        """True but for the meta device."""
        return not live.is_meta

    def number(self, live: Any, value: Any) -> Any | None:
        """None: a number is no tensor."""
        del live, value
        return None

    def written(self, lives: Sequence[Any]) -> None:
        """Bump autograd's version counters."""
        leaves.bump_versions(lives)

    def place_object(self, live: Any, node: Node, path: str, placing: Placing) -> Any | None:
        """Modules, optimizers and generators; None for everything else."""
        return live if objects.place_object(live, node, path, placing) else None
