"""Others, each in a process of its own and in the configuration that serves it best here.

torch.save: the zip format, no fsync; restored with ``mmap=True`` and ``copy_``, which reads each
byte once and is several times faster than loading a second state first.
safetensors: ``save_file``, restored tensor by tensor with ``safe_open`` and ``copy_``: its fastest.
DCP async: ``dcp.async_save`` with one stager kept over all saves, so its staging memory is warm
(``DefaultStager`` as documented allocates anew each time); no pinned memory, there is no GPU; one
writer thread per core, no fsync, since it writes to the tmpfs too. ``dcp.load`` loads in place.
Orbax async: one ``AsyncCheckpointer`` kept over all saves, OCDBT and Zarr 3, the fastest of its
layouts here; the arrays are NumPy views of the same memory, so nothing is copied for it first.

Each saves the same state to the same tmpfs as mtckpt, and a fresh process restores it into existing
tensors; the bytes are compared. A name that is not installed is skipped.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from statistics import median
from typing import Any

from benchmarks import measuring

_WARM_UPS = 2
_State = dict[str, Any]


def main() -> None:
    chosen = measuring.options(__doc__, rounds=5, kind="gpt", tensors=20_000, role="", path="")
    size = chosen.size_mib if chosen.kind == "gpt" else chosen.tensors
    if chosen.role:
        warnings.simplefilter("ignore")  # of the peers; each is used as its documents say
        role, _, name = chosen.role.partition(":")
        work = {"save": _save, "restore": _restore}[role]
        print(json.dumps(work(name, chosen.kind, size, chosen.path, chosen.rounds)), flush=True)
        return
    for name in _PEERS:
        try:
            _compare(name, chosen)
        except (SystemExit, ValueError, IndexError) as error:
            print(f"{name}: no row: {error}", file=sys.stderr)


def _compare(name: str, chosen: Any) -> None:
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    path = tempfile.mkdtemp(prefix="mtb-", dir=shm)
    common = [f"--{key.replace('_', '-')}={getattr(chosen, key)}" for key in _COMMON]
    try:
        saved = _child(f"save:{name}", path, common)
        restored = [_child(f"restore:{name}", path, common) for _ in range(chosen.rounds)]
    finally:
        shutil.rmtree(path, ignore_errors=True)
    facts = {"size_bytes": saved["size_bytes"], "kind": chosen.kind}
    copied = saved["memcpy_s"]
    measuring.row(f"{name}: complete in tmpfs", saved["complete_s"], limit=copied, **facts)
    measuring.row(f"{name}: call blocks", saved["blocked_s"], limit=copied, **facts)
    took = [done["restore_s"] for done in restored]
    copied = [done["memcpy_s"] for done in restored]
    measuring.row(f"{name}: restored", took, limit=copied, **facts)


_COMMON = ("size_mib", "rounds", "kind", "tensors")


def _child(role: str, path: str, common: list[str]) -> dict[str, Any]:
    out = measuring.child("benchmarks.peers", f"--role={role}", f"--path={path}", *common)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _save(name: str, kind: str, size: int, path: str, rounds: int) -> dict[str, Any]:
    state = _flat(measuring.make_state(kind, size))
    measuring.fill(state, 5)
    memcpy = measuring.Memcpy(state)
    save = _PEERS[name][0](path)
    blocked, complete, copied = [], [], []
    for number in range(_WARM_UPS + rounds):
        measuring.settle()
        copy_s = memcpy()
        started_s = time.perf_counter()
        wait = save(state)
        blocked_s = time.perf_counter() - started_s
        wait()
        if number >= _WARM_UPS:
            complete.append(time.perf_counter() - started_s)
            blocked.append(blocked_s)
            copied.append(copy_s)
    found: dict[str, Any] = {"complete_s": complete, "blocked_s": blocked, "memcpy_s": copied}
    return {**found, "size_bytes": memcpy.size_bytes}


def _restore(name: str, kind: str, size: int, path: str, rounds: int) -> dict[str, Any]:
    import torch

    state = _flat(measuring.make_state(kind, size))
    restore = _PEERS[name][1]
    with torch.no_grad():
        restore_s = measuring.quietly(lambda: restore(path, state))
    if not measuring.same(state, 5):
        sys.exit(f"{name}: restored bytes differ")
    memcpy = measuring.Memcpy(state)
    return {
        "restore_s": restore_s,
        "memcpy_s": median([memcpy() for _ in range(rounds)]),
    }


def _flat(state: _State) -> _State:
    """One level of names, which all of them take."""
    found: _State = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found.update({f"{name}.{inner}": tensor for inner, tensor in value.items()})
        else:
            found[name] = value
    return found


def _nothing() -> None:
    """A save that is complete when the call returns has nothing to wait for."""


def _torch_save(path: str) -> Callable[[_State], Callable[[], object]]:
    import torch

    def save(state: _State) -> Callable[[], object]:
        torch.save(state, f"{path}/state.pt.new")
        os.rename(f"{path}/state.pt.new", f"{path}/state.pt")
        return _nothing

    return save


def _torch_load(path: str, state: _State) -> None:
    import torch

    loaded = torch.load(f"{path}/state.pt", mmap=True, weights_only=True)
    for name, tensor in state.items():
        tensor.copy_(loaded[name])


def _safetensors_save(path: str) -> Callable[[_State], Callable[[], object]]:
    from safetensors.torch import save_file

    def save(state: _State) -> Callable[[], object]:
        save_file(state, f"{path}/state.new")
        os.rename(f"{path}/state.new", f"{path}/state.safetensors")
        return _nothing

    return save


def _safetensors_load(path: str, state: _State) -> None:
    from safetensors import safe_open

    with safe_open(f"{path}/state.safetensors", framework="pt") as file:
        for name, tensor in state.items():
            tensor.copy_(file.get_tensor(name))


def _dcp_save(path: str) -> Callable[[_State], Callable[[], object]]:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import async_save

    class Kept(DefaultStager):
        def close(self) -> None:
            """async_save closes it after each save, and the next one would fail."""

    stager = Kept(StagingOptions(False, False, False, False))

    def save(state: _State) -> Callable[[], object]:
        writer = FileSystemWriter(f"{path}/dcp", thread_count=os.cpu_count() or 1, sync_files=False)
        saved = async_save(state, storage_writer=writer, async_stager=stager, no_dist=True)
        assert isinstance(saved, Future)  # another type comes from stagers that are asynchronous
        return saved.result

    return save


def _dcp_load(path: str, state: _State) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    load(state, storage_reader=FileSystemReader(f"{path}/dcp"), no_dist=True)


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))


def _orbax_save(path: str) -> Callable[[_State], Callable[[], object]]:
    import orbax.checkpoint as ocp

    checkpointer = _orbax()
    numbers = itertools.count()

    def save(state: _State) -> Callable[[], object]:
        number = next(numbers)
        tree = {name: tensor.numpy() for name, tensor in state.items()}
        checkpointer.save(f"{path}/{number}", args=ocp.args.PyTreeSave(tree))

        def wait() -> None:
            checkpointer.wait_until_finished()
            if number:  # it never writes over an older one; whoever keeps one step deletes it
                shutil.rmtree(f"{path}/{number - 1}")

        return wait

    return save


def _orbax_load(path: str, state: _State) -> None:
    import numpy as np
    import orbax.checkpoint as ocp

    (number,) = os.listdir(path)
    wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in state}
    loaded = _orbax().restore(f"{path}/{number}", args=ocp.args.PyTreeRestore(restore_args=wanted))
    for name, tensor in state.items():
        tensor.numpy()[...] = loaded[name]


_PEERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torch.save": (_torch_save, _torch_load),
    "safetensors": (_safetensors_save, _safetensors_load),
    "DCP async": (_dcp_save, _dcp_load),
    "Orbax async": (_orbax_save, _orbax_load),
}


if __name__ == "__main__":
    main()
