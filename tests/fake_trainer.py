"""A trainer without a framework: it speaks the agent's protocol and fills slots by hand.

In a test it is an object; as a program it does the same in a process of its own that can be
killed: one command a line on stdin, one JSON line of answer on stdout.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from mtckpt import _manifest, _shard
from mtckpt._session import start_ticks
from mtckpt.agent import protocol
from mtckpt.agent.client import AgentClient
from mtckpt.agent.protocol import TierConfig
from mtckpt.agent.spawn import ensure_agent
from mtckpt.errors import CheckpointError

SIZE_BYTES = 600_000


def body_of(step: int, size_bytes: int = SIZE_BYTES) -> bytes:
    """What the one tensor holds at a step."""
    return bytes([step % 251, (step // 251) % 251, 7]) * (size_bytes // 3)


class FakeTrainer:
    """One Checkpointer, by hand."""

    def __init__(
        self,
        run: str,
        tiers: list[TierConfig] | None = None,
        *,
        size_bytes: int = SIZE_BYTES,
        count: int = 3,
        ram_path: str = "",
        token: str = "",
        timeout_s: float = 20.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.run, self.key = run, _manifest.run_key(run)
        self.rank, self.world_size = rank, world_size
        self.tiers = tiers or []
        self.size_bytes = size_bytes
        self.count = count
        self.ram_path = ram_path or protocol.ram_base()
        self.token = token
        self.holder = uuid.uuid4().hex
        self.incarnation = 0
        self.incarnation_id = ""
        self.next_slot: protocol.SlotGrant | None = None
        self.held: dict[str, int] = {}
        self.layout = _shard.plan_layout([("w", "uint8", (size_bytes // 3 * 3,))])
        self.client = AgentClient(ensure_agent(timeout_s), timeout_s)

    def call(
        self, verb: str, message: Any, type_: type[Any], timeout_s: float | None = None
    ) -> Any:
        return self.client.call(f"/v1/runs/{self.key}/{verb}", message, type_, timeout_s)

    def open(self) -> protocol.Opened:
        self.client.close()
        self.client = AgentClient(ensure_agent(20.0), 20.0)
        held = dict(self.held)
        if self.next_slot is not None:
            held[self.next_slot.slot_id] = self.next_slot.inode
        message = protocol.Open(
            protocol.PROTOCOL_VERSION,
            self.run,
            self.holder,
            self.rank,
            self.world_size,
            os.getpid(),
            start_ticks(os.getpid()),
            os.getppid(),
            self.ram_path,
            self.tiers,
            self.incarnation,
            held,
            self.token,
        )
        opened: protocol.Opened = self.call("open", message, protocol.Opened)
        return opened

    def begin(self, number: int = 1, parent: tuple[int, int] | None = None) -> protocol.Begun:
        id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.holder}:{number}"))
        message = protocol.Begin(self.holder, number, id_, parent)
        begun: protocol.Begun = self.call("incarnation", message, protocol.Begun)
        self.incarnation, self.incarnation_id = number, id_
        return begun

    def slot(self, wait_s: float = 5.0) -> protocol.Slots:
        """A slot of the agent's, or the reason why there is none."""
        if self.next_slot is not None:
            slot, self.next_slot = self.next_slot, None
            return protocol.Slots(slot)
        want = protocol.WantSlots(
            self.holder, self.layout.size_bytes, self.layout.table_bytes, self.count, wait_s
        )
        slots: protocol.Slots = self.call("slots", want, protocol.Slots)
        return slots

    def save_id(self, step: int) -> str:
        return _manifest.save_id(self.incarnation_id, step, 0)

    def capture(
        self, step: int, slot: protocol.SlotGrant, due: list[str], *, finish: bool = True
    ) -> protocol.Seal:
        """Fill a slot; without ``finish`` the generation word is left out."""
        self.held[slot.slot_id] = slot.inode
        body = body_of(step, self.size_bytes)
        with open(slot.data_path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
            assert os.fstat(file.fileno()).st_ino == slot.inode
            data[: self.layout.data_start] = self.layout.header
            data[self.layout.data_start :] = body
        digests = b"".join(
            xxh3_64_intdigest(body[at : at + _shard.CHUNK_BYTES]).to_bytes(8, "little")
            for at in range(0, len(body), _shard.CHUNK_BYTES)
        )
        save_id = self.save_id(step)
        header = _shard.Table.header(self.layout, _manifest.generation_of(save_id))
        record = self._record(step, save_id, header + digests, digests, due)
        at = _shard.GENERATION_OFFSET
        with open(slot.table_path, "r+b") as file, mmap.mmap(file.fileno(), 0) as table:
            table[:] = header[:at] + bytes(8) + header[at + 8 :] + digests
            with open(slot.record_path, "wb") as record_file:
                os.fchmod(record_file.fileno(), os.fstat(file.fileno()).st_mode & 0o660)
                record_file.write(_manifest.encode_sealed(record))
            if finish:
                table[at : at + 8] = header[at : at + 8]
        return protocol.Seal(self.holder, slot.slot_id, slot.inode, save_id, step, due)

    def _record(
        self, step: int, save_id: str, table: bytes, digests: bytes, due: list[str]
    ) -> _manifest.Record:
        roots = _shard.root_digests(self.layout, memoryview(digests).cast("Q"))
        entry = _manifest.ArrayEntry("w", "uint8", (self.size_bytes // 3 * 3,), "numpy")
        return _manifest.Record(
            version=_manifest.FORMAT_VERSION,
            run=self.run,
            step=step,
            incarnation=self.incarnation,
            incarnation_id=self.incarnation_id,
            save_id=save_id,
            rank=0,
            world_size=1,
            plan_digest=xxh3_128_hexdigest(self.layout.header),
            shard=_manifest.ShardEntry(
                self.layout.size_bytes,
                self.layout.data_start,
                f"{self.layout.header_digest:016x}",
                xxh3_128_hexdigest(table),
                _shard.CHUNK_BYTES,
            ),
            roots=base64.b64encode(roots).decode(),
            arrays=msgspec.Raw(msgspec.json.encode([entry])),
            structure=msgspec.Raw(b"{}"),
            plain=msgspec.Raw(b"[]"),
            due=tuple(due),
        )

    def seal(self, seal: protocol.Seal) -> protocol.Sealed:
        sealed: protocol.Sealed = self.call("seal", seal, protocol.Sealed)
        self.next_slot = sealed.next_slot
        return sealed

    def save(self, step: int, due: list[str] | None = None) -> protocol.Sealed:
        slots = self.slot()
        assert slots.grant is not None, slots.reason
        return self.seal(self.capture(step, slots.grant, due or []))

    def changes(self, since: int = 0, timeout_s: float = 0.0) -> protocol.Changes:
        path = f"changes?since={since}&timeout_s={timeout_s}&holder={self.holder}"
        changes: protocol.Changes = self.call(path, None, protocol.Changes, timeout_s + 20.0)
        return changes

    def wait(self, step: int, what: Any, timeout_s: float = 15.0) -> protocol.SaveChange:
        """Poll until ``what(change)`` holds for the save of a step."""
        seq = 0
        deadline = _now() + timeout_s
        last: Any = None
        while _now() < deadline:
            changes = self.changes(seq, 1.0)
            seq = changes.seq
            for change in changes.saves:
                if change.step == step:
                    last = change
                    if what(change):
                        return change
        raise AssertionError(f"step {step} stands at {last}")

    def wait_stage(self, step: int, stage: str, timeout_s: float = 15.0) -> protocol.SaveChange:
        return self.wait(step, lambda change: stage in change.stages, timeout_s)

    def flush(self) -> None:
        self.call("flush", protocol.Flush(self.holder), protocol.Done)

    def close(self, *, free_ram: bool = True) -> None:
        self.call("close", protocol.Close(self.holder, free_ram), protocol.Done)
        self.client.close()

    def status(self) -> protocol.AgentStatus:
        status: protocol.AgentStatus = self.client.call("/status", None, protocol.AgentStatus)
        return status

    def run_status(self) -> protocol.RunStatus:
        return next(run for run in self.status().runs if run.run == self.run)


def _now() -> float:
    import time

    return time.monotonic()


def disk(path: Path, label: str = "disk", keep: int = 0) -> TierConfig:
    return TierConfig(label, "disk", str(path), [{"last": keep}] if keep else [])


class TrainerProcess:
    """A FakeTrainer in a process of its own. ``do`` sends a line and returns the answer."""

    def __init__(
        self,
        run: str,
        tiers: list[TierConfig] | None = None,
        program: Sequence[str] = (sys.executable,),
        **options: Any,
    ) -> None:
        spec = {"run": run, "tiers": [msgspec.to_builtins(t) for t in tiers or []], **options}
        self.process = subprocess.Popen(
            [*program, __file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self.process.stdout is not None
        self._stdout = self.process.stdout

    @property
    def pid(self) -> int:
        return self.process.pid

    def do(self, *words: Any, timeout_s: float = 30.0) -> Any:
        """The answer; an error of ours is raised as what it was."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        timer = threading.Timer(timeout_s, self.process.kill)
        timer.start()
        try:
            line = self._stdout.readline()
        finally:
            timer.cancel()
        assert line, f"the trainer ended at {words}"
        kind, value = json.loads(line)
        if kind == "error":
            raise protocol.error_from_wire(msgspec.convert(value, protocol.WireError))
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def main(spec: dict[str, Any]) -> None:
    """Carry out lines: ``["open"]``, ``["begin", 1]``, ``["save", 10, ["disk"]]``, ..."""
    tiers = [msgspec.convert(tier, TierConfig) for tier in spec.pop("tiers")]
    trainer = FakeTrainer(tiers=tiers, **spec)
    pending: protocol.Seal | None = None
    for line in sys.stdin:
        verb, *words = json.loads(line)
        try:
            result: Any = None
            if verb == "capture":
                slots = trainer.slot()
                assert slots.grant is not None, slots.reason
                step, due, finish = words
                pending = trainer.capture(step, slots.grant, due, finish=finish)
            elif verb == "seal":
                assert pending is not None
                result = trainer.seal(pending)
            elif verb == "fork":  # a data loader's worker: it inherits everything, and stays
                result = os.fork()
                if result == 0:
                    import time

                    time.sleep(60)
                    os._exit(0)
            else:
                result = getattr(trainer, verb)(*words)
            answer = ["ok", msgspec.to_builtins(result)]
        except CheckpointError as error:
            answer = ["error", msgspec.to_builtins(protocol.error_to_wire(error))]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
