"""Bugs in what is put on CUDA devices, and in who waits for it; see ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

_FAULTS = "capture/test_cuda_faults.py::"
_RUNS = "capture/test_device_runs.py::"
_LEFT = "capture/test_left_on_devices.py::"
_PASSING = "capture/test_passing.py::"

ORDER = (
    Bug(
        "place-packed-again-before-it-is-copied",
        "capture/draining.py",
        "driver.wait(self.packing, self.copied[i % _RING])",
        "driver.wait(self.packing, self._packed[i % _RING])",
        (f"{_FAULTS}test_a_place_is_packed_again_only_once_it_is_copied",),
    ),
    Bug(
        "taken-out-of-pinned-memory-before-it-is-there",
        "capture/passing.py",
        "        wait(event)\n",
        "",
        (f"{_PASSING}test_bytes_are_those_at_the_call_and_no_device_copies_to_the_slot",),
    ),
    Bug(
        "values-taken-before-the-caller-has-made-them",
        "capture/draining.py",
        "            driver.wait(self.packing, self._ready)\n",
        "",
        (f"{_FAULTS}test_values_are_those_between_what_the_caller_does_before_and_after",),
    ),
    Bug(
        "values-changed-before-they-are-taken",
        "capture/cuda.py",
        "self._driver.wait(stream, device.lane.captured)",
        "self._driver.stream_idle(stream)",
        (f"{_FAULTS}test_values_are_those_between_what_the_caller_does_before_and_after",),
    ),
    Bug(
        "gate-not-held",
        "capture/gates.py",
        "                driver.wait(stream, self._event)\n",
        "",
        (f"{_FAULTS}test_whoever_holds_a_gate_changes_values_after_they_are_taken",),
    ),
    Bug(
        "restored-while-the-caller-still-writes",
        "_restore.py",
        "        scope.engine.settle(_targets(parts, repeats))  # in this thread; others read\n",
        "",
        (f"{_RUNS}test_a_restore_waits_for_what_its_caller_had_put_on_the_device",),
    ),
)

LEFT = (
    Bug(
        "left-though-its-digest-is-another",
        "capture/windows.py",
        "    rows = np.flatnonzero(is_wanted) + cut[0].first\n",
        "    rows = np.flatnonzero(is_wanted)[1:] + cut[0].first\n",
        (f"{_LEFT}test_bytes_are_right_whatever_has_changed",),
    ),
    Bug(
        "changed-chunk-copied-from-another-window",
        "capture/draining.py",
        "source = self.at[number] + part.begin - self.cut[number].begin",
        "source = self.at[0] + part.begin - self.cut[0].begin",
        (f"{_LEFT}test_bytes_are_right_whatever_has_changed",),
    ),
    Bug(
        "digests-vouch-for-what-was-written-by-half",
        "_writing.py",
        "        table[: _shard.TABLE_HEADER.size] = bytes(_shard.TABLE_HEADER.size)\n",
        "        table[40:48] = bytes(8)\n",
        (f"{_RUNS}test_digests_of_a_slot_that_was_written_by_half_say_nothing",),
    ),
    Bug(
        "what-was-left-is-not-looked-at",
        "_slots.py",
        "                left.check(layout, table.digests, view)\n",
        "                left.size_bytes = len(view)\n",
        (
            f"{_RUNS}test_a_bit_that_flipped_in_what_was_left_is_found",
            "test_left.py::test_a_seal_looks_at_what_was_left",
        ),
    ),
    Bug(
        "looked-at-with-another-digest",
        "_left.py",
        "            if digests[chunk] == looked.digests[chunk]:\n",
        "            if looked.sound[chunk]:\n",
        ("test_left.py::test_what_was_looked_at_and_is_to_have_another_digest_is_read",),
    ),
    Bug(
        "word-of-who-looked-ahead-taken-twice",
        "agent/carry.py",
        "self._looked.pop(command.inode, None)",
        "self._looked.get(command.inode)",
        ("test_left.py::test_a_seal_takes_the_word_of_who_looked_ahead_once",),
    ),
)

FAULTS = (
    Bug(
        "copies-go-on-after-a-failure",
        "capture/cuda.py",
        "                capture.abandon(error)\n",
        "",
        (f"{_FAULTS}test_copies_of_one_device_end_before_the_failure_of_another_is_raised",),
    ),
    Bug(
        "slot-of-a-stuck-device-given-back",
        "_saver.py",
        "        if not self.ring.withhold(grant):",
        "        if self.ring.withhold(grant) is not None:",
        (f"{_RUNS}test_a_slot_that_a_stuck_device_may_write_to_is_not_granted_again",),
    ),
    Bug(
        "placed-though-a-chunk-is-bad",
        "capture/landing.py",
        "    if job.waits and not bad and any(targets):",
        "    if job.waits and any(targets):",
        (f"{_FAULTS}test_all_sound_or_nothing_is_placed",),
    ),
    Bug(
        "undefined-state-said-to-be-unchanged",
        "capture/landing.py",
        "    if any(targets) and not job.waits:\n        placing()\n",
        "",
        (f"{_FAULTS}test_whoever_waits_for_all_to_be_sound_knows_whether_anything_was_placed",),
    ),
)
