"""Agents are fresh programs here: they are killed while they start, and looked at from outside."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def started_as_by_users(fresh_agents: None) -> None:
    """See ``tests/warm_agents.py``."""
