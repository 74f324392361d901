"""Train, kill, resume: what `make demo` runs.

Trains examples/train_plain.py once without interruption, then examples/train_gpt.py while it is
killed with SIGKILL again and again, then once more with its copies in RAM wiped after every kill.
Ends with 0 only if all losses and all final parameters are the same, bit for bit.

Everything happens in directories of its own, which are gone afterwards. What stays is
demo-output/: a picture of the loss curves, and the losses themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
RUN = "gpt-small"
ATTEMPT_TIMEOUT_S = 120.0
# A line of the trainer's log: "restored step 120 of 'gpt-small' from ram ..."
RESTORED = re.compile(r"restored step (\d+)\b.*\bfrom ([a-z]+)")


@dataclass(frozen=True)
class Kill:
    """One planned death. ``kind`` is "anywhere", "capture", "flush" or "flush+agent"."""

    kind: str
    step: int
    delay_s: float

    def __str__(self) -> str:
        return {
            "anywhere": "at any moment",
            "capture": "inside a capture",
            "flush": "while flushing",
            "flush+agent": "while flushing, agent too",
        }[self.kind]


@dataclass
class Attempt:
    """One process of the trainer, from its start to its end."""

    killed: str = ""
    last_step: int = -1
    source: str = ""
    restored_step: int = -1
    start_to_resumed_s: float = 0.0


@dataclass
class Places:
    """Directories of this demo alone: nothing else on the machine is touched."""

    work: Path
    runtime: Path
    ram: Path

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "MTCKPT_RUNTIME_DIR": str(self.runtime),
            "MTCKPT_RAM_DIR": str(self.ram),
            "PYTHONUNBUFFERED": "1",
        }


@contextlib.contextmanager
def make_places() -> Iterator[Places]:
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    work = Path(tempfile.mkdtemp(prefix="mtckpt-demo-"))
    ram = Path(tempfile.mkdtemp(prefix="mtckpt-demo-", dir=shm))
    places = Places(work, work / "run", ram)
    places.runtime.mkdir(mode=0o700)
    try:
        yield places
    finally:
        stop_agent(places)
        shutil.rmtree(ram, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)


def agent_pid(places: Places) -> int | None:
    try:
        pid = int((places.runtime / "agent.pid").read_text().split()[0])
        return pid if b"mtckpt" in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, ValueError, IndexError):
        return None


def stop_agent(places: Places) -> None:
    """Ask the node agent to leave; after five seconds, do not ask."""
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        pid = agent_pid(places)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline_s = time.monotonic() + patience_s
        while agent_pid(places) == pid and time.monotonic() < deadline_s:
            time.sleep(0.01)


def wipe_ram(places: Places) -> None:
    """What a reboot does to the RAM tier of this run: the agent is gone, and so are its files."""
    stop_agent(places)
    for directory in places.ram.rglob(RUN):
        shutil.rmtree(directory)


# -- one process of the trainer ------------------------------------------------------------------


class Trainer:
    """The trainer's process, its log, and how far it has come."""

    def __init__(self, script: str, steps: int, out: Path, places: Places, crash_at: str = ""):
        self.losses = out / "losses.tsv"
        self.offset_bytes = self.losses.stat().st_size if self.losses.exists() else 0
        self.log = (places.work / "trainer.log").open("w+b")
        self.log_text = ""
        self.step = -1
        environment = places.environment()
        if crash_at:
            environment["MTCKPT_CRASH_AT"] = crash_at
        command = [sys.executable, EXAMPLES / script, f"--steps={steps}", f"--out={out}"]
        self.start_s = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=places.work, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def look(self) -> int:
        """Read what the trainer has written since; the step that it finished last."""
        self.log_text += os.pread(self.log.fileno(), 1 << 20, len(self.log_text.encode())).decode()
        if self.losses.exists():
            with self.losses.open("rb") as file:
                file.seek(self.offset_bytes)
                lines = file.read()
            complete = lines[: lines.rfind(b"\n") + 1]
            self.offset_bytes += len(complete)
            if complete:
                self.step = int(complete.splitlines()[-1].split(b"\t")[0])
        return self.step

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def is_flushing(places: Places) -> bool:
    """A put into the disk tier is in flight: its temporary file is there."""
    for _, _, files in os.walk(places.work / "checkpoints"):
        if any(name.startswith(".tmp-") for name in files):
            return True
    return False


def deal_death(kill: Kill, trainer: Trainer, places: Places) -> None:
    """The step has been reached: wait for the moment, then SIGKILL."""
    if kill.kind.startswith("flush"):
        deadline_s = time.monotonic() + 5.0
        while not is_flushing(places) and time.monotonic() < deadline_s:
            if trainer.process.poll() is not None:
                return
    else:
        time.sleep(kill.delay_s)
    pid = agent_pid(places) if kill.kind == "flush+agent" else None
    trainer.kill()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_attempt(
    script: str, steps: int, out: Path, places: Places, kill: Kill | None, show: Callable[[int], None]
) -> Attempt:
    """Start the trainer, watch it, and kill it when its time has come."""
    capture = kill is not None and kill.kind == "capture"
    crash_at = f"{CAPTURE_POINT}:{2 + kill.step % 3}" if capture and kill else ""
    trainer = Trainer(script, steps, out, places, crash_at)
    attempt = Attempt()
    try:
        while trainer.process.poll() is None:
            step = trainer.look()
            if not attempt.start_to_resumed_s and (found := RESTORED.search(trainer.log_text)):
                attempt.start_to_resumed_s = time.monotonic() - trainer.start_s
                attempt.restored_step, attempt.source = int(found[1]), found[2]
            show(step)
            if kill is not None and not capture and step >= kill.step:
                deal_death(kill, trainer, places)
                trainer.process.wait()
            if time.monotonic() - trainer.start_s > ATTEMPT_TIMEOUT_S:
                raise SystemExit(f"the trainer hangs:\n{trainer.log_text[-4000:]}")
            time.sleep(0.005)
        attempt.last_step = trainer.look()
        if trainer.process.returncode == -signal.SIGKILL:
            attempt.killed = str(kill)
        elif trainer.process.returncode:
            raise SystemExit(f"the trainer failed:\n{trainer.log_text[-4000:]}")
    finally:
        trainer.close()
    return attempt


# -- the three runs ------------------------------------------------------------------------------


@dataclass
class Result:
    """One training from start to end, however many processes it took."""

    name: str
    out: Path
    attempts: list[Attempt] = field(default_factory=list)
    elapsed_s: float = 0.0


def plan_kills(count: int, steps: int, kinds: list[str], rng: random.Random) -> list[Kill]:
    """Deaths spread over the run; every kind of moment gets its share, in random order."""
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(chosen)
    targets = sorted(rng.sample(range(max(1, steps // 20), max(count + 2, steps * 9 // 10)), count))
    return [Kill(kind, step, rng.uniform(0, 0.03)) for kind, step in zip(chosen, targets)]


def train(
    name: str,
    script: str,
    steps: int,
    places: Places,
    screen: Screen,
    kills: list[Kill] | None = None,
    wipe: bool = False,
) -> Result:
    """Start the trainer until it reaches its end."""
    result = Result(name, places.work / name.replace(" ", "-"))
    start_s = time.monotonic()
    waiting = list(kills or ())
    with screen.bar(name, steps) as show:
        while True:
            kill = waiting.pop(0) if waiting else None
            attempt = run_attempt(script, steps, result.out, places, kill, show)
            if result.attempts and attempt.restored_step < 0 and not attempt.killed:
                screen.line("     started from nothing")
            result.attempts.append(attempt)
            number = len(result.attempts) - 1
            if number and attempt.restored_step >= 0:
                screen.line(
                    f"     resumed from {attempt.source} at step {attempt.restored_step}, "
                    f"{attempt.start_to_resumed_s:.2f} s after the process started"
                )
            if not attempt.killed:
                break
            screen.line(f"  {number + 1:2d} killed {attempt.killed}, step {attempt.last_step}")
            if wipe:
                wipe_ram(places)
    result.elapsed_s = time.monotonic() - start_s
    return result
