"""Runs and saves at a place that somebody names: a tier, a run in it, or one save, or a copy.

A directory, or the URL of a store. Knows how to tell these apart, and gives each the keys of a
tier, so that one way of reading serves all. Does not read shards and writes nothing. What a place
is called is not believed: a copied save may lie anywhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtckpt import _inventory, _manifest
from mtckpt._access import Access, check_url, open_store
from mtckpt._manifest import Record, SaveEntry, SaveName
from mtckpt.errors import FormatError, TierReadOnly, UsageError
from mtckpt.tiers._os_errors import tier_error
from mtckpt.tiers.base import ObjectInfo, PutResult, Source, Survives, check_key, read_all
from mtckpt.tiers.local import Lease, LocalTier

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mtckpt._inventory import Inventory
    from mtckpt.tiers.base import Tier

__all__ = [
    "Location",
    "Place",
    "is_directory",
    "is_location",
    "open_places",
    "unusable",
]

Location = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Place:
    """One run as it lies at ``where``, a path or URL; ``tier`` has it under ``run_key``."""

    tier: View
    run_key: str
    where: str

    @property
    def label(self) -> str:
        return self.tier.name

    @property
    def name(self) -> str:
        """What the place itself is called."""
        return self.where.rpartition("/")[2]

    def scan(self) -> Inventory:
        """Read all records, now."""
        return _inventory.scan(self.tier, self.run_key)

    def close(self) -> None:
        self.tier.close()


class View:
    """A tier as if it lay under ``prefix`` in another, for reading and perhaps deleting."""

    def __init__(self, tier: Tier, prefix: str, *, writable: bool = False) -> None:
        self.name = tier.name
        self.survives: Survives = tier.survives
        self._tier = tier
        self._prefix = prefix
        self._writable = writable

    def put(self, key: str, source: Source) -> PutResult:
        raise self._refused(key)

    def delete(self, key: str) -> None:
        """See ``Tier.delete``."""
        if not self._writable:
            raise self._refused(key)
        self._tier.delete(self._inner(key))

    def read_into(self, key: str, out: memoryview, offset: int = 0) -> None:
        """See ``Tier.read_into``."""
        self._tier.read_into(self._inner(key), out, offset)

    def stat(self, key: str) -> ObjectInfo:
        """See ``Tier.stat``."""
        return ObjectInfo(key, self._tier.stat(self._inner(key)).size_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See ``Tier.list``; everything of a view lies under its prefix."""
        inner = self._inner(prefix) if prefix.startswith(self._prefix) else ""
        for info in self._tier.list(inner):
            key = self._prefix + info.key
            if key.startswith(prefix):
                yield ObjectInfo(key, info.size_bytes)

    def set_aside(self) -> Iterator[str]:
        """Paths of what was found damaged before and taken out of the way."""
        return iter(())

    def close(self) -> None:
        self._tier.close()

    def _inner(self, key: str) -> str:
        return key.removeprefix(self._prefix)

    def _refused(self, key: str) -> TierReadOnly:
        return TierReadOnly(
            f"{key} was opened for reading only", state="nothing was changed", tier=self.name
        )


class DirectoryView(View):
    """A view of a directory, whose files are leased while they are read."""

    def __init__(self, tier: LocalTier, prefix: str, *, writable: bool) -> None:
        super().__init__(tier, prefix, writable=writable)
        self._directory = tier

    def lease(self, key: str) -> Lease:
        """See ``LocalTier.lease``."""
        return self._directory.lease(self._inner(key))

    def try_exclusive(self, key: str) -> AbstractContextManager[int | None]:
        """See ``LocalTier.try_exclusive``."""
        return self._directory.try_exclusive(self._inner(key))

    def set_aside(self) -> Iterator[str]:
        """See ``View.set_aside``."""
        return (str(item.path) for item in self._directory.quarantined())


def is_location(target: str) -> bool:
    """Whether a word of the user's is a place; else it is the name of a run."""
    return "/" in target or os.sep in target or target in (".", "..")


def open_places(location: Location, label: str, *, writable: bool = False) -> list[Place]:
    """The runs at ``location``, by name; several only where a tier holds several.

    ``label`` is what a directory is called as a tier; ``writable`` allows to delete. Raises
    UsageError where there is none, and TierError where it may not be read.
    """
    if "://" in os.fspath(location):
        return _in_store(check_url(os.fspath(location)), writable=writable)
    path = _directory(location)
    kind = _kind(path)
    if kind == "save":
        return [_one_save(path, label, writable=writable)]
    runs = [path] if kind == "run" else sorted(_subdirectories(path))
    return [_one_run(run, label, writable=writable) for run in runs if _kind(run) == "run"]


def _directory(location: Location) -> Path:
    text = os.fspath(location)
    try:
        path = Path(text).expanduser()
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{text}: {error}", state="nothing was read", path=text) from error
    if not is_directory(path):
        # A run whose name is no file name lies in a directory that is called otherwise.
        by_key = path.parent / _manifest.run_key(path.name or "run")
        if is_directory(by_key):
            return by_key
        what = "is a file, not a directory" if os.path.isfile(path) else "does not exist"
        usual = Path("checkpoints", by_key.name)  # where a run is that names no tiers
        found = [f"there is a run of that name: {usual}"] if is_directory(usual) else []
        raise UsageError(
            f"{path} {what}",
            state="nothing was read",
            actions=(*found, "give a tier's directory, a run in it, or one save of that"),
            path=str(path),
        )
    return path


def is_directory(path: Path, tier: str = "disk") -> bool:
    """Whether a directory is there. Raises TierError where that cannot be looked at: then nobody
    knows what is in it."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return False  # No directory can be called that.
        raise tier_error(error, doing="open", tier=tier, key=None, place=str(path)) from error


def _kind(path: Path) -> str:
    """What a directory is, from the names in it: "save", "run", or "" for anything else."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if _manifest.parse_record_file(entry.name) is not None:
                    return "save"
                if SaveName.parse(entry.name) or (
                    _manifest.parse_incarnation_file(entry.name) is not None
                ):
                    return "run"
    except PermissionError:
        return "run"  # Opening it as one will say what is the matter.
    return "save" if SaveName.parse(path.name) else ""


def _subdirectories(path: Path) -> Iterator[Path]:
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _one_run(path: Path, label: str, *, writable: bool) -> Place:
    key = _key_for(path.name)
    tier = LocalTier(path, name=label, read_only=not writable)
    return Place(DirectoryView(tier, f"{key}/", writable=writable), key, str(path))


def _key_for(name: str) -> str:
    """A key for a run in this process; that of its place where that is one, to be read."""
    try:
        return check_key(name)
    except UsageError:
        return "run"


def _one_save(path: Path, label: str, *, writable: bool) -> Place:
    tier = LocalTier(path, name=label, read_only=not writable)
    key, name = _key_for(path.parent.name), _name_of_save(path.name, tier)
    return Place(DirectoryView(tier, f"{key}/{name}/", writable=writable), key, str(path))


def _in_store(url: str, *, writable: bool) -> list[Place]:
    """As for a directory; what lies there is told from the first key, and all runs from all."""
    with ExitStack() as opened:
        tier = open_store(url, Access())
        opened.callback(tier.close)
        prefix, runs = _found_in(tier, url)
        if prefix:
            places = [Place(View(tier, prefix, writable=writable), prefix.partition("/")[0], url)]
            opened.pop_all()
            return places
        places = []
        for run in runs:
            within = f"{url}/{run}"
            inner = open_store(within, Access())
            opened.callback(inner.close)
            places.append(Place(View(inner, f"{run}/", writable=writable), run, within))
        opened.pop_all()
        tier.close()
        return places


def _found_in(tier: Tier, url: str) -> tuple[str, list[str]]:
    """What a place in a store has in a tier before it: of one run or one save; or all its runs."""
    *_, parent, last = ["", *url.split("/")]
    runs: dict[str, None] = {}
    for info in tier.list():
        head, _, rest = info.key.partition("/")
        if not rest and _manifest.parse_record_file(head) is not None:
            return f"{_key_for(parent)}/{_name_of_save(last, tier)}/", []
        if _is_of_run(info.key):
            return f"{_key_for(last)}/", []
        if _is_of_run(rest):
            runs.setdefault(head)
    return "", list(runs)


def _is_of_run(key: str) -> bool:
    """True for what lies in a run and nowhere else."""
    head, _, rest = key.partition("/")
    if head == "commit":
        return _manifest.parse_commit_file(rest) is not None
    return bool(SaveName.parse(head)) or _manifest.parse_incarnation_file(head) is not None


def _name_of_save(last: str, tier: Tier) -> SaveName:
    return _name_in_records(tier) or SaveName.parse(last) or SaveName(0, 0, "0" * 12)


def _name_in_records(tier: Tier) -> SaveName | None:
    for info in tier.list():
        if _manifest.parse_record_file(info.key) is None:
            continue
        try:
            data = read_all(tier, info.key, max_bytes=_manifest.MAX_RECORD_BYTES)
            record = _manifest.decode_sealed(data, Record)
        except FormatError:
            continue  # Another rank's record may be sound; the scan reports this one.
        return _manifest.save_name(record.step, record.incarnation, record.save_id)
    return None


def unusable(save: SaveEntry) -> list[str]:
    """Why a save cannot be read, one line a fault; nothing for one that can, as records tell."""
    lines = list(save.problems)
    if save.aborted:
        lines.append(f"called off: {save.aborted}")
    elif not save.records:
        lines.append("no record is there")
    elif not save.complete:
        wanted = next(iter(save.records.values())).world_size
        lacking = [rank for rank in range(wanted) if rank not in save.records]
        if lacking:
            some = ", ".join(map(str, lacking[:8])) + (", ..." if len(lacking) > 8 else "")
            lines.append(f"records of {len(lacking)} of {wanted} ranks are missing: {some}")
        else:
            lines.append("records of different saves lie together")
    return lines
