"""Bugs in object stores, and in what the agent and the commands do with them. See
``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

STORES = (
    Bug(
        "marker-of-another-job-taken-for-ours",
        "_commit.py",
        "    if there is not None and there.save_id != marker.save_id:",
        "    if there is not None and not there.save_id:",
        (
            "test_store_rights.py::"
            "test_who_loses_a_step_is_told_so_though_its_save_cannot_be_withdrawn",
        ),
    ),
    Bug(
        "marker-outlives-its-save",
        "_transfer.py",
        "    if not place.is_local:\n        _commit.withdraw_marker(",
        "    if place.in_memory:\n        _commit.withdraw_marker(",
        ("test_store_keeping.py::test_a_rule_lets_steps_go_markers_and_all",),
    ),
    Bug(
        "conflict-taken-for-success",
        "tiers/object_store.py",
        "                if unsure and self._has(key, path, view, deadline):",
        "                if unsure or self._has(key, path, view, deadline):",
        (
            "tiers/test_object_store_faults.py::"
            "test_the_object_of_another_after_a_lost_answer_is_a_conflict",
        ),
    ),
    Bug(
        "short-answer-is-the-end",
        "tiers/object_store.py",
        "            if offset + len(out) <= size_bytes:",
        "            if offset > size_bytes:",
        (
            "tiers/test_object_store_faults.py::"
            "test_an_answer_that_is_not_what_was_asked_for_is_asked_again",
        ),
    ),
    Bug(
        "upload-in-flight-thrown-away",
        "tiers/object_store.py",
        "            if upload.age_s >= older_than_s:",
        "            if upload.age_s >= -60:",
        ("tiers/test_object_store.py::test_parts_of_another_size_are_not_used",),
    ),
    Bug(
        "copied-part-not-compared",
        "tiers/_upload.py",
        "        if part.checksum != checksum:",
        "        if not part.checksum:",
        ("tiers/test_object_store.py::test_a_promise_of_same_bytes_is_not_believed",),
    ),
    Bug(
        "part-of-an-earlier-try-not-compared",
        "tiers/_upload.py",
        "        if not self.parts.has_bytes(has, view, checksum):",
        "        if not has.size_bytes:",
        ("tiers/test_object_store.py::test_parts_of_other_content_are_sent_again",),
    ),
    Bug(
        "denial-asked-again",
        "tiers/_requests.py",
        "_AGAIN = frozenset({Kind.THROTTLED, ",
        "_AGAIN = frozenset({Kind.DENIED, Kind.THROTTLED, ",
        ("tiers/test_object_store_faults.py::test_expired_credentials_are_read_once_more",),
    ),
    Bug(
        "successor-found-by-a-scan-is-no-rival",
        "agent/flushing.py",
        "incarnation=max(run.begun, default=0) if",
        "incarnation=run.incarnation if",
        ("test_store_branches.py::test_a_job_that_goes_on_beside_its_successor_is_told",),
    ),
    Bug(
        "what-a-tier-lacked-stays-away",
        "agent/flushing.py",
        "        tier.small_owed |= small_files_lacking(run, found)\n",
        "        small_files_lacking(run, found)\n",
        (
            "agent/test_recovery.py::"
            "test_small_files_that_a_tier_lacked_come_there_after_the_agents_death",
        ),
    ),
    Bug(
        "store-lets-go-before-it-was-read-back",
        "agent/keeping.py",
        "                if not await self._healer.verify_save(run, save, tier.label):\n"
        "                    return\n",
        "                save.verified.add(tier.label)\n",
        (
            "test_store_rights.py::"
            "test_without_the_right_to_delete_saves_go_on_and_are_not_read_over_and_over",
        ),
    ),
    Bug(
        "read-back-for-nothing",
        "agent/keeping.py",
        "        return not tier.denied and bool(",
        "        return bool(",
        (
            "test_store_rights.py::"
            "test_without_the_right_to_delete_saves_go_on_and_are_not_read_over_and_over",
        ),
    ),
    Bug(
        "what-came-back-is-deleted",
        "agent/keeping.py",
        "            if str(save.name) not in self._healer.not_kept(run, tier):",
        "            if str(save.name) not in run.saves:",
        ("test_store_keeping.py::test_what_comes_to_be_wanted_while_it_is_let_go_is_kept",),
    ),
    Bug(
        "data-gone-with-the-records",
        "agent/keeping.py",
        "await asyncio.sleep(self._tools.limits.delete_grace_s)",
        "await asyncio.sleep(0)",
        ("test_store_keeping.py::test_what_comes_to_be_wanted_while_it_is_let_go_is_kept",),
    ),
    Bug(
        "pruned-under-a-reader",
        "cli/_prune.py",
        "        if not _inventory.has_leases(place.tier):",
        "        if _inventory.has_leases(place.tier):",
        ("cli/test_prune.py::test_readers_in_a_store_are_given_time",),
    ),
    Bug(
        "pruned-on-its-way",
        "cli/_prune.py",
        "                busy=not (save.complete or save.has_manifest)",
        "                busy=bool(save.aborted)",
        ("cli/test_prune.py::test_what_may_be_on_its_way_up_is_no_remains",),
    ),
    Bug(
        "secrets-in-a-file",
        "agent/notes.py",
        "access=config.access.to_note()",
        "access=config.access",
        ("test_store_tier.py::test_no_secret_is_left_anywhere",),
    ),
    Bug(
        "failed-for-want-of-credentials-for-good",
        "agent/registry.py",
        "        save.failed.pop(tier.label, None)",
        "        save.heals = 0",
        ("test_store_rights.py::test_credentials_are_not_waited_for_for_ever",),
    ),
)
