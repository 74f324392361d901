"""JAX: arrays, random keys and pytrees of any kind. Imported only once jax has been.

``cast`` makes a template that takes arrays of other floating-point types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from typing import cast as cast_type

from mtckpt.adapters.jax import leaves, meshes, nodes, sharded
from mtckpt.adapters.jax.casting import cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtckpt._placing import Placing
    from mtckpt._state import ArraySpec, Node, Part

__all__ = ["JaxAdapter", "cast"]


class JaxAdapter:
    """``StateAdapter`` of JAX. Holds no state."""

    framework = "jax"
    replaces = True

    def is_array(self, value: object) -> bool:
        """True for every array, key and tracer, and for ``jax.ShapeDtypeStruct``."""
        return leaves.is_leaf(value)

    def spec(self, value: Any, path: str, *, template: bool = False) -> ArraySpec:
        """Raises UnsupportedState for arrays that are deleted, traced or out of reach."""
        return leaves.spec_of(value, path, template=template)

    def specs(self, values: Sequence[Any], paths: Sequence[str]) -> tuple[list[ArraySpec], None]:
        """One by one."""
        return list(map(self.spec, values, paths)), None

    def misfit(self, live: Any) -> str:
        """A sharding that cannot be, or is elsewhere."""
        return meshes.misfit(live)

    def survey(self, state: object) -> None:
        """Nothing: a sharding says all there is to say about its array."""

    def parts(self, value: Any, path: str, *, template: bool = False) -> Sequence[Part] | None:
        """The boxes on this process's devices, each once."""
        return sharded.parts_of(value, path, template=template)

    def rows(self, array: Any, first: int, stop: int) -> Any:
        """A slice, which is a copy."""
        return array[first:stop]

    def assembled(self, live: Any, arrays: Sequence[Any]) -> Any:
        """A new global array, placed as the template says."""
        return sharded.assembled(live, arrays)

    def fingerprint(self, values: Sequence[Any]) -> object:
        """By columns, for speed."""
        return leaves.fingerprint(values)

    def addresses(
        self, values: Sequence[Any], paths: Sequence[str] = (), fingerprint: object = None
    ) -> tuple[list[int], object]:
        """XLA's own memory for arrays on one CPU or CUDA device, and copies for all others."""
        columns = leaves.fingerprint(values) if fingerprint is None else fingerprint
        return leaves.addresses_of(values, paths, cast_type("list[list[Any]]", columns))

    def identity(self, value: Any) -> object | None:
        """The same object."""
        return leaves.identity(value)

    def state_of(self, value: object) -> object | None:
        """One level of a registered node."""
        return nodes.state_of(value)

    def writable_address(self, value: Any) -> int | None:
        """None: arrays of JAX never change."""
        del value
        return None

    def writable_addresses(
        self, values: Sequence[Any], specs: Sequence[ArraySpec]
    ) -> list[int] | None:
        """None: arrays of JAX never change."""
        del values, specs
        return None

    def new(self, spec: ArraySpec, like: object | None = None) -> tuple[Any, int | None]:
        """Memory that ``finished`` or ``assign`` make an array of: host's, or a CUDA device's."""
        return leaves.new(spec, like)

    def reserved(self, freshes: Sequence[Any]) -> list[int]:
        """Memory of CUDA devices, of all that is wanted there at once."""
        return leaves.reserved(freshes)

    def finished(self, fresh: Any, spec: ArraySpec) -> Any:
        """An array on the default device."""
        del spec
        return leaves.made(fresh)

    def assign(self, live: Any, fresh: Any) -> Any:
        """A new array, placed as the template says; of one box, its bytes as they are."""
        return fresh if isinstance(live, sharded.Cell) else leaves.made(fresh, live)

    def keeps(self, live: Any) -> bool:
        """False: arrays never change."""
        del live
        return False

    def number(self, live: Any, value: Any) -> Any | None:
        """JAX takes a number for an array of no dimensions, and a compiled step returns one."""
        return leaves.number(live, value)

    def written(self, lives: Sequence[Any]) -> None:
        """Nothing: no array was."""

    def place_object(self, live: Any, node: Node, path: str, placing: Placing) -> Any | None:
        """Registered nodes, and NNX's modules and variables."""
        return nodes.place_node(live, node, path, placing)
