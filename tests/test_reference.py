"""Reference pages say what the code says: types, fields, variables, and what survives what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mtckpt import _dtypes, _manifest, _shard
from mtckpt._handshake import PeerAddress
from mtckpt.capture.base import MODES
from mtckpt.tiers import LocalTier, ObjectStoreTier, Survives, Tier
from mtckpt.tiers.peer import PeerTier

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table(text: str, heading: str, *, nth: int = 0) -> list[list[str]]:
    """The cells of the ``nth`` table below a heading, without its first two lines."""
    below = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    found = re.findall(r"(?:^\|.*\|\n)+", below + "\n", flags=re.MULTILINE)[nth]
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")]
        for line in found.strip().splitlines()[2:]
    ]


# --------------------------------------------------------------------------------------- guarantees


def test_the_table_of_guarantees_is_what_the_tiers_say(tmp_path: Path) -> None:
    ram: Tier = LocalTier(tmp_path, name="ram", survives=Survives.PROCESS, sync=False)
    disk: Tier = LocalTier(tmp_path)
    peers: Tier = PeerTier(PeerAddress("127.0.0.1", 1, 1), "run", bytes(32))
    store: Tier = ObjectStoreTier(f"file://{tmp_path}/store")
    columns = [Survives.PROCESS, Survives.POWER, Survives.NODE, Survives.CLUSTER]
    wanted = [
        [tier.name, stage, *("yes" if loss in tier.survives else "no" for loss in columns)]
        for tier, stage in (
            (ram, "staged"),
            (disk, "local"),
            (peers, "replicated"),
            (store, "durable"),
        )
    ]
    assert table(page("guarantees.md"), "What survives what") == wanted
    for tier in (ram, disk, peers, store):
        tier.close()


# ------------------------------------------------------------------------------------------- format


def test_the_table_of_types_is_the_codes() -> None:
    wanted = [
        [
            *(dtype.name, str(dtype.item_bytes), dtype.stored_code),
            "as it is" if dtype.code else f"one more axis of {dtype.item_bytes}",
        ]
        for dtype in _dtypes.DTYPES.values()
    ]
    assert table(page("format.md"), "Types") == wanted


def json_fields(struct: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(struct)]


def listed(rows: list[list[str]]) -> list[str]:
    return [name.strip() for row in rows for name in row[0].split(",")]


@pytest.mark.parametrize(
    ("struct", "heading", "nth"),
    [
        (_manifest.Record, "Record: rank-00000.json", 0),
        (_manifest.ShardEntry, "Record: rank-00000.json", 1),
        (_manifest.ArrayEntry, "Record: rank-00000.json", 2),
        (_manifest.Incarnation, "Incarnation", 0),
        (_manifest.Manifest, "Manifest", 0),
        (_manifest.Commit, "Marker", 0),
        (_manifest.Metrics, "Metrics", 0),
    ],
)
def test_every_field_has_a_line(struct: Any, heading: str, nth: int) -> None:
    assert sorted(listed(table(page("format.md"), heading, nth=nth))) == sorted(json_fields(struct))


def test_the_table_of_the_digest_table_is_its_header() -> None:
    rows = table(page("format.md"), "Digest table: rank-00000.xxh3")
    offsets = [int(row[0]) for row in rows]
    sizes = [int(row[1]) for row in rows[:-1]]
    assert offsets[0] == 0
    assert offsets[1:] == [a + b for a, b in zip(offsets, sizes, strict=False)]
    assert offsets[-1] == _shard.TABLE_HEADER.size
    generation = next(row for row in rows if row[3].startswith("generation"))
    assert int(generation[0]) == _shard.GENERATION_OFFSET
    chunk = next(row for row in rows if row[3].startswith("bytes of a chunk"))
    assert chunk[3].endswith(str(_shard.CHUNK_BYTES))


def test_the_example_of_names_parses() -> None:
    block = page("format.md").split("```")[1]
    names = [line.split()[0].rstrip("/") for line in block.strip().splitlines()[1:]]
    assert _manifest.parse_incarnation_file(names[0]) == 1
    save = _manifest.SaveName.parse(names[1])
    assert save is not None
    assert (save.step, save.incarnation) == (120, 1)
    files = [_manifest.shard_file(0), _manifest.table_file(0), _manifest.record_file(0)]
    marker = _manifest.commit_file(save.step, save.incarnation)
    assert names[2:] == [*files, _manifest.MANIFEST_FILE, marker]


# ------------------------------------------------------------------------------------ configuration


def test_every_variable_has_a_line() -> None:
    read = {
        name
        for path in (ROOT / "mtckpt").rglob("*.py")
        for name in re.findall(r"\bMTCKPT_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))
    }
    rows = table(page("configuration.md"), "Environment")
    assert {row[0] for row in rows} == read


# -------------------------------------------------------------------------------------------- GPUs


def test_every_mode_of_capture_has_a_line() -> None:
    rows = table(page("gpu.md"), "Modes")
    assert [row[0].strip('"') for row in rows] == list(MODES)
    who = " ".join(row[0] for row in table(page("gpu.md"), "Who may change what, and when"))
    assert set(re.findall(r'"([\w-]+)"', who)) == set(MODES)


def test_the_page_names_the_machine_code_that_ships() -> None:
    text = re.split(r"^## On which devices$", page("gpu.md"), flags=re.MULTILINE)[1]
    (listed,) = re.findall(r"compute capability ([\d., and]+?), and runs", text)
    files = (ROOT / "mtckpt" / "capture").glob("*.cubin*")
    there = {re.sub(r"kernels\.sm_(\d+)(\d)\..*", r"\1.\2", file.name) for file in files}
    assert set(re.findall(r"\d+\.\d", listed)) == there


# ------------------------------------------------------------------------------------- command line


def test_the_reference_of_commands_is_their_help() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import cli_page; print(cli_page.reference(), end='')"],
        cwd=ROOT / "scripts",
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    written = page("cli.md").split("scripts/cli_page.py. -->\n\n")[1]
    assert done.stdout == written, "run scripts/cli_page.py"
    assert written.count("## mtckpt ") >= 8
