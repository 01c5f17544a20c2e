"""References by URL: fetched under limits, refused at every redirect that leads elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from generators import WAIT
from limits import HANG
from media_files import picture, png
from servers import Server

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.fetching import is_public
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.media_inputs import _kind, media_files
from vllm_cosmos3.server.http.request_fields import ClientRequest
from vllm_cosmos3.server.options import Options

SMALL = {"prompt": "it moves", "size": "64x64", "num_frames": 5, "seed": 1}


class Pictures(BaseHTTPRequestHandler):
    """A picture, a redirect to it, and everything that can be wrong with an address."""

    def do_GET(self) -> None:
        places = {"/again": "/picture", "/away": "http://localhost:1/x", "/file": "file:///etc/passwd", "/circle": "/circle"}  # fmt: skip
        if self.path in places:
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
            return
        body = {"/picture": png(picture(64, 64)), "/huge": bytes(2**20)}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test says what went wrong."""


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def post(server: Server, url: str) -> httpx.Response:
    headers = {"Authorization": "Bearer other", **WAIT}
    return httpx.post(
        f"{server.url}/v1/videos",
        json={**SMALL, "input_reference": url},
        headers=headers,
        timeout=HANG,
    )


@pytest.mark.serve
@pytest.mark.parametrize("path", ["picture", "again"])
def test_a_picture_by_url(path: str, guarded_server: Server, pictures: str) -> None:
    job = post(guarded_server, f"{pictures}/{path}").json()
    assert (job["status"], job["cosmos3"]["mode"]) == ("completed", "image2video")


@pytest.mark.serve
@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("missing", 400, "fetch_failed"),
        ("circle", 400, "fetch_failed"),
        ("huge", 413, "payload_too_large"),
        ("away", 400, "url_not_allowed"),
        ("file", 400, "url_not_allowed"),
    ],
)
def test_rows_67_and_68(
    path: str, status: int, code: str, guarded_server: Server, pictures: str
) -> None:
    answer = post(guarded_server, f"{pictures}/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["param"] == "input_reference"


@pytest.mark.serve
def test_a_file_of_the_server(generator_server: Server, media_folder: Path) -> None:
    (media_folder / "allowed.png").write_bytes(png(picture(64, 64)))
    (media_folder / "link.png").symlink_to("/etc/hostname")
    (media_folder / "circle.png").symlink_to("circle.png")
    for name, status in (
        ("allowed.png", 200),
        ("link.png", 403),
        ("../x.png", 403),
        ("no.png", 400),
        ("circle.png", 400),
        ("x" * 300, 400),
    ):
        answer = post(generator_server, f"file://{media_folder}/{name}")
        assert answer.status_code == status, answer.text


def reference(name: str, value: str) -> ClientRequest:
    return ClientRequest(fields={}, server_fields={}, references={name: value}, warnings=())


@pytest.mark.parametrize("name", ["edge", "sound_path"])
@pytest.mark.parametrize(
    "source",
    ["clips/a#b?c%20.mp4", "{}/clips/a#b?c%20.mp4", "file:clips/a%23b%3Fc%2520.mp4", "FILE://{}/clips/a%23b%3Fc%2520.mp4"],
)  # fmt: skip
def test_a_path_is_taken_as_it_is_and_a_url_is_read(source: str, name: str, tmp_path: Path) -> None:
    allowed, inputs = tmp_path / "allowed", tmp_path / "inputs"
    inputs.mkdir()
    (allowed / "clips").mkdir(parents=True)
    (allowed / "clips" / "a#b?c%20.mp4").write_bytes(b"a clip")
    asked = reference(name, source.format(allowed))

    async def read() -> bytes:
        options = Options(allowed_local_media_path=str(allowed))
        async with media_files(asked, options, inputs) as (files, _):
            return files[name].read_bytes()

    assert asyncio.run(read()) == b"a clip"


@pytest.mark.parametrize("path", ["proc/self/mem", "x" * 300])
def test_a_file_that_cannot_be_read_is_the_clients_mistake(path: str, tmp_path: Path) -> None:
    """That of the memory of a process is there, and reading it from its start fails."""

    async def read() -> None:
        options = Options(allowed_local_media_path="/")
        async with media_files(reference("edge", path), options, tmp_path):
            pass

    with pytest.raises(InvalidRequest, match="must be a file that can be read") as refusal:
        asyncio.run(read())
    assert refusal.value.code == "invalid_media"
    assert refusal.value.field == "edge.control"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "127.1", "2130706433",
        "0177.0.0.1", "0", "127.0.0.1.", "\uff10", "user@127.1",
    ],
)  # fmt: skip
def test_no_spelling_of_an_address_is_a_way_round(host: str, tmp_path: Path) -> None:
    asked = reference("input_reference", f"http://{host}:1/")

    async def fetch() -> None:
        async with media_files(asked, Options(), tmp_path):
            pass

    with pytest.raises(ApiError) as refusal:
        asyncio.run(fetch())
    assert refusal.value.code == "url_not_allowed"


def test_a_moving_picture_is_told_by_its_second_frame(tmp_path: Path) -> None:
    frames = [picture(16, 16, seed) for seed in range(3)]
    file = tmp_path / "moving"
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert _kind("input_reference", "a.gif", file) == "video"
    file.write_bytes(file.read_bytes()[:-40])  # the last frame is cut
    assert _kind("input_reference", "a.gif", file) == "video"
    frames[0].save(file, "GIF")
    assert _kind("input_reference", "a.gif", file) == "image"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("::1", False), ("fe80::1%eth0", False),
        ("::ffff:10.0.0.1", False), ("2002:7f00:1::", False), ("224.0.0.1", False), ("0.0.0.0", False),
        ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", True), ("::127.0.0.1", False), ("::8.8.8.8", True),
        ("2001:0:7f00:1::", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public
