"""A writer and a reader for ``torch.distributed.checkpoint`` that go through a ``Checkpointer``.

    dcp.save(state, storage_writer=Writer(checkpointer, step))
    dcp.async_save(state, storage_writer=Writer(checkpointer, step))
    dcp.load(state, storage_reader=Reader(checkpointer))

Knows the protocol of DCP: what it plans, and whom it asks for values. What a state is made of is
saved as leaves, nested as it was, so that a checkpoint is no other than those of ``save()``. DCP's
plans are made and not followed: which rank stores which bytes, and which are read for what, is
decided as for any other save. Nothing that comes from storage is unpickled: where DCP wants to do
that, it gets a pickle that was made in this process, of a value that came as JSON.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from xxhash import xxh3_128_hexdigest

from mtckpt._node import PLAIN_TYPES
from mtckpt._replicas import Replicated
from mtckpt._state import CODECS, ByPath
from mtckpt.adapters.torch import dcp_catalog, sharded
from mtckpt.errors import NoHealthyStep, SaveFailed, UnsupportedState, UsageError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import (
        LoadPlan,
        LoadPlanner,
        ReadItem,
        SavePlan,
        SavePlanner,
    )

    from mtckpt import Checkpointer
    from mtckpt._handle import Save, Stage
    from mtckpt.adapters.torch.dcp_catalog import Catalog

__all__ = ["Reader", "Writer"]

Flattened = dict[str, Any]
Mappings = dict[str, Any]

# What a planner of somebody's own may do to values when DCP writes them. Nobody asks it to here.
_BYPASSED = ("resolve_data", "lookup_object", "transform_object")


class Writer(StorageWriter, AsyncStager):
    """``storage_writer=`` of ``dcp.save`` and ``dcp.async_save``: one save of a run.

    Args:
        checkpointer: of the run. It needs no other calls; closing it is the caller's.
        step: the step. Without one it is the last number in the ``checkpoint_id`` that ``dcp.save``
            is given; ``dcp.async_save`` needs it here, since it copies before it tells the id.
        tiers: "all" saves to every tier; "due" to those whose ``every`` wants the step, which may
            be none.
        stage: what ``dcp.save``, and the future of ``dcp.async_save``, wait for.
        timeout_s: how long they wait at most.

    With ``async_save`` the values are those at its call: it returns once they are copied.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        step: int | None = None,
        *,
        tiers: Literal["due", "all"] = "all",
        stage: Stage = "staged",
        timeout_s: float = 600.0,
    ) -> None:
        self._checkpointer = checkpointer
        self._given = self._step = step
        self._tiers: Literal["due", "all"] = tiers
        self._stage: Stage = stage
        self._timeout_s = timeout_s
        self._together = True
        self._staged: tuple[Save, frozenset[str]] | None = None
        self._captured: tuple[Save, frozenset[str]] | None = None

    # -- as a stager -------------------------------------------------------------------------------

    @property
    def should_synchronize_after_execute(self) -> bool:
        """False: whatever was staged is copied."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Capture the state, in the caller's thread. What it raises, ``async_save`` raises.

        Raises what ``Checkpointer.save`` does, and UsageError without a step.
        """
        flat, mappings = flatten_state_dict(state_dict)
        self._staged = self._capture(flat, mappings), frozenset(flat)
        # DCP plans with names, shapes and types of these; the caller's containers may change.
        return flat

    def synchronize_staging(self) -> None:
        """Nothing: whatever was staged is copied."""

    def close(self) -> None:
        """Nothing: the checkpointer is the caller's."""

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a Writer belongs to the process of its Checkpointer",
            state="nothing was written",
            actions=("leave out async_checkpointer_type: the node agent is a process already",),
        )

    # -- as a writer -------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the step from an id, unless it was given."""
        if self._given is None and checkpoint_id is not None:
            self._step = _step_in(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note whether the ranks plan together, and whether this goes on from ``stage``."""
        del is_coordinator, args
        # Once: what an earlier try had captured is not what the next one is about.
        self._captured, self._staged = self._staged, None
        self._together = bool(kwargs.get("use_collectives", True))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan itself."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans themselves. Raises UsageError unless all ranks of the job take part."""
        link = self._checkpointer._link
        link.enter()
        if self._together and len(plans) != link.group.world_size:
            raise UsageError(
                f"{len(plans)} of {link.group.world_size} ranks came to save",
                state="nothing was written",
                actions=(
                    "save on all ranks, without process_group= and no_dist=: what several of them"
                    " hold alike is stored once",
                    "or give Checkpointer(group=...) the ranks that save",
                ),
            )
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Capture the state unless ``stage`` has, and wait for the stage that was asked for.

        Raises what ``Checkpointer.save`` and ``Save.wait`` do, and SaveFailed where the save was
        called off.
        """
        del plan
        flat, mappings = _planned(planner)
        staged, self._captured = self._captured, None
        save = self._capture(flat, mappings) if staged is None else staged[0]
        if staged is not None and (changed := sorted(flat.keys() - staged[1])):
            raise UsageError(
                f"{type(planner).__name__} has other keys than those that were saved:"
                f" {', '.join(changed[:5])}",
                state=f"step {save.step} was saved with the keys that the state has",
                actions=("rename before async_save, or use dcp.save",),
            )
        if save.skipped is not None:
            raise SaveFailed(
                f"the save of step {save.step} was called off: {save.skipped}",
                stage=self._stage,
                step=save.step,
            )
        if save.due:
            save.wait(self._stage, timeout_s=self._timeout_s)
        done: torch.futures.Future[list[Any]] = torch.futures.Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Nothing: a save is done when the records of all ranks are there."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: no id says which checkpointer."""
        del checkpoint_id
        return False

    def _capture(self, flat: Flattened, mappings: Mappings) -> Save:
        if self._step is None:
            raise UsageError(
                "no step was given",
                state="nothing was written",
                actions=(
                    "Writer(checkpointer, step)",
                    'or dcp.save(..., checkpoint_id="step-100"); async_save copies before it'
                    " tells the id",
                ),
            )

        def state() -> dict[str, Any]:
            """Called only where something is due."""
            return unflatten_state_dict(self._marked(flat), mappings)

        return self._checkpointer.save(self._step, state, tiers=self._tiers)

    def _marked(self, flat: Flattened) -> Flattened:
        """To DCP, what several ranks hold under one key is the same: each byte is stored once.

        Which ranks hold what is compared at each save: all of them call this. Raises
        UnsupportedState on all of them for what one cannot save.
        """
        held: Flattened = {}
        failure: UnsupportedState | None = None
        try:
            held = _held(flat)
        except UnsupportedState as error:
            failure = error
        link = self._checkpointer._link
        names = sorted(
            name
            for name, value in held.items()
            if type(value) not in PLAIN_TYPES and not sharded.is_sharded(value)
        )
        digest = xxh3_128_hexdigest("\0".join(names).encode())
        told = link.exchange("dcp keys", [digest, None if failure is None else failure.what])
        if failure is not None:
            raise failure
        for rank, (_, why) in enumerate(told):
            if why is not None:
                raise UnsupportedState(
                    f"rank {rank}: {why}", path="", rank=rank, state="nothing was written"
                )
        ranks_of: dict[str, tuple[int, ...]] = {}
        if len({each for each, _ in told}) > 1:
            for rank, theirs in enumerate(link.exchange("dcp differing keys", names)):
                for name in theirs:
                    ranks_of[name] = (*ranks_of.get(name, ()), rank)
        if link.group.world_size == 1:
            return held
        marked = {name: Replicated(held[name], ranks_of.get(name)) for name in names}
        return {**held, **marked}


def _held(flat: Flattened) -> Flattened:
    """What this rank has a part in. Raises UnsupportedState for what cannot be saved."""
    held = {}
    for name, value in flat.items():
        _check(value, name)
        part = sharded.held(value, name)
        # As DCP's planner does it: a rank that has no part in an array leaves it out.
        if part is not None or value is None:
            held[name] = part
    return held


def _planned(planner: SavePlanner) -> tuple[Flattened, Mappings]:
    """The state that a planner has taken apart. Raises UsageError for one that changes values."""
    default = default_planner.DefaultSavePlanner
    kind = type(planner)
    if not isinstance(planner, default):
        raise UsageError(
            f"{kind.__name__} is no DefaultSavePlanner: there is no state to be found in it",
            state="nothing was written",
        )
    for name in _BYPASSED:
        if getattr(kind, name) is not getattr(default, name):
            raise UsageError(
                f"{kind.__name__} has a {name} of its own, which would not be called",
                state="nothing was written",
                actions=("change values before they are saved",),
            )
    flat: Flattened = planner.state_dict
    if planner.flatten_state_dict:
        return flat, planner.mappings
    if flatten_state_dict(flat)[0].keys() != flat.keys():
        raise UsageError(
            "a nested state with flatten_state_dict=False is pickled by DCP",
            state="nothing was written",
            actions=("leave flatten_state_dict as it is by default",),
        )
    return flat, {name: (name,) for name in flat}


def _check(value: Any, name: str, depth: int = 0) -> None:
    """Raise UnsupportedState for what DCP would pickle, and what would come back otherwise."""
    kind = type(value)
    if isinstance(value, torch.Tensor) or kind in PLAIN_TYPES or kind in CODECS:
        return
    named = hasattr(value, "_fields")
    if isinstance(value, Mapping) and depth:
        for each in value.values():
            _check(each, name, depth + 1)
    elif isinstance(value, (list, tuple)) and not named:
        for each in value:
            _check(each, name, depth + 1)
    elif kind.__module__ != "numpy" and not isinstance(value, (bool, int, float, str, bytes)):
        raise UnsupportedState(
            f"DCP would pickle a value of type {kind.__module__}.{kind.__qualname__}",
            path=name,
            type_name=kind.__qualname__,
            state="nothing was written",
            actions=(
                "give its state_dict() if it has one: DCP calls it only for the values of the"
                " outermost dict",
                "or describe it once with mtckpt.register_codec(type, name=, encode=, decode=)",
            ),
        )


def _step_in(checkpoint_id: object) -> int:
    """The last number in the name of a checkpoint: of 100, "step-100", "runs/7/step_100/"."""
    text = os.fspath(checkpoint_id) if isinstance(checkpoint_id, os.PathLike) else checkpoint_id
    numbers = re.findall(r"\d+", str(text).rstrip("/").rpartition("/")[2])
    if not numbers:
        raise UsageError(
            f"no step in the name {text!r}",
            state="nothing was done",
            actions=('use names such as "step-100", or give the step itself',),
        )
    return int(numbers[-1])


class Reader(StorageReader):
    """``storage_reader=`` of ``dcp.load``: a step of a run, from the fastest tier that has it.

    Args:
        checkpointer: of the run.
        step: a number, "latest" (the newest healthy one), or "best"; a ``checkpoint_id`` that
            ``dcp.load`` is given counts where none is named here.

    All ranks of the job load together. What was loaded from is where the run goes on, as after
    ``Checkpointer.restore``, whoever wrote it: ``dcp.save`` or ``Checkpointer.save``.
    """

    def __init__(
        self, checkpointer: Checkpointer, step: int | Literal["latest", "best"] | None = None
    ) -> None:
        self._checkpointer = checkpointer
        self._given = step
        self._step: int | Literal["latest", "best"] = "latest" if step is None else step
        self._catalog: Catalog | None = None

    @property
    def step(self) -> int | None:
        """The step that was loaded from last."""
        return None if self._catalog is None else self._catalog.step

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the step from an id, unless it was given."""
        self._catalog = None
        if self._given is None and checkpoint_id is not None:
            self._step = _step_in(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """What the step holds, in DCP's words. All ranks call it.

        Raises what ``Checkpointer.restore`` does, and StepNotFound where there is nothing.
        """
        records = self._checkpointer._records(self._step)
        rank = self._checkpointer._link.group.rank
        self._catalog = dcp_catalog.make(records, rank)
        return self._catalog.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the metadata is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan itself."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans themselves."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        """Bring every box that is wanted to its tensor, verified, and every value to its place.

        Raises what ``Checkpointer.restore`` does. All ranks call it, also those that want nothing.
        """
        catalog = self._catalog
        assert catalog is not None  # DCP reads the metadata first
        targets = _Targets(catalog)
        values = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                values.append((item, catalog.value(item.storage_index.fqn, targets.whole)))
            else:
                targets.add(item, planner.resolve_tensor(item).detach())
        restored = self._checkpointer.restore(targets.template(), step=catalog.step)
        if restored.id != catalog.id:
            raise NoHealthyStep(
                f"step {catalog.step} was there twice, and the one that was looked at is damaged",
                step=catalog.step,
                state="live state is undefined",
                actions=("load it again",),
            )
        targets.convert()
        for item, target in targets.targets:
            planner.commit_tensor(item, target)
        for item, value in values:
            data = io.BytesIO()
            torch.save(value(), data)
            data.seek(0)
            planner.load_bytes(item, data)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: no id says which checkpointer."""
        del checkpoint_id
        return False


class _Targets:
    """Where bytes are wanted: boxes of live tensors, and whole arrays for values."""

    def __init__(self, catalog: Catalog) -> None:
        self.targets: list[tuple[ReadItem, torch.Tensor]] = []
        self._catalog = catalog
        self._boxes: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
        self._whole: ByPath = ByPath()
        self._converted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, item: ReadItem, target: torch.Tensor) -> None:
        """Want a box in ``target``. One of another type gets it converted, as by DCP."""
        array = self._catalog.arrays[item.storage_index.fqn]
        wanted = tuple(item.lengths)
        if tuple(target.shape) != wanted:
            raise UsageError(
                f"{item.dest_index.fqn}: {list(target.shape)} here, {list(wanted)} planned",
                state="live state unchanged",
            )
        self.targets.append((item, target))
        box = target
        if target.dtype != array.dtype:
            box = torch.empty(wanted, dtype=array.dtype)
            self._converted.append((target, box))
        # There is one chunk of each array: all of it.
        offsets = tuple(map(int, item.storage_offsets))
        self._boxes.setdefault(array.path, []).append((offsets, box))

    def whole(self, path: str, array: Any) -> None:
        """Want all of an array in a new one."""
        self._whole[path] = array

    def template(self) -> ByPath:
        """What ``restore`` is to fill."""
        shapes = {array.path: array for array in self._catalog.arrays.values()}
        found = ByPath(self._whole)
        for path, boxes in self._boxes.items():
            array = shapes[path]
            ((_, first), *more) = boxes
            is_whole = not more and tuple(first.shape) == array.shape
            found[path] = (
                first if is_whole else sharded.Boxes(array.shape, array.dtype, tuple(boxes))
            )
        return found

    def convert(self) -> None:
        """Put what came in another type where it is wanted."""
        with torch.no_grad():
            for target, box in self._converted:
                target.copy_(box)
