"""Power cut at every flush: what was acknowledged ``local`` is on the disk, and nothing torn is.

The agent writes to an ext4 whose device is a file that logs writes and flushes. From the log come
images of the disk at moments after and between flushes; each is mounted, which replays its journal,
and read to the last byte.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import _isolation
import pytest
from block_image import Event, Replay, mounted_image, read_events, recorded_disk, why_not
from small_writer import KEEP, Nursery, whole_steps

from mtckpt.errors import CheckpointError
from mtckpt.tiers import BytesSource, LocalTier, read_all

pytestmark = [
    pytest.mark.root,
    pytest.mark.fuse,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are loop devices"),
]

NUM_SAVES = 8

# Planted in the data processes: an fsync of directories that does nothing. The manifest comes last
# and is not synced either: on ext4 the sync of any new file commits the names given before it too.
NO_DIRECTORIES = """
import os, stat
whole = os.fsync
def fsync(fd):
    if stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, 18, 0) != b'{"kind":"manifest"':
        whole(fd)
os.fsync = fsync
"""
# Planted: no fsync at all.
NOTHING = """
import os
os.fsync = lambda fd: None
"""


@dataclass(slots=True)
class Recording:
    """What the disk was told, and what had been promised when its log was so long."""

    events: list[Event]
    first_bytes: int
    promised: list[tuple[int, int]] = field(default_factory=list)

    def moments(self) -> list[int]:
        """Every number of events after which the power may go, once there was a directory."""
        return [n + 1 for n, event in enumerate(self.events) if event.end >= self.first_bytes]

    def flushes(self) -> list[int]:
        """Moments at which all that was written had just been flushed."""
        return [n for n in self.moments() if self.events[n - 1].data is None]

    def after_promises(self) -> list[int]:
        """The first moments after each promise."""
        moments = self.moments()
        firsts = [
            next((n for n in moments if self.events[n - 1].end >= at_bytes), len(self.events))
            for _, at_bytes in self.promised
        ]
        return sorted({min(n + more, len(self.events)) for n in firsts for more in (0, 1)})

    def promised_at(self, count: int) -> list[int]:
        """Steps that were acknowledged before the last of ``count`` events, oldest first."""
        end = self.events[count - 1].end
        return [step for step, at_bytes in self.promised if at_bytes <= end]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory for the log and for images."""
    directory = Path(tempfile.mkdtemp(prefix="mtk-images-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@contextlib.contextmanager
def nursery_of(directory: Path, runtime_dir: Path) -> Iterator[Nursery]:
    """At its end nobody holds the disk open, or memory: that is unmounted, or taken away, then.

    Writers end before the agent: one that outlived it would start another.
    """
    nursery = Nursery(directory)
    try:
        yield nursery
    finally:
        nursery.close()
        _isolation.end_agent(runtime_dir)


def record(tmp_path: Path, places: Path, runtime_dir: Path, num_saves: int) -> Recording:
    """Save through an agent to a disk that is recorded."""
    log = places / "log"
    with contextlib.ExitStack() as stack:
        mounted = stack.enter_context(recorded_disk(tmp_path, log))
        nursery = stack.enter_context(nursery_of(tmp_path, runtime_dir))
        (mounted / "disk").mkdir()
        os.sync()
        first_bytes = log.stat().st_size
        writer = nursery.start()
        writer.do("open", 1, str(mounted / "disk"), None, KEEP, str(log))
        writer.do("restore")
        writer.do("saves", 1, num_saves)
        said = writer.said()
    promised = [(step, at_bytes) for what, step, at_bytes in said if what == "local"]
    assert [step for step, _ in promised] == list(range(1, num_saves + 1))
    return Recording(read_events(log), first_bytes, promised)


def wrong_with(recording: Recording, count: int, disk: Path) -> str:
    """What of the promises is broken on a disk whose power went after ``count`` events."""
    try:
        steps = whole_steps(disk)
    except (AssertionError, CheckpointError, OSError) as error:
        return f"torn: {error}"
    promised = recording.promised_at(count)
    if promised and promised[-1] not in steps:
        return f"lost: step {promised[-1]} was acknowledged, there are {sorted(steps)}"
    if len(steps) < min(KEEP, len(promised)):
        return f"lost: only {sorted(steps)} are left of {promised}"
    return ""


def try_images(
    recording: Recording, places: Path, moments: list[tuple[int, random.Random | None]]
) -> Counter[str]:
    """Mount and judge the disk of each moment; how many were right, and what was wrong."""
    replay = Replay(recording.events, places)
    place = places / "place"
    place.mkdir(exist_ok=True)
    found: Counter[str] = Counter()
    for count, rng in sorted(moments, key=lambda moment: moment[0]):
        unflushed = replay.cut(count, rng)
        with mounted_image(replay.image, place):
            wrong = wrong_with(recording, count, place / "disk")
        found["images"] += 1
        found["with writes after the flush"] += bool(unflushed)
        if wrong:
            found[wrong.partition(":")[0]] += 1
            print(f"after {count} of {len(recording.events)} events: {wrong}")
    print(dict(found))
    return found


def drawn(
    recording: Recording, num_images: int, rng: random.Random
) -> list[tuple[int, random.Random | None]]:
    """Moments: a third right after a flush, the others anywhere with any of the blocks since."""
    flushes, anywhere = recording.flushes(), recording.moments()
    chosen: list[tuple[int, random.Random | None]] = [
        (rng.choice(flushes), None) for _ in range(num_images // 3)
    ]
    chosen += [(rng.choice(anywhere), rng) for _ in range(num_images - len(chosen))]
    return chosen


def resume(
    recording: Recording,
    places: Path,
    tmp_path: Path,
    runtime_dir: Path,
    moments: list[int],
    rng: random.Random,
) -> None:
    """A job that is started again after the cut finds the newest promised step, and goes on."""
    ram_dir = Path(os.environ["MTCKPT_RAM_DIR"])
    replay = Replay(recording.events, places)
    place = places / "resumed"
    place.mkdir()
    for turn, count in enumerate(sorted(moments)):
        shutil.rmtree(ram_dir)
        ram_dir.mkdir(mode=0o700)
        replay.cut(count, rng)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mounted_image(replay.image, place))
            own = tmp_path / f"resumed-{turn}"
            own.mkdir()
            nursery = stack.enter_context(nursery_of(own, runtime_dir))
            writer = nursery.start()
            writer.do("open", 100 + turn, str(place / "disk"))
            restored = writer.do("restore")
            assert not restored["bad"], restored
            assert restored["step"] >= max(recording.promised_at(count), default=0), restored
            writer.do("saves", restored["step"] + 1, restored["step"] + 3)
            steps = whole_steps(place / "disk")
            assert steps[restored["step"] + 3] == 100 + turn, steps


@pytest.mark.timeout(180)
def test_power_cut_at_some_flushes(
    tmp_path: Path, places: Path, runtime_dir: Path, seed: int
) -> None:
    rng = random.Random(seed)
    recording = record(tmp_path, places, runtime_dir, NUM_SAVES)
    assert len(recording.flushes()) >= 20 * NUM_SAVES
    found = try_images(recording, places, drawn(recording, 60, rng))
    assert found["images"] == 60
    assert found["with writes after the flush"] >= 15
    assert not found["lost"]
    assert not found["torn"]
    resume(recording, places, tmp_path, runtime_dir, rng.sample(recording.moments(), 2), rng)


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_power_cut_at_every_flush(
    tmp_path: Path, places: Path, runtime_dir: Path, seed: int
) -> None:
    rng = random.Random(seed)
    recording = record(tmp_path, places, runtime_dir, 12)
    moments: list[tuple[int, random.Random | None]] = [(n, None) for n in recording.flushes()]
    moments += [(n, rng) for n in recording.moments()]
    moments += drawn(recording, max(0, 2_400 - len(moments)), rng)
    found = try_images(recording, places, moments)
    assert found["images"] >= 2_000
    assert not found["lost"]
    assert not found["torn"]
    resume(recording, places, tmp_path, runtime_dir, rng.sample(recording.moments(), 60), rng)


# -- the test of the test --------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [NO_DIRECTORIES, NOTHING], ids=["directories", "nothing"])
@pytest.mark.timeout(180)
def test_an_agent_that_leaves_out_fsyncs_loses_steps(
    tmp_path: Path,
    places: Path,
    runtime_dir: Path,
    seed: int,
    planted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(planted)
    monkeypatch.syspath_prepend(str(tmp_path / "planted"))  # the nursery's PYTHONPATH is ours
    recording = record(tmp_path, places, runtime_dir, 3)
    rng = random.Random(seed)
    moments: list[tuple[int, random.Random | None]] = []
    for count in recording.after_promises():
        moments += [(count, None), (count, rng)]
    found = try_images(recording, places, moments)
    assert found["lost"]


def record_puts(tmp_path: Path, places: Path, num_puts: int) -> Recording:
    """Objects put one by one into directories of their own, each promised when put returned."""
    log, promised = places / "log", []
    with recorded_disk(tmp_path, log) as mounted:
        (mounted / "disk").mkdir()
        os.sync()
        first_bytes = log.stat().st_size
        tier = LocalTier(mounted / "disk")
        for number in range(num_puts):
            tier.put(f"run/{number}/object", BytesSource(bytes([number]) * 5000))
            promised.append((number, log.stat().st_size))
        tier.close()
    return Recording(read_events(log), first_bytes, promised)


def lost_objects(recording: Recording, places: Path) -> int:
    """How many promised objects are not there after cuts right after they were promised."""
    replay = Replay(recording.events, places)
    place = places / "place"
    place.mkdir()
    lost = 0
    for count in recording.after_promises():
        replay.cut(count, None)
        with mounted_image(replay.image, place):
            tier = LocalTier(place / "disk", read_only=True)
            there = {info.key for info in tier.list()}
            for number in recording.promised_at(count):
                key = f"run/{number}/object"
                lost += key not in there
                if key in there:
                    assert read_all(tier, key, max_bytes=5000) == bytes([number]) * 5000
            tier.close()
    return lost


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "no fsync of directories"])
def test_a_put_without_the_fsync_of_its_directories_is_lost(
    tmp_path: Path, places: Path, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted:
        whole = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: None if stat.S_ISDIR(os.fstat(fd).st_mode) else whole(fd)
        )
    recording = record_puts(tmp_path, places, 5)
    lost = lost_objects(recording, places)
    assert lost >= 3 if planted else lost == 0
