"""What becomes of a save whose slot is not to be had, or not yet to be used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import mtckpt
from mtckpt import _save
from mtckpt._handle import Save
from mtckpt._saver import Saver
from mtckpt._shard import ShardLayout
from mtckpt.agent.protocol import SlotGrant
from mtckpt.errors import TierUnavailable

GRANT = SlotGrant("slot", 7, "/disk/d", "/disk/t", "/disk/r")


@pytest.mark.timeout(60)
def test_a_slot_that_is_being_mapped_is_named_to_an_agent_that_starts_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which would give it to another rank, and two would write to it."""
    named: list[bool] = []

    class Mapped(_save.HeldSlot):
        def __init__(self, grant: SlotGrant, layout: ShardLayout) -> None:
            named.append(c._session._held().get(grant.slot_id) == grant.inode)
            super().__init__(grant, layout)

    monkeypatch.setattr(_save, "HeldSlot", Mapped)
    with mtckpt.Checkpointer("r", [mtckpt.Ram(every=1)], timeout_s=20) as c:
        for step in (1, 2):
            c.save(step, {"w": np.ones(10)}).wait("staged", timeout_s=20)
            assert c._session.wait_idle(20)
    assert len(named) > 1
    assert all(named)


def hangs(*_: Any) -> Any:
    raise TierUnavailable("/disk does not answer", tier="ram")


def saver_of(told: list[str]) -> Any:
    """As much of one as becomes of a slot."""
    session = SimpleNamespace(wait_idle=lambda _: True, next_slot=GRANT)
    return SimpleNamespace(
        ring=SimpleNamespace(fits=lambda *_: True),
        steps={3},
        _session=session,
        _followed=hangs,
        _take_back=lambda *_: None,
        _call_off=lambda _, why: told.append(why),
    )


def test_a_save_is_called_off_where_the_disk_that_slots_have_moved_to_hangs() -> None:
    told: list[str] = []
    assert Saver._slot(saver_of(told), cast(Any, None), Save(3), 0.0) is None
    assert told == ["/disk does not answer"]


def test_a_save_that_leaves_a_device_is_called_off_where_its_slot_hangs() -> None:
    """As one is that is captured at once: training goes on."""
    told: list[str] = []
    writing = cast(Any, SimpleNamespace(finish=hangs))
    saver = saver_of(told)
    assert Saver._finish(saver, writing, Save(3), GRANT) is None
    assert told == ["/disk does not answer"]
    assert not saver.steps


def test_ctrl_c_once_slots_have_moved_to_the_disk_costs_one_save() -> None:
    """Else memory would count as full for each one after it, and no place as left."""
    moved: list[object] = []

    def move(error: object) -> None:
        moved.append(error)
        raise KeyboardInterrupt

    run = SimpleNamespace(short=(100, 10), members=SimpleNamespace(node=(0,)))
    saver: Any = saver_of([])
    saver.run, saver._insists, saver._disk_path, saver._move_slots = run, False, lambda: "/d", move
    saver._session.open = lambda: SimpleNamespace(ram_root="/memory")
    with pytest.raises(KeyboardInterrupt):
        Saver._move_if_short(saver)
    Saver._move_if_short(saver)
    assert len(moved) == 1
