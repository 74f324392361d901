"""A store behind any fsspec file system: correct for all of them, fast and atomic for none.

It knows fsspec's verbs. It does not know a store's own protocol, so it can only look whether a key
is taken and then write, and says so. s3://, gs:// and az:// have stores of their own and do better.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mtckpt.tiers._store import Entry, Kind, Refused, Stored, redacted

if TYPE_CHECKING:
    from mtckpt.tiers._store import PartStore

__all__ = ["FsspecStore"]


_BY_ERRNO = {
    errno.EISDIR: Kind.MISSING,
    errno.ENOTDIR: Kind.MISSING,
    errno.EACCES: Kind.DENIED,
    errno.EPERM: Kind.DENIED,
    errno.EROFS: Kind.DENIED,
    errno.ENOSPC: Kind.FULL,
    errno.EDQUOT: Kind.FULL,
}


class FsspecStore:
    """Objects as files of ``fs``. What it writes shows whole where the file system can do that."""

    can_create: bool | None = False
    parts: PartStore | None = None

    def __init__(self, fs: Any, place: str, secrets: Iterable[str] = ()) -> None:
        self._fs = fs
        self.place = place
        self._secrets = tuple(secrets)

    def create(self, path: str, blocks: Iterable[memoryview], timeout_s: float) -> None:
        with self._answers():
            self._refuse_taken(path)
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            if isinstance(blocks, list) and not self._commits:
                self._fs.pipe_file(path, b"".join(blocks))
            else:
                self._write(path, blocks)

    @property
    def _commits(self) -> bool:
        """Whether a file shows only when it is told to: it has a temporary name until then."""
        return "file" in self._fs.protocol

    def _write(self, path: str, blocks: Iterable[memoryview]) -> None:
        options = {"autocommit": False} if self._commits else {}
        file = self._fs.open(path, "wb", **options)
        try:
            for block in blocks:
                file.write(block)
            file.close()
            if self._commits:
                self._refuse_taken(path)
                file.commit()
        except BaseException:
            with contextlib.suppress(Exception):
                # What is left of it is a temporary file, which the file system names, or nothing.
                file.discard()
            if not self._commits and not file.closed:
                with contextlib.suppress(Exception):
                    file.closed = True  # Or its destructor would flush it, and show half an object.
                with contextlib.suppress(Exception):
                    self._fs.rm_file(path)  # It was not there before, and is not whole.
            raise

    def fetch(self, path: str, out: memoryview, offset: int, timeout_s: float) -> int:
        with self._answers():
            got: bytes = self._fs.cat_file(path, start=offset, end=offset + len(out))
        if len(got) > len(out):
            raise Refused(Kind.CORRUPTED, f"{len(got)} bytes for a range of {len(out)}")
        out[: len(got)] = got
        return len(got)

    def head(self, path: str, timeout_s: float) -> Stored:
        with self._answers():
            info = self._fs.info(path)
        if info["type"] != "file":
            raise Refused(Kind.MISSING, "is a directory")
        return Stored(int(info["size"]))

    def page(
        self, prefix: str, token: str | None, timeout_s: float
    ) -> tuple[list[Entry], str | None]:
        with self._answers():
            if hasattr(self._fs, "invalidate_cache"):
                self._fs.invalidate_cache()
            entries = list(self._below(prefix.rpartition("/")[0]))
        return sorted(entries, key=lambda entry: entry.path), None

    def _below(self, path: str) -> Iterator[Entry]:
        """All objects. ``find`` of fsspec would leave out what could not be looked at."""
        try:
            found = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return  # nothing there, or inside an object, or it has just gone
        for info in found:
            name = info["name"].rstrip("/")
            if info["type"] == "file":
                yield Entry(name, int(info["size"]))
            elif info["type"] == "directory" and name != path.rstrip("/"):
                yield from self._below(name)

    def delete(self, path: str, timeout_s: float) -> None:
        with self._answers(), contextlib.suppress(FileNotFoundError):
            if self._fs.info(path)["type"] == "file":
                self._fs.rm_file(path)

    def renew(self) -> bool:
        return False

    def secrets(self) -> Iterable[str]:
        return self._secrets

    def close(self) -> None:
        return None  # fsspec shares its file systems, and ends them itself.

    def _refuse_taken(self, path: str) -> None:
        """``exists`` of fsspec would say no whenever it could not look."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._fs.info(path)
            raise Refused(Kind.TAKEN, "it is there")

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001  (every file system raises what it likes)
            refused = self._refused(error)
        else:
            return
        raise refused

    def _refused(self, error: Exception) -> Refused:
        said = redacted(f"{type(error).__name__}: {error}", self._secrets)
        if isinstance(error, FileNotFoundError):
            return Refused(Kind.MISSING, said)
        if isinstance(error, FileExistsError):
            return Refused(Kind.TAKEN, said)
        if isinstance(error, OSError) and error.errno in _BY_ERRNO:
            return Refused(_BY_ERRNO[error.errno], said)
        return Refused(Kind.UNREACHABLE, said)
