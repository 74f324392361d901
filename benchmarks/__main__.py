"""Run every benchmark, each in a process of its own; print a table, keep the JSON lines.

``--only staged,peers`` runs some, ``--times 2`` runs them again: the spread between processes is
larger than inside one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from benchmarks import measuring

_ALL: dict[str, list[str]] = {
    "imported": [],
    "idle": [],
    "looked": [],
    "staged": [],
    "small": ["benchmarks.staged", "--kind=small"],
    "restored": [],
    "small-restored": ["benchmarks.restored", "--kind=small"],
    "lost": [],
    "flushed": [],
    "memory": [],
    "store": [],
    "peers-pull": ["benchmarks.peers_pull", "--tls=1"],
    "nodes-lost": ["benchmarks.nodes", "--only=lost"],
    "nodes-crashed": ["benchmarks.nodes", "--only=crashed"],
    "nodes-ddp": ["benchmarks.nodes", "--only=ddp"],
    "nodes-fsdp": ["benchmarks.nodes", "--only=fsdp"],
    "nodes-mesh": ["benchmarks.nodes", "--only=mesh"],
    "nodes-agree": ["benchmarks.nodes", "--only=agree"],
    "peers": [],
    "small-peers": ["benchmarks.peers", "--kind=small"],
    "jax": ["benchmarks.in_jax"],
    "small-jax": ["benchmarks.in_jax", "--kind=small"],
}
_LIMIT_S = 900.0


def main() -> None:
    chosen = measuring.options(__doc__, rounds=0, size_mib=0, tensors=0, times=1, only="")
    names = chosen.only.split(",") if chosen.only else list(_ALL)
    results = measuring.ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    path = results / f"{time.strftime('%Y%m%dT%H%M%S')}.jsonl"
    failed = []
    print(f"{'figure':42} {'median':>10} {'min':>10} {'max':>10}  n  ratio  goal")
    with path.open("w") as file:
        for name in names * chosen.times:
            rows, code = _run(name, chosen)
            for row in rows:
                file.write(json.dumps(row) + "\n")
                print(_line(row), flush=True)
            file.flush()
            if code != 0:
                failed.append(name)
    print(f"written to {path}")
    if failed:
        sys.exit(f"did not end well: {', '.join(failed)}")


def _run(name: str, chosen: Any) -> tuple[list[dict[str, Any]], int]:
    command = list(_ALL[name]) or [f"benchmarks.{name}"]
    for option in ("rounds", "size_mib"):
        if getattr(chosen, option):
            command.append(f"--{option.replace('_', '-')}={getattr(chosen, option)}")
    if chosen.tensors and name.startswith("small"):
        command.append(f"--tensors={chosen.tensors}")
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=measuring.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return [], 1
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def _line(row: dict[str, Any]) -> str:
    scale, unit = (1e3, "ms") if row["unit"] == "s" else (1.0, row["unit"])
    if row["unit"] == "s" and row["median"] < 1e-3:
        scale, unit = 1e6, "us"
    figures = [f"{row[key] * scale:8.2f}{unit:>2}" for key in ("median", "min", "max")]
    ratio = f"{row['ratio']:6.2f}" if "ratio" in row else " " * 6
    goal = f"{row['goal']}: {'met' if row['met'] else 'MISSED'}" if "goal" in row else ""
    return f"{row['figure'][:42]:42} {' '.join(figures)} {row['n']:2} {ratio}  {goal}"


if __name__ == "__main__":
    main()
