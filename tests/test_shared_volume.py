"""Containers with one volume and no memory for slots: a job ends, and starts in fewer of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _isolation
import pytest
from node_scene import Cluster, Node

from mtckpt._slots import BESIDE

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Containers that all see one volume."""
    nodes = [Node(tmp_path, name) for name in "ab"]
    for node in nodes:
        node.disk = tmp_path / "disk"
    yield nodes
    for node in nodes:
        _isolation.sweep(node.places)


def test_a_container_that_stays_has_what_the_other_left(nodes: list[Node], tmp_path: Path) -> None:
    stays, ends = nodes
    settings: dict[str, Any] = {"ram": str(stays.disk / BESIDE), "every": 100}
    job = Cluster(tmp_path, nodes)
    try:
        job.start(**settings)
        job.save(1)
        job.save(2)
        for rank in job.ranks:
            rank.kill()
        _isolation.end_all(ends.places.runtime)
        job.nodes = [stays]
        job.start(2, **settings)
        for step, sources in job.all("restore"):
            assert (step, set(sources)) == (2, {"ram"})
        job.save(3)
        assert job.all("close") == [None, None]
        assert stays.steps_on_disk() == {3: [0, 1]}
    finally:
        job.close()
