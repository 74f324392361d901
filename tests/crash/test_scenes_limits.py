"""Too little of something: inodes, descriptors, file sizes, names, rights. Errors are typed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_checks import until
from scene_trainer import SceneTrainer, TrainerError, seed_of

import mtckpt
from mtckpt import _usable
from mtckpt._probe import tier_label
from mtckpt._slots import BESIDE
from mtckpt.errors import TierError, TierFull, UsageError

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("runtime_dir")]

Start = Callable[..., SceneTrainer]
Mount = Callable[[str], Path]


@pytest.fixture
def start(runtime_dir: Path) -> Iterator[Start]:
    started: list[SceneTrainer] = []

    def make(*arguments: Any, **options: Any) -> SceneTrainer:
        started.append(SceneTrainer(*arguments, **options))
        return started[-1]

    yield make
    for trainer in started:
        trainer.close()


@pytest.fixture
def mount(tmp_path: Path, runtime_dir: Path) -> Iterator[Mount]:
    """A small tmpfs with the options given."""
    place = tmp_path / "mounted"

    def make(options: str) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("may not mount here")
        return place

    yield make
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def steps_on(disk: Path) -> list[int]:
    return [step.step for step in mtckpt.steps(disk / "r")]


def saves_until_told(trainer: SceneTrainer, first: int) -> TrainerError:
    """Save step after step until the failure of one of them reaches the loop."""
    for step in range(first, first + 200):
        try:
            trainer.save(step)
        except TrainerError as error:
            return error
    raise AssertionError("200 saves, and the loop was told nothing")


def saved_once_told(trainer: SceneTrainer, first: int) -> int:
    """Save until a step is local; what is told meanwhile is of saves before ``first``, whose
    failures were on their way, of each once."""
    told: set[int] = set()
    for step in range(first, first + 10):
        try:
            trainer.save(step, "local")
        except TrainerError as error:
            found = re.match(r"step (\d+) did not reach local", error.text)
            if found is None or int(found[1]) >= first or int(found[1]) in told:
                raise
            told.add(int(found[1]))
        else:
            return step
    raise AssertionError("ten more failures were told")


# -- the disk --------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_disk_that_turns_read_only_is_told_and_used_again(
    start: Start, mount: Mount, tmp_path: Path
) -> None:
    disk = mount("size=200M")
    trainer = start("r", disk)
    trainer.do("restore")
    trainer.save(1, "local")
    remount = ["mount", "-o", "remount,ro", str(disk)]
    until(lambda: subprocess.run(remount, capture_output=True, check=False).returncode == 0)
    error = saves_until_told(trainer, 2)
    assert (error.name, error.causes[0]) == ("SaveFailed", "TierReadOnly"), error.text
    assert str(disk) in error.text
    assert steps_on(disk) == [1]
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    step = saved_once_told(trainer, 400)
    trainer.do("close")
    assert {1, step} <= set(steps_on(disk))


@pytest.mark.root
def test_a_disk_without_inodes_keeps_what_it_has(start: Start, mount: Mount) -> None:
    disk = mount("size=200M,nr_inodes=24")
    trainer = start("r", disk)
    trainer.do("restore")
    trainer.save(1, "local")
    error = saves_until_told(trainer, 2)
    assert (error.name, error.causes[0]) == ("SaveFailed", "TierFull"), error.text
    assert "df -i" in error.text or "inode" in error.text, error.text
    held = steps_on(disk)
    assert held[0] == 1
    for step in held:
        with mtckpt.load(disk / "r", step=step) as found:
            assert found["scalar"][()] == seed_of(1, step)
    restored = trainer.do("restore")
    assert (restored["bad"], restored["sources"]) == ("", ["ram"])


@pytest.mark.root
@pytest.mark.parametrize(
    "inodes",
    [9, *(pytest.param(n, marks=pytest.mark.torture) for n in (*range(4, 9), *range(10, 20)))],
)
def test_memory_without_inodes_is_full_and_loses_nothing(
    inodes: int, start: Start, mount: Mount, tmp_path: Path
) -> None:
    """They run out where slots are made, in a capture, or in a seal."""
    ram = mount(f"size=200M,nr_inodes={inodes}")
    trainer = start("r", tmp_path / "d", ram={"path": str(ram)})
    staged: list[int] = []
    errors: list[TrainerError] = []
    for step in range(1, 9):
        try:
            if trainer.do("save", step, "staged")["skipped"] is None:
                staged.append(step)
        except TrainerError as error:
            errors.append(error)
    assert errors or inodes > 8
    for told in errors:
        assert "TierFull" in (told.name, *told.causes), f"{told.name}: {told.text}"
        assert "inode" in told.text or "No space left" in told.text, told.text
    if staged:
        restored = trainer.do("restore")
        assert restored["step"] == staged[-1]
        assert restored["bad"] == ""


# -- the process -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        ("prlimit", "--nofile=64:64"),
        ("sh", "-c", 'umask 0777; exec "$@"', "sh"),
        *(
            pytest.param(slow, marks=pytest.mark.torture)
            for slow in (
                ("prlimit", "--fsize=1048576:"),
                ("sh", "-c", 'umask 0000; exec "$@"', "sh"),
            )
        ),
    ],
    ids=["64 descriptors", "umask 0777", "soft file size", "umask 0000"],
)
def test_a_life_under_limits(wrap: tuple[str, ...], start: Start, tmp_path: Path) -> None:
    first = start("r", tmp_path / "d", wrap=wrap, num=1)
    first.do("restore")
    first.save(1, "local")
    first.save(2, "local")
    first.save(3)
    first.kill()
    second = start("r", tmp_path / "d", wrap=wrap, num=2)
    restored = second.do("restore")
    assert (restored["step"], restored["num"], restored["bad"]) == (3, 1, "")
    second.save(4, "local")
    second.do("close")
    assert [path for path in (tmp_path / "d").rglob("*") if path.stat().st_mode & 0o022] == []


@pytest.mark.root
def test_memory_that_is_full_to_the_last_page_keeps_nobody_from_the_disk(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ram = mount("size=1M")
    monkeypatch.setenv("MTCKPT_RAM_DIR", str(ram))
    disk, state = mtckpt.Disk(tmp_path / "d"), {"a": np.arange(1000)}
    with mtckpt.Checkpointer("r", [disk], timeout_s=20.0) as checkpointer:
        checkpointer.save(1, state).wait("local", timeout_s=20)
    with contextlib.suppress(OSError), open(ram / "other", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with mtckpt.Checkpointer("r", [disk], timeout_s=20.0) as checkpointer:
        assert checkpointer.restore(state).step == 1
        checkpointer.save(2, state).wait("local", timeout_s=20)
    with open_run("r", mtckpt.Ram(every=1), disk) as checkpointer:
        assert checkpointer.restore(state).step == 2
        with pytest.raises(TierFull):
            checkpointer.save(3, state)
    assert list(ram.glob("mtckpt-*/r/*")) == []


def test_slots_that_had_to_be_on_disk_are_found_by_a_restart_that_names_none(
    tmp_path: Path,
) -> None:
    disk, state = mtckpt.Disk(tmp_path / "d", every=100), {"a": np.arange(1000)}
    slots = mtckpt.Ram(tmp_path / "d" / BESIDE, every=1)
    first = mtckpt.Checkpointer("r", [slots, disk], timeout_s=20.0)
    first.save(1, state).wait("staged", timeout_s=20)
    with mtckpt.Checkpointer("r", [disk], timeout_s=20.0) as checkpointer:
        # An error of a disk below a mapping is the end of a process.
        in_memory = tier_label(str(tmp_path)) == "ram"
        assert checkpointer._link.places()[0].mapped == in_memory
        assert checkpointer.restore(state).step == 1
        checkpointer.save(2, state, tiers="all").wait("local", timeout_s=20)
    assert steps_on(tmp_path / "d") == [2]


def test_files_that_may_not_be_as_large_as_a_slot(start: Start, tmp_path: Path) -> None:
    trainer = start("r", tmp_path / "d", wrap=("prlimit", "--fsize=1048576:1048576"))
    trainer.do("restore")
    for step in (1, 2):
        with pytest.raises(TrainerError) as caught:
            trainer.save(step)
        assert caught.value.name == "TierFull"
        assert "ulimit -f" in caught.value.text
    assert trainer.do("hello")["pid"] == trainer.process.pid
    trainer.do("close")


# -- names and places ------------------------------------------------------------------------------


def open_run(run: str, *tiers: mtckpt.Ram | mtckpt.Disk) -> mtckpt.Checkpointer:
    return mtckpt.Checkpointer(run, list(tiers), timeout_s=20.0, max_stall_s=10.0)


def test_a_run_may_have_a_very_long_name(tmp_path: Path) -> None:
    run = "a/../b\n" + "x" * 990
    state = {"a": np.arange(1000.0)}
    with open_run(run, mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "d")) as checkpointer:
        checkpointer.save(1, state).wait("local", timeout_s=20)
    with open_run(run, mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "d")) as checkpointer:
        restored = {"a": np.zeros(1000)}
        assert checkpointer.restore(restored).step == 1
        assert (restored["a"] == state["a"]).all()


def test_a_directory_may_not_have_a_longer_name_than_the_file_system_takes(
    tmp_path: Path, ram_dir: Path
) -> None:
    state = {"a": np.arange(1000.0)}
    with open_run("r", mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / ("d" * 300))) as checkpointer:
        with pytest.raises(mtckpt.errors.SaveFailed) as caught:
            checkpointer.save(1, state).wait("local", timeout_s=20)
        assert type(caught.value.__cause__) is TierError
        assert "name too long" in str(caught.value).lower()
        with pytest.raises(mtckpt.errors.SaveFailed):
            checkpointer.save(2, state)  # and the loop is told once
        assert checkpointer.restore({"a": np.zeros(1000)}).step == 1
        with pytest.raises(mtckpt.errors.CloseFailed) as closed:
            checkpointer.close(timeout_s=20)
        assert len(closed.value.errors) == 1, str(closed.value)
    with pytest.raises(TierError, match=r"(?i)name too long"):
        open_run("s", mtckpt.Ram(ram_dir / ("y" * 300), every=1)).restore(state)


def test_a_disk_may_be_a_link_of_ours(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    state = {"a": np.arange(1000.0)}
    with open_run("r", mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "link")) as checkpointer:
        checkpointer.save(1, state).wait("local", timeout_s=20)
    assert steps_on(tmp_path / "real") == [1]


@pytest.mark.root
def test_a_disk_that_is_a_link_of_somebody_else_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    state = {"a": np.arange(1000.0)}
    checkpointer = open_run("r", mtckpt.Ram(every=1), mtckpt.Disk(tmp_path / "link"))
    with pytest.raises(mtckpt.errors.SaveFailed) as caught:
        checkpointer.save(1, state).wait("local", timeout_s=20)
    assert type(caught.value.__cause__) is mtckpt.errors.AccessDenied
    with pytest.raises(mtckpt.errors.CloseFailed):
        checkpointer.close(timeout_s=20)
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize("how", ["the same", "another spelling", "a link", "memory's own"])
def test_two_tiers_are_never_one_directory(how: str, tmp_path: Path, ram_dir: Path) -> None:
    """A second copy in the same place is none; and memory's files are recycled and freed."""
    first = tmp_path / "d"
    first.mkdir(0o700)
    (tmp_path / "link").symlink_to(first)
    second = {
        "the same": first,
        "another spelling": tmp_path / "x" / ".." / "d",
        "a link": tmp_path / "link",
        "memory's own": ram_dir,
    }[how]
    tiers = [mtckpt.Ram(ram_dir, every=1), mtckpt.Disk(first), mtckpt.Disk(second)]
    with pytest.raises(UsageError, match="are one directory") as caught:
        mtckpt.Checkpointer("r", tiers)
    assert "disk-2" in str(caught.value)
    assert list(ram_dir.iterdir()) == []


def test_two_tiers_are_one_directory_also_where_a_disk_hangs_amid_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was seen of it before counts: here that one is a link to the other."""
    (tmp_path / "d").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    answers = threading.Event()
    monkeypatch.setattr(_usable, "_refusal", lambda *_: answers.wait(20))
    monkeypatch.setattr(_usable, "_LOOK_TIMEOUT_S", 0.3)
    with pytest.raises(UsageError, match="are one directory"):
        open_run("r", mtckpt.Disk(tmp_path / "d"), mtckpt.Disk(tmp_path / "link"))
    answers.set()


@pytest.mark.root
def test_a_disk_that_everybody_may_write_to_is_refused_at_once(tmp_path: Path) -> None:
    """And a directory of ours in it, as in /tmp, is as good as any."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(mtckpt.errors.AccessDenied, match=r"by everybody \(mode 1777\)") as caught:
        open_run("r", mtckpt.Ram(every=1), mtckpt.Disk(shared))
    assert f"use a directory of your own in it, as {shared}/checkpoints" in str(caught.value)
    (shared / "mine").mkdir(0o700)
    state = {"a": np.arange(1000.0)}
    with open_run("r", mtckpt.Ram(every=1), mtckpt.Disk(shared / "mine")) as checkpointer:
        checkpointer.save(1, state).wait("local", timeout_s=20)
    assert steps_on(shared / "mine") == [1]
    os.chown(shared / "mine", 1000, -1)  # what is somebody else's can be read all the same
    with pytest.raises(mtckpt.errors.AccessDenied, match="belongs to user 1000") as caught:
        open_run("r", mtckpt.Ram(every=1), mtckpt.Disk(shared / "mine"))
    assert "to restore from it, and save elsewhere: restore(source=...)" in str(caught.value)
    with open_run("other", mtckpt.Ram(every=1)) as checkpointer:
        assert checkpointer.restore(state, source=shared / "mine" / "r").step == 1
