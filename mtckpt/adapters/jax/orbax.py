"""A handler for Orbax's checkpoint manager that saves through the tiers of a ``Checkpointer``.

    registry = mtckpt.adapters.jax.orbax.registry(checkpointer)
    manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)

Orbax's policies go on deciding at which steps a save is made and which steps are listed; the
directories that it makes hold one small file that says which save of which run is meant. The bytes
are where the tiers keep them, as long as their ``keep`` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orbax.checkpoint as ocp

from mtckpt.adapters.jax import orbax_arguments, orbax_metadata
from mtckpt.errors import (
    CheckpointError,
    FormatError,
    SaveFailed,
    StageNotPlanned,
    StepNotFound,
    UsageError,
)

if TYPE_CHECKING:
    from mtckpt import Checkpointer
    from mtckpt._handle import Save, Stage
    from mtckpt._manifest import Record

__all__ = ["Handler", "registry"]

POINTER = "mtckpt.json"
MAX_POINTER_BYTES = 64 * 1024
_DEFAULT = "default"  # what Orbax calls the only item of a step
_TEMPORARY = r"\.orbax-checkpoint-tmp.*"


@dataclass(slots=True)
class _Items:
    """The pytrees of one step, which are one save of mtckpt's."""

    step: int
    trees: dict[str, Any] = field(default_factory=dict)
    save: Save | None = None
    error: Exception | None = None

    def saved(self, checkpointer: Checkpointer, *, is_next: bool) -> Save:
        """The save of all of them, made by whoever asks first; what it raised, everybody gets.

        Unless ``is_next``, it may go on from another step than the last save. For Orbax a restore
        says nothing of what is saved later: all steps below stay.
        """
        if self.save is None and self.error is None:
            try:
                if not is_next:
                    checkpointer._go_on_below(self.step)
                self.save = checkpointer.save(self.step, self.trees, tiers="all")
            except CheckpointError as error:
                self.error = error
            self.trees = {}
        if self.save is None:
            assert self.error is not None
            raise self.error
        return self.save


def registry(
    checkpointer: Checkpointer,
    *,
    stage: Stage | None = None,
    timeout_s: float = 600.0,
) -> Any:
    """What ``ocp.CheckpointManager(handler_registry=...)`` takes to save pytrees through tiers.

    Pytrees are those of ``StandardSave`` and ``PyTreeSave``; all of a step are one save. Items of
    other kinds, such as JSON, stay in Orbax's directory. See ``Handler``.
    """
    handler = Handler(checkpointer, stage=stage, timeout_s=timeout_s)
    made = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arguments = ocp.args
    for kind in (
        *(arguments.StandardSave, arguments.StandardRestore),
        *(arguments.PyTreeSave, arguments.PyTreeRestore),
        *(_Save, _Restore),
    ):
        made.add(None, kind, handler)
        made.add(_DEFAULT, kind, handler)  # so that a new manager can tell what it holds
    return made


class Handler(ocp.StandardCheckpointHandler):  # type: ignore[misc]  # Orbax has no types
    """Pytrees of anything that mtckpt can save, one or several in each step.

    Args:
        checkpointer: of the run to save into. It is used by this handler alone: a step is saved
            once. Closing it is the caller's, after the manager.
        stage: what Orbax waits for, in its own thread, before it lists a step. By default that a
            tier below memory has it: memory keeps the newest steps only, and where a step is not
            waited for, a newer one may take its place on the way down.
        timeout_s: how long it waits at most.

    Raises UsageError without a checkpointer.
    """

    def __init__(
        self,
        checkpointer: Checkpointer | None = None,
        *,
        stage: Stage | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if checkpointer is None:  # a manager made it, by the name of its class in the directory
            raise UsageError(
                "the step was saved through mtckpt, and the manager was not told where to find it",
                state="nothing was done",
                actions=("give the manager handler_registry=registry(checkpointer)",),
            )
        super().__init__()
        self._checkpointer = checkpointer
        self._stage: Stage | None = stage
        self._timeout_s = timeout_s
        self._items: dict[Any, _Items] = {}
        self._highest: int | None = None  # of the run, once a directory's name had no step
        self._is_next = False  # nothing was restored since the last save, and there was one

    async def async_save(
        self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None
    ) -> list[Any]:
        """Capture the arrays, which may be donated once this is done; the rest is awaited later.

        Raises what ``Checkpointer.save`` does, and UsageError for ``save_args`` that change values.
        """
        step, item_name = _place_of(directory)
        key = directory.parent, step
        items = self._items.get(key)
        if items is None:
            items = self._items[key] = _Items(self._next_step() if step is None else step)
        args = args or ocp.args.PyTreeSave(item, save_args)
        custom = getattr(args, "custom_metadata", None)
        placed = orbax_metadata.placements(args.item)
        try:
            orbax_arguments.check_save(args)
        except UsageError as error:
            items.error = error
        items.trees[item_name] = args.item
        await asyncio.sleep(0)  # Orbax starts all items of a step before it goes on with the first
        self._items.pop(key, None)
        if self._highest is not None:
            self._highest = max(self._highest, items.step)
        save = items.saved(self._checkpointer, is_next=self._is_next)
        self._is_next = True
        # The directory is made meanwhile: Orbax runs what is left once it is there.
        left = self._commit(save, directory, item_name, custom, placed)
        return [ocp.future.CommitFutureAwaitingContractedSignals(left, name="mtckpt")]

    def _next_step(self) -> int:
        """One more than any of the run. All processes ask for it, for the same directory."""
        if self._highest is None:
            link = self._checkpointer._link
            link.enter()
            here = max((each.step for each in self._checkpointer.steps()), default=0)
            self._highest = max(link.exchange("orbax steps", here))
        return self._highest + 1

    async def _commit(
        self, save: Save, directory: Any, item_name: str, custom: Any, placed: list[Any]
    ) -> None:
        """Wait until the save is where it has to be, then point to it.

        Raises SaveFailed or WaitTimeout; Orbax then lists no such step, and raises it.
        """
        if save.skipped is not None:
            raise SaveFailed(
                f"the save of step {save.step} was called off: {save.skipped}",
                stage=self._stage or "local",
                step=save.step,
            )
        try:
            save.wait(self._stage or "local", timeout_s=self._timeout_s)
        except StageNotPlanned:
            if self._stage is not None:
                raise
            save.wait("staged", timeout_s=self._timeout_s)  # there is nothing but memory
        pointer = {
            "version": 1,
            "run": self._checkpointer.run,
            "step": save.step,
            "id": save.id,
            "item": item_name,
            "custom": custom,
        }
        orbax_metadata.write_placements(placed, directory)
        (directory / POINTER).write_text(json.dumps(pointer))

    def restore(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        """The tree of the save that the directory points to, verified, in the template's shardings.

        Without a template, arrays come as they were saved, in plain containers. ``restore_args``
        say types, which floating-point arrays are converted to, and shardings; ``partial_restore``
        is ``partial``. A directory may point to another run of the same tiers. Raises what
        ``Checkpointer.restore`` does, and FormatError for a directory that points nowhere.
        """
        pointer = _read_pointer(directory)
        args = args or ocp.args.PyTreeRestore(item)
        wanted = orbax_arguments.wanted_of(args, lambda: self.metadata(directory).tree)
        template = wanted.template
        if template is None and orbax_metadata.is_divided(directory):
            template = orbax_metadata.placed(self._record(pointer), pointer["item"], directory)
        item_name, other = pointer["item"], self._source(pointer)
        if other is None:
            self._is_next = False
        state, step = {item_name: template}, pointer["step"]
        with _listed():
            restored = self._checkpointer._read(state, step, other, wanted.is_partial)
        found = restored.state[item_name]
        if wanted.template is None:
            found = orbax_arguments.without_named_tuples(found)
        return wanted.finished(found)

    def finalize(self, directory: Any) -> None:
        """Nothing: Orbax's own handler would look for arrays there."""
        del directory

    def metadata(self, directory: Any) -> Any:
        """Shapes and types of the tree that the directory points to; all processes ask for them.

        Raises what ``restore`` does. No array is read.
        """
        pointer = _read_pointer(directory)
        item, custom = pointer["item"], pointer.get("custom")
        return orbax_metadata.of_record(self._record(pointer), item, directory, custom)

    def _record(self, pointer: dict[str, Any]) -> Record:
        """What one process told of the save; all processes ask for it."""
        with _listed():
            records = self._checkpointer._records(pointer["step"], self._source(pointer))
        return records[min(records)]

    def _source(self, pointer: dict[str, Any]) -> str | None:
        """Another run of the same tiers, where the directory is that of another manager."""
        run: str = pointer["run"]
        if run == self._checkpointer.run:
            return None
        if "/" in os.path.expanduser(run):  # a run, and no place that the file may name
            raise FormatError(f"points to a place, and not to a run: {run!r:.80}")
        return run


@ocp.args.register_with_handler(Handler, for_save=True)
class _Save(ocp.args.PyTreeSave):  # type: ignore[misc]  # Orbax has no types
    """Orbax makes these arguments where a call gives none."""


@ocp.args.register_with_handler(Handler, for_restore=True)
class _Restore(ocp.args.PyTreeRestore):  # type: ignore[misc]  # Orbax has no types
    """Orbax makes these arguments where a call gives none."""


@contextlib.contextmanager
def _listed() -> Iterator[None]:
    """Orbax's rules and those of the tiers are not the same: say so of a step that is in one."""
    try:
        yield
    except StepNotFound as error:
        error.actions = (*error.actions, "have keep= of the tiers keep what Orbax's manager does")
        raise


def _place_of(directory: Any) -> tuple[int | None, str]:
    """The step that a directory's name says, if any, and what the item in it is called.

    Of the two directories the one that Orbax is just making, and will rename, is that of the step:
    a manager's has one for each item below it, a checkpointer's has none. Where none is renamed, as
    in object stores, either can be.
    """
    above, own = (re.sub(f"{_TEMPORARY}$", "", e.name) for e in (directory.parent, directory))
    if own != directory.name and above == directory.parent.name:
        return _step_in(own), own if _step_in(own) is None else _DEFAULT
    steps = _step_in(above), _step_in(own)
    # Where both could be a step, the one that is a number and nothing else is: of run_7/5 and
    # 5/layer_1 it is 5.
    if steps[1] is not None and (steps[0] is None or (own.isdigit() and not above.isdigit())):
        return steps[1], _DEFAULT
    return steps[0], own


def _step_in(name: str) -> int | None:
    found = re.fullmatch(r"(?:.+_)?(\d+)", name)
    return None if found is None else int(found[1])


def _read_pointer(directory: Any) -> dict[str, Any]:
    path = directory / POINTER
    try:
        data = path.read_bytes()
        pointer = json.loads(data) if len(data) <= MAX_POINTER_BYTES else None
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be read: {error}", path=str(path)) from error
    if not (
        isinstance(pointer, dict)
        and isinstance(pointer.get("run"), str)
        and type(pointer.get("step")) is int
        and isinstance(pointer.get("item"), str)
    ):
        raise FormatError("not what points to a save of mtckpt", path=str(path))
    return pointer
