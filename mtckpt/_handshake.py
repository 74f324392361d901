"""How one node's agent is found by another, and how both prove that they are of the same run.

Knows where a peer listens and the proof: HMAC-SHA256 of a secret that never travels, over fresh
nonces of both sides, who the server is and with which certificate, the run and what the connection
is for. So a proof that was overheard is good for nothing: not again, not in the other direction,
not for another run, port or agent. Does not know sockets. It promises who is there when a
connection begins; against somebody who sits on the wire and changes what follows, the answer is
TLS.

    client: Hello(run, role, nonce)  ->  server: Welcome(nonce, agent, proof)  ->  client: Proof
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from mtckpt.errors import AccessDenied, AgentUnavailable, FormatError

__all__ = [
    "Answerer",
    "Challenger",
    "Hello",
    "PeerAddress",
    "Proof",
    "Refusal",
    "Role",
    "Welcome",
    "decode_small",
    "new_secret",
    "same_place",
]

PEER_PROTOCOL_VERSION = 1
SECRET_BYTES = 32
# More than any message of the handshake, or any refusal, has.
MAX_SMALL_BYTES = 16 * 1024
HELLO_PATH, PROVE_PATH = "/v1/hello", "/v1/prove"
_NONCE_BYTES = 32
Role = Literal["control", "data"]
_T = TypeVar("_T")


class PeerAddress(msgspec.Struct, frozen=True):
    """Where the agent of a node listens for others. ``name`` is the host's, for people.

    ``boot_id`` tells whether its memory is still what it was, ``agent_id`` whether the agent is.
    ``domains`` are its failure domains, kind and name, narrowest first.
    """

    host: str
    control_port: int
    data_port: int
    boot_id: str = ""
    agent_id: str = ""
    name: str = ""
    domains: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.host})" if self.name else self.host


def same_place(one: PeerAddress, other: PeerAddress) -> bool:
    """Whether both are the same node's, perhaps by another agent."""
    return (one.host, one.control_port) == (other.host, other.control_port)


class Hello(msgspec.Struct, frozen=True):
    """What a client says first. ``nonce`` is hexadecimal, drawn for this connection."""

    protocol: int
    run_key: str
    role: Role
    nonce: str


class Welcome(msgspec.Struct, frozen=True):
    """The server's nonce, and the proof that it knows the secret."""

    nonce: str
    agent_id: str
    proof: str


class Proof(msgspec.Struct, frozen=True):
    proof: str


class Refusal(msgspec.Struct, frozen=True):
    """Why a request was refused: the part of an agent's error that is read down here."""

    error: str
    what: str


def new_secret() -> bytes:
    """A secret for one start of a job."""
    return os.urandom(SECRET_BYTES)


def decode_small(data: bytes, type_: type[_T]) -> _T:
    """A message of the handshake. Raises FormatError."""
    if len(data) > MAX_SMALL_BYTES:
        raise FormatError("message is larger than any can be", got_bytes=len(data))
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"message does not parse: {error}") from error


class Challenger:
    """The client's side of one connection. ``agent_id``, if it is given, must be the server's;
    ``binding`` names the certificate that it has shown."""

    def __init__(
        self, run_key: str, role: Role, secret: bytes, agent_id: str = "", binding: str = ""
    ) -> None:
        self._secret = secret
        self._agent_id = agent_id
        self._binding = binding
        self._hello = Hello(PEER_PROTOCOL_VERSION, run_key, role, _nonce())

    def hello(self) -> Hello:
        """What to say first."""
        return self._hello

    def check(self, welcome: Welcome) -> Proof:
        """What to say next. Raises AccessDenied, AgentUnavailable: nothing more must be said."""
        wanted = self._prove("server", welcome)
        if not hmac.compare_digest(wanted.encode(), welcome.proof.encode()):
            raise AccessDenied(
                "whoever answers there does not know this run's secret",
                state="nothing was asked of it",
                run_key=self._hello.run_key,
            )
        if self._agent_id not in ("", welcome.agent_id):
            raise AgentUnavailable(
                "another agent answers there by now",
                state="nothing was asked of it",
                run_key=self._hello.run_key,
                agent_id=self._agent_id,
                found=welcome.agent_id[:64],
            )
        return Proof(self._prove("client", welcome))

    def _prove(self, side: str, welcome: Welcome) -> str:
        who = f"{welcome.agent_id} {self._binding}"
        return _prove(side, self._secret, self._hello, welcome.nonce, who)


class Answerer:
    """The server's side of one connection. ``run_key`` is empty until its client has proved;
    ``binding`` names the certificate that this side shows."""

    def __init__(
        self,
        agent_id: str,
        role: Role,
        secret_of: Callable[[str], bytes | None],
        binding: str = "",
    ) -> None:
        self._agent_id = agent_id
        self._who = f"{agent_id} {binding}"
        self._role = role
        self._secret_of = secret_of
        self._hello: Hello | None = None
        self._nonce = ""
        self.run_key = ""
        self._proved = b""

    @property
    def still_knows(self) -> bool:
        """Whether the secret that its client has proved to know is still the run's."""
        return bool(self.run_key) and self._secret_of(self.run_key) == self._proved

    def welcome(self, hello: Hello) -> Welcome:
        """Answer a client's first message. Raises AgentUnavailable, AccessDenied."""
        if hello.protocol > PEER_PROTOCOL_VERSION:
            raise AgentUnavailable(
                "the node agent is older than the one that asks",
                agent_version=PEER_PROTOCOL_VERSION,
                wanted_version=hello.protocol,
            )
        if len(hello.nonce) != 2 * _NONCE_BYTES or hello.role != self._role:
            raise AccessDenied("not the first word of a peer", state="nothing was answered")
        secret = self._secret_of(hello.run_key)
        if secret is None:
            raise AgentUnavailable("this agent has not joined the run", run_key=hello.run_key[:200])
        self._hello, self._nonce, self.run_key = hello, _nonce(), ""
        proof = _prove("server", secret, hello, self._nonce, self._who)
        return Welcome(self._nonce, self._agent_id, proof)

    def check(self, proof: Proof) -> str:
        """The run whose secret the client knows. Raises AccessDenied. A challenge is good once."""
        hello, self._hello = self._hello, None
        secret = self._secret_of(hello.run_key) if hello is not None else None
        if hello is None or secret is None:
            raise AccessDenied("proof of nothing that was asked", state="nothing was answered")
        wanted = _prove("client", secret, hello, self._nonce, self._who)
        if not hmac.compare_digest(wanted.encode(), proof.proof.encode()):
            raise AccessDenied(
                "whoever asks does not know this run's secret",
                state="nothing was answered",
                run_key=hello.run_key,
            )
        self.run_key, self._proved = hello.run_key, secret
        return self.run_key


def _nonce() -> str:
    return os.urandom(_NONCE_BYTES).hex()


def _prove(side: str, secret: bytes, hello: Hello, server_nonce: str, who: str) -> str:
    said = [side, hello.protocol, hello.run_key, hello.role, who, hello.nonce, server_nonce]
    text = msgspec.json.encode(["mtckpt peers", *said])  # JSON: no two lists have the same text
    return hmac.new(secret, text, hashlib.sha256).hexdigest()
