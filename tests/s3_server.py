"""An S3 server on this machine, moto's, for results and inputs at ``s3://``."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from limits import HANG

from ports import free_port

BUCKET = "cosmos3"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment of processes that find its bucket."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-p", url.rpartition(":")[2]]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for_bucket(url)
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "key-of-the-tests",
                "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        finally:
            process.kill()


def _wait_for_bucket(url: str) -> None:
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        try:
            assert httpx.put(f"{url}/{BUCKET}").status_code == 200
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the S3 server does not start")
