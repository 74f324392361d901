"""What the start of a job on one node takes from what an earlier start left there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._events import EventStream
from mtckpt.agent import work
from mtckpt.agent.owners import Owner
from mtckpt.agent.protocol import Begin
from mtckpt.agent.queue import Limits
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM
from mtckpt.agent.tools import Tools
from mtckpt.agent.verbs import Verbs

ID = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"


class Registry:
    """As much of the agent as a start needs; ``left``: other nodes are spoken to no more."""

    def __init__(self) -> None:
        self.tools = Tools(cast(Any, self), Limits(), EventStream())
        self.ring = None
        self.peers = SimpleNamespace(verbs={})
        self.left = False
        self.links = SimpleNamespace(leave=self._leave)
        self.agreement = SimpleNamespace(begun=self._nothing)
        self.wait_scanned = self.write_config = self._nothing

    def _leave(self, _: RunState) -> None:
        self.left = True

    async def _nothing(self, *_: Any) -> None:
        """Every tier has answered; nothing is written."""

    async def call(self, command: work.Command, **_: Any) -> work.Stored:
        assert isinstance(command, work.PutSmall)
        return work.Stored()


@pytest.mark.parametrize(
    ("incarnation", "dead", "left"),
    [
        (0, False, True),  # it is about to begin as well: both are here
        (2, False, True),
        (1, False, False),  # nobody's rank: its launcher was killed, and it lives on
        (0, True, False),
    ],
)
def test_a_process_that_an_earlier_start_left_behind_is_no_rank_of_this_one(
    incarnation: int, dead: bool, left: bool
) -> None:
    """Two ranks, and rank 1 on another node now; where it was before, its old process still is."""
    registry = Registry()
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    run.owners[0] = Owner("new", 0, 1, 1, 1, "host", world_size=2)
    run.owners[1] = Owner("other", 1, 2, 2, 2, "host", world_size=2, incarnation=incarnation)
    run.owners[1].dead = dead
    verbs = Verbs(cast(Any, registry))
    asyncio.run(verbs.begin(run, Begin("new", 2, ID)))
    assert registry.left is left
