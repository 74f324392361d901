"""Bugs in tiers, and in what moves, keeps and brings back shards. See ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

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
        "        _take_back(target, stored, record_key)\n        raise",
        "        raise",
        ("test_transfer.py::test_a_target_that_fails_holds_nothing_of_the_save",),
    ),
    Bug(
        "a-thin-copy-replaces-what-is-on-its-way",
        "_transfer.py",
        "    return not shard.record.left_out",
        "    return True",
        ("test_two_uploads.py::test_what_one_has_brought_stays_whenever_the_other_dies",),
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
        "                if fd is not None:\n                    return False\n",
        "                return False\n",
        ("test_transfer.py::test_delete_waits_for_readers_and_takes_everything",),
    ),
    Bug(
        "manifest-of-half-a-save",
        "_transfer.py",
        "not (save.complete or (parts and save.records))",
        "not save.records",
        ("test_transfer.py::test_a_manifest_waits_for_every_rank",),
    ),
)

RETENTION = (
    Bug(
        "deleted-before-a-newer-was-read-back",
        "_retention.py",
        "elif verified <= _order(save):",
        "elif verified <= _order(save) and not num_newer:",
        ("test_retention.py::test_nothing_goes_before_a_newer_one_was_read_back",),
    ),
    Bug(
        "one-newer-is-enough",
        "_retention.py",
        "elif num_newer < 2:",
        "elif num_newer < 1:",
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
        "left = {numbers[i] for i in checked}",
        "left = set(numbers[:0])",
        ("test_checkpointer.py::test_a_damaged_disk_copy_falls_back_and_says_so",),
    ),
    Bug(
        "only-copy-placed-before-all-of-it-was-read",
        "_delivery.py",
        "                elif last:\n",
        "                elif False:\n",
        (
            "test_delivery.py::"
            "test_the_only_copy_of_the_only_step_is_checked_before_anything_changes",
        ),
    ),
    Bug(
        "sound-ones-forgotten-beside-bad-ones",
        "_delivery.py",
        "            for place, these in sound:\n",
        "            for place, these in sound[1:]:\n",
        (
            "test_copies.py::"
            "test_what_memory_has_damaged_alone_comes_from_far_away[checked while placed]",
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
        "rows-placed-though-their-chunk-differs",
        "capture/cpu.py",
        "        if is_sound:\n",
        "        if moves:\n",
        ("test_cuts.py::test_rows_are_placed_out_of_chunks_that_are_sound",),
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
        "lost-start-hides-its-steps",
        "_choice.py",
        "return _inventory.line_of(saves, _incarnations(holdings))",
        "return _manifest.newest_line(_incarnations(holdings))",
        ("test_checkpointer.py::test_a_start_whose_own_file_is_lost_keeps_its_steps",),
    ),
    Bug(
        "view-stands-for-the-whole",
        "_wanted.py",
        "if spec.size_bytes and spec.size_bytes >= self._arrays[known].spec.size_bytes:",
        "if spec.size_bytes and known >= 0:",
        ("test_checkpointer.py::test_a_view_of_the_beginning_does_not_stand_for_the_whole",),
    ),
    Bug(
        "lease-held-by-a-mapping",
        "tiers/local.py",
        "                fcntl.flock(fd, fcntl.LOCK_UN)\n",
        "                pass\n",
        (
            "tiers/test_local_leases.py::"
            "test_a_lease_ends_though_an_error_still_refers_to_the_mapped_bytes",
        ),
    ),
    Bug(
        "damage-is-a-fresh-start",
        "_restorer.py",
        "        raise _no_healthy_step({**plan.skipped, **_mute(gathered.absent)})\n",
        "        pass\n",
        ("test_checkpointer.py::test_every_step_damaged_is_no_fresh_start",),
    ),
    Bug(
        "silence-is-a-fresh-start",
        "_restorer.py",
        "    if not plan.candidates and silent:\n",
        "    if not plan.candidates and silent and plan.skipped:\n",
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
        "_holdings.py",
        'called off: {held.aborted}")\n            continue\n',
        'called off: {held.aborted}")\n',
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
        '        raise RestoreFailed(\n            f"load_state_dict failed',
        '        raise CheckpointError(\n            f"load_state_dict failed',
        ("test_errors_raised.py::test_it_is_raised[RestoreFailed]",),
    ),
)
