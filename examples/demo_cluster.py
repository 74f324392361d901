"""Lose a host, go on from the memory of the others: what `make demo-cluster` runs.

Three hosts on this machine, as network namespaces: each has an address, a cable, a memory and a
disk of its own. A small sharded model trains over all of them under torchrun, with copies in the
memory of another host and without any store. One host is lost at a random moment, with all its
processes, its memory and its disk; a replacement with another name goes on from what the others
hold. Then one more is lost, and nobody comes: the job goes on with two.

Ends with 0 only if all losses up to there are those of an uninterrupted run, bit for bit. Without
the rights for namespaces the hosts are directories on the loopback, and that is said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

EXAMPLES = Path(__file__).resolve().parent
SUBNET = "10.78.0."
PORTS = itertools.count(29600)
TIMEOUT_S = 180.0
START_S = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - START_S:6.1f} s  {text}", flush=True)


def train(steps: int, out: Path, every: int) -> None:
    """One rank of the job: what train_fsdp.py does, with copies on other hosts."""
    import mtckpt
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = importlib.import_module("train_fsdp_plain")  # the model, its data and its step

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, mesh = plain.Net(), init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * 0.998**s)
    data = plain.Loader(dist.get_rank())
    tiers = [mtckpt.Ram(every=every), mtckpt.Peers(copies=1)]
    state = {"model": model, "optimizer": optimizer, "lr": lr, "data": data, "rng": mtckpt.rng()}
    with plain.open_losses(out) as losses, mtckpt.Checkpointer("cluster", tiers) as checkpointer:
        restored = checkpointer.restore(state)
        where = ", ".join(
            f"{n / 2**20:.2f} MiB from {tier}" for tier, n in restored.sources.items()
        )
        print(f"RESTORED {restored.next_step} {where or 'nothing'}", flush=True)
        for step in range(restored.next_step, steps):
            loss = plain.train_step(model, optimizer, lr, next(data))
            print(step, loss, sep="\t", file=losses)
            checkpointer.save(step, state)
    dist.barrier()
    dist.destroy_process_group()


# -- hosts -----------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True, timeout=30)


class Cluster:
    """A switch and its hosts, or directories on the loopback where there can be no network."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.switch = f"mtd-{os.getpid()}"
        self.numbers = itertools.count(1)
        self.hosts: list[Host] = []
        self.has_network = os.geteuid() == 0 and shutil.which("ip") is not None
        if self.has_network:
            try:
                ip("netns", "add", self.switch)
                ip("-n", self.switch, "link", "add", "name", "br0", "type", "bridge")
                ip("-n", self.switch, "link", "set", "br0", "up")
            except subprocess.CalledProcessError:
                self.has_network = False

    def host(self, name: str) -> Host:
        self.hosts.append(Host(self, name, next(self.numbers)))
        return self.hosts[-1]

    def close(self) -> None:
        for host in self.hosts:
            host.lose()
            if self.has_network:
                subprocess.run(("ip", "netns", "del", host.namespace), capture_output=True)
        if self.has_network:
            subprocess.run(("ip", "netns", "del", self.switch), capture_output=True)


class Host:
    """One host: an address, a memory, a disk, and the processes that run there."""

    def __init__(self, cluster: Cluster, name: str, number: int) -> None:
        self.cluster, self.name = cluster, name
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.memory = Path(tempfile.mkdtemp(prefix=f"mtckpt-{name}-", dir=shm))
        self.disk = cluster.work / name
        (self.disk / "run").mkdir(parents=True, mode=0o700)
        self.namespace, self.port = f"{cluster.switch}-{number}", f"port{number}"
        self.address = f"{SUBNET}{number}" if cluster.has_network else "127.0.0.1"
        if cluster.has_network:
            self._plug_in()

    def _plug_in(self) -> None:
        ip("netns", "add", self.namespace)
        ip("link", "add", "name", "eth0", "netns", self.namespace, "type", "veth",
           "peer", "name", self.port, "netns", self.cluster.switch)  # fmt: skip
        ip("-n", self.cluster.switch, "link", "set", self.port, "master", "br0", "up")
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            ip("-n", self.namespace, "link", "set", link, "up")

    def start(self, words: Sequence[str], log: IO[str]) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "MTCKPT_RUNTIME_DIR": str(self.disk / "run"),
            "MTCKPT_RAM_DIR": str(self.memory),
            "MTCKPT_PEER_HOST": self.address,
            "MTCKPT_DOMAINS": f"host={self.name}",
            "GLOO_SOCKET_IFNAME": "eth0" if self.cluster.has_network else "lo",
            "OMP_NUM_THREADS": "1",
        }
        inside = ["ip", "netns", "exec", self.namespace] if self.cluster.has_network else []
        command = [*inside, sys.executable, *words]
        return subprocess.Popen(
            command, cwd=self.disk, env=environment, text=True, stdout=log, stderr=log
        )

    def pids(self) -> list[int]:
        """All processes of this host: its agent, its ranks and their launcher."""
        wanted = f"MTCKPT_RUNTIME_DIR={self.disk / 'run'}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def end_job(self) -> None:
        """As a scheduler does when a host is gone: launcher and ranks end, the agent stays."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if b"demo_cluster" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def lose(self) -> None:
        """Cable, processes, memory and disk are gone."""
        if self.cluster.has_network:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("-n", self.cluster.switch, "link", "set", self.port, "down")
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        shutil.rmtree(self.memory, ignore_errors=True)
        shutil.rmtree(self.disk, ignore_errors=True)


# -- the job ---------------------------------------------------------------------------------------


class Job:
    """One start of the job on some hosts, under torchrun."""

    def __init__(self, hosts: Sequence[Host], out: Path, steps: int, every: int) -> None:
        self.hosts, self.out, self.steps = list(hosts), out, steps
        self.logs = [(out / f"job-{next(PORTS)}.log").open("w+") for _ in hosts]
        meeting = [f"--master-addr={hosts[0].address}", f"--master-port={_free_port()}"]
        self.launchers = [
            host.start(
                ["-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node-rank={number}",
                 "--nproc-per-node=1", *meeting, str(EXAMPLES / "demo_cluster.py"),
                 f"--steps={steps}", f"--every={every}", f"--train={out}"],
                self.logs[number],
            )
            for number, host in enumerate(hosts)
        ]  # fmt: skip

    def text(self, number: int) -> str:
        return Path(self.logs[number].name).read_text()

    def wait(self, step: int | None = None) -> None:
        """Until rank 0 has done ``step``, or all ranks have come to the end."""
        deadline_s = time.monotonic() + TIMEOUT_S
        shown = set[int]()
        while any(each.poll() is None for each in self.launchers):
            for number, host in enumerate(self.hosts):
                if number not in shown and (found := _restored(self.text(number))):
                    shown.add(number)
                    say(f"rank {number} on {host.name} begins with step {found[1]}: {found[2]}")
            if step is not None and len(shown) == len(self.hosts) and last_step(self.out) >= step:
                return
            if time.monotonic() > deadline_s or any(each.poll() for each in self.launchers):
                break
            time.sleep(0.02)
        if step is not None or any(each.wait(TIMEOUT_S) for each in self.launchers):
            texts = "\n".join(self.text(number)[-3000:] for number in range(len(self.hosts)))
            raise SystemExit(f"the job failed:\n{texts}")

    def end(self) -> None:
        for host in self.hosts:
            host.end_job()
        for launcher in self.launchers:
            launcher.wait(TIMEOUT_S)


def _restored(text: str) -> re.Match[str] | None:
    return re.search(r"RESTORED (\d+) (.*)\n", text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def losses(out: Path, rank: int) -> dict[int, str]:
    """Step -> loss as it was written; a step that was done again has to give the same."""
    found: dict[int, str] = {}
    path = out / f"losses-{rank}.tsv"
    for line in path.read_text().splitlines() if path.exists() else ():
        step, _, loss = line.partition("\t")
        if found.setdefault(int(step), loss) != loss:
            raise SystemExit(f"rank {rank}: step {step} was done again with another loss")
    return found


def last_step(out: Path) -> int:
    return max(losses(out, 0), default=-1)


def uninterrupted(out: Path, steps: int, ranks: int) -> None:
    """The same training on one host, without mtckpt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(EXAMPLES / "train_fsdp_plain.py")]
    command += [f"--steps={steps}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])


@contextlib.contextmanager
def make_cluster() -> Iterator[Cluster]:
    work = Path(tempfile.mkdtemp(prefix="mtckpt-cluster-"))
    cluster = Cluster(work)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(work, ignore_errors=True)


def play(cluster: Cluster, steps: int, every: int, chance: random.Random) -> bool:
    """The story; whether all losses are those of an uninterrupted run."""
    kind = "network namespaces" if cluster.has_network else "directories on the loopback (no root)"
    hosts = [cluster.host(name) for name in ("ant", "bee", "cat")]
    say(f"three hosts, as {kind}: {', '.join(f'{h.name} {h.address}' for h in hosts)}")
    whole, out = cluster.work / "whole", cluster.work / "out"
    out.mkdir()
    first, second = (int(steps * (part + chance.uniform(0, 0.15))) for part in (0.2, 0.55))
    uninterrupted(whole, second, len(hosts))
    say(f"{second} steps without interruption, to compare with")

    job = Job(hosts, out, steps, every)
    job.wait(first)
    lost = chance.randrange(len(hosts))
    hosts[lost].lose()
    say(f"{hosts[lost].name} is lost after step {last_step(out)}, its memory and disk with it")
    job.end()
    hosts[lost] = cluster.host("dog")
    say("dog comes in its place, and has nothing")
    job = Job(hosts, out, steps, every)
    job.wait(second)
    lost = chance.randrange(1, len(hosts))
    hosts[lost].lose()
    say(f"{hosts[lost].name} is lost after step {last_step(out)}, and nobody comes in its place")
    job.end()
    want, got = ([losses(each, rank) for rank in range(3)] for each in (whole, out))
    same = all(got[rank][step] == loss for rank in range(3) for step, loss in want[rank].items()
               if step in got[rank])  # fmt: skip
    enough = all(len(got[rank]) >= second for rank in range(3))
    say(f"{second} losses of 3 ranks: {'equal bit for bit' if same and enough else 'DIFFER'}")
    (out / "shrunk").mkdir()
    job = Job([host for number, host in enumerate(hosts) if number != lost],
              out / "shrunk", steps, every)  # fmt: skip
    job.wait()
    say(f"two hosts have come to the end: step {last_step(out / 'shrunk')}")
    return same and enough


def main() -> int:
    parser = argparse.ArgumentParser(description="Lose hosts, go on from the memory of the others.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--seed", type=int, help="replay the losses of an earlier demo")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        train(args.steps, args.train, args.every)
        return 0
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    say(f"a small sharded model, {args.steps} steps; the same losses again: --seed {seed}")
    with make_cluster() as cluster:
        fine = play(cluster, args.steps, args.every, random.Random(seed))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
