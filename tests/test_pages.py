"""Memory for arrays to be: whose it is, how long it stays, and that its pages change nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from mtckpt.capture import pages

MIB = 1 << 20


def array_of(size_bytes: int) -> Any:
    return np.frombuffer(pages.fresh(size_bytes), np.uint8)


def test_no_two_arrays_share_a_byte_and_all_are_aligned() -> None:
    arrays = [array_of(size) for size in (1, 63, 64, 5 * MIB, 40 * MIB, 100, 30 * MIB, 30 * MIB)]
    for number, array in enumerate(arrays, 1):
        assert array.ctypes.data % 64 == 0
        array[:] = number
    assert all((array == number).all() for number, array in enumerate(arrays, 1))


def test_a_block_stays_as_long_as_one_of_its_arrays() -> None:
    first, second, third = (array_of(20 * MIB) for _ in range(3))
    block = weakref.ref(first.base.obj.block)
    del first, second
    gc.collect()
    assert pages._worker is not None
    pages._worker.join()  # it holds the one that it is at
    assert block() is None
    third[:] = 7
    view = third[5:10]
    del third
    gc.collect()
    assert view.tolist() == [7] * 5


@pytest.mark.parametrize("huge_s", [0.0, 100.0])
def test_pages_that_are_there_keep_what_is_in_them(
    huge_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether huge ones are found to be slow or not."""
    monkeypatch.setattr(pages, "_SMALL_S", huge_s)
    monkeypatch.setattr(pages, "_huge_left", 1)
    array = array_of(33 * MIB)
    array[: 4 * MIB] = 9
    block = array.base.obj.block
    block.populate()
    assert (array[: 4 * MIB] == 9).all()
    assert not array[4 * MIB :].any()
    assert pages._huge_left == int(huge_s > 0)
