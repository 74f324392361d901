"""Agents of several nodes over TLS: certificates that were given, and those of others."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import shard_maker
import trustme
import two_nodes

from mtckpt import _handshake, _peer_tls
from mtckpt._handshake import PeerAddress
from mtckpt.agent import work
from mtckpt.agent.carry import Carrier
from mtckpt.agent.peer_client import PeerClient
from mtckpt.agent.peer_server import PeerServer
from mtckpt.agent.protocol import Done
from mtckpt.errors import AccessDenied, CheckpointError, TierUnavailable, UsageError
from mtckpt.tiers.peer import PeerTier

AGENT = "a" * 16
RUN = shard_maker.RUN
SECRET = _handshake.new_secret()


class Authority:
    """Somebody who signs, and a certificate of theirs in files."""

    def __init__(self, path: Path, name: str) -> None:
        self.ca = trustme.CA()
        self.cert, self.key, self.root = (path / f"{name}.{kind}" for kind in ("crt", "key", "ca"))
        self.ca.cert_pem.write_to_path(self.root)
        self.renew()

    def renew(self) -> None:
        issued = self.ca.issue_cert("node.example")
        self.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(self.key)

    def use(self, patch: pytest.MonkeyPatch, ca: str = "") -> None:
        patch.setenv("MTCKPT_PEER_TLS_CERT", str(self.cert))
        patch.setenv("MTCKPT_PEER_TLS_KEY", str(self.key))
        patch.setenv("MTCKPT_PEER_TLS_CA", ca or str(self.root))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "theirs")


@pytest.fixture
def port(ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A data port with a shard behind it that speaks TLS with our certificate, in this process; who
    asks takes whatever the variables say."""
    ours.use(monkeypatch)
    monkeypatch.setattr("mtckpt.agent.peer_server.server_tls", lambda: _server(ours))
    shard_maker.put_shard(tmp_path / "ram", shard_maker.make_shard(tmp_path, size=20))
    ref = work.TierRef("ram", str(tmp_path / "ram"), label="ram")
    run = work.ServedRun(RUN, SECRET.hex(), [ref])
    return PeerServer().serve(work.ServePeers(ref, AGENT, "127.0.0.1", 0, [run])).port


@pytest.fixture
def tier(port: int) -> Iterator[PeerTier]:
    made = PeerTier(PeerAddress("127.0.0.1", 1, port, name="there"), RUN, SECRET, timeout_s=5.0)
    yield made
    made.close()


def test_a_shard_is_pulled_and_verified_over_tls(port: int, tmp_path: Path) -> None:
    shard = shard_maker.make_shard(tmp_path, size=20)
    (tmp_path / "here").mkdir(mode=0o700)
    carrier = Carrier()
    ref = work.TierRef("peers", "pull", label="peers")
    target = work.TierRef("ram", str(tmp_path / "here"), label="ram")
    address = PeerAddress("127.0.0.1", 1, port)
    command = work.Pull(ref, RUN, str(shard.name), 0, address, SECRET.hex(), target)
    done = carrier.carry(command, lambda _: None)
    carrier.close()
    assert isinstance(done, work.Flushed)
    assert done.copied_bytes > len(shard.data)
    copies = list((tmp_path / "here").rglob("*.safetensors"))
    assert [copy.read_bytes() for copy in copies] == [shard.data]


def test_a_certificate_of_another_authority_is_not_believed(
    tier: PeerTier, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.use(monkeypatch)
    with pytest.raises(AccessDenied, match="certificate is not to be believed"):
        list(tier.list())


def test_who_shows_a_certificate_of_another_authority_is_not_answered(
    tier: PeerTier, ours: Authority, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.use(monkeypatch, ca=str(ours.root))  # it believes us, and we do not believe it
    with pytest.raises(TierUnavailable):
        list(tier.list())


def _server(of: Authority) -> _peer_tls.Tls:
    return _peer_tls._load(str(of.cert), str(of.key), str(of.root), is_server=True)


def test_without_certificates_nothing_is_read(
    tier: PeerTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CERT", "KEY", "CA"):
        monkeypatch.delenv(f"MTCKPT_PEER_TLS_{name}")
    with pytest.raises(TierUnavailable):
        list(tier.list())


def test_nobody_stands_between_with_another_good_certificate(
    port: int, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody with a certificate that both sides believe passes on what they say: the proofs name
    the certificate that each side saw, and so do not fit."""
    inside, outside = _peer_tls.client_tls(), _server(ours)
    monkeypatch.setattr("mtckpt.agent.peer_server.server_tls", lambda: outside)
    ours.renew()
    middle = _server(ours)
    assert inside is not None
    listener = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        sock, _ = listener.accept()
        with (
            middle.context.wrap_socket(sock, server_side=True) as client,
            socket.create_connection(("127.0.0.1", port)) as plain,
            inside.context.wrap_socket(plain) as server,
        ):
            said = b""
            while not said.endswith(b"}"):  # head and body come one after the other
                said += client.recv(65536)
            server.sendall(said)
            client.sendall(server.recv(65536))

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    there = PeerTier(PeerAddress("127.0.0.1", 1, listener.getsockname()[1]), RUN, SECRET)
    with pytest.raises(AccessDenied, match="does not know this run's secret"):
        list(there.list())
    there.close()
    thread.join(10)
    listener.close()


def test_certificates_are_renewed_under_way(tier: PeerTier, ours: Authority, port: int) -> None:
    assert list(tier.list())
    tier.close()
    ours.renew()
    again = PeerTier(PeerAddress("127.0.0.1", 1, port), RUN, SECRET)
    assert list(again.list())
    again.close()


def test_insecure_has_to_be_written_out(
    tier: PeerTier, ours: Authority, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = str(theirs.cert), str(theirs.key), "insecure"
    kept = _peer_tls._load(*files, is_server=True)
    monkeypatch.setattr("mtckpt.agent.peer_server.server_tls", lambda: kept)
    with pytest.raises(AccessDenied, match="certificate is not to be believed"):
        list(tier.list())
    ours.use(monkeypatch, ca="insecure")
    assert list(tier.list())  # encrypted; who is there was proved by the secret


@pytest.mark.parametrize("missing", ["CERT", "KEY", "CA"])
def test_variables_that_do_not_go_together_are_named(
    ours: Authority, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    ours.use(monkeypatch)
    monkeypatch.delenv(f"MTCKPT_PEER_TLS_{missing}")
    with pytest.raises(UsageError, match=f"MTCKPT_PEER_TLS_{missing} is not set"):
        _peer_tls.client_tls()


def test_files_that_are_no_certificates_are_named(
    ours: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours.use(monkeypatch)
    for wrong in (tmp_path / "not-there", ours.root):
        monkeypatch.setenv("MTCKPT_PEER_TLS_KEY", str(wrong))
        with pytest.raises(UsageError, match="cannot be used") as caught:
            _peer_tls.server_tls()
        assert "MTCKPT_PEER_TLS_KEY" in str(caught.value)


def test_agents_speak_tls_on_both_ports(ours: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    ours.use(monkeypatch)
    context = ssl.create_default_context(cafile=str(ours.root))
    context.check_hostname = False
    with two_nodes.nodes(2) as pair:
        secret = two_nodes.joined(RUN, *pair)
        pair[0].trainer.save(10)
        address = pair[0].listen()
        for where in (address.control_port, address.data_port):
            answer = b""
            with (
                socket.create_connection((address.host, where), timeout=10) as plain,
                contextlib.suppress(ssl.SSLError, ConnectionError),
                context.wrap_socket(plain) as sock,  # without a certificate of its own
            ):
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                answer = sock.recv(1000)
            assert answer == b""
        there = PeerTier(address, RUN, secret)
        assert list(there.list())
        there.close()
        client = PeerClient(address, RUN, secret)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="Not Found"):
                client.call("no-such-verb", Done(), Done, 10.0)
        client.close()
