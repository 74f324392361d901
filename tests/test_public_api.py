"""What users may rely on: names, signatures, and that importing mtckpt costs next to nothing."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mtckpt

PACKAGE = Path(mtckpt.__file__).parent

NAMES = [
    "Checkpointer",
    "Disk",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "ObjectStore",
    "Peers",
    "Ram",
    "Restored",
    "Save",
    "Status",
    "Step",
    "load",
    "register_codec",
    "replicated",
    "rng",
    "steps",
]
PUBLIC_MODULES = {"adapters", "errors", "testing", "tiers"}
# Named without an underscore because they are packages of their own, and yet nobody's business.
INTERNAL_PACKAGES = {"agent", "capture", "cli"}

# Parameter names and defaults; a change here is a change for every user.
SIGNATURES = {
    "Checkpointer": "run, tiers=None, *, group=None, timeout_s=60.0, max_stall_s=2.0, "
    "on_failure='raise'",
    "Checkpointer.due": "self, step",
    "Checkpointer.save": "self, step, state, *, metrics=None, tiers='due'",
    "Checkpointer.report": "self, step, metrics",
    "Checkpointer.restore": "self, state, *, step='latest', source=None, partial=False, "
    "rename=None",
    "Checkpointer.steps": "self",
    "Checkpointer.status": "self",
    "Checkpointer.close": "self, *, timeout_s=600.0",
    "Save.wait": "self, stage='staged', *, timeout_s=600.0",
    "Save.done": "self",
    "Save.exception": "self",
    "Ram": "path=None, *, every='auto', slots='auto', capture='auto'",
    "Disk": "path, *, every=1, keep=3",
    "Peers": "*, copies=1, every=1, strict_placement=False",
    "ObjectStore": "url, *, every=1, keep=None, engine='auto', storage_options=None, reuse=False",
    "KeepLast": "n",
    "KeepEvery": "every, within=None",
    "KeepBest": "n, metric, mode='min'",
    "load": "location, *, step='latest', framework='numpy'",
    "steps": "location",
    "replicated": "value, ranks=None",
    "rng": "",
}


# ------------------------------------------------------------------------------------------ names


def test_all_is_what_was_promised() -> None:
    assert sorted(mtckpt.__all__) == NAMES


def test_nothing_else_is_in_sight() -> None:
    # Modules appear as attributes once something imported them.
    visible = {name for name in dir(mtckpt) if not name.startswith("_")}
    assert visible - set(NAMES) <= PUBLIC_MODULES | INTERNAL_PACKAGES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(mtckpt, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("mtckpt")


def test_a_wrong_name_is_an_attribute_error() -> None:
    wrong = "Checkpoiner"
    with pytest.raises(AttributeError, match=wrong):
        getattr(mtckpt, wrong)


def test_a_new_module_is_private_or_listed() -> None:
    found = {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem[0] != "_"
    }
    assert found <= PUBLIC_MODULES | INTERNAL_PACKAGES


@pytest.mark.parametrize("name", ["errors", "testing", "tiers"])
def test_a_public_module_says_what_it_exports(name: str) -> None:
    module = importlib.import_module(f"mtckpt.{name}")
    assert inspect.getdoc(module)
    for exported in module.__all__:
        assert inspect.getdoc(getattr(module, exported)), exported


def without_annotations(name: str) -> str:
    value: object = mtckpt
    for part in name.split("."):
        value = getattr(value, part)
    assert callable(value)
    signature = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    plain = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return str(plain)[1:-1]


@pytest.mark.parametrize(("name", "signature"), SIGNATURES.items())
def test_a_signature_stays_as_it_is(name: str, signature: str) -> None:
    assert without_annotations(name) == signature


# --------------------------------------------------------------------------------- cost of import

# Each of these costs tens of milliseconds, or seconds; who needs one imports it when it is needed.
HEAVY = [
    *("aiohttp", "asyncio", "fsspec", "http.client", "jax", "ml_dtypes", "msgspec", "numpy"),
    *("rich", "torch", "xxhash"),
]
MAX_IMPORT_S = 0.080
MEASURE = f"""
import json, sys, time
before_s = time.perf_counter()
import mtckpt
elapsed_s = time.perf_counter() - before_s
print(json.dumps([elapsed_s, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def measure_import() -> tuple[float, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=30, check=True
    )
    elapsed_s, heavy = json.loads(done.stdout)
    return elapsed_s, heavy


def test_import_loads_nothing_heavy() -> None:
    assert measure_import()[1] == []


def test_import_is_quick() -> None:
    # The smallest of several: other tests run on the same cores.
    assert min(measure_import()[0] for _ in range(5)) <= MAX_IMPORT_S
