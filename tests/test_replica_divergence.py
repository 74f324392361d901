"""What ranks hold alike is compared once all have stored it: one flipped bit is named."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from agent_checks import until
from click.testing import CliRunner
from node_scene import Cluster, Node
from node_worker import SIZE

from mtckpt import _inventory, _twins
from mtckpt._manifest import ArrayEntry, Record, ShardEntry
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.cli import main
from mtckpt.errors import CheckpointError
from mtckpt.tiers import LocalTier

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes with a rank each."""
    made = Cluster(tmp_path, [Node(tmp_path, name) for name in "abc"])
    made.start()
    yield made
    made.close()


def save(job: Cluster, step: int, flipped: int | None = None) -> None:
    """On all ranks; ``flipped`` has one bit of the replicated array wrong."""
    for number, rank in enumerate(job.ranks):
        rank.tell("save" if number != flipped else "save_flipped", step)
    assert [rank.answer() for rank in job.ranks] == [""] * len(job.ranks)
    assert all("local" in reached for reached in job.all("wait", step, "local"))


def of_all_nodes(job: Cluster, into: Path) -> Path:
    """One directory with what the disks of all nodes have."""
    for node in job.nodes:
        shutil.copytree(node.disk, into, dirs_exist_ok=True)
    return into / "run"


def records_of(run: Path, step: int) -> dict[int, Record]:
    found = _inventory.scan(LocalTier(run.parent, read_only=True), "run").saves
    return next(dict(each.records) for name, each in found.items() if name.step == step)


def test_one_flipped_bit_of_a_replica_is_told_and_kept_in_mind(
    job: Cluster, tmp_path: Path
) -> None:
    lead = job.nodes[0]
    save(job, 1)
    for step in (2, 3, 4):
        save(job, step, flipped=2)
        until(lambda: lead.status().counters.get("diverged", 0) == step - 1)  # noqa: B023
    log = (lead.places.runtime / "agent.log").read_text()
    for step in (2, 3, 4):
        assert f"step {step}: copies of shared differ: those of ranks 0, 1 and of rank 2" in log
    assert "step 1: copies" not in log
    with AgentClient(str(lead.places.runtime / protocol.SOCKET_NAME), 20.0) as client:
        assert "replicas_diverged_total 3" in client.text("/metrics")
    # Two are kept by the rule, and the newest that nobody doubts, on every node.
    for node in job.nodes:
        until(lambda: node.steps_on_disk().keys() == {1, 3, 4})  # noqa: B023
    for node in job.nodes:
        node.kill_agent()
    save(job, 5, flipped=1)
    for node in job.nodes:
        until(lambda: node.steps_on_disk().keys() == {1, 4, 5})  # noqa: B023
    save(job, 6)
    save(job, 7)
    for node in job.nodes:
        until(lambda: len(list(node.disk.glob("run/step-*"))) == 2)  # noqa: B023
    save(job, 8, flipped=0)
    for node in job.nodes:
        until(lambda: len(list(node.disk.glob("run/step-*"))) == 2)  # noqa: B023
    run = of_all_nodes(job, tmp_path / "all")
    for step, differ in ((8, ["shared"]), (7, [])):
        shown = CliRunner().invoke(main, ["show", str(run), "--step", str(step), "--json"])
        told = json.loads(shown.output)["divergences"]
        assert [each["leaf"] for each in told] == differ
        assert [each["ranks"] for each in told] == [[0, 1, 2]] * len(differ)
        shown = CliRunner().invoke(main, ["show", str(run), "--step", str(step)])
        line = "ReplicaDivergence: copies of shared differ: those of rank 0 and of ranks 1, 2"
        assert (line in shown.output) == bool(differ)
    assert_only_what_is_alike_is_compared(records_of(run, 8))


def assert_only_what_is_alike_is_compared(records: dict[int, Record]) -> None:
    twins = [_twins.twins_of(record) for record in records.values()]
    (boxes,) = set().union(*twins)
    assert {path for path, _ in _twins.roots_of(records[0], boxes)} == {"shared"}
    assert len({each[boxes] for each in twins}) == 2
    # An inventory has a line a shard; so has this.
    assert len(msgspec.json.encode(twins[0])) < 64
    # Of another cut there is nothing to compare, and that is no difference.
    assert _twins.roots_of(records[0], "0" * 16) == []
    assert _twins.divergences({1: records[1], 2: records[2]}) == []
    assert records[0].shard.size_bytes > SIZE * 8


def test_a_record_that_lies_is_an_error() -> None:
    def record(dtype: str, roots: bytes, path: str = "w") -> Record:
        entry = ArrayEntry(path, dtype, (2, 2), "numpy", (0, 0), (2, 2), alike="12345678")
        arrays, none = msgspec.Raw(msgspec.json.encode([entry])), msgspec.Raw(b"[]")
        shard = ShardEntry(1, 0, "", "", 1)
        id_ = "6ba7b810-9dad-51d1-80b4-00c04fd430c8"
        text = base64.b64encode(roots).decode()
        return Record(1, "r", 1, 1, id_, id_, 0, 2, "", shard, text, arrays, none, none)

    assert len(_twins.twins_of(record("int8", bytes(16)))) == 1
    for lie in (record("int9", bytes(16)), record("int8", bytes(8)), record("int8", b"", "\0")):
        with pytest.raises(CheckpointError):
            _twins.twins_of(lie)


def test_copies_are_grouped_by_what_they_are() -> None:
    held = [((0, 4), [("a", "x"), ("b", "y")]), ((1,), [("a", "x"), ("b", "z")])]
    (found,) = _twins.compare([*held, ((2, 3), [])])
    assert found == _twins.Divergence("b", ((0, 4), (1,)))
    assert str(found) == "copies of b differ: those of ranks 0, 4 and of rank 1"
    assert found.ranks == [0, 1, 4]
    assert _twins.compare([held[0], held[0]]) == []
    twins = _twins.by_ranks([(0, {"boxes": "r"}), (1, {"boxes": "s"}), (2, {"boxes": "r"})])
    assert twins == {"boxes": {"r": [0, 2], "s": [1]}}
