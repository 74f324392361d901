"""Bugs in what agents of several nodes tell each other and agree on; see ``planted_bugs``."""

from __future__ import annotations

from planted_bug import Bug

_AGREEMENT = "agent/test_agreement.py::test_what"

SAVES = (
    Bug(
        "committed-without-the-news-of-all-nodes",
        "agent/saves.py",
        "return _number_of(here, self.told.ranks(label)) >= self.world_size",
        "return bool(here or self.told.ranks(label))",
        ("agent/test_nodes.py::test_complete_is_what_all_nodes_have_together",),
    ),
    Bug(
        "whole-elsewhere-is-whole-here",
        "agent/saves.py",
        "return bool(self.ranks.get(label)) and self.is_whole(label)",
        "return label in self.ranks and self.is_whole(label)",
        ("agent/test_nodes.py::test_complete_is_what_all_nodes_have_together",),
    ),
    Bug(
        "parts-told-before-all-ranks-of-the-node-have-theirs",
        "agent/nodes.py",
        "layout.own <= ranks",
        "layout.own & ranks",
        ("agent/test_nodes.py::test_a_node_tells_what_all_its_ranks_have",),
    ),
    Bug(
        "part-of-a-save-that-was-called-off",
        "agent/nodes.py",
        "        parts.pop(RAM, None)",
        "        parts.pop('', None)",
        ("agent/test_nodes.py::test_a_node_that_calls_a_save_off_has_no_part_of_it",),
    ),
    Bug(
        "lead-says-whole-before-the-store-was-told",
        "agent/nodes.py",
        "set(filter(save.is_whole, labels)) - save.uncommitted",
        "set(filter(save.is_whole, labels))",
        ("agent/test_nodes.py::test_the_lead_says_nothing_of_what_is_not_settled",),
    ),
)

DECISIONS = (
    Bug(
        "what-others-told-is-forgotten-when-a-rank-seals-after-a-restart",
        "agent/ring.py",
        "if other is not save and other is not None and other.is_foreign(",
        "if other is not None and other.is_foreign(",
        (
            "agent/test_agreement.py::test_what_others_told_stands_when_a_rank_seals_after_its_agent"
            "_restarted",
        ),
    ),
    Bug(
        "save-in-doubt-called-off-by-another-than-the-lead",
        "agent/agreement.py",
        "if layout and (may_be_whole or not (layout.is_lead or own_lack)):",
        "if layout and may_be_whole:",
        ("agent/test_agreement.py::test_a_part_that_others_may_count_on_is_kept[1-handed]",),
    ),
    Bug(
        "what-an-agent-left-called-off-by-the-next-lead",
        "agent/agreement.py",
        "may_be_whole = save.found or (",
        "may_be_whole = (",
        ("agent/test_agreement.py::test_a_part_that_others_may_count_on_is_kept[0-found]",),
    ),
    Bug(
        "save-called-off-by-a-lead-whose-parts-another-node-may-have",
        "agent/agreement.py",
        "(save.offered and not own_lack)",
        "False",
        ("agent/test_agreement.py::test_a_part_that_others_may_count_on_is_kept[0-offered]",),
    ),
    Bug(
        "what-a-node-has-heard-taken-for-what-its-ranks-have",
        "agent/links.py",
        "if news.parts and save.order",
        "if save.order",
        ("agent/test_agreement.py::test_a_rank_that_has_heard_of_a_later_save_has_not_gone_on",),
    ),
    Bug(
        "whole-step-called-off-since-somebody-went-on",
        "agent/agreement.py",
        "if not (run.layout and s.found)]",
        "if s]",
        (
            "agent/test_agreement.py::test_what_an_agent_before_this_one_left_is_called_off_for"
            "_nobody_who_went_on",
        ),
    ),
    Bug(
        "slot-of-a-save-called-off-while-it-was-sealed-is-lost",
        "agent/agreement.py",
        "async with run.sealing:  # what is just",
        "if True:  # what is just",
        ("agent/test_agreement.py::test_a_save_called_off_while_it_is_sealed_gives_its_slot_back",),
    ),
    Bug(
        "whole-save-called-off",
        "agent/agreement.py",
        "if not (is_open or untouched):",
        "if save.called_off:",
        ("agent/test_agreement.py::test_what_is_whole_is_never_called_off",),
    ),
    Bug(
        "recycled-part-taken-for-one-that-never-came",
        "agent/runs.py",
        "        self._note_remains()  # nobody takes it for a part that never came\n",
        "",
        (f"{_AGREEMENT}_a_node_let_go_of_before_the_lead_spoke_is_as_the_lead_says",),
    ),
    Bug(
        "called-off-not-heard-once-a-newer-one-is-whole",
        "agent/agreement.py",
        "save.is_unsettled if is_word else save.is_open",
        "save.is_open",
        (f"{_AGREEMENT}_a_node_let_go_of_before_the_lead_spoke_is_as_the_lead_says",),
    ),
    Bug(
        "whole-not-heard-once-its-parts-are-gone",
        "agent/links.py",
        "save.is_whole if save.name.incarnation == run.incarnation else save.is_complete",
        "save.is_complete",
        (f"{_AGREEMENT}_a_node_let_go_of_before_the_lead_spoke_is_as_the_lead_says",),
    ),
    Bug(
        "word-of-another-start-taken-in",
        "agent/links.py",
        "if run.links.get(number) is not link:",
        "if run.gone:",
        (f"{_AGREEMENT}_was_told_to_another_start_of_the_job_is_not_taken_in",),
    ),
    Bug(
        "steps-of-an-earlier-start-taken-for-this-one's",
        "agent/runs.py",
        "if self.layout and link.incarnation == incarnation",
        "if self.layout",
        ("agent/test_agreement.py::test_a_step_of_another_start_says_nothing_of_this_one",),
    ),
    Bug(
        "anybody's-word-taken-for-the-lead's",
        "agent/links.py",
        "link, here = run.links.get(message.node), self._peers.address",
        "link, here = run.links.setdefault(message.node, Link()), self._peers.address",
        ("agent/test_agreement.py::test_the_word_of_another_than_the_lead_is_not_taken",),
    ),
    Bug(
        "header-of-another-rank-kept-in-a-slot",
        "_writing.py",
        "        slot.data.view[: layout.data_start] = layout.header\n",
        "        if not any(slot.data.view[:8]):\n"
        "            slot.data.view[: layout.data_start] = layout.header\n",
        ("test_guards.py::test_a_slot_that_another_rank_had_meanwhile_gets_its_header_again",),
        quick=False,
    ),
)
