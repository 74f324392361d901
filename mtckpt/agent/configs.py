"""The configurations of runs as they lie in memory, for an agent that starts where another was.

Knows files and what a configuration is. Does not know what becomes of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mtckpt.agent import work
from mtckpt.errors import AccessDenied, Damaged, FormatError, ObjectNotFound

if TYPE_CHECKING:
    from mtckpt._run_files import RunFiles

__all__ = ["read_configs"]


def read_configs(files: RunFiles) -> work.RunConfigs:
    """Those of all runs below a root; one that cannot be used is a problem, and no error."""
    configs: list[work.RunConfig] = []
    problems: list[str] = []
    joins: dict[str, bytes] = {}
    for key in files.run_keys():
        try:
            joins[key] = files.read_secret(key)
        except ObjectNotFound:
            pass  # its ranks are all on this node
        except (Damaged, AccessDenied) as error:
            problems.append(f"{key}: {error.what}")
        try:
            config = msgspec.json.decode(files.read_config(key), type=work.RunConfig)
        except ObjectNotFound:
            continue
        except (Damaged, AccessDenied, FormatError) as error:
            problems.append(f"{key}: {error.what}")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            problems.append(f"{key}: {error}")
        else:
            if config.run_key != key or config.version > work.RUN_CONFIG_VERSION:
                problems.append(f"{key}: not a configuration that this version can use")
            else:
                configs.append(config)
    return work.RunConfigs(configs, problems, joins)
