"""What the rules of a tier let go, where it cannot go yet, and where many say that it may."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtckpt._events import EventStream
from mtckpt._manifest import SaveName
from mtckpt.agent import keeping, work
from mtckpt.agent.keeping import Keeper
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.queue import Limits
from mtckpt.agent.ring import Ring
from mtckpt.agent.runs import RunState
from mtckpt.agent.saves import RAM, SaveState, TierState
from mtckpt.agent.tools import Tools
from mtckpt.errors import AccessDenied


def test_a_store_that_denies_is_not_asked_whenever_another_node_says_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thousand nodes speak of every save. It is asked again after a while, also if the first of
    them was how it came to be known that it denies."""
    asked: list[str] = []
    denies = True

    async def call(command: work.Command, **_: Any) -> work.Result:
        await asyncio.sleep(0)
        asked.append(type(command).__name__)
        if denies:
            raise AccessDenied("no right to delete", tier="store")
        run.saves[str(name)].ranks.pop("store", None)
        return work.Deleted()

    async def story() -> None:
        nonlocal denies
        for _ in range(20):
            keeper.look_again(run, tier)
            await asyncio.sleep(0)
        while not tier.denied or tier.again is None:  # noqa: ASYNC110 - it is set by a task
            await asyncio.sleep(0)
        keeper.look_again(run, tier)
        assert len(asked) <= 2  # one that waited as well
        denies = False
        await tier.again
        assert not tier.denied
        assert not run.saves[str(name)].ranks
        # While it waits nothing can go any more; later something can again.
        denies, run.saves[str(name)].ranks["store"] = True, {0}
        keeper.look_again(run, tier)
        while not tier.denied:  # noqa: ASYNC110 - it is set by a task
            await asyncio.sleep(0)
        run.saves[str(name)].ranks.pop("store")
        await asyncio.sleep(0)
        await tier.again
        denies, run.saves[str(name)].ranks["store"] = False, {0}
        keeper.look_again(run, tier)
        while run.saves[str(name)].ranks:  # noqa: ASYNC110 - a task ends it
            await asyncio.sleep(0.01)

    name = SaveName(1, 1, "0" * 12)
    run = RunState("r", "r", work.TierRef("ram", "/nowhere", label=RAM))
    run.saves[str(name)] = SaveState(name, "", ranks={"store": {0}})
    config, ref = TierConfig("store", "store", "s3://b"), work.TierRef("store", "s3://b")
    tier = run.tiers["store"] = TierState("store", config, ref, scanned=True)
    tools = Tools(cast(Any, SimpleNamespace(call=call)), Limits(delete_grace_s=0.01), EventStream())
    lets_go = SimpleNamespace(
        not_kept=lambda *_: [n for n, save in run.saves.items() if "store" in save.ranks]
    )
    keeper = Keeper(tools, Ring(tools), cast(Any, lets_go))
    monkeypatch.setattr(keeping, "DENIED_PAUSE_S", 0.05)
    asyncio.run(story())
