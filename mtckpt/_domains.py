"""Which failure domains this node says that it is in: from the environment, or from a file.

Knows two ways of writing labels: ours (``rack=r1``), and that of Kubernetes, whose kubelet mounts
labels into a pod (``topology.kubernetes.io/zone="a"``). Does not know what domains are used for.
A node without labels is in none: its host is told by its boot id.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from mtckpt.errors import UsageError

__all__ = ["domains_here", "parse_domains", "parse_labels"]

MAX_FILE_BYTES = 64 * 1024
# From narrow to wide. Of a domain with another name only its place in the text is known.
WIDTHS = ("host", "rack", "subblock", "block", "spine", "zone", "region")
# Labels of nodes, as clouds and Kubernetes put them there.
LABELS = {
    "kubernetes.io/hostname": "host",
    "cloud.google.com/gce-topology-host": "host",
    "cloud.google.com/gce-topology-subblock": "subblock",
    "cloud.google.com/gce-topology-block": "block",
    "topology.k8s.aws/network-node-layer-3": "subblock",
    "topology.k8s.aws/network-node-layer-2": "block",
    "topology.k8s.aws/network-node-layer-1": "spine",
}
# Any other kind may have a label of this prefix.
LABEL_PREFIX = "topology.kubernetes.io/"

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LABEL = re.compile(r'([A-Za-z0-9./_-]{1,317})="([^"\\]*)"')


def domains_here(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Kind -> domain of this node, narrowest first.

    MTCKPT_DOMAINS_FILE names a file of lines, MTCKPT_DOMAINS has the same in one line and wins
    where both name a kind. Raises UsageError for what is no label, and for a file that is not there
    or cannot be read.
    """
    found: dict[str, str] = {}
    if path := environ.get("MTCKPT_DOMAINS_FILE"):
        text = _read(path)
        is_of_kubernetes = '="' in text
        found |= parse_labels(text, path) if is_of_kubernetes else parse_domains(text, path)
    if said := environ.get("MTCKPT_DOMAINS"):
        found |= parse_domains(said, "MTCKPT_DOMAINS")
    return _in_order(found)


def parse_domains(text: str, where: str) -> dict[str, str]:
    """``rack=r1,zone=a``, narrowest first; commas or lines apart, ``#`` begins a comment."""
    found: dict[str, str] = {}
    for word in _words(text):
        kind, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not _KIND.fullmatch(kind) or not _VALUE.fullmatch(value):
            raise _refused(where, f"{word!r} is not kind=domain")
        if kind == "node":
            raise _refused(where, "a node is a failure domain without a label: say host, or rack")
        if found.setdefault(kind, value) != value:
            raise _refused(where, f"{kind} is both {found[kind]} and {value}")
    return _in_order(found)


def parse_labels(text: str, where: str) -> dict[str, str]:
    """Lines ``label="value"`` of a downward API volume; labels that name no domain are left out."""
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        match = _LABEL.fullmatch(line)
        if match is None:
            raise _refused(where, f'{line[:100]!r} is not label="value"')
        label, value = match.groups()
        kind = LABELS.get(label)
        if kind is None and label.startswith(LABEL_PREFIX):
            kind = label.removeprefix(LABEL_PREFIX)
        if kind is None or not value:
            continue
        if kind == "node" or not _KIND.fullmatch(kind) or not _VALUE.fullmatch(value):
            raise _refused(where, f"{line[:100]!r} names no failure domain")
        found.setdefault(kind, value)
    return _in_order(found)


def _words(text: str) -> Iterator[str]:
    for line in text.splitlines():
        for word in line.partition("#")[0].split(","):
            if word.strip():
                yield word.strip()


def _in_order(found: Mapping[str, str]) -> dict[str, str]:
    """As it is written, unless all kinds are known: then narrowest first."""
    if not found.keys() <= set(WIDTHS):
        return dict(found)
    return {kind: found[kind] for kind in WIDTHS if kind in found}


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, f"it cannot be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise _refused(path, f"it has more than {MAX_FILE_BYTES} bytes")
    return text


def _refused(where: str, what: str) -> UsageError:
    return UsageError(
        f"{where} does not say which failure domains this node is in: {what}",
        state="nothing was done",
        actions=(
            "write kinds from narrow to wide: MTCKPT_DOMAINS=rack=r1,zone=a",
            "or unset it: then only hosts are told apart",
        ),
        where=where,
    )
