"""The agent as a program: ``python -m mtckpt.agent``, and ``mtckpt agent run`` for a service.

Started by a trainer it forks once before anything is imported and the first process ends: nobody
is then its parent who could reap, sweep or wait for it.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """``--fd N --dir PATH``: a listening socket and the agent's directory, as ``spawn`` passes."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    if set(options) != {"--fd", "--dir"} or not options["--fd"].isdigit():
        sys.stderr.write("usage: mtckpt agent run (this program is started by mtckpt itself)\n")
        return 2
    if os.fork():
        os._exit(0)
    from mtckpt.agent.spawn import shed_inheritance

    shed_inheritance()
    from mtckpt.agent.life import run_own

    return run_own(int(options["--fd"]), options["--dir"])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Without the interpreter's own end: a thread that hangs in the kernel must not keep us.
    os._exit(code)
