"""Write the map of the package into docs/architecture.md: a line for each module.

The line is the first one of the module's docstring. Run it after adding, removing or renaming a
module, or changing that line; tests/test_readme.py fails until then.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/architecture.md"
_ROW = re.compile(r"^(?:\| `mtckpt/.*\|\n)+", re.MULTILINE)


def modules() -> dict[str, str]:
    """Path -> first line of its docstring, of every module that is not empty; folders last."""
    found = {}
    paths = (ROOT / "mtckpt").rglob("*.py")
    for path in sorted(paths, key=lambda path: (len(path.parents), path)):
        text = path.read_text(encoding="utf-8")
        if text.strip():
            docstring = ast.get_docstring(ast.parse(text)) or ""
            line = docstring.partition("\n")[0].strip()
            found[path.relative_to(ROOT).as_posix()] = line.replace("``", "`").replace("|", "/")
    return found


def rows() -> str:
    return "".join(f"| `{path}` | {says} |\n" for path, says in modules().items())


def main() -> None:
    page = ROOT / PAGE
    text = page.read_text(encoding="utf-8")
    written, count = _ROW.subn(lambda _: rows(), text)
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} maps of the package, not one")
    if written != text:
        page.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
