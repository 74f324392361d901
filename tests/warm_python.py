"""Scripts run by forks of a process that has imported what they begin with.

As a program it is that process: it imports the modules that its arguments name, and for each line
on stdin forks one that runs a script as ``python -W error`` does. What they say goes to a file.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

__all__ = ["Warm"]

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1


class Warm:
    """The process, from the test's side."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # It is not of the test that comes first, and is not swept away with it.
            env={k: v for k, v in _environment().items() if not k.startswith("MTCKPT_")},
        )

    def run(self, script: Path, timeout_s: float) -> tuple[int, str]:
        """The exit status of a script that runs in its directory, and all that it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        said = script.with_suffix(".said")
        spec = {"script": str(script), "said": str(said), "environment": _environment()}
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(spec) + "\n")
            self._process.stdin.flush()
            status = self._process.stdout.readline()
        finally:
            timer.cancel()
        text = said.read_text(errors="replace") if said.exists() else ""
        if not status:
            self.close()
        assert status, f"it did not end within {timeout_s:g} s, or could not begin\n{text}"
        return int(status), text

    @property
    def closed(self) -> bool:
        """Whether it has ended: here, or by a script that took too long."""
        return self._process.returncode is not None

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _become(script: str, said: str, environment: dict[str, str]) -> None:
    """Run a script as if this process had been started for it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for fd, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (out, 2)):
        os.dup2(fd, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - what was read ahead is the parent's
    os.chdir(os.path.dirname(script))
    sys.argv[:] = [script]
    sys.path[0] = os.path.dirname(script)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = script
    exec(compile(Path(script).read_text(), script, "exec", dont_inherit=True), module.__dict__)


def main(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        spec: dict[str, Any] = json.loads(line)
        if not (pid := os.fork()):
            _become(**spec)
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
