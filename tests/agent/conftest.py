"""Trainers by hand, in processes of their own and in this one, with an agent for the test alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_trainer import FakeTrainer, TrainerProcess

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
