"""The random generators of this process as state: Python's, NumPy's global one, and torch's.

Knows the generators that this process has imported when it saves. Does not import a framework to
save, nor torch to restore: a part whose framework is absent is left out with a log line. Does not
know generators that the user made: those go into the state by themselves.
"""

from __future__ import annotations

import importlib
import logging
import random
import struct
import sys
from typing import Any

__all__ = ["Rng", "rng"]

logger = logging.getLogger(__name__)

_PYTHON_WORDS = struct.Struct("<625I")


class Rng:
    """All global generators as one object with ``state_dict``. It has no state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Arrays, numbers and bytes; a part for every framework that draws random numbers here."""
        state: dict[str, Any] = {"python": _python_state()}
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            # Numbers, texts and at most one array, whatever bit generator the user put there.
            state["numpy"] = numpy_random.get_state(legacy=False)
        torch = sys.modules.get("torch")
        if torch is not None:
            state["torch"] = {"cpu": torch.get_rng_state(), "cuda": _cuda_states(torch)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set every generator that the state has a part for."""
        _set_python_state(state["python"])
        if "numpy" in state:
            importlib.import_module("numpy.random").set_state(state["numpy"])
        if "torch" in state:
            _set_torch_state(state["torch"])


def rng() -> Rng:
    """The random state of this process, to be saved and restored with everything else."""
    return Rng()


def _python_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {"version": version, "words": _PYTHON_WORDS.pack(*words), "gauss": gauss}


def _set_python_state(state: dict[str, Any]) -> None:
    random.setstate((state["version"], _PYTHON_WORDS.unpack(state["words"]), state["gauss"]))


def _cuda_states(torch: Any) -> list[Any]:
    """One for each device; none before CUDA is in use, since asking would start it."""
    if not torch.cuda.is_initialized():
        return []
    return list(torch.cuda.get_rng_state_all())


def _set_torch_state(state: dict[str, Any]) -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        logger.warning("random state of torch not restored: this process has not imported torch")
        return
    torch.set_rng_state(torch.as_tensor(state["cpu"]))
    saved = state["cuda"]
    count = torch.cuda.device_count() if saved else 0
    if len(saved) != count:
        logger.warning(
            "random state of %d CUDA devices in the checkpoint, %d devices here", len(saved), count
        )
    for device, words in enumerate(saved[:count]):
        torch.cuda.set_rng_state(torch.as_tensor(words), device)
