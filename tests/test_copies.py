"""One save out of what several places have of it: directories that stand for nodes, real files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boxed import Boxed, boxed_arrays
from test_assembly import rows, write

from mtckpt import _delivery, _inventory, _restore
from mtckpt._boxes import whole
from mtckpt._choice import RestorePlan, plan_restore
from mtckpt._holdings import Holdings, holdings_of
from mtckpt._restore import Attempt, Place, Scope
from mtckpt._steps import list_steps
from mtckpt.adapters import active_adapters
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import NoHealthyStep, TierUnavailable
from mtckpt.tiers import LocalTier, ObjectInfo
from mtckpt.tiers.local import Lease

RANKS = 4
SHAPE = (64, 33)
ARRAY = np.random.default_rng(7).standard_normal(SHAPE)


class Watched(LocalTier):
    """A directory that counts looks into it, and may fall silent."""

    looks = 0
    silent = False

    def _looked_at(self) -> None:
        self.looks += 1
        if self.silent:
            raise TierUnavailable("no answer", tier=self.name)

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        self._looked_at()
        super().read_into(key, out, offset)

    def stat(self, key: str) -> ObjectInfo:
        self._looked_at()
        return super().stat(key)

    def lease(self, key: str, **options: Any) -> Lease:
        self._looked_at()
        return super().lease(key, **options)


class Nodes:
    """Places by label, each with some ranks' parts of the same save."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write(root / "all", {"w": (ARRAY, rows(SHAPE, RANKS))})
        self.tiers: dict[str, Watched] = {}

    def add(self, label: str, *ranks: int) -> Path:
        """The directory of the save in a place that has these ranks' files."""
        here = self.root / label
        shutil.copytree(self.root / "all", here)
        (save,) = here.glob("run/step-*")
        for path in save.glob("rank-*"):
            if int(path.name[5:10]) not in ranks:
                path.unlink()
        self.tiers[label] = Watched(here, read_only=True)
        return save

    def look(self) -> tuple[list[Holdings], dict[str, _inventory.Inventory]]:
        found = {
            label: _inventory.scan(tier, "run", label=label) for label, tier in self.tiers.items()
        }
        for tier in self.tiers.values():
            tier.looks = 0
        return [holdings_of(inventory) for inventory in found.values()], found

    def plan(self) -> RestorePlan:
        return plan_restore(self.look()[0], "latest")

    def restore(self, rank: int, state: Any, *, scanned: bool = True) -> tuple[Any, Attempt]:
        """``scanned``: this process has read the records of places of its node itself."""
        holdings, inventories = self.look()
        (candidate,) = plan_restore(holdings, "latest").candidates
        near = {label for label in self.tiers if label.partition("-")[0] in ("ram", "disk")}
        places = {
            label: Place(label, tier, mapped=label == "ram", near=label in near)
            for label, tier in self.tiers.items()
        }
        known = {label: inventories[label] for label in near if scanned}
        scope = Scope(
            "run", places, known, active_adapters(), CpuEngine(),
            lambda label, work, size_bytes=0: work(), rank,
        )  # fmt: skip
        attempt = Attempt()
        outcome = _restore.restore_from(
            candidate, scope, state, partial=False, rename=None, attempt=attempt, last=True
        )
        return outcome, attempt


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with boxed_arrays():
        yield Nodes(tmp_path)


def own(rank: int) -> dict[str, Any]:
    return {"w": Boxed(SHAPE, float, rows(SHAPE, RANKS)[rank])}


def everything() -> dict[str, Any]:
    return {"w": Boxed(SHAPE, float, [box for (box,) in rows(SHAPE, RANKS)])}


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("scanned", [True, False])
def test_ranks_that_are_partly_in_ram_and_partly_on_disk(nodes: Nodes, scanned: bool) -> None:
    ram, disk = nodes.add("ram", 0, 1, 2), nodes.add("disk", 1, 2, 3)
    flip(ram / "rank-00001.safetensors")
    (disk / "rank-00002.json").write_bytes(b"{}")
    (ram / "rank-00002.xxh3").write_bytes(b"")
    with pytest.raises(NoHealthyStep, match="ram: digest table has another size"):
        nodes.restore(0, everything(), scanned=scanned)
    (step,) = list_steps(nodes.look()[1].values())
    assert (step.tiers, step.stages) == (("ram", "disk"), ("staged",))
    assert step.size_bytes == nodes.plan().candidates[0].size_bytes
    flip(ram / "rank-00002.json")
    assert not list_steps(nodes.look()[1].values())[0].tiers
    assert not nodes.plan().candidates
    assert nodes.plan().lost
    for name in ("rank-00002.json", "rank-00002.xxh3"):
        (source,) = nodes.root.glob(f"all/run/step-*/{name}")
        shutil.copy(source, ram)
    state = everything()
    outcome, attempt = nodes.restore(0, state, scanned=scanned)
    assert state["w"].equals(ARRAY)
    assert set(outcome.sources) == {"ram", "disk"}
    assert outcome.sources["ram"] == outcome.sources["disk"] == ARRAY.nbytes // 2
    assert {(label, key[-22:]) for label, key, _ in attempt.bad} == {
        ("ram", "rank-00001.safetensors")
    }


def test_a_tier_of_which_each_node_has_its_own_is_one_tier(nodes: Nodes) -> None:
    nodes.add("ram", 0, 1)
    nodes.add("ram-2", 2, 3)
    nodes.add("disk", 0, 1, 2)
    inventories = nodes.look()[1]
    inventories["ram-2"].tier = "ram"
    merged = _inventory.merged(inventories.values())
    assert [inventory.tier for inventory in merged] == ["ram", "disk"]
    (step,) = list_steps(merged)
    assert (step.tiers, step.stages) == (("ram",), ("staged",))


def test_only_what_this_node_lacks_is_read_from_peers(nodes: Nodes) -> None:
    nodes.add("ram", 0, 1)
    nodes.add("peers-b", 2, 3)
    nodes.add("store", 0, 1, 2, 3)
    for rank in (0, 1):
        state = own(rank)
        outcome, _ = nodes.restore(rank, state)
        assert state["w"].equals(ARRAY)
        assert outcome.sources == {"ram": ARRAY.nbytes // RANKS}
        assert nodes.tiers["peers-b"].looks == nodes.tiers["store"].looks == 0
    for rank in (2, 3):
        state = own(rank)
        outcome, _ = nodes.restore(rank, state)
        assert state["w"].equals(ARRAY)
        assert outcome.sources == {"peers-b": ARRAY.nbytes // RANKS}
        assert nodes.tiers["store"].looks == 0
        assert nodes.tiers["ram"].looks == 0
    state = everything()
    outcome, _ = nodes.restore(0, state)
    assert state["w"].equals(ARRAY)
    assert outcome.sources == {"ram": ARRAY.nbytes // 2, "peers-b": ARRAY.nbytes // 2}
    assert nodes.tiers["store"].looks == 0


@pytest.mark.parametrize("cheap_bytes", [0, 1 << 30], ids=["checked while placed", "staged"])
def test_what_memory_has_damaged_alone_comes_from_far_away(
    nodes: Nodes, cheap_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the only step: what is sound in memory is placed from there, once the rest is here."""
    monkeypatch.setattr(_delivery, "_CHEAP_BYTES", cheap_bytes)
    flip(nodes.add("ram", 0, 1, 2, 3) / "rank-00001.safetensors")
    nodes.add("peers-b", 0, 1, 2, 3)
    state = everything()
    outcome, _ = nodes.restore(1, state)
    assert state["w"].equals(ARRAY)
    quarter = ARRAY.nbytes // RANKS
    assert outcome.sources == {"ram": 3 * quarter, "peers-b": quarter}
    more = np.random.default_rng(1).standard_normal((20, 9))
    for label in ("all", "ram", "peers-b"):
        shutil.rmtree(nodes.root / label)
    write(nodes.root / "all", {"w": (ARRAY, [[whole(SHAPE)]]), "z": (more, [[whole((20, 9))]])})
    flip(nodes.add("ram", 0) / "rank-00000.safetensors")
    far = nodes.add("peers-b", 0)
    state = {"w": Boxed(SHAPE, float, [whole(SHAPE)]), "z": Boxed((20, 9), float, [whole((20, 9))])}
    outcome, _ = nodes.restore(0, state)
    assert state["w"].equals(ARRAY)
    assert state["z"].equals(more)
    assert set(outcome.sources) == {"ram", "peers-b"}
    flip(far / "rank-00000.safetensors")
    state = {"w": Boxed(SHAPE, float, [whole(SHAPE)]), "z": Boxed((20, 9), float, [whole((20, 9))])}
    with pytest.raises(NoHealthyStep):
        nodes.restore(0, state)
    assert not any(array.any() for boxed in state.values() for array in boxed.arrays)


@pytest.mark.parametrize("harm", ["flip", "record", "silent"])
def test_what_a_peer_cannot_give_comes_from_the_next(nodes: Nodes, harm: str) -> None:
    nodes.add("ram", 0, 1)
    bad = nodes.add("peers-b", 2, 3)
    nodes.add("peers-c", 2)
    nodes.add("store", 0, 1, 2, 3)
    look: Callable[[], Any] = nodes.look

    def then() -> Any:
        found = look()
        if harm == "flip":
            flip(bad / "rank-00002.safetensors")
        elif harm == "record":
            (bad / "rank-00002.json").write_bytes(b"")
        nodes.tiers["peers-b"].silent = harm == "silent"
        return found

    nodes.look = then  # type: ignore[method-assign]  # the fault comes after the look
    state = everything()
    outcome, attempt = nodes.restore(0, state)
    assert state["w"].equals(ARRAY)
    quarter = ARRAY.nbytes // RANKS
    last = {"store": quarter} if harm == "silent" else {"peers-b": quarter}
    assert outcome.sources == {"ram": 2 * quarter, "peers-c": quarter, **last}
    if harm == "silent":
        assert attempt.silent == {"peers-b": "no answer"}
        assert not attempt.bad
        assert nodes.tiers["peers-b"].looks == 1  # not asked again for another shard
    else:
        assert [label for label, _, _ in attempt.bad] == ["peers-b"]
        assert not attempt.silent


def test_a_shard_that_nobody_gives_is_named(nodes: Nodes) -> None:
    nodes.add("ram", 0, 1, 2)
    flip(nodes.add("peers-b", 3) / "rank-00003.safetensors")
    state = everything()
    with pytest.raises(NoHealthyStep, match="peers-b: 1 tensors differ from their digests"):
        nodes.restore(0, state)
    assert not state["w"].arrays[0].any()  # the sound ones were not placed before it was known
