"""Bugs in what earlier starts left, in copies that are gone, in replicas; see ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

LINE = (
    Bug(
        "what-was-abandoned-counts-as-newer",
        "agent/queue.py",
        "return (self.on_line, self.order)",
        "return (True, self.order)",
        ("agent/test_queue.py::test_a_slot_is_recycled_only_when_nothing_needs_it",),
    ),
    Bug(
        "copies-of-what-was-restored-from-go-for-what-is-abandoned",
        "agent/saves.py",
        "return (self.is_on(line), self.order)",
        "return (True, self.order)",
        (
            "agent/test_runs.py::test_copies_of_what_was_restored_from_outlast_what_that_abandoned",
            "agent/test_runs.py::test_a_disk_is_owed_what_was_restored_from_whatever_it_has_of_what"
            "_is_abandoned",
        ),
    ),
    Bug(
        "chosen-and-forgotten",
        "agent/notes.py",
        "sorted(name for name, save in run.saves.items() if save.chosen)",
        "[]",
        ("agent/test_runs.py::test_what_was_restored_from_is_whole_for_the_next_agent_too",),
    ),
    Bug(
        "a-job-on-fewer-nodes-was-restored-from-nothing",
        "agent/agreement.py",
        "if save.order == at:",
        "if save.order == at and run.layout:",
        ("agent/test_agreement.py::test_what_the_job_was_restored_from_was_whole[alone]",),
    ),
    Bug(
        "who-was-left-behind-is-a-rank",
        "agent/verbs.py",
        "own = [o for o in run.owners.values() if o.incarnation in (0, message.number)]",
        "own = list(run.owners.values())",
        (
            "agent/test_starts.py::test_a_process_that_an_earlier_start_left_behind_is_no_rank_of"
            "_this_one[1-False-False]",
        ),
    ),
    Bug(
        "news-ends-a-backlog",
        "agent/links.py",
        "run.discharge(scanned=False)\n        for save in sorted",
        "run.discharge()\n        for save in sorted",
        ("agent/test_agreement.py::test_news_of_a_newer_save_ends_no_backlog",),
    ),
    Bug(
        "news-ends-a-backlog-in-the-end",
        "agent/links.py",
        "run.discharge(scanned=False)\n        # Nobody looks",
        "run.discharge()\n        # Nobody looks",
        ("agent/test_agreement.py::test_news_of_a_newer_save_ends_no_backlog",),
    ),
    Bug(
        "nodes-that-may-be-gone-are-waited-for",
        "_gathering.py",
        "deadline_s = time.monotonic() + run.timeout_s",
        "deadline_s = time.monotonic() + 20 * run.timeout_s",
        (
            "test_gathering.py::test_a_node_that_may_be_gone_is_not_waited_for_longer_than_others"
            "_wait",
        ),
    ),
)

GONE = (
    Bug(
        "acknowledged-and-gone",
        "agent/guests.py",
        "if not self._has(run, offer):",
        "if False:",
        (
            "agent/test_guests.py::test_a_copy_that_is_gone_when_it_is_asked_for_is_not"
            "_acknowledged",
        ),
    ),
    Bug(
        "an-offer-is-answered-with-an-earlier-one",
        "agent/guests.py",
        "tuple(sorted(set(offer.ranks))), run.secret",
        '(), ""',
        (
            "agent/test_guests.py::test_what_was_offered_before_does_not_stand_for_what_is_offered"
            "_now",
        ),
    ),
    Bug(
        "strangers-say-what-they-like",
        "agent/peer_listener.py",
        "if odd:",
        "if False:",
        ("agent/test_peers.py::test_no_more_than_a_word_is_read_of_a_stranger",),
    ),
    Bug(
        "bytes-twice",
        "adapters/dcp_files.py",
        "lies = num_bytes <= chunk.size_bytes",
        "lies = True",
        (
            "adapters/test_dcp_files.py::test_a_view_that_has_bytes_twice_is_none_of_what_dcp"
            "_writes[sizes4-strides4-False]",
        ),
    ),
)

ALIKE = (
    Bug(
        "any-save-counts-as-sound",
        "_retention.py",
        "[save for save in counted if not save.suspect]",
        "list(counted)",
        ("test_retention.py::test_the_newest_that_nobody_doubts_is_kept_too",),
    ),
    Bug(
        "replicas-differ-and-are-equal",
        "_twins.py",
        "if len(groups) > 1:",
        "if len(groups) > 2:",
        ("test_replica_divergence.py::test_copies_are_grouped_by_what_they_are",),
    ),
)
