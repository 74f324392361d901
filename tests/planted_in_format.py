"""Bugs in what is written and read: shards, records, incarnations, state. See ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

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
        ("test_guards_format.py::test_the_last_byte_of_a_tensor_has_a_digest",),
    ),
    Bug(
        "holes-in-a-shard",
        "_shard.py",
        "if start != end or stop - start != kind[2]:",
        "if stop - start != kind[2]:",
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
        "    if layout.size_bytes != file_bytes:",
        "    if layout.size_bytes > file_bytes:",
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
        "return -dtype.stored_item_bytes, kind",
        "return dtype.stored_item_bytes, kind",
        ("test_guards_format.py::test_every_tensor_is_aligned_to_its_elements",),
    ),
)

RECORDS = (
    Bug(
        "record-digest-not-compared",
        "_manifest.py",
        "sealed.digest != _digest(kind, sealed.body)",
        "not sealed.digest",
        ("test_manifest.py::test_no_flipped_bit_in_a_record_passes",),
    ),
    Bug(
        "save-complete-without-all-ranks",
        "_manifest.py",
        "== (first.save_id, len(records), first.step, first.incarnation, first.plan_digest)",
        "== (first.save_id, r.world_size, first.step, first.incarnation, first.plan_digest)",
        ("test_manifest.py::test_a_save_is_complete_when_every_rank_of_one_save_is_there",),
    ),
    Bug(
        "two-saves-make-one",
        "_manifest.py",
        "(r.save_id, r.world_size, r.step, r.incarnation, r.plan_digest)",
        "(first.save_id, r.world_size, r.step, r.incarnation, r.plan_digest)",
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
        ("test_guards_format.py::test_a_table_that_was_made_of_the_damaged_bytes_blesses_nothing",),
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
        ("test_guards_format.py::test_a_record_of_any_size_costs_no_memory",),
    ),
    Bug(
        "save-id-with-a-newline",
        "_manifest.py",
        r"[0-9a-f]{12}\\Z",
        "[0-9a-f]{12}$",
        ("test_guards_format.py::test_an_id_is_an_id_to_its_end",),
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
        "number=max(highest for highest, *_ in told) + 1,",
        "number=max(1, *(highest for highest, *_ in told)),",
        ("test_checkpointer.py::test_roll_back_starts_a_branch",),
    ),
    Bug(
        "roll-back-without-a-parent",
        "_restorer.py",
        "None if source else (restored._incarnation, restored.step or 0)",
        "None",
        ("test_guards.py::test_a_resumed_incarnation_names_its_parent",),
    ),
    Bug(
        "rolled-back-branch-is-newest",
        "_manifest.py",
        "            return limit is None or name.step <= limit\n",
        "            return True\n",
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
        (
            "test_guards_format.py::test_a_branch_from_before_its_parent_began_counts_no_step_after_it",
        ),
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
        "        _copy(target, source, CHUNK_BYTES)\n"
        "        digests[chunk] = xxh3_64_intdigest(_chunk_at(source))\n",
        "        _copy(target, source, CHUNK_BYTES)\n"
        "        digests[chunk] = xxh3_64_intdigest(_chunk_at(target))\n",
        ("test_guards.py::test_the_digest_is_of_the_source_and_not_of_the_copy",),
    ),
    Bug(
        "conjugation-forgotten",
        "adapters/torch/looks.py",
        "        and COMPLEX.isdisjoint(dtypes)\n",
        "",
        ("adapters/test_torch_leaves.py::test_lazy_conjugation_and_negation",),
    ),
    Bug(
        "negation-forgotten",
        "adapters/torch/looks.py",
        "        and not any(map(torch.Tensor.is_neg, block))\n",
        "",
        ("adapters/test_torch_leaves.py::test_lazy_conjugation_and_negation",),
    ),
    Bug(
        "memory-that-was-given-back",
        "adapters/torch/leaves.py",
        "            else:\n                _check_storages(values, layouts.held_bytes, paths)\n",
        "            else:\n",
        ("adapters/test_torch_leaves.py::test_memory_given_back_between_two_saves_is_noticed",),
    ),
    Bug(
        "storage-not-asked-for-again",
        "adapters/torch/looks.py",
        "        and list(map(_held_bytes, map(_storage, block))) == held_bytes\n",
        "",
        ("adapters/test_torch_looks.py::test_whatever_changes_is_seen",),
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
        "_writing.py",
        "        table[: _shard.TABLE_HEADER.size] = bytes(_shard.TABLE_HEADER.size)\n",
        "",
        ("test_guards.py::test_a_capture_cut_short_is_no_finished_one",),
    ),
)
