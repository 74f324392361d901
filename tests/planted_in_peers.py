"""Bugs in copies on other nodes, in how they travel, and in who is let in; see ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

COPIES = (
    Bug(
        "slot-given-out-while-its-copies-are-all-there-is",
        "agent/queue.py",
        "if save.copied and not any(s.replicated for s in newer):",
        "if save.copied and not newer:",
        ("agent/test_copies.py::test_a_slot_stays_until_a_newer_save_is_on_other_nodes_too",),
    ),
    Bug(
        "guests-taken-for-parts-of-own-ranks",
        "agent/runs.py",
        "own -= save.guests",
        "own -= set()",
        ("agent/test_copies.py::test_a_scan_tells_guests_from_parts_of_its_own_ranks",),
    ),
    Bug(
        "guests-not-noted-for-the-next-agent",
        "agent/runs.py",
        "for name, s in self.saves.items() if s.guests}",
        "for name, s in self.saves.items() if s.ranks}",
        ("agent/test_copies.py::test_a_scan_tells_guests_from_parts_of_its_own_ranks",),
    ),
    Bug(
        "silent-partners-hold-up-saves-for-ever",
        "agent/runs.py",
        "(t.owed_since_s or now_s) < PARTNER_PATIENCE_S",
        "now_s < PARTNER_PATIENCE_S",
        ("agent/test_copies.py::test_partners_that_are_silent_for_long_do_not_hold_up_saves",),
    ),
    Bug(
        "racks-not-told-to-the-placement",
        "agent/partners.py",
        "dict(node.address.domains),",
        "{},",
        (
            "agent/test_copies.py::test_partners_are_in_other_racks_and_each_node_has_as_many_guests",
        ),
    ),
    Bug(
        "copies-offered-to-a-node-that-is-about-to-go",
        "agent/partners.py",
        "number in leaving,",
        "False,",
        ("agent/test_copies.py::test_nodes_that_fail_or_go_are_not_partners",),
    ),
    Bug(
        "copies-on-a-node-that-goes-taken-for-safe",
        "agent/copies.py",
        " or save.held_on & run.leaving:",
        ":",
        (
            "test_drains_over_nodes.py::test_owners_of_copies_on_a_drained_node_choose_another_partner",
        ),
    ),
    Bug(
        "saves-taken-by-a-node-that-is-drained",
        "agent/ring.py",
        "            if run.drained:",
        "            if False:",
        (
            "test_drains_over_nodes.py::test_without_copies_another_node_takes_what_a_drained_one_has",
        ),
    ),
    Bug(
        "strict-placement-that-is-not",
        "_joining.py",
        "strict=tier.strict_placement",
        "strict=False",
        ("test_errors_raised.py::test_it_is_raised[PlacementImpossible]",),
    ),
    Bug(
        "failures-of-another-node-not-heard",
        "agent/copies.py",
        "max(run.troubles[number], taken.failures)",
        "run.troubles[number]",
        ("test_copies_over_nodes.py::test_a_node_whose_copies_rot_is_avoided",),
    ),
)

TRANSFER = (
    Bug(
        "chunks-of-two-requests-not-compared",
        "_source.py",
        "for start in starts[1:]:",
        "for start in starts[len(starts) :]:",
        ("agent/test_receiving.py::test_damage_at_the_source_is_not_copied[2097142]",),
    ),
    Bug(
        "last-chunks-of-a-shard-not-compared",
        "_source.py",
        "stop if stop == self.size_bytes else stop - _shard.CHUNK_BYTES",
        "stop - _shard.CHUNK_BYTES",
        ("agent/test_receiving.py::test_damage_at_the_source_is_not_copied[-1]",),
    ),
    Bug(
        "damaged-on-the-way-and-never-asked-again",
        "_source.py",
        "for left in range(REREADS, -1, -1):",
        "for left in range(0, -1, -1):",
        (
            "agent/test_receiving.py::"
            "test_what_a_connection_damages_is_asked_for_again[flip-100000]",
        ),
    ),
    Bug(
        "no-room-found-half-way",
        "agent/receiving.py",
        "if not _is_there(target, shard_keys(*at)):",
        "if _is_there(target, shard_keys(*at)):",
        ("agent/test_receiving.py::test_no_room_is_said_before_a_byte_comes",),
    ),
)

THIN = (
    Bug(
        "left-out-what-differs",
        "_thinning.py",
        "if captured.get(box) == root}",
        "if box in captured and root}",
        ("agent/test_thin_copies.py::test_a_replica_that_differs_is_no_copy",),
    ),
    Bug(
        "left-out-of-the-root-of-another-tensor",
        "_twins.py",
        'array("L", [index_of[entry.stored_name] for entry in held]))',
        'array("L", range(len(held))))',
        ("agent/test_thin_copies.py::test_what_was_captured_here_too_neither_comes_nor_is_stored",),
    ),
    Bug(
        "thin-copies-taken-for-parts-of-own-ranks",
        "agent/findings.py",
        "if record.left_out]",
        "if record.left_out < 0]",
        ("agent/test_thin_copies.py::test_a_node_has_all_of_a_save_with_thin_copies_of_the_rest",),
    ),
    Bug(
        "mended-with-a-thin-copy",
        "agent/receiving.py",
        "if not copy.record.left_out:",
        "if copy.record:",
        (
            "agent/test_thin_copies.py::test_a_shard_is_mended_from_a_thin_copy_and_what_is_beside[-5]",
        ),
    ),
    Bug(
        "other-shards-read-without-comparing-digests",
        "_delivery.py",
        "if there is not None and _digests(own, tensor) == _digests(loaded, there):",
        "if there is not None:",
        ("agent/test_thin_copies.py::test_what_others_have_of_the_same_name_is_not_taken_for_it",),
    ),
    Bug(
        "nothing-behind-a-thin-copy",
        "_copies.py",
        "return [*self._levels(), self._whole()]",
        "return [*self._levels()]",
        (
            "agent/test_thin_copies.py::"
            "test_a_shard_that_leaves_nothing_out_is_found_behind_those_that_do",
        ),
    ),
)

STRANGERS = (
    Bug(
        "answered-before-a-proof",
        "agent/peer_server.py",
        "        if not self.run_key:\n            raise",
        "        if not head.path:\n            raise",
        ("agent/test_hostile_peers.py::test_nothing_is_answered_before_a_proof[list]",),
    ),
    Bug(
        "a-proof-is-good-twice",
        "_handshake.py",
        "hello, self._hello = self._hello, None",
        "hello = self._hello",
        ("agent/test_hostile_peers.py::test_what_was_overheard_is_good_for_nothing",),
    ),
    Bug(
        "a-secret-opens-all-runs",
        "agent/peer_server.py",
        "if not self._server.lets_read(self.run_key, rest):",
        'if not rest.startswith(""):',
        ("agent/test_hostile_peers.py::test_a_secret_is_good_for_its_own_run_and_port",),
    ),
    Bug(
        "strangers-have-as-long-as-they-like",
        "agent/peer_server.py",
        "self.deadline_s = time.monotonic() + PROVE_S",
        "self.deadline_s = time.monotonic() + IDLE_S",
        ("agent/test_hostile_peers.py::test_a_word_a_letter_at_a_time_is_not_waited_for",),
    ),
    Bug(
        "a-range-from-another-place-is-taken",
        "tiers/peer.py",
        "            _check_range(response, offset)\n",
        "            _check_range(response, 5)\n",
        (
            "agent/test_lying_peers.py::"
            "test_what_a_liar_answers_to_a_range_is_an_error_of_the_tier[1]",
        ),
    ),
    Bug(
        "another-certificate-in-between",
        "_handshake.py",
        "hello.role, who, hello.nonce",
        "hello.role, who.split()[0], hello.nonce",
        ("agent/test_peer_tls.py::test_nobody_stands_between_with_another_good_certificate",),
    ),
)
