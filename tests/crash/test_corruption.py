"""Damage in one tier: the right bytes come from elsewhere, or a typed error; never wrong values."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from builders import build_incarnation, build_manifest, build_save
from crash_worker import Life, Nursery, read_log

from mtckpt import _manifest, _restorer
from mtckpt._coordination import Single
from mtckpt._holdings import Holdings
from mtckpt._pieces import ALONE
from mtckpt._restore import Place
from mtckpt._run import Run
from mtckpt._schedule import Disk
from mtckpt.capture.cpu import CpuEngine
from mtckpt.errors import CheckpointError
from mtckpt.tiers import LocalTier, Survives

RUN = "rot"
KEY = _manifest.run_key(RUN)
NEWEST = 4
Array = np.ndarray[Any, Any]


def arrays_of(step: int) -> dict[str, Array]:
    """The same shapes at every step, and no byte the same by chance for long."""
    numbers = np.random.default_rng(step)
    return {
        "w": numbers.standard_normal(70_000).astype("<f4"),  # two digest chunks
        "m": numbers.standard_normal((30, 50)),
        "b": numbers.integers(0, 256, 1001, dtype="u1"),
        "s": np.array(step, dtype="<i8"),
    }


def template(framework: str = "numpy") -> dict[str, Any]:
    arrays: dict[str, Any] = {name: np.full_like(a, 77) for name, a in arrays_of(0).items()}
    if framework == "jax":
        arrays = _jax().device_put(arrays)
    return {**arrays, "step": -1}


def _jax() -> Any:
    return importlib.import_module("jax")


# -- a run without an agent ---------------------------------------------------------------------


class NoAgent:
    """Takes the place of the session: what would be reported to the agent is kept."""

    def __init__(self) -> None:
        self.damage: list[Any] = []
        self.opened = self.joined = None

    def call(self, verb: str, message: Any, _type: Any, _timeout_s: float | None = None) -> None:
        assert verb == "damage"
        self.damage.append(message)


class FileRun:
    """As much of a Run as a restore asks for, over directories that nobody else uses."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.name, self.key, self.tiers = RUN, KEY, [Disk(".")]
        self.session, self.labels = NoAgent(), ["disk"]
        self.group = Single()
        self.members = ALONE
        self._places = list(places)

    def places(self) -> list[Place]:
        return self._places

    def exchange(self, stage: str, value: object, *, patient: bool = False) -> list[Any]:
        return [value]

    def note(self, holdings: Sequence[Holdings]) -> None:
        pass

    def reading_s(self, label: str, size_bytes: int) -> float:
        return 0.0

    def within(self, label: str, work: Callable[[], Any], size_bytes: int = 0) -> Any:
        return work()

    def together(self, stage: str, *_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Tiers:
    """Two tiers with the same saves; ``undo`` takes one fault back."""

    def __init__(self, root: Path, framework: str = "numpy") -> None:
        self.framework = framework
        self.pristine = root / "pristine"
        self.ram, self.disk = root / "ram", root / "disk"
        for step in range(1, NEWEST + 1):
            save = build_save(self.pristine, RUN, step, arrays_of(step), {"step": step})
            build_manifest(save)
        for tier in (self.ram, self.disk):
            shutil.copytree(self.pristine, tier)
        self.engine = CpuEngine()

    def places(self, *, only: str = "") -> list[Place]:
        ram = LocalTier(self.ram, name="ram", survives=Survives.PROCESS, read_only=True)
        both = [
            Place("ram", ram, mapped=True),
            Place("disk", LocalTier(self.disk, name="disk", read_only=True), mapped=False),
        ]
        return [place for place in both if only in ("", place.label)]

    def files(self, tier: Path) -> list[Path]:
        """Every file of the tier, the newest save's several times: it is the one that is wanted."""
        found = sorted(path for path in (tier / KEY).rglob("*") if path.is_file())
        assert len(found) == 4 * NEWEST + 1
        return found + [p for p in found if f"{NEWEST:012d}" in p.parent.name] * 5

    def restore(self, only: str = "") -> tuple[int | None, dict[str, Any], FileRun]:
        run = FileRun(self.places(only=only))
        # JAX would narrow some of the types otherwise.
        wide = _jax().enable_x64(True) if self.framework == "jax" else contextlib.nullcontext()
        with wide:
            restored = _restorer.restore(
                cast(Run, run), self.engine, template(self.framework), "latest", None, False, None
            )
            return restored.step, restored.state, run

    def undo(self, tier: Path) -> None:
        for good in (self.pristine / KEY).rglob("*"):
            path = tier / good.relative_to(self.pristine)
            if good.is_file() and (not path.exists() or path.read_bytes() != good.read_bytes()):
                path.parent.mkdir(exist_ok=True)
                path.unlink(missing_ok=True)
                shutil.copyfile(good, path)


@pytest.fixture
def tiers(request: pytest.FixtureRequest, tmp_path: Path, ram_dir: Path) -> Iterator[Tiers]:
    framework = getattr(request, "param", "numpy")
    if framework == "jax":
        pytest.importorskip("jax")
    root = ram_dir / "rot"
    root.mkdir()
    yield Tiers(root, framework)
    shutil.rmtree(root)


# -- faults -------------------------------------------------------------------------------------


def flip_bit(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header_bit(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    """Where the few bytes lie that say what all the others mean."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(len(data), 64))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_page(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(0, len(data), 4096)
    stop = min(start + 4096, len(data))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def zero_tail(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    os.truncate(path, rng.choice((0, 1, path.stat().st_size - 1, rng.randrange(1 << 20))))


def extend(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 8, 4096))))


def _of_another_step(path: Path, rng: random.Random) -> Path:
    """The file of the same kind of another step; itself where there is no other."""
    others = [p for p in path.parent.parent.glob(f"step-*/{path.name}") if p != path]
    return rng.choice(sorted(others)) if others else path


def swap(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    other = _of_another_step(path, rng)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def swap_saves(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    """All files of two saves change places: each is sound in itself, and under a wrong name."""
    other = _of_another_step(path, rng).parent
    if path.parent != other and path.parent.name != KEY:
        aside = path.parent.parent / "aside"
        path.parent.rename(aside)
        other.rename(path.parent)
        aside.rename(other)


def put_older(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    data = _of_another_step(path, rng).read_bytes()
    path.write_bytes(data)


def delete(path: Path, _rng: random.Random, _tiers: Tiers) -> None:
    path.unlink()


def make_other_kind(path: Path, rng: random.Random, _tiers: Tiers) -> None:
    """A directory, a dangling link or a link to the good file in the other tier."""
    good = path.read_bytes()
    path.unlink()
    kind = rng.choice(("directory", "dangling", "link"))
    if kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        beside = path.with_name("elsewhere")
        beside.write_bytes(good)
        path.symlink_to(beside)


FAULTS = (
    flip_bit,
    flip_header_bit,
    zero_page,
    zero_tail,
    truncate,
    extend,
    swap,
    swap_saves,
    put_older,
    delete,
    make_other_kind,
)


def clean(tier: Path, tiers: Tiers) -> None:
    for path in sorted((tier / KEY).rglob("*"), reverse=True):
        known = tiers.pristine / path.relative_to(tier)
        if path.is_symlink() or not known.exists():
            path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()
        elif path.is_dir() != known.is_dir():
            path.rmdir()
    tiers.undo(tier)


def differs(state: dict[str, Any], step: int) -> list[str]:
    wanted = arrays_of(step)
    bad = [name for name, array in wanted.items() if not np.array_equal(state[name], array)]
    return bad + (["plain"] if state["step"] != step else [])


def check_faults(tiers: Tiers, seed: int, num_faults: int) -> Counter[str]:
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for number in range(num_faults):
        name = rng.choice(("ram", "disk"))
        tier: Path = getattr(tiers, name)
        path = rng.choice(tiers.files(tier))
        fault = FAULTS[number % len(FAULTS)]
        what = f"fault {number}: {fault.__name__} on {name} {path.relative_to(tier / KEY)}"
        fault(path, rng, tiers)
        try:
            # A good copy in the other tier: the newest step, exactly.
            step, state, run = tiers.restore()
            assert step == NEWEST, what
            assert not differs(state, NEWEST), what
            seen["reported"] += bool(run.session.damage)
            # Nothing but the damaged tier: the right bytes of some step, or an error of ours.
            step, state, _ = tiers.restore(only=name)
            assert step is not None, what
            assert not differs(state, step), what
            seen["newest" if step == NEWEST else "older"] += 1
        except CheckpointError as error:
            seen[type(error).__name__] += 1
            raise AssertionError(f"{what}: {error}") from error
        finally:
            clean(tier, tiers)
    print(dict(seen))
    return seen


@pytest.mark.parametrize(
    ("tiers", "num_faults"), [("numpy", 220), ("jax", 165)], indirect=["tiers"]
)
def test_one_fault_in_one_tier(tiers: Tiers, seed: int, num_faults: int) -> None:
    seen = check_faults(tiers, seed, num_faults)
    assert seen["older"] >= num_faults // 8
    assert seen["reported"] >= num_faults // 11


@pytest.mark.torture
@pytest.mark.parametrize("tiers", ["numpy", "jax"], indirect=True)
def test_one_fault_in_one_tier_many_times(tiers: Tiers, seed: int) -> None:
    check_faults(tiers, seed, 10_000)


@pytest.mark.parametrize("tiers", ["numpy", "jax"], indirect=True)
def test_a_fault_in_each_tier(tiers: Tiers, seed: int) -> None:
    """Both copies damaged, somewhere: some step, exactly, or a typed error."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for number in range(60):
        done = []
        for tier in (tiers.ram, tiers.disk):
            path, fault = rng.choice(tiers.files(tier)), rng.choice(FAULTS)
            done.append(f"{fault.__name__} on {path.relative_to(tier.parent)}")
            fault(path, rng, tiers)
        try:
            step, state, _ = tiers.restore()
            assert step is not None, done
            assert not differs(state, step), done
            seen[str(step)] += 1
        except CheckpointError as error:
            seen[type(error).__name__] += 1
        finally:
            clean(tiers.ram, tiers)
            clean(tiers.disk, tiers)
        assert number < 5 or seen[str(NEWEST)], seen
    print(dict(seen))


def test_without_its_incarnation_an_abandoned_step_does_not_come_back(tiers: Tiers) -> None:
    """Step 3 was saved again after a roll-back to 2: step 4 of before is abandoned."""
    for tier in (tiers.ram, tiers.disk):
        build_incarnation(tier, RUN, 2, parent=(1, 2))
        build_save(tier, RUN, 3, arrays_of(33), {"step": 33}, incarnation=2, parent=(1, 2))
    (lost,) = (tiers.ram / KEY).glob("incarnation-000002*")
    lost.unlink()
    step, state, _ = tiers.restore()
    assert step == 3
    assert not differs(state, 33)


# -- end to end ---------------------------------------------------------------------------------


@pytest.fixture
def nursery(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setenv("MTCKPT_SCRUB_S", "0.3")
    nursery = Nursery()
    yield nursery
    nursery.close()


def wait_for(what: Callable[[], bool], name: str, timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s: {name}"
        time.sleep(0.02)


def live(nursery: Nursery, life: Life, line: str, count: int = 1) -> int:
    """A trainer that has logged ``line`` so many times; its pid."""
    pid = nursery.start(life)
    log = Path(life.log)
    wait_for(
        lambda: sum(words[0] == line for words in read_log(log)) >= count,
        f"{line}: {read_log(log)[-3:]}",
    )
    return pid


@pytest.mark.parametrize("label", ["ram", "disk"])
def test_damage_is_found_reported_and_healed(
    label: str, tmp_path: Path, ram_dir: Path, runtime_dir: Path, nursery: Nursery
) -> None:
    disk = tmp_path / "disk"
    life = Life("heal", str(disk), str(tmp_path / "1.log"), 1, max_steps=3, linger_s=60.0)
    pid = live(nursery, life, "local")
    os.kill(pid, signal.SIGKILL)
    nursery.wait(pid)
    os.kill(int((runtime_dir / "agent.pid").read_text()), signal.SIGKILL)

    root = ram_dir if label == "ram" else disk
    (bad,) = root.rglob("step-000000000003*/rank-00000.safetensors")
    good = bad.read_bytes()
    with bad.open("r+b") as file:
        file.seek(len(good) // 2)
        file.write(bytes([good[len(good) // 2] ^ 1]))

    again = Life("heal", str(disk), str(tmp_path / "2.log"), 2, max_steps=0, linger_s=60.0)
    pid = live(nursery, again, "restored")
    words = read_log(Path(again.log))[0]
    assert words[:3] == ["restored", "3", "ok"]

    def healed() -> bool:
        found = list(root.rglob("step-000000000003*/rank-00000.safetensors"))
        try:
            return [path.read_bytes() for path in found] == [good]
        except FileNotFoundError:
            return False  # the damaged one was set aside after it was found

    try:
        wait_for(healed, f"{label} is whole again")
    finally:
        print((runtime_dir / "agent.log").read_text()[-3000:])
        os.kill(pid, signal.SIGKILL)
        nursery.wait(pid)
