"""A CUDA device: state captured into a slot, sealed; the process is killed; a fresh one restores.

Prints one JSON line with the times and exits 0, or says ``skipped: no GPU`` and exits 0. The bytes
are compared on the host. It shows that the path works, not how fast it can be.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from typing import Any

from benchmarks import measuring


def main() -> None:
    chosen = measuring.options(__doc__, size_mib=256, role="")
    import torch

    if not torch.cuda.is_available():
        print("skipped: no GPU")
        return
    if chosen.role:
        {"save": _save, "restore": _restore}[chosen.role](chosen.size_mib)
        return
    with measuring.places():
        size = f"--size-mib={chosen.size_mib}"
        saved = measuring.child("benchmarks.gpu.smoke", "--role=save", size, check=False)
        restored = measuring.child("benchmarks.gpu.smoke", "--role=restore", size)
    found: dict[str, Any] = {"figure": "gpu smoke", "device": torch.cuda.get_device_name()}
    for out in (saved, restored):
        found.update(json.loads(out.splitlines()[-1]))
    print(json.dumps({**found, "machine": measuring.machine(), "versions": measuring.versions()}))


def _on_device(size_mib: int, salt: int | None) -> dict[str, Any]:
    host = measuring.gpt_state(size_mib)
    if salt is not None:
        measuring.fill(host, salt)
    return {
        part: {name: tensor.cuda() for name, tensor in tensors.items()}
        for part, tensors in host.items()
    }


def _save(size_mib: int) -> None:
    import mtckpt

    state = _on_device(size_mib, 9)
    checkpointer = mtckpt.Checkpointer("smoke", [mtckpt.Ram(every=1)], max_stall_s=60)

    def save(step: int) -> None:
        checkpointer.save(step, state).wait("staged")

    took = []
    for step in range(1, 5):
        took.append(measuring.quietly(partial(save, step)))
        measuring.settle()
    size_bytes = sum(tensor.nbytes for tensor in measuring.tensors_of(state))
    print(json.dumps({"staged_s": took[-1], "size_bytes": size_bytes}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _restore(size_mib: int) -> None:
    state = _on_device(size_mib, None)
    import mtckpt

    started_s = time.perf_counter()
    checkpointer = mtckpt.Checkpointer("smoke", [mtckpt.Ram(every=1)], max_stall_s=60)
    restored = checkpointer.restore(state)
    took_s = time.perf_counter() - started_s
    host = {
        part: {name: tensor.cpu() for name, tensor in tensors.items()}
        for part, tensors in state.items()
    }
    if restored.step != 4 or not measuring.same(host, 9):
        sys.exit(f"{restored!r}: the restored bytes differ")
    print(json.dumps({"restored_s": took_s}), flush=True)
    checkpointer.close()


if __name__ == "__main__":
    main()
