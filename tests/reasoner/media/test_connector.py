"""What the URLs of a request name is fetched by the rules of the server, or refused with the part."""

from __future__ import annotations

import asyncio
import base64
import http.server
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from limits import HANG
from media_files import animation, clip, data_url, encoded, picture, png
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.fetching import PRIVATE_MEDIA
from vllm_cosmos3.media_budget import MediaBudget
from vllm_cosmos3.plugin import register
from vllm_cosmos3.reasoner.media import connector as module
from vllm_cosmos3.reasoner.media import media_io, video_reader
from vllm_cosmos3.reasoner.media.limits import CONNECTOR, FRAMES


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gives a download of a picture up after five seconds."""
    for kind in ("IMAGE", "VIDEO", "AUDIO"):
        monkeypatch.setenv(f"VLLM_{kind}_FETCH_TIMEOUT", f"{HANG:.0f}")


def connector(folder: Path | None = None, **media_io_kwargs: Any) -> Any:
    register()
    return MEDIA_CONNECTOR_REGISTRY.load(
        CONNECTOR,
        media_io_kwargs=media_io_kwargs or None,
        allowed_local_media_path="" if folder is None else str(folder),
        allowed_media_domains=None,
    )


def fetch(kind: str, url: str, **options: Any) -> Any:
    """The picture, or frames and metadata, and the same for both ways to ask."""
    found = getattr(connector(**options), f"fetch_{kind}")(url)
    later = asyncio.run(getattr(connector(**options), f"fetch_{kind}_async")(url))
    first, second = (getattr(each, "media", each) for each in (found, later))  # bare up to 0.27
    assert type(first) is type(second)
    return first


def refusal(kind: str, url: str, **options: Any) -> str:
    said = set()
    with pytest.raises(ValueError, match=r"\w") as error:
        getattr(connector(**options), f"fetch_{kind}")(url)
    said.add(str(error.value))
    with pytest.raises(ValueError, match=r"\w") as error:
        asyncio.run(getattr(connector(**options), f"fetch_{kind}_async")(url))
    said.add(str(error.value))
    (message,) = said
    return message


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return clip(tmp_path_factory.mktemp("clip") / "a.mp4", frames=20).read_bytes()


@contextmanager
def serving(
    *, status: int = 200, body: bytes = b"", location: str = "", asked: list[str] | None = None
) -> Iterator[str]:
    """URL of a server on this machine that gives one answer. ``asked`` are the paths of requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if asked is not None:
                asked.append(self.path)
            here = status if self.path == "/first" else 200
            self.send_response(here)
            if location and self.path == "/first":
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/first"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("name", "said"), [("opencv", "'opencv'"), ("nope", "'nope'"), (None, "'null'"), (7, "7")]
)
def test_another_loader_is_refused_before_anything_is_read(name: object, said: str) -> None:
    says = f"media_io_kwargs.video.video_backend is {said}, must be left out"
    with pytest.raises(InvalidRequest, match=says):
        connector(video={"num_frames": -1, "video_backend": name})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sound": {}}, "a key of media_io_kwargs is 'sound', must be image or video"),
        ({"video": 3}, "media_io_kwargs.video is 3, must be an object"),
        (
            {"video": {"frames": 3}},
            "a key of media_io_kwargs.video is 'frames', must be one of num_f",
        ),
        (
            {"image": {"size": 3}},
            "a key of media_io_kwargs.image is 'size', must be one of image_m",
        ),
        ({"audio": {"sr": 3}}, "a key of media_io_kwargs.audio is 'sr'"),
        ({"image": {"image_mode": "LAB"}}, "image.image_mode is 'LAB', must be 'RGB'"),
    ],
    ids=str,
)
def test_options_that_nothing_follows_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        connector(**options)


def test_ours_may_be_named_and_keeps_its_cap(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FRAMES, "5")
    options = {"num_frames": -1, "video_backend": "cosmos3"}
    frames, _ = fetch("video", data_url(data, "video/mp4"), video=options)
    assert len(frames) == 5


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_frames": -1}, 20),
        ({"num_frames": 7}, 7),
        ({"num_frames": 50}, 20),
        ({"fps": 6}, 5),
        ({}, 4),
    ],
    ids=str,
)
def test_numbers_of_frames_are_followed(data: bytes, options: dict[str, int], count: int) -> None:
    frames, metadata = fetch("video", data_url(data, "video/mp4"), video=options)
    assert len(frames) == count
    assert metadata["total_num_frames"] == 20


@pytest.mark.parametrize("kind", ["video/jpeg", "VIDEO/JPEG", "video/jpeg;a=b"])
def test_frames_sent_as_pictures_count_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FRAMES, "3")
    one = data_url(png(picture()), "image/png").partition(",")[2]
    few, many = (f"data:{kind};base64,{','.join([one] * count)}" for count in (3, 4))
    assert "video_url is '4 pictures', must be at most 3" in refusal("video", many)
    frames, _ = fetch("video", few, video={"num_frames": -1})
    assert frames.shape == (3, 96, 128, 3)


def test_data_urls_as_browsers_and_shells_write_them(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    urls = [
        f"data:video/mp4;codecs=avc1.64000a,mp4a.40.2;base64,{plain}",
        f"data:video/mp4;base64,{base64.encodebytes(data).decode()}",
        f"data:video/mp4;BASE64,{plain}",
        f"DATA:video/mp4;base64,{plain.rstrip('=')}",
        f"data:;base64,{quote(plain)}",
        f'data:video/mp4;codecs="avc1, mp4a";base64,{plain}',
        f"data:video/mp4,{quote(data)}",
    ]
    for url in urls:
        frames, _ = fetch("video", url, video={"num_frames": -1})
        assert frames.tobytes() == data


def test_grey_of_16_bits_is_scaled() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 64, axis=0)
    for name in ("PNG", "TIFF"):
        buffer = BytesIO()
        Image.fromarray(ramp).save(buffer, name)
        found = np.asarray(fetch("image", data_url(buffer.getvalue(), "image/x")))
        assert np.array_equal(found, np.repeat(ramp[..., None] // 257, 3, axis=2))


def test_floating_point_levels_have_no_range() -> None:
    buffer = BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(buffer, "TIFF")
    says = "image_url is 'a picture of floating-point levels', must be one of 8 or 16 bits"
    assert says in refusal("image", data_url(buffer.getvalue(), "image/tiff"))


def test_urls_of_this_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(body=png(picture())) as url:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433"):
            here = url.replace("127.0.0.1", host)
            assert "a URL that this server can and may fetch" in refusal("image", here)
        monkeypatch.setenv(PRIVATE_MEDIA, "1")
        assert fetch("image", url).size == picture().size


def test_other_media_of_this_network_are_refused_too() -> None:
    """Whichever of vLLM's ways a URL comes by."""
    asked: list[str] = []
    with serving(asked=asked) as url:
        one = connector()
        for fetch_it in (one.fetch_audio, lambda u: asyncio.run(one.fetch_audio_async(u))):
            with pytest.raises(ValueError, match=r"audio_url is .* can and may fetch"):
                fetch_it(url)
        for kind in ("image", "video"):
            refusal(kind, url)
    assert not asked


def test_every_redirect_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRIVATE_MEDIA, "1")
    with serving(body=png(picture())) as inner:
        for location in ("file:///etc/hostname", "gopher://127.0.0.1/", "http://"):
            with serving(status=302, location=location) as url:
                assert "can and may fetch" in refusal("image", url)
        with serving(status=302, location=inner) as url:
            assert fetch("image", url).size == picture().size
            monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
            assert "redirects more than 0 times" in refusal("image", url)


@pytest.mark.parametrize("status", [404, 403, 410, 429, 500, 503])
def test_what_a_host_answers_is_said_with_the_part(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv(PRIVATE_MEDIA, "1")
    with serving(status=status) as url:
        message = refusal("video", url)
    assert message.startswith(f"video_url is '{url}', must be a URL that")
    assert f"it answered {status}" in message


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/hostname", "started without --allowed-local-media-path"),
        ("ftp://example.com/a.png", "must be a URL of http, https, data or"),
        ("/etc/hostname", "must be a URL of http, https, data or"),
        ("", "must be a URL of http, https, data or"),
        ("data:image/png;base64", "must be a data URL with a comma"),
        ("data:image/png;base64,?!", "must be base64"),
        ("http://", "a URL that this server can and may fetch"),
        ("http://[::1", "a URL that this server can and may fetch"),
        ("http://no-such-host.invalid/a.png", "a URL that this server can and may fetch"),
    ],
)
def test_urls_that_name_nothing_are_named(url: str, says: str) -> None:
    message = refusal("image", url)
    assert message.startswith("image_url is ")
    assert says in message


def test_files_of_the_server_stay_in_their_folder(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "secret.png").write_bytes(png(picture()))
    (allowed / "a b.png").write_bytes(png(picture()))
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    assert fetch("image", (allowed / "a b.png").as_uri(), folder=allowed).size == (128, 96)
    for name, says in {
        "../secret.png": "in the folder of --allowed-local-media-path",
        "link.png": "in the folder of --allowed-local-media-path",
        "absent.png": "a file that exists",
        "": "in the folder of",
        "%00.png": "image_url is ",
    }.items():
        assert says in refusal("image", f"file://{allowed}/{name}", folder=allowed)
    assert str(allowed) not in refusal("image", "file:///etc/hostname", folder=allowed)


def heic() -> bytes:
    brands = b"heic" + bytes(4) + b"mif1heic"
    return (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(64)


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "text": b"# Read me",
    "HEIC": heic(),
    "half a PNG": png(picture())[:300],
    "half a GIF": animation([picture(seed=s) for s in range(3)])[:2000],
    "half a clip": encoded()[:2000],
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_broken_files_are_named_with_what_is_accepted(kind: str, name: str) -> None:
    message = refusal(kind, data_url(BROKEN[name], f"{kind}/x"))
    accepted = {"image": "PNG, JPEG, WebP", "video": "a video"}[kind]
    assert message.startswith(f"{kind}_url is ")
    assert accepted in message
    assert len(message) < 300


@pytest.mark.parametrize("name", ["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG", "AVIF", "clip"])
def test_damage_is_read_or_refused(name: str) -> None:
    dice = random.Random(name)
    if name == "clip":
        kind, whole = "video", encoded(frames=4, width=64, height=48)
    else:
        kind, buffer = "image", BytesIO()
        many = (
            {"save_all": True, "append_images": [picture(40, 30, 2)]}
            if name in ("GIF", "TIFF")
            else {}
        )
        picture(40, 30).save(buffer, name, **many)
        whole = buffer.getvalue()
    for _ in range(150):
        broken = bytearray(whole[: dice.choice([len(whole), dice.randrange(20, len(whole))])])
        for _ in range(dice.choice([1, 4, 16, 64])):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        with suppress(InvalidRequest):
            getattr(connector(), f"fetch_{kind}")(data_url(bytes(broken), f"{kind}/x"))


def test_pictures_ask_for_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    url = data_url(png(picture(400, 300)), "image/png")
    size = 400 * 300 * (media_io.KEPT + media_io.WORKING)
    budget = MediaBudget(per_request=size, total=2 * size)
    monkeypatch.setattr(media_io, "media_budget", lambda: budget)
    one = connector()
    first = one.fetch_image(url)
    assert budget.used == 400 * 300 * media_io.KEPT
    with pytest.raises(Exception, match="at most 2 MiB of decoded pixels in a request") as error:
        one.fetch_image(url)  # of the same request
    assert error.value.http_status == 413  # type: ignore[attr-defined]
    budget.total = size
    with pytest.raises(Exception, match="send it again later") as error:
        connector().fetch_image(url)
    assert error.value.http_status == 429  # type: ignore[attr-defined]
    del first, one, error
    assert budget.used == 0


def test_frames_as_pictures_ask_for_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    one = data_url(png(picture(400, 300)), "image/png").partition(",")[2]
    budget = MediaBudget(per_request=2**22, total=2**23)
    for each in (media_io, video_reader):
        monkeypatch.setattr(each, "media_budget", lambda: budget)
    with pytest.raises(Exception, match="at most 4 MiB of decoded pixels in a request") as error:
        connector().fetch_video(f"data:video/jpeg;base64,{','.join([one] * 9)}")
    assert error.value.http_status == 413  # type: ignore[attr-defined]
    assert budget.used == 0


def test_vllms_cache_of_downloads_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PRIVATE_MEDIA, "1")
    monkeypatch.setenv("VLLM_MEDIA_CACHE", str(tmp_path))
    with serving(body=png(picture())) as url:
        assert fetch("image", url).size == picture().size
    assert fetch("image", url).size == picture().size  # the host is gone
    monkeypatch.setenv(PRIVATE_MEDIA, "0")
    assert "not a public address" in refusal("image", url)


def test_the_rule_is_that_of_the_generator() -> None:
    rule = connector()._rule
    assert (rule.domains, rule.private, rule.redirects) == ((), False, module.REDIRECTS)
