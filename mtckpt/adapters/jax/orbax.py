"""A handler for Orbax's checkpoint manager that saves through the tiers of a ``Checkpointer``.

    registry = mtckpt.adapters.jax.orbax.registry(checkpointer)
    manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)

Orbax's policies go on deciding at which steps a save is made and which steps are listed; the
directories that it makes hold one small file that says which save of which run is meant. The bytes
are where the tiers keep them, as long as their ``keep`` says.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

import orbax.checkpoint as ocp

from mtckpt.errors import FormatError, SaveFailed, UsageError

if TYPE_CHECKING:
    from mtckpt import Checkpointer
    from mtckpt._handle import Save

__all__ = ["Handler", "registry"]

POINTER = "mtckpt.json"
MAX_POINTER_BYTES = 64 * 1024
_ITEM = "item"


def registry(
    checkpointer: Checkpointer,
    *,
    stage: Literal["staged", "local"] = "staged",
    timeout_s: float = 600.0,
) -> Any:
    """What ``ocp.CheckpointManager(handler_registry=...)`` takes to save pytrees through tiers.

    One pytree a step, with the ``StandardSave`` or ``PyTreeSave`` of Orbax and what restores them;
    items of other kinds, such as JSON, stay in Orbax's directory. See ``Handler``.
    """
    handler = Handler(checkpointer, stage=stage, timeout_s=timeout_s)
    made = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arguments = ocp.args
    for kind in (
        *(arguments.StandardSave, arguments.StandardRestore),
        *(arguments.PyTreeSave, arguments.PyTreeRestore),
    ):
        made.add(None, kind, handler)
    return made


class Handler(ocp.StandardCheckpointHandler):  # type: ignore[misc]  # Orbax has no types
    """One pytree of anything that mtckpt can save, in each step.

    Args:
        checkpointer: of the run to save into. It is used by this handler alone: a step is saved
            once. Closing it is the caller's, after the manager.
        stage: what Orbax waits for, in its own thread, before it lists a step.
        timeout_s: how long it waits at most.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        stage: Literal["staged", "local"] = "staged",
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        self._checkpointer = checkpointer
        self._stage: Literal["staged", "local"] = stage
        self._timeout_s = timeout_s

    async def async_save(
        self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None
    ) -> list[Any]:
        """Capture the arrays, which may be donated once this is done; the rest is awaited later.

        Raises what ``Checkpointer.save`` does.
        """
        if save_args is not None or getattr(args, "save_args", None) is not None:
            raise UsageError(
                "save_args are Orbax's: mtckpt has no such options", state="nothing was saved"
            )
        step = _step_of(directory)
        tree = item if args is None else args.item
        save = self._checkpointer.save(step, {_ITEM: tree}, tiers="all")
        # The directory is made meanwhile: Orbax runs what is left once it is there.
        left = self._commit(save, directory)
        return [ocp.future.CommitFutureAwaitingContractedSignals(left, name="mtckpt")]

    async def _commit(self, save: Save, directory: Any) -> None:
        """Wait until the save is where it has to be, then point to it.

        Raises SaveFailed or WaitTimeout; Orbax then lists no such step, and raises it.
        """
        if save.skipped is not None:
            raise SaveFailed(
                f"the save of step {save.step} was called off: {save.skipped}",
                stage=self._stage,
                step=save.step,
            )
        save.wait(self._stage, timeout_s=self._timeout_s)
        pointer = {"version": 1, "run": self._checkpointer.run, "step": save.step, "id": save.id}
        (directory / POINTER).write_text(json.dumps(pointer))

    def restore(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        """The tree of the save that the directory points to, verified, in the template's shardings.

        Without a template, arrays come as they were saved, in plain containers. Raises what
        ``Checkpointer.restore`` does, and FormatError for a directory that points nowhere.
        """
        if getattr(args, "restore_args", None) is not None:
            raise UsageError(
                "restore_args are Orbax's: mtckpt has no such options",
                state="nothing was restored",
                actions=("give a template with the types and shardings that are wanted",),
            )
        template = item if args is None else args.item
        pointer = _read_pointer(directory)
        if pointer["run"] != self._checkpointer.run:
            raise UsageError(
                f"the step was saved into the run {pointer['run']!r},"
                f" and the handler's Checkpointer is of {self._checkpointer.run!r}",
                state="live state unchanged",
            )
        restored = self._checkpointer.restore({_ITEM: template}, step=pointer["step"])
        return restored.state[_ITEM]

    def finalize(self, directory: Any) -> None:
        """Nothing: Orbax's own handler would look for arrays there."""
        del directory

    def metadata(self, directory: Any) -> Any:
        """What the pointer says: run, step and id. ``mtckpt show RUN`` knows the arrays."""
        return _read_pointer(directory)


def _step_of(directory: Any) -> int:
    """The step in the name of a manager's directory, which may still be a temporary one."""
    for name in (directory.parent.name, directory.name):
        found = re.fullmatch(r"(?:[A-Za-z_]+[_.-])?(\d+)(?:\.orbax-checkpoint-tmp.*)?", name)
        if found:
            return int(found[1])
    raise UsageError(
        f"no step in the name of {directory}", actions=("save through ocp.CheckpointManager",)
    )


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
    ):
        raise FormatError("not what points to a save of mtckpt", path=str(path))
    return pointer
