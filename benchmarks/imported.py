"""What ``import mtckpt`` costs in a fresh interpreter, and that no heavy package comes with it.

The process has loaded the parts of the standard library that the benchmarks use (json, argparse,
subprocess), as any training script has.
"""

from __future__ import annotations

import json
import sys
import time

from benchmarks import measuring

_HEAVY = ("numpy", "fsspec", "torch", "jax")


def main() -> None:
    chosen = measuring.options(__doc__, rounds=11, role="")
    if chosen.role:
        _import()
        return
    package, named = [], []
    for number in range(chosen.rounds + 1):
        took_s, name_s, heavy = json.loads(measuring.child("benchmarks.imported", "--role=import"))
        if heavy:
            sys.exit(f"import mtckpt imports {', '.join(heavy)}")
        if number:  # the first fills the cache of byte code
            package.append(took_s)
            named.append(name_s)
    measuring.row("import mtckpt", package, goal="value <= 0.08")
    measuring.row("import mtckpt, Checkpointer too", named)


def _import() -> None:
    started_s = time.perf_counter()
    import mtckpt

    took_s = time.perf_counter() - started_s
    assert callable(mtckpt.Checkpointer)  # the first use of a name loads what it needs
    named_s = time.perf_counter() - started_s
    print(json.dumps([took_s, named_s, [name for name in _HEAVY if name in sys.modules]]))


if __name__ == "__main__":
    main()
