"""``mtckpt verify``: compare what is stored with what its records and digests say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from mtckpt.cli import _output
from mtckpt.cli._output import json_option, print_json, print_line, reporting
from mtckpt.cli._target import find, parse_step
from mtckpt.errors import CheckpointError, FormatError, ObjectNotFound, StepNotFound, TierError

if TYPE_CHECKING:
    from mtckpt._inventory import Inventory
    from mtckpt._manifest import Record, SaveEntry
    from mtckpt._places import Place

__all__ = ["check_place", "verify"]

_MAX_FAULTS_A_SAVE = 20


@dataclass(slots=True)
class Checked:
    """One save, or the run's own files, in one tier. ``faults`` are (file, what is wrong)."""

    run: str
    tier: str
    step: int | None
    id: str = ""
    incarnation: int = 0
    checked_bytes: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)


@click.command(short_help="Check files and digests.")
@click.argument("target")
@click.option("--read-data", is_flag=True, help="Also read every tensor and check its digests.")
@click.option("--step", help="A number or a save's id. Default: all steps.")
@json_option
@reporting
def verify(target: str, read_data: bool, step: str | None, as_json: bool) -> int:
    """Check records, headers and digest tables; with --read-data every byte.

    Nothing is changed. Exit status 1 if anything is damaged, missing or incomplete.
    """
    wanted = None if step is None else parse_step(step)
    checked: list[Checked] = []
    with find(target) as found:
        for run, places in found.runs.items():
            for place in places:
                checked += check_place(run, place, wanted, read_data=read_data)
        if not any(item.step is not None for item in checked):
            raise StepNotFound(
                f"{target} has no step" if wanted is None else f"{target} has no step {step}",
                state="nothing was checked",
                step=wanted,
            )
        aside = [
            path for places in found.runs.values() for p in places for path in p.tier.set_aside()
        ]
        notes = [*found.notes, *(f"set aside as damaged before: {path}" for path in aside)]
    if as_json:
        print_json(_object(checked, notes, read_data=read_data))
    else:
        _print(checked, notes, read_data=read_data)
    return _output.WRONG if any(item.faults for item in checked) else _output.FINE


def check_place(
    run: str, place: Place, step: int | str | None, *, read_data: bool
) -> Iterator[Checked]:
    """Check one place, the run's own files first, then each save that ``step`` may mean."""
    from mtckpt import _load
    from mtckpt._progress import progress

    inventory = place.scan()
    if step is None:
        saves = sorted(inventory.saves.values(), key=lambda save: save.name)
        own = Checked(run, place.label, None)
        own.faults = [_split(problem) for problem in inventory.problems]
        if own.faults:
            yield own
    else:
        try:
            saves = _load.candidates(inventory, step)
        except StepNotFound:
            return  # Another tier may have it; that none has is said above.
        saves = saves[:1] if step == "latest" else saves
    total_bytes = sum(save.size_bytes for save in saves) if read_data else 0
    with progress("verify", total_bytes=total_bytes, run=run) as report:
        done_bytes = 0
        for save in saves:
            before = done_bytes

            def done(size_bytes: int, before: int = before) -> None:
                report(before + size_bytes, f"step {save.name.step}")  # noqa: B023 - called within

            item = _check_save(run, place, save, inventory, done, read_data=read_data)
            if item is not None:
                done_bytes += item.checked_bytes
                yield item


def _check_save(
    run: str,
    place: Place,
    save: SaveEntry,
    inventory: Inventory,
    done: Callable[[int], None],
    *,
    read_data: bool,
) -> Checked | None:
    """None for a save that went away while it was looked at: recycled, or deleted by a rule."""
    from mtckpt._places import unusable

    id_ = next((record.save_id for record in save.records.values()), save.name.short_id)
    item = Checked(run, place.label, save.name.step, id_, save.name.incarnation)
    item.faults = [_split(problem) for problem in save.problems]
    if not save.aborted:
        lines = [line for line in unusable(save) if line not in save.problems]
        item.faults += [(str(save.name), line) for line in lines]
        for record in save.records.values():
            try:
                _check_shard(place, save, record, item, done, read_data=read_data)
            except ObjectNotFound as error:
                if _is_gone(place, save, record):
                    return None
                item.faults.append((str(error.details.get("key", "")), "is missing"))
            except (FormatError, TierError) as error:
                item.faults.append(_fault(error))
    item.faults += _check_manifest(place, save)
    return item


def _check_shard(
    place: Place,
    save: SaveEntry,
    record: Record,
    item: Checked,
    done: Callable[[int], None],
    *,
    read_data: bool,
) -> None:
    from mtckpt._load import state_of
    from mtckpt._reading import open_shard

    shard = open_shard(place, save.name, record)
    try:
        state_of(shard)
        item.checked_bytes += shard.layout.data_start
        for tensor in shard.layout.tensors if read_data else ():
            try:
                shard.read(tensor)
            except FormatError as error:
                item.faults.append(_fault(error))
            item.checked_bytes += tensor.size_bytes
            done(item.checked_bytes)
    finally:
        shard.close()


def _check_manifest(place: Place, save: SaveEntry) -> list[tuple[str, str]]:
    """A manifest is never believed, but one that lies is a sign of damage. It may be missing."""
    from xxhash import xxh3_128_hexdigest

    from mtckpt import _inventory, _manifest
    from mtckpt.tiers.base import read_all

    key = _inventory.save_key(place.run_key, save.name, _manifest.MANIFEST_FILE)
    try:
        manifest = _inventory.read_manifest(place.tier, place.run_key, save.name)
        if manifest is None:
            return []
        if _manifest.save_name(manifest.step, manifest.incarnation, manifest.save_id) != save.name:
            return [(key, "the manifest is of another save")]
        for entry in manifest.shards:
            record_key = _inventory.shard_keys(place.run_key, save.name, entry.rank)[2]
            record = read_all(place.tier, record_key, max_bytes=_manifest.MAX_RECORD_BYTES)
            if xxh3_128_hexdigest(record) != entry.record_digest:
                return [(key, f"the manifest names another record of rank {entry.rank}")]
    except ObjectNotFound as error:
        return [(key, f"the manifest names a record that is missing: {error.details.get('key')}")]
    except (FormatError, TierError) as error:
        return [(key, error.what)]
    return []


def _is_gone(place: Place, save: SaveEntry, record: Record) -> bool:
    from mtckpt import _inventory

    try:
        place.tier.stat(_inventory.shard_keys(place.run_key, save.name, record.rank)[2])
    except ObjectNotFound:
        return True
    except TierError:
        return False
    return False


def _fault(error: CheckpointError) -> tuple[str, str]:
    facts = [
        f"{name} {error.details[name]}"
        for name in ("tensor", "leaf", "chunk", "offset")
        if name in error.details
    ]
    return str(error.details.get("key", "")), ", ".join([error.what, *facts])


def _split(problem: str) -> tuple[str, str]:
    key, _, what = problem.partition(": ")
    return (key, what) if what else ("", problem)


def _object(checked: list[Checked], notes: list[str], *, read_data: bool) -> dict[str, Any]:
    return {
        "ok": not any(item.faults for item in checked),
        "read_data": read_data,
        "checked": [
            {
                "run": item.run,
                "tier": item.tier,
                "step": item.step,
                "incarnation": item.incarnation,
                "id": item.id,
                "checked_bytes": item.checked_bytes,
                "faults": [{"file": file, "what": what} for file, what in item.faults],
            }
            for item in checked
        ],
        "notes": notes,
    }


def _print(checked: list[Checked], notes: list[str], *, read_data: bool) -> None:
    from mtckpt._handle import size_text

    for note in notes:
        print_line(f"note: {note}")
    for item in checked:
        what = "the run's own files" if item.step is None else f"step {item.step}"
        verdict = "damaged" if item.faults else "ok"
        size = f"{size_text(item.checked_bytes)} read" if item.step is not None else ""
        parts = [f"{item.run} {what}", item.tier, verdict, *([size] if size else [])]
        print_line(", ".join(parts))
        for file, fault in item.faults[:_MAX_FAULTS_A_SAVE]:
            print_line(f"  {file}: {fault}" if file else f"  {fault}")
        if len(item.faults) > _MAX_FAULTS_A_SAVE:
            print_line(f"  and {len(item.faults) - _MAX_FAULTS_A_SAVE} more")
    wrong = sum(bool(item.faults) for item in checked)
    if wrong:
        print_line(f"{wrong} of {len(checked)} checked have faults; nothing was changed")
    elif not read_data:
        print_line("all well; --read-data checks the tensors' bytes too")
    else:
        print_line("all well, every byte")
