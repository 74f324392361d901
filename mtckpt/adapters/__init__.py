"""The frameworks whose arrays can be saved, and which of them this process uses.

Knows where each adapter lives. Does not import a framework: an adapter is active once the user's
own import has put its framework into ``sys.modules``. NumPy's is always active and imports NumPy
only when there is an array to look at.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, cast

from mtckpt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mtckpt._coordination import Group
    from mtckpt._state import StateAdapter

__all__ = ["active_adapters", "array_maker", "converter", "find_group"]

# Asked in this order which of them owns a leaf. NumPy is last: it is the most general.
_TABLE = (
    ("torch", "mtckpt.adapters.torch", "TorchAdapter"),
    ("jax", "mtckpt.adapters.jax", "JaxAdapter"),
    ("", "mtckpt.adapters.numpy", "NumpyAdapter"),
)

# What joins ranks, by framework; asked in this order.
_GROUPS = (
    ("torch.distributed", "mtckpt.adapters.torch.group"),
    ("jax", "mtckpt.adapters.jax.group"),
)

# What reads or writes checkpoints of other libraries, what it needs, and the extra that has that.
_CONVERTERS = {
    "dcp_export": ("mtckpt.adapters.torch.dcp_export", "torch", "torch"),
    "dcp_files": ("mtckpt.adapters.dcp_files", "", ""),
    "orbax_export": ("mtckpt.adapters.jax.orbax_export", "tensorstore", "jax"),
    "orbax_files": ("mtckpt.adapters.jax.orbax_files", "tensorstore", "jax"),
}

_made: dict[str, StateAdapter] = {}


def active_adapters() -> list[StateAdapter]:
    """The adapters of the frameworks that this process has imported. Called at every save."""
    return [
        _made.get(module) or _make(module, name)
        for framework, module, name in _TABLE
        if not framework or sys.modules.get(framework) is not None  # None: its import is blocked
    ]


def find_group(name: str) -> Group | None:
    """What joins the ranks of this job, if a framework of this process has started several."""
    for framework, module in _GROUPS:
        if sys.modules.get(framework) is not None:  # None: its import is blocked
            group = importlib.import_module(module).find_group(name)
            if group is not None:
                return cast("Group", group)
    return None


def array_maker(framework: str) -> Callable[[Any, str, tuple[int, ...], str, str], Any]:
    """What makes arrays of a framework from bytes, which is imported now; see ``from_bytes``."""
    module = importlib.import_module("mtckpt.adapters.from_bytes")
    return cast("Callable[[Any, str, tuple[int, ...], str, str], Any]", module.maker(framework))


def converter(name: str) -> Any:
    """A module that reads or writes another library's checkpoints.

    Raises UsageError where what it needs is not installed.
    """
    module, needed, extra = _CONVERTERS[name]
    try:
        if needed:
            importlib.import_module(needed)
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"what such checkpoints are read and written with is not installed: {error}",
            state="nothing was done",
            actions=(f'pip install "mtckpt[{extra}]"',),
        ) from error


def _make(module: str, name: str) -> StateAdapter:
    adapter = cast("StateAdapter", getattr(importlib.import_module(module), name)())
    return _made.setdefault(module, adapter)
