"""The map of the README and of the architecture page is the tree, file by file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| `(?P<path>[\w/.-]+)` \| (?P<says>\S.*\S) \|$", re.MULTILINE)
# Directories of several files that the map names once.
FOLDERS = ("benchmarks/", "docs/", "examples/", "scripts/", "tests/")


def rows(page: str, heading: str) -> dict[str, str]:
    """Path -> what the map says of it, from the table below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.split(rf"^#+ {heading}$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    found = [(match["path"], match["says"]) for match in ROW.finditer(section)]
    assert len(found) == len({path for path, _ in found}), "a file has two lines"
    return dict(found)


def modules() -> set[str]:
    """Every module of the package that has something to say."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mtckpt").rglob("*.py")
        if path.read_text(encoding="utf-8").strip()
    }


def test_the_readme_names_every_module() -> None:
    named = {path for path in rows("README.md", "Where things live") if path.startswith("mtckpt/")}
    assert named == modules()


def test_the_readme_names_folders_that_exist() -> None:
    listed = rows("README.md", "Where things live")
    for path in listed:
        assert (ROOT / path).exists(), path
    assert set(FOLDERS) <= set(listed)


def test_the_architecture_page_has_the_same_lines() -> None:
    readme = rows("README.md", "Where things live")
    package = {path: says for path, says in readme.items() if path.startswith("mtckpt/")}
    assert rows("docs/architecture.md", "Modules") == package


def test_two_commands_and_no_more() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)[1]
    assert section.startswith("Two commands")
    commands = re.findall(r"^(make .+)$", section, flags=re.MULTILINE)
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_a_page_that_one_sees_first_is_short(page: str) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) < 250
