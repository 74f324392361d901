"""Bugs to plant, one edit each, and the tests that are there to catch them.

Not a test file: ``test_planted_bugs`` plants them. ``text`` occurs exactly once in ``file``; a bug
whose text has gone is an error, so that the table ages with the code. Every test that ``caught_by``
names has to fail with the bug in, and to pass without it; few are named, and quick ones.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUGS", "Bug"]


@dataclass(frozen=True, slots=True)
class Bug:
    """One edit. ``quick``: nothing has to hang for it to be caught."""

    name: str
    file: str
    text: str
    replacement: str
    caught_by: tuple[str, ...]
    quick: bool = True


SHARD = (
    Bug(
        "digest-of-a-block-not-compared",
        "_shard.py",
        "            found = xxh3_64_intdigest(window[at:end])\n            if found != ",
        "            found = xxh3_64_intdigest(window[at:end])\n            if found != found and ",
        ("test_shard.py::test_a_flipped_bit_is_found_wherever_it_is",),
    ),
    Bug(
        "digest-of-a-tensor-not-compared",
        "_shard.py",
        "found = xxh3_64_intdigest(view[begin : begin + CHUNK_BYTES])\n        if found != ",
        "found = xxh3_64_intdigest(view[begin : begin + CHUNK_BYTES])\n        if 0 and found != ",
        ("test_shard.py::test_a_tensor_alone_is_checked_by_its_chunks",),
    ),
    Bug(
        "last-chunk-without-a-digest",
        "_shard.py",
        "return -(-self.size_bytes // CHUNK_BYTES)",
        "return max(self.size_bytes // CHUNK_BYTES, self.size_bytes > 0)",
        ("test_guards.py::test_the_last_byte_of_a_tensor_has_a_digest",),
    ),
    Bug(
        "holes-in-a-shard",
        "_shard.py",
        "if start != end or stop - start != size_bytes or stop > file_bytes:",
        "if stop - start != size_bytes or stop > file_bytes:",
        ("test_shard.py::test_headers_that_do_not_add_up_are_damage",),
    ),
    Bug(
        "header-length-believed",
        "_shard.py",
        "if length > min(MAX_HEADER_BYTES, file_bytes):",
        "if length > file_bytes:",
        ("test_shard.py::test_a_header_length_is_refused_before_it_is_allocated",),
    ),
    Bug(
        "bytes-behind-the-last-tensor",
        "_shard.py",
        "    if len(header) + end != file_bytes:",
        "    if len(header) + end > file_bytes:",
        ("test_shard.py::test_headers_that_do_not_add_up_are_damage",),
    ),
    Bug(
        "table-of-another-shard",
        "_shard.py",
        "            or header_digest != layout.header_digest\n",
        "",
        ("test_shard.py::test_a_table_is_read_back_and_belongs_to_one_layout",),
    ),
    Bug(
        "tensors-not-aligned",
        "_shard.py",
        "rows.append((-dtype.stored_item_bytes, name, dtype, shape))",
        "rows.append((dtype.stored_item_bytes, name, dtype, shape))",
        ("test_guards.py::test_every_tensor_is_aligned_to_its_elements",),
    ),
)

RECORDS = (
    Bug(
        "record-digest-not-compared",
        "_manifest.py",
        "sealed.digest != xxh3_128_hexdigest(kind.encode() + body)",
        "not sealed.digest",
        ("test_manifest.py::test_no_flipped_bit_in_a_record_passes",),
    ),
    Bug(
        "save-complete-without-all-ranks",
        "_manifest.py",
        "== (first.save_id, len(records), first.step, first.incarnation)",
        "== (first.save_id, first.world_size, first.step, first.incarnation)",
        ("test_manifest.py::test_a_save_is_complete_when_every_rank_of_one_save_is_there",),
    ),
    Bug(
        "two-saves-make-one",
        "_manifest.py",
        "(r.save_id, r.world_size, r.step, r.incarnation)",
        "(first.save_id, r.world_size, r.step, r.incarnation)",
        ("test_manifest.py::test_a_save_is_complete_when_every_rank_of_one_save_is_there",),
    ),
    Bug(
        "later-version-parsed",
        "_manifest.py",
        "if version > FORMAT_VERSION:",
        "if version > FORMAT_VERSION + 1:",
        ("test_manifest.py::test_a_later_version_is_said_to_be_one",),
    ),
    Bug(
        "any-step-number",
        "_manifest.py",
        "msgspec.Meta(ge=0, le=MAX_STEP)",
        "msgspec.Meta(le=MAX_STEP)",
        ("test_manifest.py::test_a_record_with_impossible_numbers_is_refused",),
    ),
    Bug(
        "record-believed-about-its-place",
        "_inventory.py",
        "if said != name or record.rank != rank:",
        "if record.rank != rank:",
        (
            "test_inventory.py::test_a_record_is_not_believed_about_another_place",
            "test_slots.py::test_a_record_of_another_save_or_rank_is_refused",
        ),
    ),
    Bug(
        "table-of-another-save",
        "_inventory.py",
        "if _shard.table_digest(table_data) != record.shard.table_digest:",
        "if not record.shard.table_digest:",
        ("test_guards.py::test_a_table_that_was_made_of_the_damaged_bytes_blesses_nothing",),
    ),
    Bug(
        "shard-size-not-compared",
        "_inventory.py",
        "if not record.aborted and size_bytes != record.shard.size_bytes:",
        "if not record.aborted and size_bytes is None:",
        ("test_inventory.py::test_damage_is_a_problem_of_its_save_alone",),
    ),
    Bug(
        "size-of-a-record-not-capped",
        "tiers/base.py",
        "    if size_bytes > max_bytes:",
        "    if size_bytes < 0:",
        ("test_guards.py::test_a_record_of_any_size_costs_no_memory",),
    ),
    Bug(
        "save-id-with-a-newline",
        "_manifest.py",
        r"[0-9a-f]{12}\\Z",
        "[0-9a-f]{12}$",
        ("test_guards.py::test_an_id_is_an_id_to_its_end",),
    ),
)

INCARNATIONS = (
    Bug(
        "lower-incarnation-accepted",
        "agent/verbs.py",
        "if message.number <= run.incarnation:",
        "if message.number < 0:",
        ("agent/test_recovery.py::test_a_killed_trainer_resumes_from_ram",),
    ),
    Bug(
        "incarnation-known-though-not-written",
        "agent/verbs.py",
        "if before is None and run.incarnations.get(message.number) is known:",
        "if before is not None:",
        ("test_guards.py::test_an_incarnation_that_was_not_written_can_be_tried_again",),
    ),
    Bug(
        "incarnation-not-counted-up",
        "_run.py",
        "number=self._highest + 1,",
        "number=max(self._highest, 1),",
        ("test_checkpointer.py::test_roll_back_starts_a_branch",),
    ),
    Bug(
        "roll-back-without-a-parent",
        "_checkpointer.py",
        "None if source else (restored._incarnation, restored.step or 0)",
        "None",
        ("test_guards.py::test_a_resumed_incarnation_names_its_parent",),
    ),
    Bug(
        "rolled-back-branch-is-newest",
        "_manifest.py",
        "name.incarnation == number and (limit is None or name.step <= limit)",
        "name.incarnation == number",
        (
            "test_manifest.py::test_the_line_leaves_out_what_was_rolled_back",
            "test_load.py::test_a_rolled_back_branch_is_not_the_latest",
        ),
    ),
    Bug(
        "branch-of-a-branch-forgets-its-limit",
        "_manifest.py",
        "limit = step if limit is None else min(step, limit)",
        "limit = step",
        ("test_guards.py::test_a_branch_from_before_its_parent_began_counts_no_step_after_it",),
    ),
)

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
        "            if info.st_ino != inode:",
        "            if not info.st_ino:",
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
        "if slot is None or slot.holder != owner.holder or slot.inode != message.inode:",
        "if slot is None or slot.inode != message.inode:",
        ("test_guards.py::test_a_slot_of_another_rank_cannot_be_sealed",),
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
        "agent/ring.py",
        "            not owner.fenced_by\n            and found.incarnation",
        "            found.incarnation",
        ("test_guards.py::test_what_a_fenced_trainer_had_finished_is_never_offered",),
        quick=False,
    ),
    Bug(
        "capture-of-a-dead-owner-not-read",
        "agent/ring.py",
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

LOCAL_TIER = (
    Bug(
        "parents-not-synced",
        "tiers/_rooted.py",
        "        for fd in reversed(fds):\n            try:\n                full_sync(fd)",
        "        for fd in fds[-1:]:\n            try:\n                full_sync(fd)",
        ("tiers/test_local_syscalls.py::test_everything_is_synced_in_order",),
    ),
    Bug(
        "parent-of-the-root-not-synced",
        "tiers/_rooted.py",
        "        if self.sync and not self.read_only:\n            self._sync_parent(path)",
        "        if self.sync and self.read_only:\n            self._sync_parent(path)",
        ("tiers/test_local_syscalls.py::test_everything_is_synced_in_order",),
    ),
    Bug(
        "file-not-synced",
        "tiers/_put.py",
        "        if self.root.sync:\n            # Once only",
        "        if self.root.sync and not self.size_bytes:\n            # Once only",
        ("tiers/test_local_syscalls.py::test_everything_is_synced_in_order",),
    ),
    Bug(
        "fsync-tried-again",
        "tiers/_put.py",
        '            with self._mapped("sync"):\n                full_sync(fd)\n',
        '            with self._mapped("sync"):\n                try:\n'
        "                    full_sync(fd)\n"
        "                except OSError:\n                    full_sync(fd)\n",
        ("tiers/test_local_syscalls.py::test_a_failed_fsync_is_reported_and_not_tried_again",),
    ),
    Bug(
        "rename-over-what-is-there",
        "tiers/_put.py",
        "            os.link(\n                self.temporary,\n                self.name,\n"
        "                src_dir_fd=dir_fd,\n                dst_dir_fd=dir_fd,\n"
        "                follow_symlinks=False,\n            )\n",
        "            os.rename(self.temporary, self.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)\n"
        "            os.link(self.name, self.temporary, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)\n",
        ("tiers/test_suite.py::TestDisk::test_racing_threads_have_one_winner",),
    ),
    Bug(
        "object-that-was-not-synced-stays",
        "tiers/_put.py",
        "            self._withdraw(keep_fd)\n",
        "",
        ("tiers/test_local_syscalls.py::test_a_failed_fsync_is_reported_and_not_tried_again",),
    ),
    Bug(
        "taken-before-it-is-durable",
        "tiers/_put.py",
        "        self.root.sync_directories(self.fds, self.key)\n        raise self.root.taken",
        "        raise self.root.taken",
        ("tiers/test_local_syscalls.py::test_a_key_that_is_taken_is_durable_when_that_is_said",),
    ),
    Bug(
        "temporary-left-behind",
        "tiers/_put.py",
        "                with contextlib.suppress(OSError):\n"
        "                    os.unlink(self.temporary, dir_fd=self.fds[-1])\n"
        "                self._remove_empty()\n",
        "                self._remove_empty()\n",
        ("tiers/test_local_full.py::test_a_full_file_system_at_every_capacity",),
    ),
    Bug(
        "replaced-root-not-noticed",
        "tiers/_rooted.py",
        "if (info.st_dev, info.st_ino) != self._identity:",
        "if not info.st_ino:",
        ("tiers/test_local_hostile.py::test_a_root_that_was_replaced_is_unavailable",),
    ),
    Bug(
        "lease-on-what-was-recycled",
        "tiers/local.py",
        "if os.path.samestat(there, info):",
        "if there.st_nlink:",
        (
            "tiers/test_local_leases.py::test_what_was_recycled_between_open_and_flock_is_not_leased",
        ),
    ),
    Bug(
        "put-in-flight-swept",
        "tiers/local.py",
        "if unless_held and _is_held(name, fds[-1]):",
        "if unless_held and not fds:",
        ("tiers/test_local_syscalls.py::test_a_sweep_leaves_a_put_in_flight_alone",),
    ),
    Bug(
        "object-of-somebody-else-taken-for-ours",
        "tiers/wrappers.py",
        "if tried == 1 or not self._is_ours(key, source):",
        "if tried == 1:",
        ("tiers/test_wrappers.py::test_an_object_of_somebody_else_is_never_taken_for_ours",),
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
        ("test_guards.py::test_a_run_of_any_name_lies_right_in_its_tier",),
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
        "if self._registry.service or uid in (0, os.geteuid()):",
        "if self._registry.service or uid >= 0:",
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

TRANSFER = (
    Bug(
        "record-copied-first",
        "_transfer.py",
        '("data", "table", "record"), steps, strict=True',
        '("data", "table", "record"), steps[::-1], strict=True',
        ("test_transfer.py::test_a_copy_is_the_same_bytes_with_the_record_last",),
    ),
    Bug(
        "copied-without-looking",
        "_source.py",
        "            _shard.check_range(self._layout, self._digests, window, offset, stop)\n",
        "",
        ("test_transfer.py::test_damage_is_found_never_copied_and_healed",),
    ),
    Bug(
        "half-a-copy-stays",
        "_transfer.py",
        "            _take_back(target, stored)\n",
        "",
        ("test_transfer.py::test_a_target_that_fails_holds_nothing_of_the_save",),
    ),
    Bug(
        "healed-from-a-damaged-copy",
        "_transfer.py",
        "    for key, reason in check.damaged.items():",
        "    for key, reason in list(check.damaged.items())[:0]:",
        ("test_transfer.py::test_damage_is_found_never_copied_and_healed",),
    ),
    Bug(
        "data-deleted-before-its-record",
        "_transfer.py",
        "    if _manifest.is_record_file(file):\n        return 0",
        "    if _manifest.is_record_file(file):\n        return 9",
        ("test_transfer.py::test_killed_in_a_delete",),
    ),
    Bug(
        "deleted-under-a-reader",
        "_transfer.py",
        "            return fd is None",
        "            return fd == -1",
        ("test_transfer.py::test_delete_waits_for_readers_and_takes_everything",),
    ),
    Bug(
        "manifest-of-half-a-save",
        "_transfer.py",
        "    if not save.complete or save.aborted:",
        "    if save.aborted:",
        ("test_transfer.py::test_a_manifest_waits_for_every_rank",),
    ),
)

RETENTION = (
    Bug(
        "deleted-before-a-newer-was-read-back",
        "_retention.py",
        "elif not any(s.verified for s in newer):",
        "elif not newer:",
        ("test_retention.py::test_nothing_goes_before_a_newer_one_was_read_back",),
    ),
    Bug(
        "one-newer-is-enough",
        "_retention.py",
        "elif len(newer) < 2:",
        "elif len(newer) < 1:",
        ("test_guards.py::test_with_one_newer_save_nothing_is_deleted",),
    ),
    Bug(
        "keep-one",
        "_retention.py",
        "or isinstance(self.n, bool) or self.n < 2:",
        "or isinstance(self.n, bool) or self.n < 1:",
        ("test_retention.py::test_bad_rules_are_refused",),
    ),
    Bug(
        "damaged-counts-as-newer",
        "_retention.py",
        "if s.complete and s.on_line and not s.damaged)",
        "if s.complete and s.on_line)",
        ("test_retention.py::test_damaged_and_incomplete_saves_do_not_count_as_newer",),
    ),
    Bug(
        "abandoned-counts-as-newer",
        "_retention.py",
        "if s.complete and s.on_line and not s.damaged)",
        "if s.complete and not s.damaged)",
        (
            "test_retention.py::"
            "test_abandoned_saves_go_once_their_successors_are_there_and_what_is_read_stays",
        ),
    ),
    Bug(
        "what-is-read-back-not-believed",
        "agent/healing.py",
        "            if verified.damaged:",
        "            if verified.damaged and rank:",
        ("agent/test_flushing.py::test_the_scrubber_finds_and_heals_ram",),
        quick=False,
    ),
)

RESTORE = (
    Bug(
        "bytes-placed-without-looking",
        "_delivery.py",
        "bad = set(self._engine.verify(base, spans, self._loaded.table.digests))",
        "bad = set(spans[:0])",
        ("test_checkpointer.py::test_a_damaged_disk_copy_falls_back_and_says_so",),
    ),
    Bug(
        "only-copy-placed-before-all-of-it-was-read",
        "_delivery.py",
        "            if last:\n",
        "            if last and not spans:\n",
        (
            "test_delivery.py::"
            "test_the_only_copy_of_the_only_step_is_checked_before_anything_changes",
        ),
    ),
    Bug(
        "small-arrays-not-compared",
        "capture/cpu.py",
        "view[start : start + size_bytes]) != digests[chunk]:",
        "view[start : start + size_bytes]) < 0:",
        ("test_checkpointer.py::test_a_damaged_disk_copy_falls_back_and_says_so",),
    ),
    Bug(
        "large-arrays-not-compared",
        "capture/cpu.py",
        "        if xxh3_64_intdigest(_chunk_at(source)) != digests[chunk]:",
        "        if xxh3_64_intdigest(_chunk_at(source)) < 0:",
        ("test_guards.py::test_a_large_array_that_is_damaged_is_not_restored",),
    ),
    Bug(
        "last-piece-of-a-large-array-not-compared",
        "capture/cpu.py",
        "return not rest or xxh3_64_intdigest(view_at(source, rest)) == digests[chunk]",
        "return True",
        ("test_guards.py::test_a_large_array_that_is_damaged_is_not_restored",),
    ),
    Bug(
        "placed-though-it-differs",
        "capture/cpu.py",
        "if xxh3_64_intdigest(view[begin : begin + size]) != digests[chunk]:",
        "if size > want:",
        ("test_capture.py::test_what_is_fetched_is_checked_before_it_is_placed",),
    ),
    Bug(
        "small-arrays-placed-though-they-differ",
        "capture/cpu.py",
        "if stop > got or xxh3_64_intdigest(view[begin:stop]) != digests[chunk]:",
        "if stop > got:",
        ("test_capture.py::test_what_is_fetched_is_checked_before_it_is_placed",),
    ),
    Bug(
        "placed-before-it-was-compared",
        "_restore.py",
        "    placing.raise_diff(record.step)\n",
        "",
        ("test_checkpointer.py::test_a_template_that_differs_changes_nothing",),
    ),
    Bug(
        "damage-is-a-fresh-start",
        "_restorer.py",
        "        if skipped:\n            raise _no_healthy_step(skipped)\n",
        "",
        ("test_checkpointer.py::test_every_step_damaged_is_no_fresh_start",),
    ),
    Bug(
        "silence-is-a-fresh-start",
        "_restorer.py",
        "        if silent:\n            raise RestoreUnavailable(",
        "        if silent and skipped:\n            raise RestoreUnavailable(",
        ("test_errors_raised.py::test_it_is_raised[RestoreUnavailable]",),
    ),
    Bug(
        "run-behind-a-link-is-no-run",
        "tiers/local.py",
        'elif prefix.startswith(f"{key}/"):',
        "elif not key:",
        ("test_errors_raised.py::test_it_is_raised[RestoreUnavailable]",),
    ),
    Bug(
        "called-off-save-offered",
        "_restore.py",
        "            if save.complete and not save.aborted:",
        "            if save.complete:",
        ("test_guards.py::test_a_save_called_off_is_passed_over",),
    ),
    Bug(
        "unread-bytes-out-of-load",
        "_reading.py",
        "if xxh3_64_intdigest(piece) != digests[chunk]:",
        "if xxh3_64_intdigest(piece) == digests[chunk] + 1:",
        ("test_load.py::test_a_flipped_byte_is_never_handed_out",),
    ),
    Bug(
        "half-written-state-without-a-word",
        "_restore.py",
        "        raise RestoreFailed(",
        "        raise NoHealthyStep(",
        ("test_errors_raised.py::test_it_is_raised[RestoreFailed]",),
    ),
)

CAPTURE = (
    Bug(
        "stale-plan",
        "_save.py",
        "        if fingerprint != plan.fingerprint:\n            return None\n",
        "",
        ("crash/test_semantics.py::test_no_change_of_the_state_is_saved_by_a_stale_plan",),
    ),
    Bug(
        "stale-structure",
        "_state.py",
        "        if list(value) != node.keys:\n            return False\n",
        "",
        ("test_state.py::test_refill_refuses",),
    ),
    Bug(
        "digest-of-the-copy",
        "capture/cpu.py",
        "        digests[chunk] = xxh3_64_intdigest(_chunk_at(source))\n"
        "        _copy(target, source, CHUNK_BYTES)\n",
        "        _copy(target, source, CHUNK_BYTES)\n"
        "        digests[chunk] = xxh3_64_intdigest(_chunk_at(target))\n",
        ("test_guards.py::test_the_digest_is_of_the_source_and_not_of_the_copy",),
    ),
    Bug(
        "conjugation-forgotten",
        "adapters/torch/leaves.py",
        "            and COMPLEX.isdisjoint(set(dtypes))\n",
        "",
        ("adapters/test_torch_leaves.py::test_lazy_conjugation_and_negation",),
    ),
    Bug(
        "negation-forgotten",
        "adapters/torch/leaves.py",
        "            and not any(negative)\n",
        "",
        ("adapters/test_torch_leaves.py::test_lazy_conjugation_and_negation",),
    ),
    Bug(
        "memory-that-was-given-back",
        "adapters/torch/leaves.py",
        "            if checked != last:\n                _check_storages(values, held, paths)\n",
        "",
        ("adapters/test_torch_leaves.py::test_memory_given_back_between_two_saves_is_noticed",),
    ),
    Bug(
        "ties-by-the-address-of-a-copy",
        "_save.py",
        "if addresses != plan.sources or _has_copies(keep):",
        "if addresses != plan.sources and not _has_copies(keep):",
        ("test_guards.py::test_what_is_no_longer_tied_is_stored_twice",),
    ),
    Bug(
        "word-of-the-last-capture-kept",
        "_save.py",
        "    table[generation_at : generation_at + 8] = bytes(8)\n",
        "",
        ("test_guards.py::test_a_capture_cut_short_is_no_finished_one",),
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
        "_checkpointer.py",
        "        if step in self._saver.steps:",
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
        "        elif failures:\n            raise failures[0]",
        "        elif failures[:0]:\n            raise failures[0]",
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
        "_run.py",
        "        thread.join(timeout_s)",
        "        thread.join()",
        ("test_guards.py::test_a_look_into_a_tier_that_hangs_ends_by_its_deadline",),
        quick=False,
    ),
    Bug(
        "hung-disk-waited-for",
        "agent/pool.py",
        "            if pending.last_s + ",
        "            if pending.last_s + 3600.0 + ",
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

BUGS = (
    *SHARD,
    *RECORDS,
    *INCARNATIONS,
    *SLOTS,
    *FENCING,
    *LOCAL_TIER,
    *SECURITY,
    *TRANSFER,
    *RETENTION,
    *RESTORE,
    *CAPTURE,
    *SCHEDULE,
    *DEADLINES,
)
