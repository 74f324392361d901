"""Bugs in what several ranks store, agree on and restore together; see ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

PLACEMENT = (
    Bug(
        "copies-beside-one-another",
        "_boxes.py",
        "(seat + turn * num_seats // count)",
        "(seat + turn)",
        ("test_placement.py::test_the_ring_is_as_good_as_any_that_is_balanced",),
    ),
    Bug(
        "one-loss-too-many-promised",
        "_survival.py",
        "least[name] = fewest - 1",
        "least[name] = fewest",
        ("test_placement.py::test_the_report_is_what_is_really_lost",),
    ),
    Bug(
        "racks-of-two-zones-mixed",
        "_survival.py",
        "paths = [path[: len(used) - position] for path in wider]",
        "paths = [path[len(used) - position - 1 : len(used) - position] for path in wider]",
        ("test_placement.py::test_a_rack_of_one_zone_is_not_that_of_another",),
    ),
)

_BY_PATH = "test_by_path_global_arrays_of_any_rank_are_found_and_private_ones_of_this"

BOXES = (
    Bug(
        "box-restored-in-part",
        "_boxes.py",
        "still += _without(part, common)",
        "still += _without(part, common)[1:]",
        ("test_boxes.py::test_pieces_and_what_is_missing_make_up_the_wanted_box_once",),
    ),
    Bug(
        "rows-taken-for-columns",
        "_boxes.py",
        "or piece.shape[axis] == source.shape[axis] == target.shape[axis]",
        "or piece.shape[axis] == target.shape[axis]",
        ("test_boxes.py::test_a_wanted_box_is_put_together_byte_for_byte",),
    ),
    Bug(
        "missing-bytes-left-as-they-are",
        "_assembly.py",
        "    if missing:\n",
        "    if missing and not pieces:\n",
        ("test_assembly.py::test_a_box_of_which_a_part_is_nowhere_is_refused",),
    ),
    Bug(
        "arrays-of-two-groups-mixed",
        "_assembly.py",
        "if entry.ranks != wanted.ranks:",
        "if entry.dtype != wanted.dtype:",
        ("test_assembly.py::test_groups_of_ranks_have_arrays_of_their_own_under_one_path",),
    ),
    Bug(
        "private-state-of-rank-0-for-all",
        "_copies.py",
        "self.base = scope.rank % world_size",
        "self.base = 0",
        ("test_assembly.py::test_what_is_private_stays_with_its_rank",),
    ),
    Bug(
        "first-shard-placed-before-the-last-was-seen",
        "_restore.py",
        "if last and sum(map(len, parts)) > 1:",
        "if last and len(parts) > 1:",
        ("test_assembly.py::test_a_flipped_bit_in_any_shard_is_found[checked while placed]",),
    ),
    Bug(
        "another-ranks-own-handed-out",
        "_copies.py",
        "if entry.path in lacking and entry.offsets is not None:",
        "if entry.path in lacking:",
        ("test_assembly.py::" + _BY_PATH,),
    ),
    Bug(
        "what-only-others-have-not-looked-for",
        "_copies.py",
        "for rank in itertools.chain(*self._levels()) if lacking else ():",
        "for rank in ():",
        ("test_assembly.py::" + _BY_PATH,),
    ),
)

NODES = (
    Bug(
        "network-for-what-is-here",
        "_copies.py",
        "            if place.near:\n                self._look(rank, place)\n",
        "            self._look(rank, place)\n",
        ("test_copies.py::test_only_what_this_node_lacks_is_read_from_peers",),
    ),
    Bug(
        "each-node-chooses-by-what-it-has",
        "_gathering.py",
        "            if prefix and joined is not None:\n",
        "            if prefix and joined is None:\n",
        ("test_gathering.py::test_a_node_that_lost_everything_gets_it_from_peers",),
    ),
    Bug(
        "silent-node-asked-again-and-again",
        "_copies.py",
        "if label in self._scope.places and label not in self._attempt.silent",
        "if label in self._scope.places",
        ("test_copies.py::test_what_a_peer_cannot_give_comes_from_the_next[silent]",),
    ),
    Bug(
        "small-array-left-to-whom-a-tie-names",
        "_save.py",
        "        if (twin := pieces_of[first].get(what)) is not None",
        "        if (twin := next(iter(pieces_of[first].values()))) is not None",
        ("test_pieces.py::test_no_byte_is_left_to_another_rank_whatever_each_has_tied",),
    ),
)

SHARES = (
    Bug(
        "share-of-a-rank-with-a-gap",
        "_boxes.py",
        "length * member // members, length * (member + 1) // members",
        "length * member // members, length // members * (member + 1)",
        ("test_boxes.py::test_shares_are_the_whole_each_byte_once",),
    ),
    Bug(
        "share-of-ranks-on-another-node",
        "_pieces.py",
        "[rank for rank in holders if rank in near]",
        "list(holders)",
        ("test_pieces.py::test_every_byte_once_for_each_node",),
    ),
    Bug(
        "stale-plan-of-a-global-array",
        "_pieces.py",
        "if (part.spec, part.holders) != (piece.held, piece.holders):",
        "if part.spec.shape != (piece.held and piece.held.shape):",
        ("test_pieces.py::test_what_changed_since_the_plan_is_not_gathered",),
    ),
)

AGREEMENT = (
    Bug(
        "words-of-an-earlier-start-heard",
        "_coordination.py",
        'f"{self._door}/{_word()}" if rank == 0',
        'f"{self._door}/0" if rank == 0',
        ("test_coordination.py::test_nobody_takes_what_an_earlier_start_has_left_in_the_store",),
    ),
    Bug(
        "parts-of-two-plans-are-a-save",
        "_manifest.py",
        "r.incarnation, r.plan_digest)",
        "r.incarnation, first.plan_digest)",
        ("test_manifest.py::test_parts_of_different_plans_are_no_save",),
    ),
    Bug(
        "crash-in-the-first-save-for-ever",
        "_restorer.py",
        "(plan.lost or (plan.skipped",
        "(plan.skipped or (plan.skipped",
        ("test_ranks.py::test_a_first_save_that_was_never_whole_is_no_step",),
    ),
    Bug(
        "save-skipped-by-one-rank-alone",
        "_saver.py",
        "if self.run.members.world_size > 1 and save.id:",
        "if self.run.members.world_size > 1 and not save.id:",
        ("test_ranks.py::test_a_rank_that_cannot_capture_calls_the_save_off_on_all",),
        quick=False,
    ),
    Bug(
        "staged-with-a-part-missing",
        "_session.py",
        "        if sealed.staged:\n",
        "        if sealed.save:\n",
        ("test_ranks.py::test_a_rank_that_never_comes_is_named",),
    ),
)
