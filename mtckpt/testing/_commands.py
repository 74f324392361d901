"""What data processes do, done in ``Directory``s: one command at a time, cut into steps.

Knows the order of the steps, which is that of ``_slots`` and ``_transfer``. Between any two of them
``pause`` may take time, or end it all. Does not decide anything, nor know why it is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from mtckpt import _inventory, _manifest, _transfer
from mtckpt._inventory import shard_keys
from mtckpt._manifest import Record, SaveName
from mtckpt._slots import Slot, SlotFinding
from mtckpt._transfer import Place
from mtckpt.agent import work
from mtckpt.agent.findings import save_scan, slot_scan
from mtckpt.errors import (
    AlreadyExists,
    CheckpointError,
    Damaged,
    ObjectNotFound,
    TierFull,
    TierUnavailable,
)
from mtckpt.testing._copying import Files, has_alike, sound_files, whole_files, why_damaged
from mtckpt.testing._devices import Directory, File, SlotFiles, is_sound, parsed, table_of, thinned
from mtckpt.tiers.base import BytesSource

if TYPE_CHECKING:
    from mtckpt._handshake import PeerAddress

__all__ = ["Commands"]

Pause = Callable[[], Awaitable[None]]


class Commands:
    """Carries commands out in the directories of one node. ``find`` gives the one of a place,
    ``memory_of`` that of another node.

    ``room`` says how many slots fit into memory.
    """

    def __init__(
        self,
        find: Callable[[work.TierRef], Directory],
        memory_of: Callable[[PeerAddress, str, str], Directory],
        room: int = 1000,
    ) -> None:
        self._find = find
        self._memory_of = memory_of
        self.room = room
        self.readers: set[str] = set()  # keys of shards that somebody has a lease of
        self._locks: dict[tuple[int, str], asyncio.Lock] = {}
        self._table: dict[type, Callable[[Any, Pause], Awaitable[work.Result]]] = {
            work.Allocate: self._allocate,
            work.SealSlot: self._seal,
            work.Recycle: self._recycle,
            work.Free: self._free,
            work.Scan: self._scan,
            work.Flush: self._flush,
            work.Complete: self._complete,
            work.Pull: self._pull,
            work.Verify: self._verify,
            work.Delete: self._delete,
            work.Heal: self._heal,
            work.PutSmall: self._put_small,
            work.WriteRunConfig: self._write_config,
            work.ReadRunConfigs: self._read_configs,
            work.WriteJoin: self._write_join,
            work.Wipe: self._wipe,
        }

    async def carry(self, command: Any, pause: Pause, *, again: bool = False) -> work.Result:
        """Do it. ``again``: an earlier try was cut off."""
        for name in ("tier", "source", "target", "bad", "good"):
            ref = getattr(command, name, None)
            if ref is not None and ref.kind != "peers":
                self._find(ref).check()
        if again and isinstance(command, work.Allocate):
            self._find(command.tier).slots.get(command.run_key, {}).pop(command.slot_id, None)
        if isinstance(command, (work.Flush, work.Pull, work.Heal, work.Allocate, work.PutSmall)):
            return await self._table[type(command)](command, pause)
        place = self._find(command.tier)
        async with self._lock(place, getattr(command, "run_key", None) or ""):
            return await self._table[type(command)](command, pause)

    def _lock(self, place: Directory, run_key: str) -> asyncio.Lock:
        return self._locks.setdefault((id(place), run_key), asyncio.Lock())

    # -- slots -----------------------------------------------------------------------------------

    async def _allocate(self, command: work.Allocate, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        slots = place.slots.setdefault(command.run_key, {})
        if command.slot_id in slots:
            raise AlreadyExists("there is a slot of that id", tier=place.name, key=command.slot_id)
        num_shards = sum(key.endswith(".safetensors") for key in place.objects)
        if sum(map(len, place.slots.values())) + num_shards >= self.room:
            raise TierFull("no room for a slot", tier=place.name, needed_bytes=command.shard_bytes)
        slots[command.slot_id] = slot = SlotFiles(File(bytes(command.shard_bytes)))
        await pause()
        slot.table = File(bytes(command.table_bytes))
        return self._answer(command.slot_id, slot)

    def _answer(self, slot_id: str, slot: SlotFiles) -> work.SlotFiles:
        assert slot.data is not None
        assert slot.table is not None
        return work.SlotFiles(
            slot_id,
            slot.data.inode,
            f"{slot_id}.safetensors",
            f"{slot_id}.xxh3",
            f"{slot_id}.json",
            len(slot.data.content),
            len(slot.table.content),
        )

    async def _seal(self, command: work.SealSlot, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        slots = place.slots.setdefault(command.run_key, {})
        slot = slots.get(command.slot_id, SlotFiles())
        self._undo_half_seal(place, command.run_key, slot)
        name = _name(command.save)
        keys = shard_keys(command.run_key, name, command.rank)
        if keys[0] in place.objects and keys[2] in place.objects:
            if place.objects[keys[0]].inode != command.inode:
                raise AlreadyExists("another slot is that shard", tier=place.name, key=keys[0])
            record = parsed(place.objects[keys[2]])
            assert record is not None
            return _sealed(command.save, record, again=True)
        if slot.data is None or slot.data.inode != command.inode:
            raise ObjectNotFound("no such slot", tier=place.name, key=command.slot_id)
        record = parsed(slot.record)
        if (
            record is None
            or slot.table is None
            or (str(record.name), record.rank) != (command.save, command.rank)
            or not is_sound(record, slot.data.content, slot.table.content)
        ):
            slots.pop(command.slot_id, None)
            raise Damaged("what lies in the slot is not that shard", tier=place.name)
        await pause()
        place.objects[keys[0]], slot.data = slot.data, None
        await pause()
        place.objects[keys[1]], slot.table = slot.table, None
        await pause()
        assert slot.record is not None
        place.objects[keys[2]], slot.record = slot.record, None
        slots.pop(command.slot_id, None)
        return _sealed(command.save, record)

    def _undo_half_seal(self, place: Directory, run_key: str, slot: SlotFiles) -> bool:
        record = parsed(slot.record)
        if record is None or (slot.data is not None and slot.table is not None):
            return False
        data_key, table_key, record_key = shard_keys(run_key, record.name, record.rank)
        if record_key in place.objects:
            return False
        moved = False
        if slot.table is None and table_key in place.objects:
            slot.table, moved = place.objects.pop(table_key), True
        if slot.data is None and data_key in place.objects:
            slot.data, moved = place.objects.pop(data_key), True
        return moved

    async def _recycle(self, command: work.Recycle, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        slots = place.slots.setdefault(command.run_key, {})
        data_key, table_key, record_key = shard_keys(
            command.run_key, _name(command.save), command.rank
        )
        slot = slots.get(command.slot_id)
        if data_key in self.readers:
            return work.Recycled(None)
        if data_key in place.objects:
            slot = slots.setdefault(command.slot_id, SlotFiles())
            place.objects.pop(record_key, None)
            await pause()
            if table_key in place.objects:
                table = place.objects[table_key]
                table.content = table_of(b"")
                await pause()
                slot.table = place.objects.pop(table_key)
                await pause()
            slot.data = place.objects.pop(data_key)
            self._drop_notes(place, data_key)
        if slot is None or slot.data is None or slot.table is None:
            slots.pop(command.slot_id, None)
            raise ObjectNotFound("there was no such shard", tier=place.name, key=data_key)
        await pause()
        return work.Recycled(self._answer(command.slot_id, slot))

    async def _free(self, command: work.Free, pause: Pause) -> work.Result:
        slots = self._find(command.tier).slots.get(command.run_key, {})
        slot = slots.get(command.slot_id)
        if slot is None:
            return work.Freed(0)
        self._undo_half_seal(self._find(command.tier), command.run_key, slot)
        slot.record = None
        await pause()
        slot.table = None
        await pause()
        slots.pop(command.slot_id, None)
        return work.Freed(1)

    async def _wipe(self, command: work.Wipe, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        keys = sorted(k for k in place.objects if k.startswith(f"{command.run_key}/"))
        for key in sorted(keys, key=lambda key: _transfer._delete_rank(key)):
            place.objects.pop(key, None)
        await pause()
        place.slots.pop(command.run_key, None)
        for hidden in [each for each in place.hidden if each[0] == command.run_key]:
            del place.hidden[hidden]
        return work.Freed(1)

    # -- looking ---------------------------------------------------------------------------------

    async def _scan(self, command: work.Scan, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        keys = [command.run_key] if command.run_key is not None else self._run_keys(place)
        await pause()
        runs = [self._scan_run(command, place, key) for key in keys]
        return work.Scanned(runs, free_bytes=1 << 40, total_bytes=1 << 40)

    def _run_keys(self, place: Directory) -> list[str]:
        found = {key.partition("/")[0] for key in place.objects}
        return sorted(found | place.slots.keys() | {run_key for run_key, _ in place.hidden})

    def _scan_run(self, command: work.Scan, place: Directory, run_key: str) -> work.RunScan:
        slots = []
        if command.tier.kind == "ram":
            slots = self._scan_slots(place, run_key, repair=command.repair)
            if command.repair:
                self._drop_remains(place, run_key)
        inventory = _inventory.scan(place, run_key, label=command.tier.label or None)
        return work.RunScan(
            run_key,
            [save_scan(save) for _, save in sorted(inventory.saves.items())],
            inventory.incarnations,
            [slot_scan(finding) for finding in slots],
            [],
            inventory.problems,
        )

    def _scan_slots(self, place: Directory, run_key: str, *, repair: bool) -> list[SlotFinding]:
        found = []
        slots = place.slots.get(run_key, {})
        for slot_id, slot in sorted(slots.items()):
            if repair:
                self._undo_half_seal(place, run_key, slot)
            if slot.data is None or slot.table is None:
                if repair:
                    del slots[slot_id]
                continue
            record = parsed(slot.record)
            if record is not None and not is_sound(record, slot.data.content, slot.table.content):
                record = None
            there = self._answer(slot_id, slot)
            described = Slot(
                slot_id, there.inode, there.shard_bytes, there.table_bytes,
                there.data_path, there.table_path, there.record_path,
            )  # fmt: skip
            found.append(SlotFinding(described, 1 if record else 0, record))
        return found

    def _drop_remains(self, place: Directory, run_key: str) -> None:
        """Files of shards that no record speaks for."""
        for key in [k for k in place.objects if k.startswith(f"{run_key}/step-")]:
            file = key.rpartition("/")[2]
            record = key.rpartition(".")[0] + ".json"
            if file.startswith("rank-") and record not in place.objects:
                del place.objects[key]
                self._drop_notes(place, key)

    def _drop_notes(self, place: Directory, key: str) -> None:
        """What else there is of the save of a shard that is gone, if it was the last here."""
        there = [k for k in place.objects if k.startswith(key.rpartition("/")[0] + "/")]
        if not any("/rank-" in each for each in there):
            for each in there:
                del place.objects[each]

    async def _verify(self, command: work.Verify, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        await pause()
        reason = why_damaged(place, command.run_key, _name(command.save), command.rank)
        key = shard_keys(command.run_key, _name(command.save), command.rank)[0]
        return work.Verified(1, 0.0, [work.DamagedKey(key, reason)] if reason else [])

    # -- moving ----------------------------------------------------------------------------------

    async def _flush(self, command: work.Flush, pause: Pause) -> work.Result:
        source, target = self._find(command.source), self._find(command.target)
        name = _name(command.save)
        source.file(shard_keys(command.run_key, name, command.rank)[0])
        if command.incarnation and command.target.kind == "store":
            _inventory.check_newest(target, command.run_key, command.incarnation)
        copied = await self._copy(source, target, command.run_key, name, command.rank, pause)
        done = None
        if command.is_last:
            await pause()
            done = await self._manifest(target, command.target.kind, command, name)
        return work.Flushed(copied, 0.0, done is not None)

    async def _pull(self, command: work.Pull, pause: Pause) -> work.Result:
        source = self._memory_of(command.address, command.run_key, command.secret)
        target, name = self._find(command.target), _name(command.save)
        await pause()
        at = command.run_key, name, command.rank
        try:
            files = sound_files(source, *at)
            if command.mends:
                files = whole_files(source, target, *at) or files
            elif has_alike(target, *at, command.beside, files):
                files = thinned(_manifest.decode_sealed(files[2], Record))
            copied = await self._put_files(target, shard_keys(*at), files, pause)
        except ObjectNotFound as error:
            raise TierUnavailable(f"it is not there: {error.what}", tier="peers") from error
        except Damaged as error:
            raise Damaged(error.what, tier="peers", key=str(error.details["key"])) from error
        return work.Flushed(copied, 0.0, False)

    async def _copy(
        self,
        source: Directory,
        target: Directory,
        run_key: str,
        name: SaveName,
        rank: int,
        pause: Pause,
    ) -> int:
        files = sound_files(source, run_key, name, rank)
        return await self._put_files(target, shard_keys(run_key, name, rank), files, pause)

    async def _put_files(
        self, target: Directory, keys: tuple[str, str, str], files: Files, pause: Pause
    ) -> int:
        stored: list[str] = []
        try:
            for key, content in zip(keys, files, strict=True):
                await pause()
                target.check()
                if key in target.objects and target.objects[key].content == content:
                    continue
                target.objects.pop(key, None)
                target.put(key, BytesSource(content))
                stored.append(key)
        except CheckpointError:
            for key in reversed(stored):
                with contextlib.suppress(CheckpointError):
                    target.delete(key)
            raise
        return len(stored)

    async def _manifest(
        self, place: Directory, kind: str, command: work.Flush | work.Complete, name: SaveName
    ) -> _transfer.Completed | None:
        run_key = command.run_key
        if kind == "store":
            return _transfer.write_manifest(Place(place, place), run_key, name)
        save = _inventory.scan_save(place, run_key, name)
        if save.aborted or not (save.complete or (command.parts and save.records)):
            return None
        key = _inventory.save_key(run_key, name, _manifest.MANIFEST_FILE)
        if key not in place.objects:  # that it was whole is known here
            place.put(key, BytesSource(b"{}"))
        return _transfer.Completed() if save.complete else None

    async def _complete(self, command: work.Complete, pause: Pause) -> work.Result:
        await pause()
        place, name = self._find(command.tier), _name(command.save)
        done = await self._manifest(place, command.tier.kind, command, name)
        return work.Completed(done is not None)

    async def _heal(self, command: work.Heal, pause: Pause) -> work.Result:
        bad, good = self._find(command.bad), self._find(command.good)
        name = _name(command.save)
        reason = why_damaged(good, command.run_key, name, command.rank)
        key = shard_keys(command.run_key, name, command.rank)[0]
        if reason:
            raise Damaged(reason, tier=good.name, key=key)
        replaced = why_damaged(bad, command.run_key, name, command.rank)
        await self._copy(good, bad, command.run_key, name, command.rank, pause)
        return work.Healed([key] if replaced else [])

    async def _delete(self, command: work.Delete, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        prefix, name = f"{command.run_key}/{command.save}/", _name(command.save)
        wanted = {key for key in place.objects if key.startswith(prefix)}
        if command.ranks is not None:
            of_ranks = [shard_keys(command.run_key, name, rank) for rank in command.ranks]
            wanted &= {key for keys in of_ranks for key in keys}
        keys = sorted(wanted, key=lambda key: (_transfer._delete_rank(key), key))
        if any(key in self.readers for key in keys) and command.tier.kind != "store":
            return work.Deleted(busy=True)
        if command.tier.kind == "store":
            from mtckpt import _commit

            _commit.withdraw_marker(place, command.run_key, name)
        for key in keys:
            if command.records_only and _transfer._delete_rank(key):
                break
            place.delete(key)
            await pause()
        return work.Deleted()

    async def _put_small(self, command: work.PutSmall, pause: Pause) -> work.Result:
        place = self._find(command.tier)
        await pause()
        place.check()
        there = place.objects.get(command.key)
        if there is not None and there.content != command.data:
            raise AlreadyExists("other bytes are there", tier=place.name, key=command.key)
        if there is None:
            place.put(command.key, BytesSource(command.data))
        return work.Stored(already=there is not None)

    # -- configuration ---------------------------------------------------------------------------

    async def _write_config(self, command: work.WriteRunConfig, pause: Pause) -> work.Result:
        await pause()
        data = msgspec.json.encode(command.config)
        self._find(command.tier).hidden[command.config.run_key, "config"] = data
        return work.Stored()

    async def _write_join(self, command: work.WriteJoin, pause: Pause) -> work.Result:
        await pause()
        self._find(command.tier).hidden[command.run_key, "join"] = command.data
        return work.Stored()

    async def _read_configs(self, command: work.ReadRunConfigs, pause: Pause) -> work.Result:
        await pause()
        hidden = self._find(command.tier).hidden
        configs = [
            msgspec.json.decode(data, type=work.RunConfig)
            for (_, what), data in sorted(hidden.items())
            if what == "config"
        ]
        joins = {key: data for (key, what), data in sorted(hidden.items()) if what == "join"}
        return work.RunConfigs(configs, [], joins)


def _name(text: str) -> SaveName:
    name = SaveName.parse(text)
    assert name is not None, text
    return name


def _sealed(save: str, record: Record, *, again: bool = False) -> work.SealedSlot:
    return work.SealedSlot(
        save=save,
        save_id=record.save_id,
        step=record.step,
        incarnation=record.incarnation,
        incarnation_id=record.incarnation_id,
        rank=record.rank,
        world_size=record.world_size,
        size_bytes=record.shard.size_bytes,
        due=list(record.due),
        metrics=dict(record.metrics),
        aborted=record.aborted,
        plan_digest=record.plan_digest,
        again=again,
    )
