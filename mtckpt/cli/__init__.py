"""The command line: ``mtckpt COMMAND TARGET``. One file a command or a few that belong together.

Only click is imported at the start; whatever a command needs, it imports when it runs. Commands
that read write nothing and need no agent where they are given a location.
"""

from __future__ import annotations

import click

from mtckpt.cli._agent import agent, rm, status
from mtckpt.cli._convert import export_, import_
from mtckpt.cli._doctor import doctor
from mtckpt.cli._estimate import estimate
from mtckpt.cli._explain import explain
from mtckpt.cli._list import ls, show
from mtckpt.cli._prune import prune
from mtckpt.cli._verify import verify

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A TARGET with a / is a location: a tier's directory, a run in it, one save, or a copy"
    " of any; or the URL of one in a store. Every other one is a run that this node's agent is"
    " asked about."
    " Exit status: 0 fine, 1 something is wrong, 2 wrong usage.",
)
@click.version_option(package_name="mtckpt", prog_name="mtckpt")
def main() -> None:
    """Look at, check, convert and remove checkpoints, and see what this machine can do for them."""


_COMMANDS = (
    ls, show, verify, explain, status, rm, prune, doctor, estimate, export_, import_, agent,
)  # fmt: skip
for _command in _COMMANDS:
    main.add_command(_command)
