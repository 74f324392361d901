"""Labels of failure domains: what people write, what Kubernetes mounts, and what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtckpt._domains import MAX_FILE_BYTES, WIDTHS, domains_here, parse_domains, parse_labels
from mtckpt.errors import UsageError

# A downward API volume, as the kubelet writes it.
MOUNTED = """\
app.kubernetes.io/name="mtckpt-agent"
controller-revision-hash="5d8f9c7b6d"
kubernetes.io/hostname="gpu-17"
topology.kubernetes.io/rack="r1"
topology.kubernetes.io/region=""
topology.kubernetes.io/zone="europe-west4-a"
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("rack=r1,zone=a", [("rack", "r1"), ("zone", "a")]),
        ("zone=a, rack=r1", [("rack", "r1"), ("zone", "a")]),
        ("# where we are\nrack = r1\n\nzone=a # the cold one\n", [("rack", "r1"), ("zone", "a")]),
        ("chassis=c3,rack=r1,row=7", [("chassis", "c3"), ("rack", "r1"), ("row", "7")]),
        ("rack=r1,rack=r1", [("rack", "r1")]),
        ("", []),
    ],
)
def test_labels_of_ours(text: str, wanted: list[tuple[str, str]]) -> None:
    assert list(parse_domains(text, "here").items()) == wanted


def test_labels_of_kubernetes() -> None:
    wanted = [("host", "gpu-17"), ("rack", "r1"), ("zone", "europe-west4-a")]
    assert list(parse_labels(MOUNTED, "here").items()) == wanted


@pytest.mark.parametrize(
    "lines",
    [
        'cloud.google.com/gce-topology-block="b"\ncloud.google.com/gce-topology-subblock="s"',
        'topology.k8s.aws/network-node-layer-2="b"\ntopology.k8s.aws/network-node-layer-3="s"',
    ],
)
def test_labels_of_clouds(lines: str) -> None:
    assert list(parse_labels(lines, "here").items()) == [("subblock", "s"), ("block", "b")]


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    for text in (MOUNTED, "rack=r1\nzone=europe-west4-a"):
        file = tmp_path / "labels"
        file.write_text(text)
        environ = {"MTCKPT_DOMAINS_FILE": str(file), "MTCKPT_DOMAINS": "rack=r9,host=h"}
        wanted = [("host", "h"), ("rack", "r9"), ("zone", "europe-west4-a")]
        assert list(domains_here(environ).items()) == wanted
    assert domains_here({}) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rack", "'rack' is not kind=domain"),
        ("rack=", "'rack=' is not kind=domain"),
        ("Rack=r1", "'Rack=r1' is not kind=domain"),
        ("rack=r 1", "is not kind=domain"),
        ("node=n1", "a node is a failure domain without a label"),
        ("rack=r1,rack=r2", "rack is both r1 and r2"),
    ],
)
def test_what_is_no_label_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        domains_here({"MTCKPT_DOMAINS": text})
    assert raised.value.details == {"where": "MTCKPT_DOMAINS"}


@pytest.mark.parametrize(
    "line",
    [
        'zone="a',
        'topology.kubernetes.io/zone="a\\n"',
        'topology.kubernetes.io/node="a"',
        'topology.kubernetes.io/Zone="a"',
        'topology.kubernetes.io/zone="a b"',
    ],
)
def test_what_kubernetes_never_writes_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match="does not say which failure domains"):
        parse_labels(line, "labels")


@pytest.mark.parametrize("content", [None, b"\xff", b"#" * (MAX_FILE_BYTES + 1)])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "labels"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match="labels does not say which"):
        domains_here({"MTCKPT_DOMAINS_FILE": str(file)})


@given(st.text())
def test_any_text_is_labels_or_is_refused(text: str) -> None:
    for parse in (parse_domains, parse_labels):
        try:
            found = parse(text, "here")
        except UsageError:
            continue
        assert all(kind and value for kind, value in found.items())


@given(st.permutations(WIDTHS))
def test_known_kinds_are_put_in_order(kinds: list[str]) -> None:
    text = ",".join(f"{kind}=x" for kind in kinds)
    assert tuple(parse_domains(text, "here")) == WIDTHS
