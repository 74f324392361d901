"""Others on the same device and tmpfs, each in a process of its own and bounded in time.

torch.save: the zip format; ``torch.load`` onto the device, then copied. DCP: synchronous; its
asynchronous save as it comes; with pinned memory kept over all saves; with its newer stager, pinned
and on a stream of its own. torch_checkpointing and NVRx as they come, where they can be imported.
The call, until complete, and the restore into tensors on the device in the same process, which
spares the peers what a fresh process costs. Bits that differ after the restore are an error.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.gpu.bench import (
    Bench,
    Skipped,
    differing,
    make_state,
    options,
    scramble,
    show,
    size_of,
)

if TYPE_CHECKING:
    import torch

_State = dict[str, Any]
_Save = Callable[[_State], Callable[[], object]]
_Restore = Callable[[_State], object]
_SEED = 5
_LIMIT_S = 90.0


def measure(bench: Bench) -> None:
    for name in PEERS:
        bench.attempt(name, _in_a_process, bench, name, needs_s=15)


def _in_a_process(bench: Bench, name: str) -> None:
    path = os.pathsep.join(filter(None, (str(measuring.ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.gpu.peers", *bench.arguments(), f"--role={name}"]
    try:
        done = subprocess.run(
            command,
            cwd=measuring.ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            timeout=min(_LIMIT_S, bench.left_s()),
        )
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"not done after {error.timeout:.0f} s") from error
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        show(json.loads(row))
    if not rows:
        raise RuntimeError(f"status {done.returncode}, no row")


def main() -> None:
    bench = options(__doc__)
    if bench is None:
        return
    name = bench.chosen.role
    if not name:
        with measuring.places():
            measure(bench)
        return
    bench.attempt(name, _peer, bench, name)
    sys.stdout.flush()
    os._exit(0)  # threads and processes of theirs may wait for one another


def _peer(bench: Bench, name: str) -> None:
    directory = f"{os.environ['MTCKPT_RAM_DIR']}/peer"
    os.makedirs(directory, exist_ok=True)
    state: _State = make_state(bench.size_mib(), bench.device)
    blocked, complete, restored = [], [], []
    try:
        save, restore = PEERS[name](bench, directory)
        for number in range(1 + max(1, min(2, bench.rounds))):
            scramble(state, _SEED)
            bench.sync()
            started_s = time.perf_counter()
            wait = save(state)
            blocked_s = time.perf_counter() - started_s
            wait()
            complete_s = time.perf_counter() - started_s
            if number:  # the first one allocates what they keep
                blocked.append(blocked_s)
                complete.append(complete_s)
        scramble(state, _SEED + 1)
        bench.sync()
        started_s = time.perf_counter()
        restore(state)
        bench.sync()
        restored.append(time.perf_counter() - started_s)
        if wrong := differing(state, _SEED):
            raise RuntimeError(f"{len(wrong)} tensors came back with other bits: {wrong[:3]}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    facts = {"size_bytes": size_of(state)}
    bench.row(f"{name}: call blocks", blocked, **facts)
    bench.row(f"{name}: complete in tmpfs", complete, **facts)
    bench.row(f"{name}: restored", restored, **facts)


# -- the peers -------------------------------------------------------------------------------------


def _nothing() -> None:
    """A save that is complete when the call returns has nothing to wait for."""


def _torch_save(bench: Bench, directory: str) -> tuple[_Save, _Restore]:
    import torch

    path = f"{directory}/state.pt"

    def save(state: _State) -> Callable[[], object]:
        torch.save(state, path)
        return _nothing

    def restore(state: _State) -> None:
        _take(state, torch.load(path, map_location=bench.device, weights_only=True))

    return save, restore


def _take(state: _State, loaded: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        tensor.copy_(loaded[name])


def _group(directory: str) -> None:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/group", rank=0, world_size=1
        )


def _dcp_restore(directory: str) -> _Restore:
    from torch.distributed.checkpoint.state_dict_loader import load

    return lambda state: load(state, checkpoint_id=f"{directory}/dcp")


def _dcp(bench: Bench, directory: str) -> tuple[_Save, _Restore]:
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    _group(directory)

    def save(state: _State) -> Callable[[], object]:
        shutil.rmtree(f"{directory}/dcp", ignore_errors=True)
        dcp_save(state, checkpoint_id=f"{directory}/dcp")
        return _nothing

    return save, _dcp_restore(directory)


def _dcp_async_by(directory: str, make_stager: Callable[[], Any]) -> tuple[_Save, _Restore]:
    from torch.distributed.checkpoint.state_dict_saver import async_save

    _group(directory)
    stager = make_stager()
    settings: Any = {} if stager is None else {"async_stager": stager}

    def save(state: _State) -> Callable[[], object]:
        shutil.rmtree(f"{directory}/dcp", ignore_errors=True)
        saved: Any = async_save(state, checkpoint_id=f"{directory}/dcp", **settings)
        completion: Any = getattr(saved, "upload_completion", saved)
        return lambda: completion.result()

    return save, _dcp_restore(directory)


def _dcp_async(bench: Bench, directory: str) -> tuple[_Save, _Restore]:
    return _dcp_async_by(directory, lambda: None)


def _dcp_async_pinned(bench: Bench, directory: str) -> tuple[_Save, _Restore]:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    _wants_gpu(bench)
    return _dcp_async_by(directory, lambda: BlockingAsyncStager(cache_staged_state_dict=True))


def _dcp_async_stream(bench: Bench, directory: str) -> tuple[_Save, _Restore]:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    class Kept(DefaultStager):
        def close(self) -> None:
            """async_save closes it after each save, and the next one would fail."""

    _wants_gpu(bench)
    return _dcp_async_by(directory, lambda: Kept(StagingOptions(True, False, True, True)))


def _wants_gpu(bench: Bench) -> None:
    if not bench.on_gpu:
        raise Skipped("pinned memory wants a GPU")


def _torch_checkpointing(bench: Bench, directory: str) -> tuple[_Save, _Restore]:
    _wants_gpu(bench)
    manager = _imported("torch_checkpointing").CheckpointManager()
    numbers = itertools.count()
    newest: list[str] = []

    def save(state: _State) -> Callable[[], object]:
        newest[:] = [f"{directory}/{next(numbers)}"]
        written = manager.save(newest[0], state)
        return _nothing if written is None else lambda: written.result(timeout=_LIMIT_S)

    def restore(state: _State) -> None:
        manager.load(newest[0], into=state)

    return save, restore


def _nvrx(bench: Bench, directory: str) -> tuple[_Save, _Restore]:
    import torch

    _wants_gpu(bench)
    _group(directory)
    module = _imported("nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt")
    checkpointer = module.TorchAsyncCheckpoint()
    path = f"{directory}/state.pt"

    def save(state: _State) -> Callable[[], object]:
        checkpointer.async_save(state, path)
        return lambda: checkpointer.finalize_async_save(blocking=True)

    def restore(state: _State) -> None:
        _take(state, torch.load(path, map_location=bench.device, weights_only=True))

    return save, restore


def _imported(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise Skipped(f"{name} cannot be imported: {error}") from error


PEERS: dict[str, Callable[[Bench, str], tuple[_Save, _Restore]]] = {
    "DCP async, pinned and kept": _dcp_async_pinned,
    "DCP async, pinned, own stream": _dcp_async_stream,
    "DCP async": _dcp_async,
    "DCP": _dcp,
    "torch.save": _torch_save,
    "torch_checkpointing": _torch_checkpointing,
    "NVRx": _nvrx,
}


if __name__ == "__main__":
    main()
