"""Directories that somebody takes away while a data process has them open."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest

from mtckpt.agent import work
from mtckpt.agent.carry import Carrier
from mtckpt.errors import CheckpointError, TierUnavailable


def made_anew(ref: work.TierRef) -> None:
    os.rename(ref.path, ref.path + "-old")
    os.mkdir(ref.path, 0o700)


def test_a_root_that_was_made_anew_is_opened_again(ram: work.TierRef, disk: work.TierRef) -> None:
    carrier = Carrier()
    for ref in (ram, disk):
        carrier.carry(work.Scan(ref), lambda _: None)
        made_anew(ref)
    with pytest.raises(TierUnavailable):  # perhaps not mounted
        carrier.carry(work.Scan(disk), lambda _: None)
    for ref in (ram, disk):  # memory is begun anew at once
        assert isinstance(carrier.carry(work.Scan(ref), lambda _: None), work.Scanned)
    carrier.close()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_who_still_uses_a_root_that_was_taken_away_is_told_that(
    request: pytest.FixtureRequest, kind: str
) -> None:
    ref = request.getfixturevalue(kind)
    carrier = Carrier()
    place, files = carrier._opened(ref)  # by the thread of another command
    assert files is not None
    made_anew(ref)
    with contextlib.suppress(TierUnavailable):
        carrier.carry(work.Scan(ref), lambda _: None)
    assert carrier._opened(ref)[0] is not place
    for use in (lambda tier: list(tier.list("")), lambda tier: tier.stat("r/a")):
        error = failure_of(use, place.tier)
        assert isinstance(error, TierUnavailable), error
    assert isinstance(failure_of(lambda each: each.run_keys(), files), TierUnavailable)
    assert open_below(ref.path + "-old")
    del place, files, error
    gc.collect()
    assert not open_below(ref.path + "-old")  # with its last user
    carrier.close()


def failure_of(use: Callable[[Any], object], of: object) -> Exception | None:
    """What it raises, without the frames, which would keep all that they name."""
    try:
        use(of)
    except CheckpointError as error:
        return error.with_traceback(None)
    return None


def open_below(path: str) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the listing
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [each for each in found if each.startswith(path)]
