"""All GPU benchmarks on one machine with one GPU: a table, JSON lines, a picture.

``--only staged,lost`` takes some, ``--seconds 170`` bounds the whole run, ``--json DIR/name.jsonl``
says where the lines go (``benchmarks/results/`` otherwise); the picture lies beside them. Figures
of one group share a process. Peers take minutes: they come with ``--peers 1``. A dry run without
a GPU: ``--device cpu --size-mib 16``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks import measuring
from benchmarks.gpu.bench import Bench, options
from benchmarks.gpu.picture import draw

# Each group is a process: what a crash would take along, and how often a framework is imported.
GROUPS = (
    ("limits", "staged", "small", "changed", "lost"),
    ("restored",),
    ("killed",),
    ("stress",),
    ("memory",),
    ("jax",),
    ("big",),
    ("peers",),
)
_GRACE_S = 20.0  # to end after the last figure


def main() -> None:
    bench = options(__doc__)
    if bench is None:
        return
    path = _path(bench)
    known = {name for group in GROUPS for name in group}
    asked = set(filter(None, bench.chosen.only.split(",")))
    wanted = asked or known - (set() if bench.chosen.peers else {"peers"})
    if unknown := asked - known:
        sys.exit(f"--only: {', '.join(sorted(unknown))}: not one of {', '.join(sorted(known))}")
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with path.open("w") as file:
        for group in GROUPS:
            names = [name for name in group if name in wanted]
            for row in _session(bench, names, failed) if names else ():
                if row["figure"] == "machine" and rows:
                    continue  # each process describes it
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(line_of(row), flush=True)
    picture = path.with_suffix(".svg")
    picture.write_text(draw(rows, _title(rows)))
    print(f"written to {path} and {picture}")
    if failed or any("error" in row for row in rows):
        sys.exit(f"did not end well: {', '.join(failed) or 'see the errors above'}")


def _path(bench: Bench) -> Path:
    if bench.chosen.json:
        return Path(bench.chosen.json)
    results = measuring.ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    return results / f"gpu-{time.strftime('%Y%m%dT%H%M%S')}.jsonl"


def _session(bench: Bench, names: list[str], failed: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one process, as it prints them; it is killed when the time is over."""
    if bench.left_s() < 5:
        yield {"figure": ", ".join(names), "skipped": "no time left"}
        return
    path = os.pathsep.join(filter(None, (str(measuring.ROOT), os.environ.get("PYTHONPATH"))))
    only = f"--only={','.join(names)}"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.session", *bench.arguments(), only],
        cwd=measuring.ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    killer = threading.Timer(bench.left_s() + _GRACE_S, process.kill)
    killer.start()
    try:
        yield from _rows(process.stdout)
    finally:
        process.wait()
        killer.cancel()
    if process.returncode != 0:
        failed.append("+".join(names))


def _rows(lines: IO[str]) -> Iterator[dict[str, Any]]:
    for text in lines:
        try:
            yield json.loads(text)
        except ValueError:
            print(text, end="", file=sys.stderr)  # what a framework printed


def line_of(row: dict[str, Any]) -> str:
    """One row for people."""
    name = str(row["figure"])
    if "median" not in row:
        other = row.get("error") or row.get("skipped")
        word = "FAILED" if "error" in row else "skipped"
        return f"{name}: {word}: {other}" if other else json.dumps(row)
    scale, unit = (1e3, "ms") if row["unit"] == "s" else (1.0, row["unit"])
    figures = " ".join(f"{row[key] * scale:9.3f}" for key in ("median", "min", "max"))
    text = f"{name[:52]:52} {figures} {unit:5} {row['n']:2}"
    if "ratio" in row:
        limit = row["limit"]
        text += f"  {row['ratio']:.3f} x {limit['median'] * scale:.2f} ({limit['name']})"
    if "goal" in row:
        text += f"  goal {row['goal']}: {'met' if row['met'] else 'MISSED'}"
    return text


def _title(rows: list[dict[str, Any]]) -> str:
    found = next((row for row in rows if row["figure"] == "machine"), {})
    return f"mtckpt on {found.get('device', '?')}, torch {found.get('versions', {}).get('torch')}"


if __name__ == "__main__":
    main()
