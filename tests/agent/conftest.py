"""Trainers by hand, in processes of their own and in this one, with an agent for the test alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeTrainer, TrainerProcess
from shard_maker import Shard, make_shard

from mtckpt.agent import work
from mtckpt.agent.protocol import TierConfig


@pytest.fixture
def trainers(runtime_dir: Path, ram_dir: Path) -> Iterator[Callable[..., TrainerProcess]]:
    started: list[TrainerProcess] = []

    def start(run: str = "r", tiers: list[TierConfig] | None = None, **options: Any) -> Any:
        started.append(TrainerProcess(run, tiers, **options))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()


@pytest.fixture
def own(runtime_dir: Path, ram_dir: Path) -> Iterator[Callable[..., FakeTrainer]]:
    """Trainers in this process."""
    made: list[FakeTrainer] = []

    def make(*arguments: Any, **options: Any) -> FakeTrainer:
        made.append(FakeTrainer(*arguments, **options))
        return made[-1]

    yield make
    for trainer in made:
        trainer.client.close()


@pytest.fixture
def ram(ram_dir: Path) -> work.TierRef:
    return work.TierRef("ram", str(ram_dir / "root"))


@pytest.fixture
def disk(tmp_path: Path) -> work.TierRef:
    return work.TierRef("disk", str(tmp_path / "disk"), label="disk-2")


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return make_shard(tmp_path)
