"""The kernels of ``kernels.cu`` on one device: digest and copy, copy, compare.

Knows how they are loaded and launched, and what a row of their table is. Does not know whose bytes
they are, where tables lie, or when what was launched is done: that is the stream's and its owner's.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING

from mtckpt.capture.driver import CudaError

if TYPE_CHECKING:
    from mtckpt.capture.driver import Driver

__all__ = ["ROW", "Kernels", "machine_code_for"]

logger = logging.getLogger(__name__)

ROW = struct.Struct("<4Q")
"""A row of a table: source address, target address or 0, size in bytes, index of the digest.

An ``array("Q")`` of four numbers a row is the same. A row is the work of one warp, so one that has
more bytes than a chunk is right, and slow.
"""

_THREADS = 128  # as THREADS in kernels.cu
_ROWS_A_BLOCK = _THREADS // 32
_MACHINE_CODE = re.compile(r"kernels\.sm_(\d+)(\d)\.cubin\.zlib")


def machine_code_for(capability: tuple[int, int], files: Iterable[str]) -> str | None:
    """The file that devices of a compute capability run: of the same major, the nearest minor."""
    found = {}
    for file in files:
        if match := _MACHINE_CODE.fullmatch(file):
            found[int(match[1]), int(match[2])] = file
    fitting = [of for of in found if of[0] == capability[0] and of[1] <= capability[1]]
    return found[max(fitting)] if fitting else None


class Kernels:
    """The kernels, loaded for one device. Any thread may launch them.

    All addresses are device memory. Each launch is asynchronous, in the order of its stream, and is
    made with the device's context current; table, sources and targets have to stay until it is
    done. Sources and targets have any size and alignment. No two rows write the same bytes.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        """Raises CudaError if the driver takes neither machine code nor PTX for the device."""
        self._driver = driver
        self._ordinal = ordinal
        with driver.current(ordinal):
            self._module, self.image = self._load()
            self._digest_copy = driver.function(self._module, "mtckpt_digest_copy")
            self._gather = driver.function(self._module, "mtckpt_gather")
            self._verify = driver.function(self._module, "mtckpt_verify")
            self._place = driver.function(self._module, "mtckpt_place")

    def _load(self) -> tuple[int, str]:
        """The loaded module, and the name of the file that it comes from.

        Machine code first: the driver may take half a second to compile PTX.
        """
        folder = resources.files("mtckpt.capture")
        files = [file.name for file in folder.iterdir()]
        file = machine_code_for(self._driver.compute_capability(self._ordinal), files)
        if file is not None:
            image = zlib.decompress(folder.joinpath(file).read_bytes())
            try:
                return self._driver.load_module(image), file
            except CudaError as error:  # one that is not about the image, PTX meets again
                logger.info("%s is not for this device or driver: %s", file, error)
        file = "kernels.ptx"
        return self._driver.load_module(folder.joinpath(file).read_bytes()), file

    def digest_copy(self, stream: int, rows: int, num_rows: int, digests: int) -> None:
        """``digests[index]`` (u64) = the XXH3-64 of the source of each row.

        Where a row has a target, what was digested is copied there.
        """
        self._launch(self._digest_copy, stream, rows, num_rows, digests)

    def gather(self, stream: int, rows: int, num_rows: int) -> None:
        """Copy the source of each row to its target."""
        self._launch(self._gather, stream, rows, num_rows)

    def verify(self, stream: int, rows: int, num_rows: int, digests: int, bad: int) -> None:
        """``bad[index]`` (u8) = 1 where the source's digest is not ``digests[index]``.

        Nothing is written where it is: the caller has set all of ``bad`` to 0. Targets are ignored.
        """
        self._launch(self._verify, stream, rows, num_rows, digests, bad)

    def place(self, stream: int, rows: int, num_rows: int, digests: int, bad: int) -> None:
        """Copy the source of each row to its target, if it has one and its digest is right.

        ``bad[index]`` (u8) = 1 for the others, of which nothing is copied.
        """
        self._launch(self._place, stream, rows, num_rows, digests, bad)

    def _launch(self, function: int, stream: int, rows: int, num_rows: int, *more: int) -> None:
        if num_rows:
            blocks = -(-num_rows // _ROWS_A_BLOCK)
            self._driver.launch(function, blocks, _THREADS, 0, stream, rows, num_rows, *more)

    def close(self) -> None:
        """Unload them. Nothing launched may be under way."""
        if self._module:
            with self._driver.current(self._ordinal):
                self._driver.unload(self._module)
            self._module = 0
