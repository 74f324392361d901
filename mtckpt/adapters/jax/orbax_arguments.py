"""What Orbax's arguments of a save or a restore ask for, in the words of ``Checkpointer.restore``.

Knows ``ocp.args`` and the ``SaveArgs`` and ``RestoreArgs`` of leaves. Does not save or restore: it
makes the template that says the same, or refuses what no template can say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from mtckpt.adapters.jax.casting import Cast
from mtckpt.adapters.jax.nodes import key_name
from mtckpt.adapters.jax.orbax_metadata import placed_again, template_of
from mtckpt.errors import UsageError

__all__ = ["MAX_CUSTOM_BYTES", "Wanted", "check_save", "wanted_of", "without_named_tuples"]

MAX_CUSTOM_BYTES = 48 * 1024
_NUMBERS = (int, float, bool)


@dataclass(frozen=True, slots=True)
class Wanted:
    """``is_partial``: what only one of checkpoint and template has is passed over.

    ``kinds`` has the numbers that are wanted as an int, a float or a bool, and ``places`` what
    stands in the template where something is.
    """

    template: Any
    is_partial: bool
    kinds: Mapping[Any, type]
    places: Mapping[Any, Any]

    def finished(self, tree: Any) -> Any:
        """What was restored, with numbers of the types that were asked for."""
        if not (self.kinds or (self.is_partial and self.places)):
            return tree

        def leaf(keys: Any, found: Any) -> Any:
            name = _name(keys)
            if found is None:
                return self.places.get(name) if self.is_partial else None
            kind = self.kinds.get(name)
            return found if kind is None or np.ndim(found) else kind(found)

        return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=lambda each: each is None)


def without_named_tuples(tree: Any) -> Any:
    """Dicts in their place, as Orbax has them where nobody says of which type they are."""
    if isinstance(tree, dict):
        return {key: without_named_tuples(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and (names := getattr(tree, "_fields", None)) is not None:
        return {name: without_named_tuples(value) for name, value in zip(names, tree, strict=True)}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(without_named_tuples, tree))
    return tree


def check_save(args: Any) -> None:
    """Raises UsageError where values would have to be changed before they are saved.

    How Orbax would divide arrays into chunks and files says nothing here, and is passed over.
    """
    custom = getattr(args, "custom_metadata", None)
    try:
        size = len(json.dumps(custom))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"custom_metadata is no JSON: {error}", state="nothing was saved"
        ) from error
    if size > MAX_CUSTOM_BYTES:
        raise UsageError(
            f"custom_metadata is {size:,} bytes of JSON, and {MAX_CUSTOM_BYTES:,} are the most",
            state="nothing was saved",
            actions=("save it as an item of its own: ocp.args.JsonSave(...)",),
        )
    for each in jax.tree.leaves(getattr(args, "save_args", None)):
        if getattr(each, "dtype", None) is not None:
            raise UsageError(
                f"SaveArgs(dtype={each.dtype}): mtckpt saves arrays as they are",
                state="nothing was saved",
                actions=(
                    "give arrays of that type: jax.tree.map(lambda a: a.astype(...), state)",
                    "or let the restore convert: mtckpt.adapters.jax.cast(template, dtype)",
                ),
            )


def wanted_of(args: Any, described: Callable[[], Any]) -> Wanted:
    """The template that restore arguments amount to. Raises UsageError where none does.

    ``described`` gives the metadata of the tree that is to be restored, of which all processes ask
    for it at once: where the arguments leave open what an array is, or where it goes, it is what
    was saved, as with Orbax.
    """
    refused = {
        "strict=False": getattr(args, "strict", True) is False,
        "support_layout=True": getattr(args, "support_layout", False),
        "fallback_sharding": getattr(args, "fallback_sharding", None) is not None,
        "transforms": getattr(args, "transforms", None) is not None,
        "legacy_transform_fn": getattr(args, "legacy_transform_fn", None) is not None,
    }
    for name in (name for name, is_given in refused.items() if is_given):
        raise UsageError(
            f"{name} is Orbax's: mtckpt has no such option",
            state="nothing was restored",
            actions=("give a template with the shapes, types and shardings that are wanted",),
        )
    template = template_of(args.item)
    places: Mapping[Any, Any] = {}
    if isinstance(args, ocp.args.PyTreeRestore):
        places = {} if template is None else _by_name(template)
        template = jax.tree.map(_place, template)
    for_leaves = getattr(args, "restore_args", None)
    told: Mapping[Any, Any] = {}
    if for_leaves is not None:
        told = _by_name(for_leaves, lambda leaf: isinstance(leaf, ocp.RestoreArgs))
        _check_arguments(told, template)
        if template is None:
            template = jax.tree.map(lambda _: None, for_leaves)
    template = _filled(template, told, described)
    # Orbax's callers keep their template as it is: what is filled in place is a copy of it.
    template = jax.tree.map(_own, template)
    kinds = {name: each.restore_type for name, each in told.items() if each is not None}
    kinds = {name: kind for name, kind in kinds.items() if kind in _NUMBERS}
    return Wanted(template, bool(getattr(args, "partial_restore", False)), kinds, places)


def _own(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _place(leaf: Any) -> Any:
    """To a ``PyTreeRestore``, a leaf that is no array says where something is, and not what."""
    if leaf is ocp.PLACEHOLDER or hasattr(leaf, "shape"):
        return leaf
    return None


def _by_name(tree: Any, is_leaf: Callable[[Any], bool] = lambda leaf: False) -> dict[Any, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, lambda e: e is None or is_leaf(e))
    return {_name(keys): leaf for keys, leaf in pairs}


def _name(keys: Any) -> tuple[str, ...]:
    return tuple(str(key_name(key)) for key in keys)


def _check_arguments(told: Mapping[Any, Any], template: Any) -> None:
    """Every leaf has to have its arguments. There may be more: for parts that are not restored."""
    wrong = [name for name, each in told.items() if not isinstance(each, ocp.RestoreArgs | None)]
    for name, leaf in () if template is None else _by_name(template).items():
        if name not in told and leaf is not None and leaf is not ocp.PLACEHOLDER:
            wrong.append(name)
    if wrong:
        raise UsageError(
            f"restore_args is not a tree like item: look at {'.'.join(wrong[0])!r}",
            state="nothing was restored",
            actions=("make it with ocp.checkpoint_utils.construct_restore_args(item)",),
        )
    if any(getattr(each, "strict", True) is False for each in told.values()):
        raise UsageError(
            "strict=False is Orbax's: mtckpt cuts no array, and fills none up",
            state="nothing was restored",
        )


def _filled(template: Any, told: Mapping[Any, Any], described: Callable[[], Any]) -> Any:
    """A template with what the arguments of its leaves say, and with what was saved for the rest.

    None stands for an open leaf here: it comes as what it was saved as.
    """
    pairs, definition = jax.tree_util.tree_flatten_with_path(template, lambda each: each is None)
    wishes = [(_name(keys), _wish(leaf, told.get(_name(keys)))) for keys, leaf in pairs]
    saved: Mapping[Any, Any] = {}
    if any(isinstance(wish, _Wish) and wish.is_open for _, wish in wishes):
        saved = _by_name(described(), lambda leaf: isinstance(leaf, ocp.metadata.value.Metadata))
    leaves = [
        wish.granted(saved.get(name)) if isinstance(wish, _Wish) else wish for name, wish in wishes
    ]
    return jax.tree_util.tree_unflatten(definition, leaves)


@dataclass(frozen=True, slots=True)
class _Wish:
    """An array of JAX, or of NumPy where ``is_host``; what is None was not said."""

    shape: Any
    dtype: Any
    sharding: Any
    make: Any
    is_host: bool
    is_live: bool

    @property
    def is_open(self) -> bool:
        """True where it depends on what was saved."""
        if self.shape is None or self.dtype is None:
            return True
        if self.dtype == np.uint32 and not self.is_live:
            return True  # what Orbax makes of a random key to describe it
        return self.sharding is None and not self.is_live and not self.is_host

    def granted(self, saved: Any) -> Any:
        """A leaf of a template for ``Checkpointer.restore``: where it was, if there is such a place
        and none was given. An array that was of NumPy is of NumPy again.
        """
        shape, dtype, sharding = self.shape, self.dtype, self.sharding
        is_host = self.is_host
        if self.is_open and type(saved) is ocp.metadata.ArrayMetadata:
            is_key = jnp.issubdtype(saved.dtype, jax.dtypes.prng_key)
            shape = saved.shape if shape is None or is_key else shape
            dtype = saved.dtype if dtype is None or is_key else dtype
            if is_key and isinstance(sharding, NamedSharding):  # of the numbers in it
                make_spec: Any = PartitionSpec  # jax leaves it untyped
                spec = make_spec(*sharding.spec[: len(shape)])
                sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
            if sharding is None:
                sharding = placed_again(saved.sharding)
                is_host = is_host or (saved.sharding is None and not is_key)
        if shape is None or dtype is None:
            return None
        return np.empty(shape, dtype) if is_host else self.make(shape, dtype, sharding=sharding)


def _wish(leaf: Any, told: Any) -> Any:
    """What the template and the arguments say of one leaf: a _Wish, or the leaf as it is."""
    kind = getattr(told, "restore_type", None)
    dtype, shape = (getattr(told, each, None) for each in ("dtype", "global_shape"))
    if leaf is None and kind in _NUMBERS:
        return None
    is_live = isinstance(leaf, jax.Array)
    is_described = leaf is None or isinstance(leaf, jax.ShapeDtypeStruct)
    if not (is_live or is_described):
        is_host = kind is np.ndarray and hasattr(leaf, "shape")
        return np.empty(leaf.shape, dtype or leaf.dtype) if is_host else leaf
    sharding = _sharding(leaf, told)
    if told is None and is_live:
        return leaf
    make: Any = type(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct
    if dtype is not None and jnp.issubdtype(dtype, np.floating):
        make = Cast
    shape = getattr(leaf, "shape", None) if shape is None else shape
    dtype = getattr(leaf, "dtype", None) if dtype is None else dtype
    return _Wish(shape, dtype, sharding, make, kind is np.ndarray, is_live)


def _sharding(leaf: Any, told: Any) -> Any:
    sharding: Any = getattr(told, "sharding", None)
    if hasattr(sharding, "to_jax_sharding"):
        return sharding.to_jax_sharding()
    if sharding is None and getattr(told, "mesh_axes", None) is not None:
        return NamedSharding(told.mesh, told.mesh_axes)
    if sharding is None and getattr(leaf, "committed", True):
        return getattr(leaf, "sharding", None)
    return sharding
