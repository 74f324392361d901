"""FSDP1: the pieces of flat parameters as boxes of the parameters that they were made of.

Knows ``FullyShardedDataParallel``: which run of each parameter's elements a rank holds, and where
in its memory. Such a run is a few boxes, so a save reads the live shard and a restore writes into
it: nothing is gathered, no rank is waited for, and the names are those of the module without FSDP.
Does not know optimizers (``flat_optimizers``). Keeps no module alive, imports nothing to look.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mtckpt._boxes import of_run
from mtckpt.adapters.torch import loading, wrappers
from mtckpt.adapters.torch.sharded import Boxes
from mtckpt.errors import UnsupportedState

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["Known", "Unit", "found_in", "has_flat", "is_flattened", "is_loaded", "known", "note"]

_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel"
_Ranks = tuple[int, ...]


class Known(NamedTuple):
    """A parameter that was seen in a module: its unit if it is in one, which of that it is, and its
    place in the order of the module without FSDP, and its name there; of a flat parameter those of
    all.

    ``module`` is a number that all parameters have which were seen in the same one. ``mixed`` has
    one for each part of it of which FSDP ignores some parameters and manages others: where they
    were among each other is not known. It is -1 elsewhere.
    """

    fsdp: Callable[[], Any] | None
    part: int | None
    module: int
    places: tuple[int, ...]
    names: tuple[str, ...]
    mixed: tuple[int, ...]

    def unit(self) -> Unit | None:
        """Whose piece it is; None for a parameter that FSDP left alone."""
        fsdp = None if self.fsdp is None else self.fsdp()
        return None if fsdp is None else Unit.of(fsdp)


_modules = itertools.count()
_known: Any = WeakIdKeyDictionary()  # parameters of FSDP modules, and of those around them


def known(parameter: torch.Tensor) -> Known | None:
    """What is known of an optimizer's parameter."""
    found: Known | None = _known.get(parameter)
    return found


def is_flattened(parameter: torch.Tensor) -> bool:
    """True for a flat parameter, and for one that became a piece of one."""
    return "_fsdp_flattened" in parameter.__dict__


def is_loaded() -> bool:
    """True if there may be any FSDP1 in this process."""
    return _FSDP in sys.modules


def _is_fsdp(module: Module) -> bool:
    return isinstance(module, sys.modules[_FSDP].FullyShardedDataParallel)


def has_flat(module: Module) -> bool:
    """True if any part of a module is FSDP1."""
    return is_loaded() and any(map(_is_fsdp, module.modules()))


# -- one flat parameter ----------------------------------------------------------------------------


@dataclass(slots=True)
class Unit:
    """One flat parameter: ``holders`` have the same piece of it as this rank, ``sharers`` any."""

    fsdp: Any
    flat: Any
    holders: _Ranks
    sharers: _Ranks

    @classmethod
    def of(cls, fsdp: Any) -> Unit | None:
        """That of an FSDP module; None if it has no parameters. Raises UnsupportedState."""
        handle = fsdp._handle
        if handle is None:
            return None
        flat = handle.flat_param
        if any(extension is not None for extension in flat._param_extensions):
            raise _unsupported(
                "cannot save DTensors that FSDP1 has flattened",
                "use fully_shard (FSDP2) with tensor parallelism",
                "or put what get_model_state_dict and get_optimizer_state_dict return in the state",
            )
        if handle._training_state.name == "SUMMON_FULL_PARAMS":
            raise _unsupported(
                "cannot save an FSDP module within summon_full_params: its shards are not current",
                "save after the end of that block",
            )
        return cls(fsdp, flat, *_ranks_of(fsdp))

    @property
    def keeps_parameters(self) -> bool:
        """True with ``use_orig_params``: optimizers have pieces, else flat parameters."""
        return bool(self.fsdp._handle._use_orig_params)

    @property
    def is_whole(self) -> bool:
        """True where nothing is sharded (NO_SHARD)."""
        return not self.fsdp._handle.uses_sharded_strategy

    @property
    def _shows_pieces(self) -> bool:
        """True if the module's parameters are pieces now, and no views of a gathered copy."""
        handle = self.fsdp._handle
        return self.keeps_parameters and (
            self.is_whole
            or (handle.is_sharded(self.flat) and not handle._skipped_use_sharded_views)
        )

    def local(self) -> torch.Tensor:
        """This rank's piece of the flat parameter, in live memory."""
        flat = self.flat
        kept = getattr(flat, "_local_shard", None)  # from the first forward pass on
        if flat.size() == flat._sharded_size and (kept is None or flat.dtype == kept.dtype):
            kept = flat
        assert isinstance(kept, torch.Tensor)
        return kept.detach()

    def value(self, index: int) -> Boxes:
        """This rank's elements of a parameter, in live memory."""
        local = self.local()
        run = self.cut(index, local)
        if self._shows_pieces and run is not None:
            name, owner, _ = self.flat._param_infos[index]
            # FSDP takes over another memory of a parameter only with the next forward pass.
            piece = owner._parameters.get(name)
            if isinstance(piece, torch.Tensor) and piece.numel() == run.numel():
                if self.is_whole and tuple(piece.shape) == self.shape(index):
                    return self.whole(piece.detach())
                if piece.dim() == 1:
                    run = piece.detach()
        return self.boxes(index, run, local.dtype)

    def cut(self, index: int, flat: torch.Tensor) -> torch.Tensor | None:
        """The same elements out of something like the flat parameter's local piece."""
        info = self.flat._shard_param_infos[index]
        if not info.in_shard:
            return None
        return flat[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]

    def shape(self, index: int) -> tuple[int, ...]:
        """That of a parameter, whole."""
        return tuple(self.flat._shapes[index])

    def boxes(self, index: int, run: torch.Tensor | None, dtype: torch.dtype) -> Boxes:
        """``run``, which has the elements that this rank has of a parameter, as boxes."""
        shape, flat = self.shape(index), self.flat
        found: list[tuple[tuple[int, ...], torch.Tensor]] = []
        if run is not None:
            info, axes = flat._shard_param_infos[index], tuple(range(len(shape)))
            if not flat._contiguities[index]:  # flattened as it lay in memory
                strides = flat._strides[index]
                axes = tuple(sorted(axes, key=lambda axis: -strides[axis]))
            start = info.intra_param_start_idx
            found = _cut_up(run, shape, axes, start, start + info.numel_in_shard)
        return Boxes(shape, dtype, tuple(found), self.sharers, self.holders)

    def whole(self, tensor: torch.Tensor) -> Boxes:
        """Something with all elements of a parameter that is not sharded, in its shape."""
        shape = tuple(tensor.shape)
        box = ((0,) * len(shape), tensor)
        return Boxes(shape, tensor.dtype, (box,), self.sharers, self.holders)

    def drop_copies(self) -> None:
        """After a restore: let go of a gathered copy, which would be used instead of the shard."""
        for name in ("_full_param_padded", "_full_prec_full_param_padded"):
            full = getattr(self.flat, name, None)  # the other is for evaluation, if it is told so
            if full is not None and full.untyped_storage().nbytes() and not self.is_whole:
                self.fsdp._handle.reshard(True)
                full.untyped_storage().resize_(0)  # it frees the one that it would use now


def _cut_up(
    run: torch.Tensor, shape: tuple[int, ...], axes: tuple[int, ...], start: int, stop: int
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    found, at = [], 0
    back = [axes.index(axis) for axis in range(len(axes))]
    for box in _boxes_of(tuple(shape[axis] for axis in axes), start, stop):
        size = math.prod(box.shape)
        piece = run[at : at + size].view(box.shape).permute(back)
        found.append((tuple(box.offsets[axis] for axis in back), piece))
        at += size
    return found


_boxes_of = functools.lru_cache(maxsize=100_000)(of_run)


def _ranks_of(fsdp: Any) -> tuple[_Ranks, _Ranks]:
    """The ranks that hold the same piece as this one, and all that hold any."""
    import torch.distributed as dist

    if not dist.is_initialized():
        raise _unsupported(
            "cannot save an FSDP module whose process group is gone",
            "call destroy_process_group() after the last save and restore",
        )
    group = tuple(sorted(map(int, dist.get_process_group_ranks(fsdp.process_group))))
    if not fsdp._handle.uses_sharded_strategy:
        return group, group
    if "HYBRID" not in fsdp.sharding_strategy.name:
        return (dist.get_rank(),), group
    holders = tuple(sorted(map(int, dist.get_process_group_ranks(fsdp._inter_node_pg))))
    mesh = fsdp._device_mesh
    if mesh is not None:
        return holders, tuple(sorted(map(int, mesh.mesh.flatten().tolist())))
    everybody = tuple(range(dist.get_world_size()))
    if len(group) * len(holders) != len(everybody):
        raise _unsupported(
            "cannot tell which ranks have a part in an FSDP module that is sharded in groups",
            "give FSDP a device_mesh of two dimensions",
        )
    return holders, everybody


def _unsupported(what: str, *actions: str, path: str = "") -> UnsupportedState:
    return UnsupportedState(
        what,
        path=path,
        type_name="FullyShardedDataParallel",
        state="nothing was written, live state unchanged",
        actions=actions,
    )


# -- a module with such parts ----------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What a module holds, by its names without wrappers.

    ``casts`` are buffers that FSDP computes with in another type, each with what stands for it.
    """

    tensors: dict[str, torch.Tensor | Boxes] = field(default_factory=dict)
    casts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)

    def settle(self) -> None:
        """After a restore into ``tensors``: what else is to be as if that had been saved here."""
        for buffer, tensor in self.casts:
            buffer.copy_(tensor)
        for unit in self.units:
            unit.drop_copies()


def found_in(module: Module) -> Found:
    """All of a module that is FSDP1 in places. Raises UnsupportedState for what saves itself."""
    walk = _Walk(module)
    walk.visit(module, "", {}, "")
    return walk.found


def note(module: Module) -> None:
    """Remember where the parameters of a module are, for the sake of its optimizers."""
    walk = _Walk(module)
    walk.visit(module, "", {}, "")
    number = next(_modules)
    names = list(walk.found.tensors)

    def known(back: Any, part: int | None, places: list[int]) -> Known:
        mixed = tuple(walk.mixed.get(place, -1) for place in places)
        return Known(
            back, part, number, tuple(places), tuple(names[place] for place in places), mixed
        )

    for unit in walk.found.units:
        places = [walk.places[id(unit), index] for index in range(len(unit.flat._shapes))]
        back = weakref.ref(unit.fsdp)
        if unit.keeps_parameters:
            for index, place in enumerate(places):
                _known[unit.flat._params[index]] = known(back, index, [place])
        else:
            _known[unit.flat] = known(back, None, places)
    for parameter, place in walk.others:
        _known[parameter] = known(None, None, [place])


class _Walk:
    """The parts of a module in order, through whatever wraps them."""

    def __init__(self, module: Module) -> None:
        self.found = Found()
        self.places: dict[tuple[int, int], int] = {}
        self.mixed: dict[int, int] = {}  # by place, see ``Known``
        self.others: list[tuple[torch.Tensor, int]] = []
        self._boxes: dict[tuple[int, int], Boxes] = {}
        self._managed: dict[int, dict[str, tuple[Unit, int]]] = {}
        for part in module.modules():
            unit = Unit.of(part) if _is_fsdp(part) else None
            if unit is not None:
                self.found.units.append(unit)
                for name, owner, index in _names_in(unit.flat):
                    self._managed.setdefault(id(owner), {})[name] = (unit, index)

    def visit(self, module: Module, prefix: str, types: dict[str, torch.dtype], inner: str) -> None:
        """``types`` are those that buffers have in a checkpoint, by names that begin ``inner``."""
        if _is_fsdp(module):
            around: Any = module
            if not types:
                types, inner = around._buffer_name_to_orig_dtype, ""
            self.visit(around._fsdp_wrapped_module, prefix, types, inner)
            return
        wrapped = wrappers.inside_of(module)
        if wrapped is not None:  # FSDP has the name of what compiling puts around in its own names
            more = wrappers.COMPILED if wrappers.is_compiled(module) else ""
            self.visit(wrapped, prefix, types, inner + more)
            return
        if not loading.is_plain(module):
            raise _unsupported(
                f"cannot save a {type(module).__qualname__} within FSDP1: it saves or loads itself"
                " in a way of its own",
                "use fully_shard (FSDP2)",
                "or put what get_model_state_dict and get_optimizer_state_dict return in the state",
                path=prefix.removesuffix("."),
            )
        self._parameters(module, prefix)
        passing = module._non_persistent_buffers_set
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in passing:
                self._buffer(buffer, prefix + name, types.get(inner + name, buffer.dtype))
        for name, child in module._modules.items():
            if child is not None:
                self.visit(child, f"{prefix}{name}.", types, f"{inner}{name}.")

    def _parameters(self, module: Module, prefix: str) -> None:
        managed, first = self._managed.get(id(module), {}), len(self.found.tensors)
        # Those that FSDP was to ignore come first: where they were among the others, nobody knows
        # any more, and with use_orig_params FSDP itself has put the others behind them.
        for name, parameter in module._parameters.items():
            if parameter is None or name in managed or getattr(parameter, "_is_flat_param", False):
                continue
            self.others.append((parameter, len(self.found.tensors)))
            self.found.tensors[prefix + name] = parameter
        if managed and len(self.found.tensors) > first:
            last = len(self.found.tensors) + len(managed)
            self.mixed.update(dict.fromkeys(range(first, last), first))
        for name, (unit, index) in managed.items():
            key = id(unit), index
            if key not in self._boxes:  # tied: one object
                self.places[key] = len(self.found.tensors)
                self._boxes[key] = unit.value(index)
            self.found.tensors[prefix + name] = self._boxes[key]

    def _buffer(self, buffer: torch.Tensor, name: str, dtype: torch.dtype) -> None:
        tensor = buffer
        if dtype != buffer.dtype:
            tensor = buffer.to(dtype)
            self.found.casts.append((buffer, tensor))
        self.found.tensors[name] = tensor


def _names_in(flat: Any) -> Iterator[tuple[str, Module, int]]:
    """Every name that a parameter of a unit goes by, and the module that has it."""
    numbers: dict[tuple[int, str], int] = {}
    for index, (name, owner, _) in enumerate(flat._param_infos):
        numbers[id(owner), name] = index
        yield name, owner, index
    for name, owner, _, first_name, first_owner, _ in flat._shared_param_infos:
        yield name, owner, numbers[id(first_owner), first_name]
