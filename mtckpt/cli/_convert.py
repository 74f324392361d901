"""``mtckpt import`` and ``mtckpt export``: checkpoints of other libraries, in and out."""

from __future__ import annotations

import functools
import os
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtckpt.cli import _output
from mtckpt.cli._list import open_one
from mtckpt.cli._output import json_option, print_json, print_line, reporting
from mtckpt.cli._target import find, parse_step
from mtckpt.errors import StepNotFound, UsageError

if TYPE_CHECKING:
    from mtckpt._manifest import Incarnation
    from mtckpt.tiers import LocalTier

__all__ = ["export_", "import_"]


@click.command("import", short_help="Bring checkpoints of Orbax or PyTorch's DCP into a run.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("location", type=click.Path(path_type=Path))
@click.option("--run", required=True, help="The name of the new run below LOCATION.")
@click.option("--step", help='A number, or "all". Default: the newest step.')
@click.option("--unpickle", is_flag=True, help="Read the pickles in checkpoints of DCP.")
@json_option
@reporting
def import_(
    source: Path, location: Path, run: str, step: str | None, unpickle: bool, as_json: bool
) -> int:
    """Read a foreign directory and write a run that is restored, loaded and shown like any other.

    SOURCE is the directory of a checkpoint manager of Orbax, one step of it or one item (OCDBT or
    Zarr); or one that torch.distributed.checkpoint has written, or a directory of such. LOCATION is
    a tier's directory, such as ./checkpoints; it is made where it is missing. Arrays are moved
    piece by piece. A run that is there is never changed.

    DCP keeps metadata and plain values as pickles. With --unpickle they are read, in a process of
    its own that knows a few exact names, calls nothing, and has little memory and no packages.
    """
    from mtckpt._building import build_save
    from mtckpt._progress import progress
    from mtckpt.tiers import LocalTier

    files = _reader_of(source, unpickle)
    chosen = _chosen(files.find_steps(source), step, source)
    tier = LocalTier(location)
    saved: list[dict[str, int]] = []
    try:
        incarnation, key = _begin(tier, run)
        try:
            for number, path in chosen:
                item = files.read_step(path)
                total = sum(each.spec.size_bytes for each in item.arrays)
                with progress("import", total_bytes=total, run=run, step=number) as show:
                    size_bytes = build_save(
                        tier, incarnation, number, item.arrays, item.root, item.plain, show
                    )
                num_arrays = len({each.path for each in item.arrays})
                saved.append({"step": number, "arrays": num_arrays, "size_bytes": size_bytes})
        finally:
            if not saved:
                tier.delete(key)  # so that the same command may be given again
    finally:
        tier.close()
    if as_json:
        print_json({"run": run, "location": os.fspath(location), "steps": saved})
    else:
        for each in saved:
            print_line(
                f"step {each['step']}: {each['arrays']} arrays, {each['size_bytes']:,} bytes"
            )
    return _output.FINE


def _reader_of(source: Path, unpickle: bool) -> Any:
    """What reads a directory. Raises UsageError for one with pickles, unless they were allowed."""
    from mtckpt.adapters import converter

    dcp = converter("dcp_files")
    if not dcp.is_checkpoint(source):
        _refuse(source)
        return converter("orbax_files")
    if not unpickle:
        raise UsageError(
            f"{source} is a checkpoint of torch.distributed, whose metadata is a pickle",
            state="nothing was read",
            actions=("add --unpickle: it is read in a process that can call nothing",),
        )
    return dcp


def _refuse(source: Path) -> None:
    """Raise UsageError for what PyTorch writes and the import does not read."""
    names = [path.name for path in source.iterdir()] if source.is_dir() else []
    for suffix, what in (
        (".metadata", "has metadata of each rank: use_collectives=False wrote it"),
        (".safetensors", "is made of safetensors files, as HuggingFaceStorageWriter writes them"),
    ):
        if any(name.endswith(suffix) for name in names):
            raise UsageError(
                f"{source} {what}, which is not imported",
                state="nothing was read",
                actions=("load it with dcp.load, and save the state with Checkpointer.save",),
            )


def _chosen(
    steps: dict[int | None, Path], step: str | None, source: Path
) -> list[tuple[int, Path]]:
    """The steps to import. A directory of one step whose name says no number is step 0."""
    numbered = {0 if number is None else number: path for number, path in steps.items()}
    if step == "all":
        return sorted(numbered.items())
    if step is None:
        return [max(numbered.items())]
    wanted = parse_step(step)
    if None in steps and isinstance(wanted, int):
        return [(wanted, steps[None])]
    if not isinstance(wanted, int) or wanted not in numbered:
        raise StepNotFound(
            f"{source} has no step {step}",
            step=wanted,
            state="nothing was written",
            actions=(f"steps that are there: {', '.join(map(str, sorted(numbered)))}",),
        )
    return [(wanted, numbered[wanted])]


def _begin(tier: LocalTier, run: str) -> tuple[Incarnation, str]:
    """The only incarnation of a run that is not there yet, and its key."""
    from mtckpt import _inventory, _manifest
    from mtckpt.tiers import BytesSource

    key = _manifest.run_key(run)
    if next(iter(tier.list(f"{key}/")), None) is not None:
        raise UsageError(
            f"run {run} is there", run=run, actions=("choose another --run, or another LOCATION",)
        )
    incarnation = _manifest.Incarnation(
        _manifest.FORMAT_VERSION, run, 1, str(uuid.uuid4()), None, socket.gethostname(), os.getpid()
    )
    place = _inventory.incarnation_key(key, incarnation)
    tier.put(place, BytesSource(_manifest.encode_sealed(incarnation)))
    return incarnation, place


@click.command("export", short_help="Write a step as a directory of Orbax or PyTorch's DCP.")
@click.argument("target")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--step", help="A number or a save's id. Default: the newest step.")
@click.option(
    "--to", type=click.Choice(["orbax", "dcp"]), default="orbax", help="Whose. Default: orbax."
)
@click.option("--zarr", is_flag=True, help="A directory for each array, without OCDBT.")
@json_option
@reporting
def export_(
    target: str, directory: Path, step: str | None, to: str, zarr: bool, as_json: bool
) -> int:
    """Write one step as DIRECTORY, which ocp.StandardCheckpointer and others of Orbax restore.

    Every byte is verified on the way. Arrays of NumPy type are what comes back without a template;
    with one, arrays of JAX with its shardings. A few bands of one array are in memory at a time.

    With --to dcp, it is a directory that torch.distributed.checkpoint loads. What several ranks
    have under one name is there as the first of them has it.
    """
    if to == "dcp" and zarr:
        raise UsageError("--zarr is about directories of Orbax", state="nothing was done")
    with find(target) as found:
        framework = "torch" if to == "dcp" else "numpy"
        checkpoint, _ = open_one(found, target, step, framework)
        with checkpoint:
            number = checkpoint.step
            directory = directory.absolute()
            if to == "dcp":
                size_bytes = _write_dcp(checkpoint, directory)
            else:
                size_bytes = _write_orbax(checkpoint, directory, ocdbt=not zarr)
    if as_json:
        print_json({"step": number, "directory": os.fspath(directory), "size_bytes": size_bytes})
    else:
        print_line(f"step {number}: {size_bytes:,} bytes in {directory}")
    return _output.FINE


def _write_dcp(checkpoint: Any, directory: Path) -> int:
    from mtckpt.adapters import converter

    records = {shard.record.rank: shard.record for shard in checkpoint._shards}
    written: int = converter("dcp_export").write(
        directory,
        records,
        lambda path, rank, most: checkpoint._read_bands(path, most, rank=rank),
    )
    return written


def _write_orbax(checkpoint: Any, directory: Path, *, ocdbt: bool) -> int:
    from mtckpt import _load
    from mtckpt.adapters import converter

    shard = checkpoint._shards[0]
    root, plain = _load.state_of(shard)
    orbax = converter("orbax_export")
    leaves = [
        orbax.Leaf(
            entry.dtype,
            entry.framework,
            checkpoint.shape(entry.path),
            functools.partial(checkpoint._read_bands, entry.path),
        )
        for entry in shard.entries
    ]
    written: int = orbax.write(directory, root, plain, leaves, ocdbt=ocdbt)
    return written
