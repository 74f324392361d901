"""The tier of the page "Write your own tier" passes the suite, in at most 100 lines."""

from __future__ import annotations

import re
import types
from pathlib import Path

from _code_blocks import blocks

from mtckpt.testing import TierSuite
from mtckpt.tiers import Survives, Tier

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tiers.md"


def first_block() -> str:
    return next(block.code for block in blocks(PAGE.read_text(encoding="utf-8")) if block.code)


def make_memory_tier() -> Tier:
    module = types.ModuleType("docs_tier")
    exec(compile(first_block(), str(PAGE), "exec"), module.__dict__)
    tier: Tier = module.__dict__["MemoryTier"]()
    return tier


class TestMemoryTier(TierSuite):
    survives = Survives(0)
    several_processes = False

    def make_tier(self, tmp_path: Path) -> Tier:
        return make_memory_tier()


def test_it_is_as_short_as_the_page_says() -> None:
    assert len(first_block().strip().splitlines()) <= 100


def test_the_suite_on_the_page_is_the_one_above() -> None:
    shown = re.findall(r"class TestMemoryTier\(TierSuite\):\n(?:    .*\n|\n)+", PAGE.read_text())
    assert len(shown) == 1
    assert "several_processes = False" in shown[0]
