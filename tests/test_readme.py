"""The maps of the README and of the architecture page are the tree, and the first page is short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


file_map = load_script("file_map")
ROW = re.compile(r"^\| `(?P<path>[\w/.-]+)` \| (?P<says>\S.*\S) \|$", re.MULTILINE)


def rows(page: str, heading: str) -> dict[str, str]:
    """Path -> what the map says of it, from the table below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.split(rf"^#+ {heading}$", text, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    return {match["path"]: match["says"] for match in ROW.finditer(section)}


def test_the_map_is_the_tree() -> None:
    assert rows("docs/architecture.md", "Modules") == file_map.modules(), "run scripts/file_map.py"


def test_the_readme_names_every_folder_of_code() -> None:
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("mtckpt/**/__init__.py")}
    listed = set(rows("README.md", "Where things live"))
    assert {each for each in packages if each.count("/") <= 2} <= listed
    assert all((ROOT / path).is_dir() for path in listed)


def test_a_module_that_says_nothing_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_map, "ROOT", tmp_path)
    (tmp_path / "mtckpt" / "inner").mkdir(parents=True)
    (tmp_path / "mtckpt" / "__init__.py").write_text("")
    (tmp_path / "mtckpt" / "inner" / "b.py").write_text('"""Says ``this``.\n\nAnd more."""\n')
    (tmp_path / "mtckpt" / "a.py").write_text("x = 1\n")
    assert file_map.rows() == "| `mtckpt/a.py` |  |\n| `mtckpt/inner/b.py` | Says `this`. |\n"


def test_two_commands_and_no_more() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)[1]
    assert section.startswith("Two commands")
    commands = re.findall(r"^(make .+)$", section, flags=re.MULTILINE)
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE)
