"""A checkpoint written as a directory that ``dcp.load`` reads: a band of an array at a time.

Knows what DCP's reader wants to find. The directory appears whole or not at all. What is written
are pickles, as DCP's are, of verified bytes; none is read.
"""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from mtckpt.adapters.torch import dcp_catalog
from mtckpt.errors import AccessDenied, TierFull, TierUnavailable, UsageError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from mtckpt._manifest import Record

__all__ = ["write"]

_METADATA = ".metadata"
_DATA = "__0_0.distcp"
BAND_BYTES = 32 * 1024 * 1024

_Offsets = tuple[int, ...]
_Bands = Callable[[str, "int | None", int], Iterator[tuple[_Offsets, torch.Tensor]]]


def write(directory: Path, records: Mapping[int, Record], bands: _Bands) -> int:
    """Write a save to ``directory``, which must not be there; returns the bytes of its tensors.

    Args:
        records: what the save says of itself, by rank.
        bands: gives the array at a path, as a rank has it (None is the first that has it), in
            pieces of up to so many bytes, each with its offsets.

    Raises:
        UsageError: the directory is there. UnsupportedState: a type that torch lacks.
        TierFull, AccessDenied, TierUnavailable: it could not be written; nothing is left.
    """
    if directory.exists():
        raise UsageError(
            f"{directory} is there already",
            state="nothing was done",
            actions=("name a directory that is not there yet: it is made",),
        )
    catalog = dcp_catalog.make(records, 0, private=True)
    temporary = directory.parent / f".{directory.name}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        with open(temporary / _DATA, "wb") as file:
            size_bytes, places = _write_data(file, catalog, bands)
            file.flush()
            os.fsync(file.fileno())
        catalog.metadata.storage_data = places
        with open(temporary / _METADATA, "wb") as file:
            pickle.dump(catalog.metadata, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, directory)
    except OSError as error:
        full, denied = error.errno == 28, isinstance(error, PermissionError)
        kind = TierFull if full else AccessDenied if denied else TierUnavailable
        raise kind(
            f"{directory} could not be written: {error}", state="nothing was left there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size_bytes


def _write_data(
    file: BinaryIO, catalog: dcp_catalog.Catalog, bands: _Bands
) -> tuple[int, dict[MetadataIndex, Any]]:
    """Every value after the other, as ``torch.save`` has it, and where each lies.

    Each band of an array is a chunk to DCP, and told in its metadata.
    """
    places: dict[MetadataIndex, Any] = {}
    size_bytes = 0

    def add(index: MetadataIndex, value: Any) -> None:
        start = file.tell()
        torch.save(value, file)
        places[index] = _StorageInfo(_DATA, start, file.tell() - start)

    def fill(path: str, array: Any) -> None:
        """Into an array inside a value, which was just made."""
        for offsets, found in bands(path, None, BAND_BYTES):
            at = tuple(
                slice(start, start + size) for start, size in zip(offsets, found.shape, strict=True)
            )
            if isinstance(array, torch.Tensor):
                array[at].copy_(found)
            else:
                bits = found.contiguous().reshape(-1).view(torch.uint8).numpy()
                array[at] = bits.view(array.dtype).reshape(tuple(found.shape))

    metadata: Any  # of two kinds: those with chunks are the arrays
    for name, metadata in catalog.metadata.state_dict_metadata.items():
        known = catalog.arrays.get(name)
        if known is None:
            add(MetadataIndex(name), catalog.value(name, fill)())
            continue
        chunks: list[ChunkStorageMetadata] = []
        for offsets, tensor in bands(known.path, known.rank, BAND_BYTES):
            size_bytes += tensor.nbytes
            add(MetadataIndex(name, offsets, len(chunks)), tensor)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
        metadata.chunks = chunks
    return size_bytes, places
