"""Imports point downwards: the contracts of pyproject.toml hold, and they can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as main; main()"


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    # It looks in the working directory first, before the checkout that is installed.
    return subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS, "--no-cache"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("errors.py", "import mtckpt._state", "imports point downwards"),
        ("tiers/base.py", "import mtckpt._state", "tiers know only bytes"),
        ("_state.py", "import torch", "frameworks are imported by adapters"),
        ("_state.py", "def late():\n    import jax", "frameworks are imported by adapters"),
        ("_state.py", "import numpy", "numpy is imported by adapters"),
        ("agent/protocol.py", "import torch", "the agent knows no framework"),
        ("_handle.py", "import mtckpt.adapters.numpy", "adapters are imported by their registry"),
        ("_drawer.py", "", "imports point downwards"),
    ],
)
def test_a_wrong_import_breaks_its_contract(
    tmp_path: Path, module: str, line: str, contract: str
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "mtckpt", tmp_path / "mtckpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (tmp_path / "mtckpt" / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [text for text in done.stdout.splitlines() if " BROKEN" in text]
    assert any(text.startswith(contract) for text in broken), done.stdout
