"""Every error has a place in docs/errors.md, under the anchor that its text names."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from mtckpt import errors

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
CLASSES = sorted(
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.CheckpointError)
)


def sections() -> dict[str, str]:
    """Return the text under every heading that is one class's name, by that name."""
    parts = re.split(r"^#{2,6} +`?(\w+)`? *$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_has_a_section(name: str) -> None:
    text = sections().get(name)
    assert text is not None, f"docs/errors.md has no heading '## {name}'"
    assert len(text.split()) >= 5, f"docs/errors.md says nothing about {name}"


@pytest.mark.parametrize("name", CLASSES)
def test_the_text_of_an_error_leads_to_its_section(name: str) -> None:
    text = str(getattr(errors, name)("what happened"))
    assert text.endswith(f"errors#{name.lower()}")


def test_no_section_is_about_an_error_that_is_gone() -> None:
    assert set(sections()) <= set(CLASSES)


def test_every_error_is_exported() -> None:
    assert sorted(errors.__all__) == CLASSES
