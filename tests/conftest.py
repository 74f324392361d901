"""What every test has: directories of its own, a seed, skips with a reason, a budget of time."""

from __future__ import annotations

import ctypes.util
import functools
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import _isolation
import hypothesis
import net_scene
import pytest
from _budget import Budget, limit_from_environment
from warm_agents import WarmAgents

from mtckpt.agent import spawn

# Fixtures that start servers when a test asks for one.
pytest_plugins = ["stores"]

hypothesis.settings.register_profile(
    "default",
    # Two cores shared with other tests: how long one example takes says nothing.
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.register_profile(
    "torture", hypothesis.settings.get_profile("default"), max_examples=20_000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, help="replay the random choices of a run (default: MTCKPT_SEED, or new)"
    )


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--seed")
    if seed is not None:
        os.environ["MTCKPT_SEED"] = str(seed)
    # Workers of xdist are started with this environment, so all of them have the same seed.
    os.environ.setdefault("MTCKPT_SEED", str(int.from_bytes(os.urandom(4), "little")))
    if not hasattr(config, "workerinput"):
        _isolation.sweep_dead()
        config.pluginmanager.register(Budget(limit_from_environment()), "mtckpt-budget")


# Tests that fork in their own process, into a child that makes one call and exits.
_FORKING = {
    "test_a_forked_child_gives_back_nothing_of_its_parent",
    "test_a_fork_does_not_speak_on_its_parents_connection",
    "test_a_fork_is_told",
    "test_it_is_raised[ForkedProcess]",
}


# How long a test of `make torture` may take, whatever it says itself: such a limit is there so that
# a run ends, and hours of work are not thrown away because the machine had other things to do.
TORTURE_LIMIT_S = 14_400


@pytest.hookimpl(trylast=True)  # after the shuffle
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Modules that may take long begin first: the end of a run waits for none that has just begun.
    limit_s: dict[Path, float] = {}
    for item in items:
        limit_s[item.path] = max(limit_s.get(item.path, 0.0), _limit_s(item))
    items.sort(key=lambda item: -limit_s[item.path])
    # JAX warns of every fork once it was imported, which some test before in this process may have
    # done; the child that it warns about never uses JAX. Elsewhere the warning is an error.
    harmless = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
    for item in items:
        if item.name in _FORKING:
            item.add_marker(harmless)
        if item.get_closest_marker("torture"):
            item.add_marker(pytest.mark.timeout(TORTURE_LIMIT_S), append=False)


def _limit_s(item: pytest.Item) -> float:
    """The time that a test itself says it may take; 0 where it does not."""
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark is not None and mark.args else 0.0


def pytest_report_header() -> str:
    return f"mtckpt: --seed={os.environ['MTCKPT_SEED']}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number for this test, the same whenever the session's seed is, in whatever order."""
    session = os.environ["MTCKPT_SEED"]
    digest = hashlib.sha256(f"{session}:{request.node.nodeid}".encode()).digest()
    print(f"replay with --seed={session}")
    return int.from_bytes(digest[:4], "little")


@pytest.fixture(scope="session", autouse=True)
def isolated_process() -> Iterator[None]:
    """An agent that a test starts without saying where is this test process's own."""
    places = _isolation.make_places()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in places.environment().items():
            monkeypatch.setenv(name, value)
        try:
            yield
        finally:
            _isolation.sweep(places)


@pytest.fixture(scope="session", autouse=True)
def warm_agents(isolated_process: None) -> Iterator[None]:
    """Agents that this process starts are forked from one that has imported what they need."""
    warm = WarmAgents(_isolation.forked)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(spawn, "subprocess", warm.module)
        yield
    warm.close()


@pytest.fixture
def fresh_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that this process starts are fresh programs: the test looks at them from outside."""
    monkeypatch.setattr(spawn, "subprocess", subprocess)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """MTCKPT_RUNTIME_DIR, and MTCKPT_RAM_DIR with it, for this test alone: an agent of its own."""
    places = _isolation.make_places()
    for name, value in places.environment().items():
        monkeypatch.setenv(name, value)
    try:
        yield places.runtime
    finally:
        _isolation.sweep(places)


@pytest.fixture
def ram_dir(runtime_dir: Path) -> Path:
    """The RAM directory of this test's own agent; it is on tmpfs where there is one."""
    return Path(os.environ["MTCKPT_RAM_DIR"])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is Ctrl-C also where these tests were started with it ignored, as by ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, why_not in _NEEDS.items():
        if item.get_closest_marker(name) and (reason := why_not()):
            pytest.skip(reason)


@functools.cache
def _why_no_root() -> str:
    return "" if os.geteuid() == 0 else "needs root"


@functools.cache
def _why_no_strace() -> str:
    if shutil.which("strace") is None:
        return "needs strace"
    tried = subprocess.run(["strace", "-f", "true"], capture_output=True, timeout=20, check=False)
    return "" if tried.returncode == 0 else "strace is here but may not trace"


@functools.cache
def _why_no_fuse() -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    if not (ctypes.util.find_library("fuse") or ctypes.util.find_library("fuse3")):
        return "needs libfuse"
    return ""


@functools.cache
def _why_no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device"


_NEEDS = {
    "root": _why_no_root,
    "strace": _why_no_strace,
    "fuse": _why_no_fuse,
    "gpu": _why_no_gpu,
    "net": net_scene.why_no_network,
}
