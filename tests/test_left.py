"""What a save left as it lay in its slot is looked at before it counts, and found where wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from pool_checks import slot_of
from shard_maker import RUN, Shard, fill_slot, flip, make_shard, ram_place

from mtckpt import _shard
from mtckpt._left import Left, Looked
from mtckpt._shard import CHUNK_BYTES, Table
from mtckpt._slots import Slot
from mtckpt.agent import work
from mtckpt.agent.carry import Carrier
from mtckpt.errors import Damaged

SHAPES = [
    ("a", "uint8", (20 * CHUNK_BYTES + 7,)),
    ("b", "uint8", (3,)),
    ("c", "uint8", (CHUNK_BYTES,)),
]


def bits(chunks: set[int], num_chunks: int) -> bytes:
    found = bytearray(-(-num_chunks // 8))
    for chunk in chunks:
        found[chunk // 8] |= 1 << chunk % 8
    return bytes(found)


class File:
    """A shard's bytes, its layout and its digests."""

    def __init__(self) -> None:
        self.layout = _shard.plan_layout(SHAPES)
        self.data = bytearray(random.Random(5).randbytes(self.layout.size_bytes))
        self.view = memoryview(self.data)
        self.digests = memoryview(bytearray(8 * self.layout.num_chunks)).cast("Q")
        for chunk, (begin, end) in self.places().items():
            self.digests[chunk] = xxhash.xxh3_64_intdigest(self.view[begin:end])

    def places(self) -> dict[int, tuple[int, int]]:
        """Where each chunk begins and ends in the file."""
        return {
            tensor.first_chunk + i: (
                tensor.start + begin,
                min(tensor.start + begin + CHUNK_BYTES, tensor.start + tensor.size_bytes),
            )
            for tensor in self.layout.tensors
            for i, begin in enumerate(range(0, tensor.size_bytes, CHUNK_BYTES))
        }

    def check(self, chunks: set[int], looked: Looked | None = None) -> int:
        left = Left(bits(chunks, self.layout.num_chunks), looked)
        left.check(self.layout, self.digests, self.view)
        return left.size_bytes


@pytest.fixture
def file() -> File:
    return File()


def test_what_is_wrong_is_found_where_it_was_left_and_nowhere_else(file: File) -> None:
    every = set(file.places())
    assert len(every) == 23
    for chunk, (begin, end) in file.places().items():
        at = random.randrange(begin, end)
        file.data[at] ^= 1
        with pytest.raises(Damaged, match="differ from their digest"):
            file.check({chunk})
        with pytest.raises(Damaged):
            file.check(every)
        assert file.check(every - {chunk}) == sum(
            e - b for c, (b, e) in file.places().items() if c != chunk
        )
        file.data[at] ^= 1


def test_bits_that_cannot_be_of_this_shard_have_all_of_it_looked_at(file: File) -> None:
    file.data[file.places()[17][0]] ^= 1
    with pytest.raises(Damaged):
        Left(b"\1").check(file.layout, file.digests, file.view)


def test_what_was_looked_at_ahead_is_not_read_again(file: File) -> None:
    looked = Looked()
    some = {1, 2, 3, 20, 21, 22}
    looked.look(file.layout, file.digests, file.view, bits(some, 23))
    assert {i for i, sound in enumerate(looked.sound) if sound} == some
    for chunk in some:
        file.data[file.places()[chunk][0]] ^= 1
    assert file.check(some, looked)
    with pytest.raises(Damaged):
        file.check(some)


def test_what_was_looked_at_and_is_to_have_another_digest_is_read(file: File) -> None:
    """It was written since, and only then left."""
    looked = Looked()
    old = memoryview(bytes(file.digests)).cast("Q")
    looked.look(file.layout, old, file.view, bits({1, 2, 3}, 23))
    begin, end = file.places()[2]
    file.data[begin] ^= 1
    with pytest.raises(Damaged):
        file.digests[2] = 7
        file.check({1, 2, 3}, looked)
    file.digests[2] = xxhash.xxh3_64_intdigest(file.view[begin:end])
    assert file.check({1, 2, 3}, looked)


def test_what_is_not_sound_ahead_of_time_is_read_at_the_seal(file: File) -> None:
    looked = Looked()
    at = file.places()[2][0]
    file.data[at] ^= 1
    looked.look(file.layout, file.digests, file.view, bits({2, 22}, 23))
    assert {i for i, sound in enumerate(looked.sound) if sound} == {22}
    with pytest.raises(Damaged):
        file.check({2, 22}, looked)
    file.data[at] ^= 1
    assert file.check({2, 22}, looked)


def test_a_look_that_is_over_goes_no_further(file: File) -> None:
    looked = Looked()
    looked.over = True
    looked.look(file.layout, file.digests, file.view, bits(set(range(23)), 23))
    assert not any(looked.sound)


# -- in a data process -----------------------------------------------------------------------------


@pytest.fixture
def carrier() -> Iterator[Carrier]:
    made = Carrier()
    yield made
    made.close()


class Story:
    """Two saves through one slot, of which the second left all as it was."""

    def __init__(self, carrier: Carrier, ram_dir: Path, scratch: Path) -> None:
        ram_place(ram_dir / "root")
        self.ref = work.TierRef("ram", str(ram_dir / "root"))
        self.carrier = carrier
        self.first, self.second = (make_shard(scratch, step) for step in (10, 11))
        self.all = bits(set(range(self.num_chunks)), self.num_chunks)
        slot = self.ask(
            work.Allocate(self.ref, RUN, "a", len(self.first.data), len(self.first.table))
        )
        self.slot = slot_of(slot)
        self.seal(self.first, b"")
        recycled = self.ask(work.Recycle(self.ref, RUN, str(self.first.name), 0, "a"))
        assert isinstance(recycled, work.Recycled)
        assert recycled.files
        self.slot = slot_of(recycled.files)

    @property
    def num_chunks(self) -> int:
        return len(Table.parse(self.first.table).digests)

    def ask(self, command: work.Command) -> work.Result:
        return self.carrier.carry(command, lambda _: None)

    def look(self) -> int:
        looked = self.ask(work.LookAhead(self.ref, RUN, "a", self.slot.inode, self.all))
        assert isinstance(looked, work.Looked)
        return looked.sound

    def seal(self, shard: Shard, left: bytes, data: bytes | None = None) -> work.SealedSlot:
        """``data``: what lies in the slot by now instead of the shard's bytes."""
        fill_slot(self.slot, shard)
        if data is not None:
            Path(self.slot.data_path).write_bytes(data)
        sealed = self.ask(
            work.SealSlot(self.ref, RUN, "a", self.slot.inode, str(shard.name), 0, left=left)
        )
        assert isinstance(sealed, work.SealedSlot)
        return sealed


@pytest.fixture
def story(carrier: Carrier, ram_dir: Path, tmp_path: Path) -> Story:
    return Story(carrier, ram_dir, tmp_path)


def hurt(slot: Slot) -> bytes:
    """What lies in a slot, with a byte of the data changed there."""
    flip(Path(slot.data_path), os_size(slot) - 3)
    return Path(slot.data_path).read_bytes()


def os_size(slot: Slot) -> int:
    return Path(slot.data_path).stat().st_size


def test_a_seal_looks_at_what_was_left(story: Story) -> None:
    damaged = hurt(story.slot)
    with pytest.raises(Damaged, match="differ from their digest"):
        story.seal(story.second, story.all, damaged)
    assert not Path(story.slot.data_path).exists()  # nobody is offered it


def test_a_seal_counts_what_was_left(story: Story) -> None:
    sealed = story.seal(story.second, story.all)
    assert sealed.left_bytes == len(story.second.data) - data_start(story.second)


def data_start(shard: Shard) -> int:
    return shard.parsed().shard.data_start


def test_a_seal_takes_the_word_of_who_looked_ahead_once(story: Story) -> None:
    assert story.look() == story.num_chunks
    damaged = hurt(story.slot)
    story.seal(story.second, story.all, damaged)  # it was right a moment ago
    story.ask(work.Recycle(story.ref, RUN, str(story.second.name), 0, "a"))
    with pytest.raises(Damaged):
        story.seal(story.first, story.all, damaged)


def test_nothing_is_known_ahead_of_a_slot_that_is_captured_into(story: Story) -> None:
    table = Path(story.slot.table_path)
    table.write_bytes(bytes(_shard.TABLE_HEADER.size) + table.read_bytes()[64:])
    assert story.look() == 0
    story.seal(story.second, story.all)
