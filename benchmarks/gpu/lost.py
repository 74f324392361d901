"""Training time lost per save: the extra wall time of a loop that saves over the same one without.

Blocks of the same number of steps come in pairs, one of them with a save in it, in alternating
order; a block is long enough for all that a save sets off to be over. The state is then saved
once more, trained on at once, restored and compared with copies that were taken at the call.
DCP is measured in its best configuration: pinned memory that is kept over all saves.
"""

from __future__ import annotations

import itertools
import os
import shutil
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.gpu.bench import Bench, Skipped, bits_of, opened, ram, saved, size_of
from benchmarks.gpu.model import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    import mtckpt

_STEPS = 20
_AT = 4
_WARM_UPS = 4
_GOALS = {"": "value <= 0.008", "snapshot-overlap": "value <= 0.004", "overlap": ""}
_DCP_STEPS = 80  # its threads are at work for seconds after the call


def measure(bench: Bench) -> None:
    trainer = Trainer(bench, bench.size_mib(), layers=10 if bench.on_gpu else 2)
    for _ in range(5):
        trainer.step()
    for capture, goal in _GOALS.items():
        name = f"training time lost{', ' if capture else ''}{capture}"
        bench.attempt(name, _mtckpt, bench, trainer, name, capture, goal, needs_s=5)
    bench.attempt(
        "training time lost, DCP async", _dcp, bench, trainer, needs_s=15 if bench.on_gpu else 1
    )


def _mtckpt(bench: Bench, trainer: Trainer, name: str, capture: str, goal: str) -> None:
    steps = itertools.count(1)
    last: list[mtckpt.Save] = []

    with opened(ram(capture)) as checkpointer:

        def save() -> None:
            last[:] = [saved(checkpointer, next(steps), trainer.state())]

        def settle() -> None:
            for one in last:
                one.wait("staged", timeout_s=60)

        for _ in range(_WARM_UPS):
            save()
            trainer.step()
            settle()
            measuring.settle()
        steps_a_block = _STEPS if bench.on_gpu else _AT + 1
        lost, blocked, step_s = _pairs(bench, trainer, save, settle, bench.rounds, steps_a_block)
        _verify(checkpointer, trainer, next(steps))
    facts = {"size_bytes": size_of(trainer.tensors()), "tensors": len(trainer.tensors())}
    bench.row(name, lost, goal=goal, step_s=round(step_s, 5), **facts)
    bench.row(f"{name}: save() blocks", blocked)


def _pairs(
    bench: Bench,
    trainer: Trainer,
    save: Callable[[], None],
    settle: Callable[[], None],
    pairs: int,
    steps: int,
) -> tuple[list[float], list[float], float]:
    """What each save cost, how long each call took, and the time of a step without one."""
    lost: list[float] = []
    blocked: list[float] = []
    plain: list[float] = []
    for pair in range(pairs):
        took = {}
        for saving in (pair % 2 == 0, pair % 2 == 1):
            settle()
            bench.sync()
            took[saving] = measuring.quietly(
                partial(_block, bench, trainer, save if saving else None, blocked, steps)
            )
        lost.append(took[True] - took[False])
        plain.append(took[False] / steps)
        if bench.left_s() < 2.5 * sum(took.values()):
            break
    settle()
    return lost, blocked, median(plain)


def _block(
    bench: Bench,
    trainer: Trainer,
    save: Callable[[], None] | None,
    blocked: list[float],
    steps: int,
) -> None:
    for number in range(steps):
        trainer.step()
        if save is not None and number == _AT:
            blocked.append(measuring.quietly(save))
    bench.sync()


def _verify(checkpointer: mtckpt.Checkpointer, trainer: Trainer, step: int) -> None:
    wanted = bits_of(trainer.tensors())
    save = saved(checkpointer, step, trainer.state())
    trainer.step()
    trainer.step()
    save.wait("staged", timeout_s=60)
    checkpointer.restore(trainer.state(), step=step)
    found = bits_of(trainer.tensors())
    if wrong := [name for name in wanted if not wanted[name].equal(found[name])]:
        raise RuntimeError(f"{len(wrong)} tensors came back with other bits: {wrong[:3]}")


def _dcp(bench: Bench, trainer: Trainer) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.staging import BlockingAsyncStager
    from torch.distributed.checkpoint.state_dict_saver import async_save

    if not bench.on_gpu:
        raise Skipped("the stager keeps pinned memory, which wants a GPU")
    ram_dir = os.environ["MTCKPT_RAM_DIR"]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{ram_dir}/group", rank=0, world_size=1)
    state = trainer.tensors()
    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    running: list[Any] = []

    def settle() -> None:
        while running:
            running.pop().result()

    def save() -> None:
        path = f"{ram_dir}/dcp"
        shutil.rmtree(path, ignore_errors=True)
        started: Any = async_save(state, checkpoint_id=path, async_stager=stager)
        running.append(getattr(started, "upload_completion", started))

    try:
        save()  # pins its memory
        settle()
        pairs = min(3, bench.rounds)
        lost, blocked, step_s = _pairs(bench, trainer, save, settle, pairs, _DCP_STEPS)
    finally:
        dist.destroy_process_group()
        shutil.rmtree(f"{ram_dir}/dcp", ignore_errors=True)
    bench.row("training time lost, DCP async", lost, step_s=round(step_s, 5))
    bench.row("training time lost, DCP async: call blocks", blocked)
