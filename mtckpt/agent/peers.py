"""The other nodes of this node's runs: where they are, and what they may ask and read here.

Knows who has joined which run, keeps that for the next agent (readable by its user alone), and sees
to it that the two listeners serve it: this process small messages, a data process the bytes. Does
not know what the nodes agree on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

import msgspec

from mtckpt._domains import domains_here
from mtckpt._handshake import SECRET_BYTES, PeerAddress, same_place
from mtckpt._manifest import Rank
from mtckpt._run_files import RunFiles
from mtckpt.agent import protocol, work
from mtckpt.agent.interfaces import choose_host, fixed_ports
from mtckpt.agent.nodes import moved
from mtckpt.agent.peer_client import PeerClient
from mtckpt.agent.peer_listener import PeerListener, PeerVerb
from mtckpt.errors import (
    AgentUnavailable,
    CheckpointError,
    FormatError,
    RunLocked,
    TierUnavailable,
    UsageError,
)
from mtckpt.tiers import LocalTier

if TYPE_CHECKING:
    from mtckpt.agent.owners import Owner
    from mtckpt.agent.registry import Registry
    from mtckpt.agent.runs import RunState

__all__ = ["SERVING", "Peers", "others_kept"]

logger = logging.getLogger(__name__)

# Starts of a job that may fail one after another, and the nodes before them are still known.
MAX_EARLIER = 8
# The data process that other nodes read from.
SERVING = work.TierRef("peers", "", label="peers")


class _Kept(msgspec.Struct, frozen=True):
    """What the next agent has to know of a run's nodes. ``host``: where this one listens.

    ``earlier`` are the other nodes of starts before, the last first, as long as this one has saved
    nothing whole: that is, nothing in an incarnation after number ``since``. ``rank`` is one of
    this node's; None in what agents wrote before it was kept here.
    """

    join: protocol.Join
    host: str = ""
    since: int = 0
    earlier: list[protocol.Others] = []
    rank: Rank | None = None


class Peers:
    """See the module. One for the agent.

    ``verbs`` is what agents of other nodes can ask: name -> (type of the message, what answers it).
    ``joining`` is held while a run's nodes are taken over, so that what was told before does not
    come last.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._tools = registry.tools
        self._kept: dict[str, _Kept] = {}
        self._lent: dict[str, set[str]] = {}
        self._clients: dict[tuple[str, PeerAddress], PeerClient] = {}
        self._listener: PeerListener | None = None
        self._address: PeerAddress | None = None
        self._changing = asyncio.Lock()
        self._telling = asyncio.Lock()
        self.joining = asyncio.Lock()
        self.verbs: dict[str, PeerVerb] = {}

    @property
    def address(self) -> PeerAddress | None:
        """Where other nodes find this agent; None while nothing listens."""
        return self._address

    # -- joining ---------------------------------------------------------------------------------

    async def listen(
        self, message: protocol.Listen, before: PeerAddress | None = None
    ) -> PeerAddress:
        """Start to listen, if nothing does yet; at the ports of ``before`` if they are free.
        Raises UsageError, TierUnavailable."""
        host = await asyncio.to_thread(choose_host, message.host, message.towards)
        async with self._changing:
            if self._address is None:
                self._address = await self._start(host, before)
            elif self._address.host != host:
                raise UsageError(
                    f"this node's agent listens at {self._address.host}, for another run",
                    state="nothing was changed",
                    actions=[f"set MTCKPT_PEER_HOST={self._address.host}"],
                    host=host,
                )
        return self._address

    async def join(self, run: RunState, owner: Owner, message: protocol.Join) -> protocol.Done:
        """Take over who the nodes of a run are, and let them read it. Idempotent. Raises RunLocked
        for a rank of an earlier start of the job, whose nodes they are no more."""
        check_join(message)
        known = self.joined(run.key)
        # Said again by each rank, and to another agent: that may know later addresses by then.
        if known is None or known.secret != message.secret:
            if known is not None and 0 < owner.incarnation < run.incarnation:
                raise RunLocked(
                    "the job was started anew since: other nodes have this run",
                    run=run.run,
                    rank=owner.rank,
                    owner_pid=next(
                        (o.pid for o in run.living() if o.incarnation == run.incarnation), 0
                    ),
                    owner_host=owner.host,
                )
            await self.replace(run, message, owner.rank)
        await self.keep()
        return protocol.Done()

    async def replace(self, run: RunState, message: protocol.Join, rank: int | None = None) -> None:
        """Take over other nodes, as the node of ``rank``, or other addresses of the same nodes, and
        keep them for the next agent."""
        known = self._kept.get(run.key)
        host = self._address.host if self._address else ""
        if known is not None and known.join.secret == message.secret:
            kept = msgspec.structs.replace(known, join=message, host=host)
        else:
            self._lent.pop(run.key, None)
            earlier = self.others(run)[:MAX_EARLIER]
            kept = _Kept(message, host, run.incarnation, earlier, rank)
        data = msgspec.json.encode(kept)
        await self._tools.call(work.WriteJoin(run.ram, run.key, data), work.Stored)
        self._kept[run.key] = kept
        self._forget_clients(run.key)

    async def adopt(self, run: RunState, data: bytes, rank: int | None = None) -> None:
        """Take over what an agent before this one had been told, and listen where it did.

        At other ports, if those are taken by now, of which the others do not know yet. ``rank`` is
        one of its node's, if that is not kept with the rest.
        """
        try:
            kept = protocol.decode(data, _Kept)
            check_join(kept.join)
            rank = rank if kept.rank is None else kept.rank
            self._kept[run.key] = kept = msgspec.structs.replace(kept, rank=rank)
            if kept.host:
                addresses = [
                    node.address if rank in node.ranks else None for node in kept.join.nodes
                ]
                here = next((n for n, address in enumerate(addresses) if address), None)
                before = None if here is None else addresses[here]
                own = await self.listen(protocol.Listen("", kept.host), before)
                if here is not None:
                    await self.replace(run, moved(kept.join, here, own))
        except CheckpointError as error:
            logger.warning("run %s: its other nodes are not heard: %s", run.key, error)

    async def lend(self, run: RunState, source_key: str) -> None:
        """Let the run's other nodes read another run, in the places of this one, until the job is
        started anew: it is restored from that."""
        if run.key in self._kept:
            self._lent.setdefault(run.key, set()).add(source_key)
            await self.keep()

    def rank_here(self, run_key: str) -> int | None:
        """A rank of this node, as its run was joined; None for a run that is on this node alone."""
        kept = self._kept.get(run_key)
        return None if kept is None else kept.rank

    def joined(self, run_key: str) -> protocol.Join | None:
        """Who the nodes of a run are; None for a run that is on this node alone."""
        kept = self._kept.get(run_key)
        return None if kept is None else kept.join

    def others(self, run: RunState) -> list[protocol.Others]:
        """The run's nodes besides this one, for who comes back without some of them; the nodes of
        earlier starts too, if none after them has saved anything whole. The last start first."""
        kept = self._kept.get(run.key)
        if kept is None:
            return []
        went_on = any(
            save.name.incarnation > kept.since and "staged" in save.stages
            for save in run.saves.values()
        )
        last = _besides(self._registry.agent_id, kept.join, self._address)
        return [*last, *([] if went_on else kept.earlier)]

    def secret_of(self, run_key: str) -> bytes | None:
        """What the nodes of a run share."""
        join = self.joined(run_key)
        return None if join is None else bytes.fromhex(join.secret)

    def leave(self, run_key: str) -> None:
        """Forget a run that is gone from this node; nobody may read it any more."""
        self._lent.pop(run_key, None)
        if self._kept.pop(run_key, None) is not None:
            self._forget_clients(run_key)

    def client(self, run_key: str, address: PeerAddress) -> PeerClient:
        """What another node of the run is asked with. Raises UsageError for one never joined."""
        secret = self.secret_of(run_key)
        if secret is None:
            raise UsageError("the run has no other nodes", run_key=run_key)
        client = self._clients.get((run_key, address))
        if client is None:
            client = self._clients[run_key, address] = PeerClient(address, run_key, secret)
        return client

    def _forget_clients(self, run_key: str) -> None:
        for key in [key for key in self._clients if key[0] == run_key]:
            self._clients.pop(key).close()

    # -- listening -------------------------------------------------------------------------------

    async def _start(self, host: str, before: PeerAddress | None) -> PeerAddress:
        listener = PeerListener(
            self._registry.agent_id, self._registry.runs, self.secret_of, self.verbs
        )
        domains = tuple(domains_here().items())
        fixed = fixed_ports()
        ports = fixed or ((before.control_port, before.data_port) if before else (0, 0))
        sock = _bind(host, ports[0], insists=bool(fixed))
        try:
            await listener.start(sock)
        except BaseException:
            sock.close()
            raise
        control_port = sock.getsockname()[1]
        try:
            try:
                data_port = await self._serve(host, ports[1])
            except TierUnavailable:
                if before is None or fixed:
                    raise
                data_port = await self._serve(host, 0)  # taken since
        except BaseException:
            await listener.stop()
            raise
        self._listener = listener
        logger.info("other nodes are heard at %s, ports %d and %d", host, control_port, data_port)
        return PeerAddress(
            host,
            control_port,
            data_port,
            self._registry.boot_id,
            self._registry.agent_id,
            self._registry.host,
            domains,
        )

    async def keep(self) -> None:
        """Once a second or so, and after changes: a data process that was replaced serves again."""
        address = self._address
        if self._listener is None or address is None:
            return
        self._listener.close_idle()
        for key in self._kept.keys() - self._registry.runs.keys():
            self.leave(key)
        port = await self._serve(address.host, address.data_port)
        if port != address.data_port:
            raise AgentUnavailable("the data port of this node is taken by another process")

    async def _serve(self, host: str, port: int) -> int:
        async with self._telling:  # what was true before must not be told after what is true now
            command = work.ServePeers(SERVING, self._registry.agent_id, host, port, self._served())
            return (await self._tools.call(command, work.Serving)).port

    def _served(self) -> list[work.ServedRun]:
        """Everything that is on this node: what a store has, the others read there."""
        runs = [self._registry.runs[key] for key in self._kept if key in self._registry.runs]
        return [
            work.ServedRun(
                run.key,
                self._kept[run.key].join.secret,
                [run.ram, *(t.ref for t in run.tiers.values() if t.config.kind == "disk")],
                sorted(self._lent.get(run.key, ())),
            )
            for run in runs
        ]

    async def close(self) -> None:
        """Stop to listen and to ask. Idempotent."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        if self._listener is not None:
            await self._listener.stop()
            self._listener = self._address = None


def others_kept(ram_root: str, run_key: str, agent_id: str) -> list[protocol.Others]:
    """What the agent of this id keeps in its RAM root of the run's other nodes, of earlier starts
    too.

    None where another user is to know: the file is its user's alone.
    """
    tier = LocalTier(ram_root, name="ram", sync=False, read_only=True)
    try:
        files = RunFiles(tier)
        try:
            kept = protocol.decode(files.read_secret(run_key), _Kept)
        finally:
            files.close()
    except (CheckpointError, OSError):
        return []
    finally:
        tier.close()
    return [*_besides(agent_id, kept.join), *kept.earlier]


def _besides(
    agent_id: str, join: protocol.Join, own: PeerAddress | None = None
) -> list[protocol.Others]:
    """The nodes without the one of this agent; none if it is the only one."""
    nodes = [
        node
        for node in join.nodes
        if node.address.agent_id != agent_id and (own is None or not same_place(node.address, own))
    ]
    return [protocol.Others(nodes, join.secret)] if nodes else []


def check_join(message: protocol.Join) -> None:
    """Raises FormatError for nodes that cannot be those of a run."""
    ranks = sorted(rank for node in message.nodes for rank in node.ranks)
    try:
        secret = bytes.fromhex(message.secret)
    except ValueError as error:
        raise FormatError("the secret of a run is not one") from error
    if len(secret) != SECRET_BYTES:
        raise FormatError("the secret of a run is not one")
    # By their number first: what is said may be any, and is not to be counted up to.
    are_all = len(ranks) == message.world_size and ranks == list(range(message.world_size))
    if not are_all or not 0 <= message.lead < len(message.nodes):
        raise FormatError(
            "the nodes of a run do not have its ranks, each once",
            state="nothing was changed",
            world_size=message.world_size,
            nodes=len(message.nodes),
        )


def _bind(host: str, port: int, *, insists: bool) -> socket.socket:
    """A bound socket; at any port if that one is taken, unless it ``insists``."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if port and not insists:
            return _bind(host, 0, insists=False)
        raise TierUnavailable(
            f"cannot listen at {host}: {error.strerror}",
            state="nothing is served to other nodes",
            actions=[
                "set MTCKPT_PEER_HOST to an address of this node, or an interface's name",
                *(["or MTCKPT_PEER_PORTS to ports that are free"] if port else []),
            ],
            tier="peers",
            port=port,
        ) from error
    return sock
