"""Train, kill, resume: what `make demo` runs.

Trains examples/train_plain.py once without interruption, then examples/train_gpt.py while it is
killed with SIGKILL again and again, then once more with its copies in RAM wiped after every kill,
and last with those on disk wiped as well, so that an S3 server on this machine has all that is
left. Ends with 0 only if all losses and all final parameters are the same, bit for bit.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from store_server import store_server

EXAMPLES = Path(__file__).resolve().parent
RUN = "gpt-small"
ATTEMPT_TIMEOUT_S = 120.0
# Of the trainer's log: "run gpt-small: restored step 120 from ram (7.3 MiB) in 0.03 s"
RESTORED = re.compile(r"restored step (\d+) from (\w+).* in ([\d.]+) s")
# Where a trainer that is to die inside a capture kills itself, with SIGKILL (MTCKPT_CRASH_AT).
CAPTURE_POINT = "capture.copied"


@dataclass(frozen=True)
class Kill:
    """One planned death: what the run is doing then, and from which step on."""

    kind: str
    step: int
    delay_s: float


ANYWHERE, CAPTURE, FLUSH, FLUSH_AND_AGENT = (
    "anywhere",
    "in capture",
    "in flush",
    "in flush, agent too",
)


@dataclass
class Attempt:
    """One process of the trainer, from its start to its end."""

    killed: str = ""
    last_step: int = -1
    source: str = ""
    restored_step: int = -1
    restore_s: float = 0.0
    start_to_resumed_s: float = 0.0


@dataclass
class Places:
    """Directories of this demo alone: nothing else on the machine is touched."""

    work: Path
    runtime: Path
    ram: Path
    store: dict[str, str] = field(default_factory=dict)  # the environment that it is reached by

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **self.store,
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


def stop_agent(places: Places, gently: bool = True) -> None:
    """Ask the node agent to leave, which drains then; after five seconds, do not ask."""
    asked = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
    for number, patience_s in asked if gently else asked[1:]:
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
    stop_agent(places, gently=False)
    for directory in places.ram.rglob(RUN):
        shutil.rmtree(directory)


def forget(places: Places) -> None:
    """Begin with nothing: no agent, no copy in RAM, no file on disk."""
    wipe_ram(places)
    shutil.rmtree(places.work / "checkpoints", ignore_errors=True)


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
        command = [sys.executable, str(EXAMPLES / script), f"--steps={steps}", f"--out={out}"]
        command += ["--store=s3://demo/checkpoints"] if places.store else []
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
    if kill.kind in (FLUSH, FLUSH_AND_AGENT):
        deadline_s = time.monotonic() + 5.0
        while not is_flushing(places) and time.monotonic() < deadline_s:
            if trainer.process.poll() is not None:
                return
    else:
        time.sleep(kill.delay_s)
    pid = agent_pid(places) if kill.kind == FLUSH_AND_AGENT else None
    trainer.kill()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_attempt(
    script: str,
    steps: int,
    out: Path,
    places: Places,
    kill: Kill | None,
    show: Callable[[int], None],
    say: Callable[[str], None],
) -> Attempt:
    """Start the trainer, watch it, and kill it when its time has come."""
    by_itself = kill is not None and kill.kind == CAPTURE
    crash_at = f"{CAPTURE_POINT}:{1 + kill.step % 3}" if kill and by_itself else ""
    trainer = Trainer(script, steps, out, places, crash_at)
    attempt = Attempt()
    try:
        while trainer.process.poll() is None:
            step = trainer.look()
            if not attempt.start_to_resumed_s and (found := RESTORED.search(trainer.log_text)):
                attempt.start_to_resumed_s = time.monotonic() - trainer.start_s
                attempt.restored_step, attempt.source = int(found[1]), found[2]
                attempt.restore_s = float(found[3])
                say(
                    f"     resumed from {attempt.source} at step {attempt.restored_step}, "
                    f"{attempt.start_to_resumed_s:.2f} s after the process started "
                    f"({attempt.restore_s:.2f} s of it to restore)"
                )
            show(step)
            # One that should have died by itself gets its chance, then dies like the others.
            if kill is not None and step >= kill.step + (steps // 10 if by_itself else 0):
                if by_itself:
                    kill, by_itself = Kill(ANYWHERE, step, kill.delay_s), False
                deal_death(kill, trainer, places)
                trainer.process.wait()
            if time.monotonic() - trainer.start_s > ATTEMPT_TIMEOUT_S:
                raise SystemExit(f"the trainer hangs:\n{trainer.log_text[-4000:]}")
            time.sleep(0.005)
        attempt.last_step = trainer.look()
        if trainer.process.returncode == -signal.SIGKILL:
            attempt.killed = kill.kind if kill else "by somebody else"
        elif trainer.process.returncode:
            raise SystemExit(f"the trainer failed:\n{trainer.log_text[-4000:]}")
    finally:
        trainer.close()
    return attempt


# -- what one sees ---------------------------------------------------------------------------------


class Screen:
    """Lines that work in a pipe; on a terminal with rich, a bar below them."""

    def __init__(self) -> None:
        self.console: Any = None
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console

                self.console = Console(highlight=False)

    def line(self, text: str = "") -> None:
        if self.console is not None:
            self.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    @contextlib.contextmanager
    def bar(self, steps: int) -> Iterator[Callable[[int], None]]:
        """A function that shows the step reached."""
        if self.console is None:
            yield self._plain_bar(steps)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), "steps", TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=steps)
            yield lambda step: progress.update(task, completed=step + 1)

    def _plain_bar(self, steps: int) -> Callable[[int], None]:
        shown = 0

        def show(step: int) -> None:
            nonlocal shown
            while shown + steps // 4 <= step + 1:
                shown += steps // 4
                self.line(f"     step {shown} of {steps}")

        return show


# -- the three runs ------------------------------------------------------------------------------


@dataclass
class Training:
    """One training from start to end, however many processes it takes."""

    title: str
    out: Path
    attempts: list[Attempt] = field(default_factory=list)
    elapsed_s: float = 0.0


def plan_kills(kinds: list[str], steps: int, chance: random.Random) -> list[Kill]:
    """Deaths spread over the whole run, in random order."""
    kinds = list(kinds)
    chance.shuffle(kinds)
    targets = sorted(chance.sample(range(steps // 20, steps * 17 // 20), len(kinds)))
    return [Kill(*pair, chance.uniform(0, 0.03)) for pair in zip(kinds, targets, strict=True)]


def train(
    training: Training,
    script: str,
    steps: int,
    places: Places,
    screen: Screen,
    kills: Sequence[Kill] = (),
    after_kill: Callable[[], None] = lambda: None,
) -> None:
    """Start the trainer until it reaches its end."""
    screen.line(f"\n{training.title}")
    start_s = time.monotonic()
    waiting = list(kills)
    with screen.bar(steps) as show:
        while True:
            kill = waiting.pop(0) if waiting else None
            attempt = run_attempt(script, steps, training.out, places, kill, show, screen.line)
            training.attempts.append(attempt)
            if not attempt.killed:
                break
            number = len(training.attempts)
            screen.line(f"  {number:2d} SIGKILL {attempt.killed}, after step {attempt.last_step}")
            after_kill()
    training.elapsed_s = time.monotonic() - start_s
    screen.line(f"     done: {steps} steps, {training.elapsed_s:.1f} s")


# -- the judgement -------------------------------------------------------------------------------


def read_losses(training: Training) -> dict[int, str]:
    """Step -> loss as it was written. A step that was done again must give the same loss."""
    losses: dict[int, str] = {}
    for line in (training.out / "losses.tsv").read_text().splitlines():
        step, loss = line.split("\t")
        if losses.setdefault(int(step), loss) != loss:
            raise SystemExit(f"{training.title}: step {step} was done again with another loss")
    return losses


def compare(trainings: Sequence[Training], screen: Screen) -> bool:
    """Every loss and every parameter against the uninterrupted run, bit for bit."""
    first, *others = trainings
    losses = read_losses(first)
    parameters = (first.out / "parameters.safetensors").read_bytes()
    fine = True
    for other in others:
        same_losses = read_losses(other) == losses
        same_parameters = (other.out / "parameters.safetensors").read_bytes() == parameters
        screen.line(
            f"{other.title}\n     {len(losses)} losses {_verdict(same_losses)}, "
            f"{len(parameters):,} bytes of parameters {_verdict(same_parameters)}"
        )
        fine = fine and same_losses and same_parameters
    return fine


def _verdict(same: bool) -> str:
    return "equal bit for bit" if same else "DIFFER"


def show_table(trainings: Sequence[Training], screen: Screen) -> None:
    """One row a kill, with what the next process made of it."""
    columns = ("kill", "when", "after step", "resumed from", "at step", "restore", "since start")
    rows: list[tuple[str, ...]] = []
    for training in trainings:
        for attempt, following in zip(training.attempts, training.attempts[1:], strict=False):
            restored = following.source or "nothing"
            rows.append(
                (
                    str(len(rows) + 1),
                    attempt.killed,
                    str(attempt.last_step),
                    restored,
                    str(max(0, following.restored_step)),
                    f"{following.restore_s:.2f} s" if following.source else "",
                    f"{following.start_to_resumed_s:.2f} s" if following.source else "",
                )
            )
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, tuple("-" * width for width in widths), *rows):
        screen.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    screen.line("restore: with starting an agent where that was gone")
    screen.line("since start: from the start of the process; most of it is importing torch")


def draw(trainings: Sequence[Training], path: Path) -> None:
    """The loss curves on top of one another, with a line for every kill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    styles = [("0.75", 7.0, "-"), ("tab:blue", 2.2, "-"), ("tab:orange", 1.2, "--")]
    styles.append(("black", 0.8, ":"))
    for training, (color, width, dashes) in zip(trainings, styles, strict=False):
        losses = read_losses(training)
        window = max(1, len(losses) // 50)
        values = [float(losses[step]) for step in sorted(losses)]
        smooth = [
            sum(part := values[max(0, i - window + 1) : i + 1]) / len(part)
            for i in range(len(values))
        ]
        axes.plot(smooth, color=color, linewidth=width, linestyle=dashes, label=training.title)
        for attempt in training.attempts:
            if attempt.killed:
                axes.axvline(attempt.last_step, color=color, linewidth=0.8, alpha=0.6)
    axes.set(xlabel="step", ylabel="loss (mean of the last steps)", title="Upright lines: SIGKILL")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def lose_the_node(
    places: Places, screen: Screen, args: argparse.Namespace, chance: random.Random
) -> Training:
    """The last act: after every kill the memory and the disk are gone, the store is there."""
    lost = Training("The same, with RAM and disk wiped: a store has the rest", places.work / "lost")
    forget(places)
    with store_server(places.work / "server") as places.store:
        kills = plan_kills([ANYWHERE] * max(1, args.kills // 4), args.steps, chance)
        train(
            *(lost, "train_gpt.py", args.steps, places, screen, kills),
            after_kill=lambda: forget(places),
        )
        stop_agent(places)
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, kill, resume; compare bit for bit.")
    parser.add_argument("--seed", type=int, help="replay the kills of an earlier demo")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--kills", type=int, default=8, help="half as many with RAM wiped")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    chance = random.Random(seed)
    kinds = [ANYWHERE, CAPTURE, FLUSH, FLUSH_AND_AGENT]
    mixed = [kinds[i % len(kinds)] for i in range(args.kills)]
    screen = Screen()
    screen.line(f"A small GPT, {args.steps} steps. The same kills again: --seed {seed}")
    start_s = time.monotonic()
    with make_places() as places:
        work = places.work
        whole = Training("Uninterrupted, without mtckpt", work / "whole")
        killed = Training("Killed with SIGKILL and restarted", work / "killed")
        wiped = Training("The same, with RAM wiped after every kill", work / "wiped")
        train(whole, "train_plain.py", args.steps, places, screen)
        kills = plan_kills(mixed, args.steps, chance)
        train(killed, "train_gpt.py", args.steps, places, screen, kills)
        forget(places)
        kills = plan_kills([ANYWHERE] * (args.kills // 2), args.steps, chance)
        train(
            *(wiped, "train_gpt.py", args.steps, places, screen, kills),
            after_kill=lambda: wipe_ram(places),
        )
        acts = [whole, killed, wiped, lose_the_node(places, screen, args, chance)]
        screen.line()
        show_table(acts[1:], screen)
        screen.line()
        fine = compare(acts, screen)
        args.out.mkdir(exist_ok=True)
        for training in acts:
            shutil.copy(training.out / "losses.tsv", args.out / f"{training.out.name}.tsv")
        draw(acts, args.out / "losses.png")
    screen.line(f"\nPicture: {args.out / 'losses.png'}. {time.monotonic() - start_s:.0f} s in all.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
