"""Bugs in the protocol that the simulation finds by itself; see ``test_simulation_bugs``.

``seed`` is of a story in which a promise is broken with the bug in. A change of the
protocol, or of the simulation, makes other stories of all seeds: then look for another seed with
``python -m mtckpt.testing.simulation 1 400`` in a copy that has the bug.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SimulatedBug:
    """One edit, and the seed of the story that does not end well with it."""

    name: str
    file: str
    text: str
    replacement: str
    seed: int
    partners: bool = False


BUGS = (
    SimulatedBug(
        "committed-without-the-news-of-all-nodes",
        "agent/saves.py",
        "return _number_of(here, self.told.ranks(label)) >= self.world_size",
        "return bool(here or self.told.ranks(label))",
        1,
    ),
    SimulatedBug(
        "newest-whole-save-in-memory-recycled",
        "agent/queue.py",
        "newer = [s for s in saves if s.worth > save.worth and s.staged]",
        "newer = [s for s in saves if s.worth > save.worth]",
        9,
    ),
    SimulatedBug(
        "slot-of-a-dead-owner-never-free",
        "agent/leftovers.py",
        "slot.state, slot.holder, slot.doubtful = SlotState.FREE",
        "_, _, slot.doubtful = SlotState.FREE",
        3,
    ),
    SimulatedBug(
        "one-number-for-all-starts-of-the-job",
        "_run.py",
        "number=max(highest for highest, *_ in told) + 1",
        "number=max(1, max(highest for highest, *_ in told))",
        2,
    ),
    SimulatedBug(
        "oldest-step-restored-first",
        "_choice.py",
        "key=lambda name: (name.step, name.incarnation), reverse=True)",
        "key=lambda name: (name.step, name.incarnation))",
        2,
    ),
    SimulatedBug(
        "rolled-back-branch-comes-back",
        "_choice.py",
        "counted = [name for name in names if not line or _manifest.on_line(name, line)]",
        "counted = names",
        375,
    ),
    SimulatedBug(
        "retention-takes-the-newest",
        "agent/healing.py",
        "gone = [save for save in held if decisions[save.name].delete]",
        "gone = held if decisions else []",
        5,
    ),
    SimulatedBug(
        "slot-given-to-two",
        "agent/ring.py",
        "if slot.state is SlotState.FREE and slot.fits(plan):",
        "if slot.state in (SlotState.FREE, SlotState.CAPTURING) and slot.fits(plan):",
        1,
    ),
    SimulatedBug(
        "disputed-save-is-whole",
        "agent/saves.py",
        "        if self.disputed or (label == RAM and self.called_off):",
        "        if label == RAM and self.called_off:",
        345,
    ),
    SimulatedBug(
        "plans-of-ranks-not-compared",
        "agent/ring.py",
        "        save.disputed |= sealed.plan_digest != save.plan_digest\n",
        "",
        39,
    ),
    SimulatedBug(
        "what-an-earlier-start-left-open-stays-open",
        "agent/verbs.py",
        "        await self._registry.agreement.begun(run, message.number, message.parent)\n",
        "",
        12,
    ),
    SimulatedBug(
        "slots-given-by-an-earlier-agent-never-settled",
        "agent/registry.py",
        "if any(owner.absent and not owner.dead for owner in run.owners.values()):",
        "if run.owners:",
        52,
    ),
    SimulatedBug(
        "memory-freed-before-it-is-safe-elsewhere",
        "agent/freeing.py",
        "        elif run.closing and safe:",
        "        elif run.closing:",
        36,
    ),
    SimulatedBug(
        "write-that-failed-goes-on-for-ever",
        "agent/flushing.py",
        "        finally:\n            save.writing.discard(tier.label)",
        "        finally:\n",
        2,
    ),
    SimulatedBug(
        "tiers-are-not-told-that-there-is-something-to-do",
        "agent/runs.py",
        "        for tier in self.tiers.values():\n            tier.wake.set()",
        "        pass",
        2,
    ),
    SimulatedBug(
        "part-of-a-save-taken-for-the-whole",
        "agent/saves.py",
        "            if self.chosen:",
        "            if not self.stages:",
        12,
    ),
    SimulatedBug(
        "dead-owner-is-not-settled",
        "agent/registry.py",
        "        run.unsettled.append(owner)\n",
        "        pass\n",
        4,
    ),
    SimulatedBug(
        "save-waits-for-an-agent-that-is-stopped",
        "_saver.py",
        "return want.wait_s + _ANSWER_S if known else None",
        "return None",
        136,
    ),
    SimulatedBug(
        "rank-that-nobody-looks-after-keeps-its-run",
        "agent/owners.py",
        'process.state in "ZXTt" or process.parent_pid != owner.parent_pid',
        'process.state in "ZX"',
        120,
    ),
    SimulatedBug(
        "copies-let-go-before-newer-ones-are-there",
        "agent/guests.py",
        "for save in [s for s in run.outlived() if s.guests]:",
        "for save in [s for s in run.saves.values() if s.guests]:",
        11,
        partners=True,
    ),
)
