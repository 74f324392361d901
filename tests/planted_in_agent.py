"""Bugs in slots, owners, rights, rhythm and deadlines. See ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

SLOTS = (
    Bug(
        "recycled-under-a-reader",
        "_slots.py",
        "                    if fd is None:\n                        return None\n",
        "",
        ("test_slots.py::test_a_reader_keeps_a_shard_from_being_recycled",),
    ),
    Bug(
        "sealed-without-looking-at-the-inode",
        "_slots.py",
        "            if (found := os.fstat(fd).st_ino) != inode:",
        "            if not (found := os.fstat(fd).st_ino):",
        ("test_slots.py::test_seal_refuses_another_file_under_the_name_of_the_slot",),
    ),
    Bug(
        "record-sealed-first",
        "_slots.py",
        "for suffix, file in _shard_files(rank):",
        "for suffix, file in _shard_files(rank)[::-1]:",
        ("test_slots.py::test_killed_in_a_seal",),
    ),
    Bug(
        "generation-kept-over-a-recycle",
        "_slots.py",
        "os.pwrite(fd, bytes(8), _shard.GENERATION_OFFSET)",
        "os.fsync(fd)",
        ("test_slots.py::test_recycle_keeps_the_inode_and_zeroes_the_generation",),
    ),
    Bug(
        "record-kept-over-a-recycle",
        "_slots.py",
        "            unlink(_manifest.record_file(rank), save_fd)\n",
        "",
        ("test_slots.py::test_killed_in_a_recycle",),
    ),
    Bug(
        "slot-without-its-pages",
        "_slots.py",
        "os.posix_fallocate(fd, 0, size_bytes)",
        "os.ftruncate(fd, size_bytes)",
        ("test_slots.py::test_a_full_tmpfs_is_an_error_and_leaves_nothing",),
    ),
    Bug(
        "slot-id-becomes-a-path",
        "_slots.py",
        "    if not _SLOT_ID.fullmatch(slot_id):",
        "    if not _SLOT_ID.match(slot_id):",
        ("test_slots.py::test_slot_ids_never_become_paths",),
    ),
    Bug(
        "half-a-seal-offered",
        "_slots.py",
        "            _shard.table_digest(table) != record.shard.table_digest\n            or ",
        "            ",
        ("test_guards.py::test_a_finished_capture_whose_table_changed_is_none",),
    ),
    Bug(
        "recycled-while-it-is-flushed",
        "agent/queue.py",
        "    if save.writing:",
        "    if save.writing and not newer:",
        ("agent/test_queue.py::test_a_slot_is_recycled_only_when_nothing_needs_it",),
    ),
    Bug(
        "recycled-before-it-is-flushed",
        "agent/queue.py",
        "if not any(label in s.owed for s in newer)]",
        "if not newer]",
        ("agent/test_queue.py::test_a_slot_is_recycled_only_when_nothing_needs_it",),
    ),
    Bug(
        "newest-save-recycled",
        "agent/queue.py",
        "    if not newer:",
        "    if not newer and save.readers:",
        ("agent/test_queue.py::test_a_slot_is_recycled_only_when_nothing_needs_it",),
    ),
    Bug(
        "one-slot",
        "_schedule.py",
        "or self.slots < 2):",
        "or self.slots < 1):",
        ("test_schedule.py::test_ram_takes_no_times_and_no_single_slot",),
    ),
    Bug(
        "one-slot-given-twice",
        "agent/ring.py",
        "            if slot.state is SlotState.FREE and slot.fits(plan):",
        "            if slot.state is not SlotState.COMMITTED and slot.fits(plan):",
        ("agent/test_flushing.py::test_slots_run_out_and_say_why",),
    ),
    Bug(
        "seal-of-a-slot-of-somebody-else",
        "agent/ring.py",
        "if slot.holder != owner.holder or slot.inode != message.inode:",
        "if slot.inode != message.inode:",
        ("test_guards.py::test_a_slot_of_another_rank_cannot_be_sealed",),
    ),
)

ASKED = (
    Bug(
        "told-once-and-not-to-who-asks-then",
        "agent/verbs.py",
        "        save.said = None  # who asks for it waits for what it may have been told before\n",
        "",
        ("agent/test_flushing.py::test_who_asks_for_what_is_there_already_hears_that_it_is",),
    ),
)

EMPTIED = (
    Bug(
        "slots-given-that-are-gone",
        "agent/verbs.py",
        "        run.doubted |= bool(run.slots or run.saves) and not run.living()\n",
        "",
        ("crash/test_lost_memory.py::test_the_next_job_has_the_disk_and_saves",),
        quick=False,
    ),
    Bug(
        "slots-given-again-that-were-taken-away",
        "agent/verbs.py",
        "        run.doubted = True  # why nothing was captured is not said\n",
        "",
        ("crash/test_lost_memory.py::test_a_job_loses_a_save_and_goes_on",),
        quick=False,
    ),
)

FENCING = (
    Bug(
        "fenced-owner-is-still-one",
        "agent/runs.py",
        "raise self.locked_out(holder)",
        "return self.fenced[holder]",
        ("agent/test_recovery.py::test_an_owner_that_cannot_mean_it_is_fenced",),
        quick=False,
    ),
    Bug(
        "capture-of-a-fenced-owner-sealed",
        "agent/leftovers.py",
        "            not owner.fenced_by\n            and found.incarnation",
        "            found.incarnation",
        ("test_guards.py::test_what_a_fenced_trainer_had_finished_is_never_offered",),
        quick=False,
    ),
    Bug(
        "capture-of-a-dead-owner-not-read",
        "agent/leftovers.py",
        "found.save, found.rank, verify=True)",
        "found.save, found.rank, verify=False)",
        ("test_guards.py::test_a_damaged_capture_of_a_dead_trainer_is_never_offered",),
    ),
    Bug(
        "live-owner-fenced",
        "agent/owners.py",
        "return Verdict.WAIT if waited_s < patience_s else Verdict.REFUSE",
        "return Verdict.WAIT if waited_s < patience_s else Verdict.FENCE",
        ("agent/test_queue.py::test_who_may_take_a_run",),
    ),
    Bug(
        "step-sealed-twice",
        "agent/ring.py",
        "            if other is not None and other is not save:",
        "            if other is not None and other is save:",
        ("agent/test_recovery.py::test_the_same_step_twice_is_refused_and_a_repeated_seal_is_not",),
    ),
)

SECURITY = (
    Bug(
        "link-to-a-directory-followed",
        "tiers/_rooted.py",
        'getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | _CLOEXEC',
        'getattr(os, "O_DIRECTORY", 0) | _CLOEXEC',
        ("tiers/test_local_hostile.py::test_a_directory_that_is_a_link_is_not_entered",),
    ),
    Bug(
        "link-to-a-file-followed",
        "tiers/_rooted.py",
        '    getattr(os, "O_NOFOLLOW", 0)\n    | getattr(os, "O_NONBLOCK", 0)',
        '    getattr(os, "O_NONBLOCK", 0)',
        ("tiers/test_local_hostile.py::test_a_file_swapped_for_a_link_is_not_followed",),
    ),
    Bug(
        "files-of-other-users-read",
        "tiers/_rooted.py",
        "        if info.st_uid in (os.geteuid(), 0):\n            return True",
        "        if info.st_uid >= 0:\n            return True",
        ("tiers/test_local_hostile.py::test_what_another_user_owns_is_refused",),
    ),
    Bug(
        "files-that-others-write-read",
        "tiers/_rooted.py",
        "forbidden = 0o002 if self.group_access else 0o022",
        "forbidden = 0o002 if self.group_access else 0o000",
        ("tiers/test_local_hostile.py::test_what_others_can_write_is_refused",),
    ),
    Bug(
        "hard-links-read",
        "tiers/_rooted.py",
        "if dir_fd >= 0 and info.st_nlink > 1 and not",
        "if dir_fd >= 0 and info.st_nlink > 2 and not",
        ("tiers/test_local_hostile.py::test_a_hard_link_is_refused",),
    ),
    Bug(
        "keys-leave-their-directory",
        "tiers/base.py",
        're.compile(r"[a-z0-9_=-][a-z0-9_.=-]{0,199}")',
        're.compile(r"[a-z0-9_.=-]{1,199}")',
        ("tiers/test_suite.py::TestDisk::test_what_is_no_key_is_refused",),
    ),
    Bug(
        "run-names-become-paths",
        "_manifest.py",
        're.compile(r"[a-z0-9][a-z0-9_.=-]{0,99}")',
        're.compile(r"[a-z0-9./][a-z0-9_.=/-]{0,99}")',
        ("test_guards_format.py::test_a_run_of_any_name_lies_right_in_its_tier",),
    ),
    Bug(
        "agent-of-a-stranger",
        "agent/client.py",
        "if uid not in address.trusted_uids(self._path):",
        "if uid < 0:",
        ("agent/test_client.py::test_nothing_is_sent_to_a_stranger",),
    ),
    Bug(
        "agent-serves-other-users",
        "agent/server.py",
        "        if uid in (0, os.geteuid()):\n            return True\n",
        "        if uid >= 0:\n            return True\n",
        ("agent/test_server.py::test_another_user_is_refused",),
    ),
    Bug(
        "agent-in-a-foreign-directory",
        "agent/address.py",
        "    if info.st_uid != os.geteuid():",
        "    if info.st_uid < 0:",
        ("agent/test_spawn.py::test_a_directory_of_another_user_is_refused",),
    ),
    Bug(
        "wire-replaces-methods-of-an-error",
        "agent/protocol.py",
        "if name.isidentifier() and name not in _OWN_NAMES",
        "if name.isidentifier()",
        ("agent/test_protocol.py::test_details_from_the_wire_cannot_break_an_error",),
    ),
    Bug(
        "messages-of-any-size",
        "agent/protocol.py",
        "    if len(data) > MAX_MESSAGE_BYTES:",
        "    if not data:",
        ("agent/test_protocol.py::test_deep_and_huge_input_is_refused",),
    ),
    Bug(
        "index-out-of-a-checkpoint",
        "_node.py",
        "if type(body) is not int or not 0 <= body < limit:",
        "if type(body) is not int or not body < limit:",
        ("test_state.py::test_structures_that_were_never_written_are_refused",),
    ),
)

SCHEDULE = (
    Bug(
        "due-at-multiples-only",
        "_schedule.py",
        "return every is not None and step // every > self.last_step // every",
        "return every is not None and step % every == 0",
        ("test_schedule.py::test_calls_that_are_not_multiples_still_fire",),
    ),
    Bug(
        "resumed-run-forgets-its-rhythm",
        "_schedule.py",
        "        for tier in self.tiers:\n            tier.last_step = step\n",
        "        for tier in self.tiers:\n            tier.last_step = 0\n",
        ("test_schedule.py::test_a_resumed_run_goes_on_with_the_same_steps",),
    ),
    Bug(
        "same-step-captured-twice",
        "_saver.py",
        "        if step in self.steps and not self._is_lost(step):",
        "        if step < 0:",
        ("test_checkpointer.py::test_same_step_twice_is_refused_before_capture",),
    ),
    Bug(
        "fork-saves",
        "_checkpointer.py",
        "        if self._pid != os.getpid():\n            raise ForkedProcess(",
        "        if self._pid < 0:\n            raise ForkedProcess(",
        ("test_checkpointer.py::test_a_fork_is_told",),
        quick=False,
    ),
    Bug(
        "failure-never-reaches-the-loop",
        "_checkpointer.py",
        "        elif failures:\n            if labels",
        "        elif failures[:0]:\n            if labels",
        ("test_checkpointer.py::test_a_disk_that_fails_reaches_the_loop_once",),
    ),
    Bug(
        "failure-told-again-and-again",
        "_checkpointer.py",
        "            failures, self._pending = self._pending, []",
        "            failures = list(self._pending)",
        ("test_guards.py::test_a_failure_is_raised_once",),
    ),
)

DEADLINES = (
    Bug(
        "answers-take-as-long-as-they-like",
        "agent/client.py",
        "            self.sock.settimeout(left_s)\n",
        "            self.sock.settimeout(None)\n",
        ("agent/test_client.py::test_a_stopped_agent_is_an_error_by_the_deadline",),
        quick=False,
    ),
    Bug(
        "answers-come-by-the-byte",
        "agent/client.py",
        "        while True:\n            connection.limit()\n",
        "        while True:\n",
        ("agent/test_client.py::test_a_slow_answer_is_bounded_as_a_whole",),
    ),
    Bug(
        "looks-into-tiers-take-for-ever",
        "_patience.py",
        "        thread.join(timeout_s)",
        "        thread.join()",
        ("test_guards.py::test_a_look_into_a_tier_that_hangs_ends_by_its_deadline",),
        quick=False,
    ),
    Bug(
        "hung-disk-waited-for",
        "agent/pool.py",
        "            if process.left_s(pending) <= 0:",
        "            if process.left_s(pending) <= -3600.0:",
        ("agent/test_worker.py::test_a_process_that_hangs_is_named_given_up_and_replaced",),
        quick=False,
    ),
    Bug(
        "tier-without-a-deadline",
        "tiers/_deadline.py",
        "return self._chunks.get(timeout=max(0.0, self._deadline - time.monotonic()))",
        "return self._chunks.get()",
        ("tiers/test_wrappers.py::test_every_verb_ends_in_time_and_says_which",),
        quick=False,
    ),
)
