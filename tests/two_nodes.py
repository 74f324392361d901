"""Two nodes on one machine: an agent each, with its own runtime directory and RAM root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import _isolation
from fake_trainer import FakeTrainer, disk

from mtckpt import _handshake
from mtckpt.agent import protocol
from mtckpt.agent.protocol import Done, PeerAddress, TierConfig

HOST = "127.0.0.1"


@dataclass
class Node:
    """One node: what is started within ``here`` finds its agent and RAM, not another's."""

    places: _isolation.Places = field(default_factory=_isolation.make_places)
    trainers: list[FakeTrainer] = field(default_factory=list)

    @property
    def trainer(self) -> FakeTrainer:
        """The one that came last."""
        return self.trainers[-1]

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        with mock.patch.dict(os.environ, self.places.environment()):
            yield

    def train(self, run: str, tiers: list[TierConfig] | None = None) -> FakeTrainer:
        """A trainer of this node, that has opened the run and begun its first incarnation."""
        with self.here():
            self.trainers.append(FakeTrainer(run, tiers))
            self.trainer.open()
        self.trainer.begin()
        return self.trainer

    def listen(self) -> PeerAddress:
        message = protocol.Listen(self.trainer.holder, HOST)
        address: PeerAddress = self.trainer.call("listen", message, PeerAddress)
        return address

    def join(self, secret: bytes, *addresses: PeerAddress) -> None:
        """Rank by rank, the nodes at these addresses; the first one leads."""
        nodes = [protocol.NodeOfRun(address, [rank]) for rank, address in enumerate(addresses)]
        message = protocol.Join(self.trainer.holder, secret.hex(), len(nodes), nodes)
        self.trainer.call("join", message, Done)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[list[Node]]:
    made = [Node() for _ in range(count)]
    try:
        yield made
    finally:
        for node in made:
            for trainer in node.trainers:
                trainer.client.close()
            _isolation.sweep(node.places)


def joined(run: str, *of: Node, disks: Path | None = None) -> bytes:
    """Nodes that train and know each other, each with a disk below ``disks``; what they share."""
    secret = _handshake.new_secret()
    for number, node in enumerate(of):
        node.train(run, [disk(disks / str(number))] if disks else None)
    addresses = [node.listen() for node in of]
    for node in of:
        node.join(secret, *addresses)
    return secret
