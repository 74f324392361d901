"""Limits that the sources keep: sizes, nothing that runs code from data, no excuses.

It reads the syntax trees and texts of the files; what it does not see are names that are built at
run time. ``test_layers`` looks at which module imports which.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("mtckpt", "tests", "benchmarks", "examples", "scripts")
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in SOURCE_FOLDERS
    for path in ROOT.glob(f"{folder}/**/*.py")
)
LIBRARY = [name for name in SOURCES if name.startswith("mtckpt/")]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
MIN_REASON_WORDS = 4

# Each of these runs code, or can be made to, when it reads bytes. multiprocessing sends pickles.
BANNED_MODULES = frozenset(
    {"_pickle", "cloudpickle", "dill", "jsonpickle", "marshal", "multiprocessing"}
    | {"pickle", "shelve"}
)
BANNED_CALLS = frozenset({"eval", "exec", "compile", "__import__"})
BANNED_METHODS = frozenset({("torch", "load"), ("torch", "save"), ("yaml", "load")})
# Who imports a module whose name is not written in the call: the name is one of a fixed table.
MAY_IMPORT_BY_NAME = frozenset({"mtckpt/__init__.py", "mtckpt/adapters/__init__.py"})
# Who speaks to PyTorch's checkpoints, whose values are pickles, and what may be done there.
FOREIGN_PICKLES = {
    "mtckpt/adapters/torch/dcp.py": {"calls torch.save"},  # into memory, for DCP to read back
    "mtckpt/adapters/torch/dcp_export.py": {"calls torch.save", "imports pickle"},  # writes them
    "mtckpt/adapters/dcp_stand_ins.py": {"imports pickle"},  # in a process that can call nothing
}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def comments(text: str) -> dict[int, str]:
    """Return the comments of a source by line number, without what linters read in them."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            words = re.sub(
                r"# *(noqa|type|pragma|pyright):? *[\w\[\], -]*?(?= - |$|#)", "", token.string
            )
            found[token.start[0]] = words.strip("# -")
    return found


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_fits_in_a_head(name: str) -> None:
    num_lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{name} has {num_lines} lines; split it by what it knows"


def long_functions(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {num_lines} lines"


@pytest.mark.parametrize("name", SOURCES)
def test_a_function_fits_on_a_page(name: str) -> None:
    assert list(long_functions(tree(name))) == []


# ---------------------------------------------------------------------------- code run from data


def dangers(module: ast.Module, *, by_name: bool) -> Iterator[str]:
    """Yield what could run code that came as data, with its line."""
    for node in ast.walk(module):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for imported in imported_modules(node):
                if imported.partition(".")[0] in BANNED_MODULES:
                    yield f"line {node.lineno}: imports {imported}"
        elif isinstance(node, ast.Call):
            yield from dangerous_call(node, by_name=by_name)


def imported_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module else []
    return [alias.name for alias in node.names]


def dangerous_call(call: ast.Call, *, by_name: bool) -> Iterator[str]:
    function = call.func
    if isinstance(function, ast.Name) and function.id in BANNED_CALLS:
        yield f"line {call.lineno}: calls {function.id}"
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        called = (function.value.id, function.attr)
        if called in BANNED_METHODS:
            yield f"line {call.lineno}: calls {'.'.join(called)}"
    for keyword in call.keywords:
        if keyword.arg in {"allow_pickle", "shell"}:
            value = keyword.value
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield f"line {call.lineno}: {keyword.arg} is not False"
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    is_written = bool(call.args) and isinstance(call.args[0], ast.Constant)
    if name == "import_module" and not (is_written or by_name):
        yield f"line {call.lineno}: imports a module whose name is not written there"


@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_runs_code_from_data(name: str) -> None:
    found = list(dangers(tree(name), by_name=name in MAY_IMPORT_BY_NAME))
    if name in FOREIGN_PICKLES:
        assert {what.partition(": ")[2] for what in found} == FOREIGN_PICKLES[name]
    else:
        assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def late():\n    from marshal import loads",
        "import os, multiprocessing.shared_memory",
        "eval(text)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=flag)",
        "importlib.import_module(name)",
    ],
)
def test_the_gauge_sees_what_runs_code(text: str) -> None:
    assert list(dangers(ast.parse(text), by_name=False))


# ---------------------------------------------------------------------------------------- excuses


def unexplained_handlers(text: str) -> Iterator[str]:
    """Yield every handler of all exceptions that neither raises nor says why it must not."""
    said = comments(text)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler) or not is_broad(node.type):
            continue
        if isinstance(node.body[-1], ast.Raise):
            continue
        # Behind the except, on the line above it, or above the first statement of its body.
        lines = range(node.lineno - 1, node.body[0].lineno + 1)
        reason = " ".join(said.get(line, "") for line in lines)
        if len(reason.split()) < MIN_REASON_WORDS:
            yield f"line {node.lineno}: no sentence says why everything is caught here"


def is_broad(caught: ast.expr | None) -> bool:
    if caught is None:
        return True
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in names
    )


@pytest.mark.parametrize("name", LIBRARY)
def test_a_broad_except_says_why(name: str) -> None:
    assert list(unexplained_handlers((ROOT / name).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("handler", "is_fine"),
    [
        ("except Exception:", False),
        ("except:", False),
        ("except (OSError, BaseException):  # noqa: BLE001", False),
        ("except Exception:  # noqa: BLE001 - one bad key must not end the scrub", True),
        ("except Exception:\n    # One bad key must not end the scrub.", True),
        ("except OSError:", True),
    ],
)
def test_the_gauge_sees_a_broad_except(handler: str, is_fine: bool) -> None:
    text = f"try:\n    work()\n{handler}\n    pass\n"
    assert (list(unexplained_handlers(text)) == []) == is_fine


EXCUSES = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b|pragma: no cover")


def excuses(text: str) -> Iterator[str]:
    """Yield lines that put something off, and ignored types without a reason beside or above."""
    said = comments(text)
    for number, line in enumerate(text.splitlines(), 1):
        reason = f"{said.get(number - 1, '')} {said.get(number, '')}"
        is_silent = len(reason.split()) < MIN_REASON_WORDS
        if EXCUSES.search(line) or ("# type: ignore" in line and is_silent):
            yield f"line {number}: {line.strip()}"


@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_is_left_for_later(name: str) -> None:
    assert list(excuses((ROOT / name).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ("x = 1  # TODO", False),
        ("raise NotImplementedError", False),
        ("x = f()  # type: ignore[no-any-return]", False),
        ("x = f()  # type: ignore[no-any-return]  # ctypes returns an int here", True),
        ("# The stub of ctypes lacks this.\nx = f()  # type: ignore[attr-defined]", True),
    ],
)
def test_the_gauge_sees_an_excuse(text: str, is_fine: bool) -> None:
    assert (list(excuses(text)) == []) == is_fine


# --------------------------------------------------------------------------------- one's machine

TEXTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "scripts/*", "docs/**/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
# A file that is only where it was written: nobody else has it. Put together here, or this very file
# would hold them.
MACHINE_PATHS = re.compile(
    "|".join((r"(?<![\w.~$}])/" + "work/", "/" + r"root/", r"\." + "library/", "/opt/" + "wheels"))
)


@pytest.mark.parametrize("name", [*SOURCES, *TEXTS])
def test_no_path_of_one_machine(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if MACHINE_PATHS.search(line)] == []
