"""TLS between agents, if certificates were given: who shows which, and who is believed.

Knows the three variables and what they mean together. Does not know sockets. Who is at the other
end is proved by the run's secret all the same; the proof names the certificate that the server has
shown, so that nobody with another one, however good, can stand between the two.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtckpt.errors import UsageError

if TYPE_CHECKING:
    import ssl

__all__ = ["INSECURE", "Tls", "binding_of", "client_tls", "server_tls"]

CERT, KEY, CA = "MTCKPT_PEER_TLS_CERT", "MTCKPT_PEER_TLS_KEY", "MTCKPT_PEER_TLS_CA"
# Written out instead of a file of authorities: encrypted, and certificates are not looked at.
INSECURE = "insecure"
_known: dict[tuple[object, ...], tuple[list[int], Tls]] = {}


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak; ``binding`` names this side's certificate."""

    context: ssl.SSLContext
    binding: str


def server_tls() -> Tls | None:
    """What this node's agent shows and wants to see; None where no certificates were given.

    Raises UsageError for variables that do not go together, and for files that cannot be used.
    """
    return _made(is_server=True)


def client_tls() -> Tls | None:
    """The same for whoever asks another node's agent."""
    return _made(is_server=False)


def binding_of(certificate: bytes | None) -> str:
    """A name for a certificate in DER, which each side makes of what it has."""
    return hashlib.sha256(certificate or b"").hexdigest()


def _made(*, is_server: bool) -> Tls | None:
    paths = {name: os.environ.get(name, "") for name in (CERT, KEY, CA)}
    if not any(paths.values()):
        return None
    if not all(paths.values()):
        raise UsageError(
            f"{', '.join(name for name, path in paths.items() if not path)} is not set",
            state="nothing is said to other nodes",
            actions=[
                f"set {CERT}, {KEY} and {CA} on all nodes, or none of them",
                f"{CA}={INSECURE} encrypts without looking at certificates",
            ],
        )
    cert, key, ca = paths.values()
    facts = (is_server, cert, key, ca)
    before = _known.get(facts)
    try:
        # Certificates are renewed while agents run: a file that was replaced is read again.
        times = [os.stat(path).st_mtime_ns for path in (cert, key, ca) if path != INSECURE]
        if before is None or before[0] != times:
            _known[facts] = (times, _load(cert, key, ca, is_server=is_server))
        return _known[facts][1]
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        if before is not None:
            return before[1]  # replaced by half, perhaps: looked at again next time
        raise UsageError(
            f"the certificates for other nodes cannot be used: {error}",
            state="nothing is said to other nodes",
            actions=[f"look at the files that {CERT}, {KEY} and {CA} name"],
        ) from error


def _load(cert: str, key: str, ca: str, *, is_server: bool) -> Tls:
    import ssl  # a quarter of a start; most runs have no certificates

    purpose = ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if is_server:
        context.num_tickets = 0  # connections are kept, so nobody comes back with one
    # Nodes come and go under names and addresses that no certificate knows: it is the secret that
    # tells which one this is.
    context.check_hostname = False
    context.load_cert_chain(cert, key)
    if ca == INSECURE:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca)
    with open(cert) as file:
        text = file.read()
    begin, end = ssl.PEM_HEADER, ssl.PEM_FOOTER
    own = text[text.index(begin) : text.index(end) + len(end)]
    return Tls(context, binding_of(ssl.PEM_cert_to_DER_cert(own)))
