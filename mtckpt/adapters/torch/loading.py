"""Whether a module, or an optimizer, takes what was saved, as far as that can be known before.

Knows how ``torch.nn.Module`` loads and what changes that, and what settings optimizers have. Does
not load anything. Where a part of the way to a name has a loading of its own, its hooks decide, and
nothing is said.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Adamax, RAdam

from mtckpt.errors import UnsupportedState

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["EXTRA", "OWN_NAMES", "PLAIN_LOADS", "check_taken_back", "is_plain", "other_settings"]

# Loading hooks of torch itself that only fill in what an old file lacks; ours lack nothing.
PLAIN_LOADS = (Module._load_from_state_dict, _NormBase._load_from_state_dict)
# What changes how one module is saved and loaded, where it is set on the module itself.
OWN_NAMES = frozenset(
    {"state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict"}
)
EXTRA = "_extra_state"  # its module takes back whatever it gave, of any shape
# What schedulers of torch add to the settings of an optimizer, and what is no setting.
_ADDED = frozenset(
    {
        *("initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"),
        *("params", "param_names"),
    }
)
# Settings of torch that tell optimizers with otherwise the same ones apart, and that none was given
# later.
_OF_KINDS = frozenset(
    {
        *("alpha", "amsgrad", "betas", "centered", "dampening", "etas", "lambd", "lr_decay"),
        *("momentum", "momentum_decay", "nesterov", "rho", "step_sizes"),
    }
)
_DECOUPLED = "decoupled_weight_decay"
# Modules whose names were looked at: they hardly ever change, and there is a save every few steps.
_checked: weakref.WeakSet[Module] = weakref.WeakSet()


def is_plain(module: Module) -> bool:
    """True if nobody has changed how this one module is saved and loaded (children aside)."""
    kind = type(module)
    return (
        kind._save_to_state_dict is Module._save_to_state_dict
        and kind._load_from_state_dict in PLAIN_LOADS
        and kind.state_dict is Module.state_dict
        and kind.load_state_dict is Module.load_state_dict
        and kind.get_extra_state is Module.get_extra_state
        and kind.set_extra_state is Module.set_extra_state
        and not module._state_dict_hooks
        and not module._state_dict_pre_hooks
        and not module._load_state_dict_pre_hooks
        and not module._load_state_dict_post_hooks
        and OWN_NAMES.isdisjoint(module.__dict__)
        and not isinstance(module, torch.jit.ScriptModule)
    )


def check_taken_back(module: Module, names: Iterable[Any]) -> None:
    """Raise UnsupportedState where ``load_state_dict`` refuses a name that ``state_dict`` gave.

    A part that only saves more than parameters and buffers, such as a quantised layer whose loading
    is somebody else's, would be found out when it is to be restored, which is too late.
    """
    if module in _checked:
        return
    parts = dict(module.named_modules(remove_duplicate=False))
    if not any(_decides_for_all(part) for part in parts.values()) and _loads_plainly(module):
        for name in names:
            if isinstance(name, str):
                _check_name(name, parts)
    _checked.add(module)


def _check_name(name: str, parts: dict[str, Module]) -> None:
    path, part, rest = "", parts[""], name
    while True:  # to the innermost part that the name lies in, as loading goes
        if not _takes_plainly(part):
            return
        first, dot, behind = rest.partition(".")
        child = f"{path}.{first}" if path else first
        if not dot or child not in parts:
            break
        path, part, rest = child, parts[child], behind
    if rest in part._parameters or rest in part._buffers:
        return
    if rest == EXTRA and type(part).set_extra_state is not Module.set_extra_state:
        return
    kind = type(part)
    raise UnsupportedState(
        f"{kind.__module__}.{kind.__qualname__} saves {rest!r}, which its load_state_dict does not"
        " take back: it could not be restored",
        path=name,
        type_name=kind.__qualname__,
        state="nothing was written",
        actions=(
            "save the parts that you train, and make this one anew from where it came from",
            "or give it a _load_from_state_dict, or a hook of loading, that takes it",
        ),
    )


def _takes_plainly(part: Module) -> bool:
    # A hook, or a method of this one module, may be for another module that knows the names.
    return (
        type(part)._load_from_state_dict in PLAIN_LOADS
        and not part._load_state_dict_pre_hooks
        and not part._state_dict_hooks
        and OWN_NAMES.isdisjoint(part.__dict__)
    )


def _loads_plainly(module: Module) -> bool:
    return type(module).load_state_dict is Module.load_state_dict


def _decides_for_all(part: Module) -> bool:
    """Whether it sees, or may see, what the whole module was refused."""
    return bool(part._load_state_dict_post_hooks) or isinstance(part, torch.jit.ScriptModule)


def other_settings(optimizer: Optimizer, number: int, saved: Mapping[str, Any]) -> str:
    """Why a saved group is of another kind of optimizer than group ``number`` of this one; empty if
    it may be of this kind. ``saved`` are its settings.

    Torch would take it, and the next steps would be another optimizer's, or fail for want of a
    setting. One that only one side has, as another version of torch may, is no reason, unless it is
    what makes a kind of optimizer.
    """
    lacking = optimizer.defaults.keys() - saved.keys()
    foreign = saved.keys() - _ADDED.union(*optimizer.param_groups)
    is_torchs = type(optimizer).__module__.startswith("torch.optim")
    # Adam and AdamW were given that one later, RAdam always had it, and Adamax never.
    told = {_DECOUPLED} if isinstance(optimizer, RAdam | Adamax) else frozenset()
    kinds = (_OF_KINDS | told) & (lacking | foreign) if is_torchs else ()
    if (lacking and foreign) or kinds:
        return f"settings {sorted(lacking)} here, {sorted(foreign)} in the checkpoint"
    here = optimizer.param_groups[number].get(_DECOUPLED)
    there = saved.get(_DECOUPLED)
    if isinstance(here, bool) and isinstance(there, bool) and here != there:
        return (
            f"{_DECOUPLED}={here} here, {there} in the checkpoint (Adam has False, AdamW True):"
            " the same moments, and another weight decay"
        )
    return ""
