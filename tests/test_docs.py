"""The documentation holds: its code runs, its links lead somewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _code_blocks import Block, blocks
from warm_python import Warm

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)
RUN_PAGES = [name for name in PAGES if name == "README.md" or name.startswith("docs/")]
TIMEOUT_S = 50


def python_blocks() -> list[tuple[str, Block]]:
    return [
        (name, block)
        for name in RUN_PAGES
        for block in blocks((ROOT / name).read_text(encoding="utf-8"))
        if block.language in {"python", "py", "python3"}
    ]


@pytest.fixture(scope="module")
def warm() -> Iterator[Callable[[str], Warm]]:
    """Processes for code: most of what a block takes is to import what it begins with."""
    started: dict[bool, Warm] = {}

    def get(code: str) -> Warm:
        # JAX is never imported ahead: it has threads from then on.
        torch = bool(re.search(r"^(import|from) torch\b", code, re.MULTILINE))
        if torch not in started or started[torch].closed:
            more = ("torch", "mtckpt.adapters.torch") if torch else ()
            started[torch] = Warm("mtckpt", "mtckpt._checkpointer", "mtckpt.adapters.numpy", *more)
        return started[torch]

    yield get
    for process in started.values():
        process.close()


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(*pair, id=f"{pair[0]}:{pair[1].line}") for pair in python_blocks()],
)
@pytest.mark.usefixtures("runtime_dir")
def test_code_runs(page: str, block: Block, tmp_path: Path, warm: Callable[[str], Warm]) -> None:
    if block.no_run:
        compile(block.code, page, "exec", dont_inherit=True)  # at least it is Python
        pytest.skip(block.no_run)
    script = tmp_path / "block.py"
    script.write_text(block.code)
    status, said = warm(block.code).run(script, TIMEOUT_S)
    said = f"{page}:{block.line}\n{said}"
    if block.raises:
        assert status != 0, said
        assert re.search(rf"^(\w+\.)*{block.raises}\b", said, re.MULTILINE), said
    else:
        assert status == 0, said


# ------------------------------------------------------------------------------------------ links

LINK = re.compile(r"(?<!\!)\[[^\]]*\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)")
IMAGE = re.compile(r"!\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)(?: +\{ *#(?P<anchor>[\w-]+) *\})? *#*$")
ANCHOR = re.compile(r"""<a (?:id|name)=["'](?P<anchor>[\w-]+)["']""")


def prose(text: str) -> list[str]:
    """Return the lines outside code blocks, code spans emptied: a link in code is no link."""
    found, fence = [], ""
    for line in text.splitlines():
        opening = re.match(r" *(`{3,}|~{3,})", line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif opening:
            fence = opening[1]
        else:
            found.append(re.sub(r"`[^`]*`", "``", line))
    return found


def anchors(text: str) -> set[str]:
    """Return the anchors of a page, as GitHub and the documentation make them of headings."""
    found = set()
    for line in text.splitlines():
        if heading := HEADING.match(line):
            slug = re.sub(r"[^\w\s-]", "", heading["title"].replace("`", "")).strip().lower()
            found |= {re.sub(r"[\s]", "-", slug), re.sub(r"[-\s]+", "-", slug)}
            found |= {heading["anchor"]} - {None}
        found |= {match["anchor"] for match in ANCHOR.finditer(line)}
    return found


def broken_links(page: Path) -> list[str]:
    lines = prose(page.read_text(encoding="utf-8"))
    links = [
        found["target"] for line in lines for found in (*LINK.finditer(line), *IMAGE.finditer(line))
    ]
    # Elsewhere: tests do not leave the machine.
    inside = [link for link in links if not re.match(r"[a-z]+:", link)]
    return [f"{link}: {why}" for link in inside if (why := why_broken(page, link))]


def why_broken(page: Path, link: str) -> str:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not (target.exists() and target.is_relative_to(ROOT)):
        return "no such file"
    if not anchor or target.suffix != ".md":
        return ""
    return "" if anchor in anchors(target.read_text(encoding="utf-8")) else "no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    listed = set(re.findall(r'"([\w/.-]+\.md)"', config))
    linked = {
        (path.parent / link).resolve().relative_to(ROOT / "docs").as_posix()
        for path in ROOT.glob("docs/**/index.md")
        for link in re.findall(r"\]\(([\w/.-]+\.md)\)", path.read_text(encoding="utf-8"))
    }
    assert listed <= pages
    assert pages <= listed | linked


# --------------------------------------------------------------------------- the checks themselves

PAGE = """\
# A page

<!-- setup
import os
-->
```python
print(os.sep)
```

    ```python continues
    print("again")
    ```

```python no-run: needs a GPU
train()
```

~~~python raises: ValueError
int("x")
~~~

```bash
rm
```
"""


def test_blocks_say_how_they_run() -> None:
    first, second, third, fourth, fifth = blocks(PAGE)
    assert first == Block(6, "python", "import os\nprint(os.sep)\n", None, None)
    assert second.code == 'import os\nprint(os.sep)\nprint("again")\n'
    assert (third.no_run, third.code) == ("needs a GPU", "train()\n")
    assert (fourth.raises, fourth.code) == ("ValueError", 'int("x")\n')
    assert fifth.language == "bash"


@pytest.mark.parametrize(
    ("page", "match"),
    [
        ("```python no-run\nx\n```\n", "has to say why"),
        ("```python no-run:\nx\n```\n", "has to say why"),
        ("```python continues\nx\n```\n", "no block that this one could continue"),
        ("```python\nx\n", "not closed"),
    ],
)
def test_a_block_that_hides_is_refused(page: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        list(blocks(page))


def test_broken_links_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# One `two` three\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Top\n[ok](b.md#one-two-three) [own](#top) [gone](c.md) [lost](b.md#four)\n"
        "`[code](none.md)` [out](../x.md)\n```\n[code](none.md)\n```\n"
    )
    assert broken_links(page) == [
        "c.md: no such file",
        "b.md#four: no such heading",
        "../x.md: no such file",
    ]
