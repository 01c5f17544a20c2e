"""Bodies that are cut off, in other letters, or larger than what may be read as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import UploadFile

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.http.api_errors import ApiError, envelope
from vllm_cosmos3.server.http.body import MAX_COMMAS, MAX_TEXT, Text, read_body
from vllm_cosmos3.server.options import Options

FORM = "multipart/form-data; boundary=cut"
JSON = "application/json"


def read(data: bytes, kind: str = JSON, chunk: int = 2**16) -> dict[str, Any]:
    """What the server makes of a body that comes in chunks."""
    chunks: Iterator[bytes] = (data[at : at + chunk] for at in range(0, len(data), chunk))

    async def receive() -> dict[str, Any]:
        body = next(chunks, None)
        return {"type": "http.request", "body": body or b"", "more_body": body is not None}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(read_body(Request(scope, receive), Options()))


def refused(data: bytes, kind: str = JSON) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(data, kind)
    return caught.value


@pytest.mark.parametrize("sent", [True, False])
def test_a_client_is_not_slow_because_the_server_is(sent: bool) -> None:
    """Nothing else of this process runs while it is held up, and the body comes meanwhile, or does not."""

    async def read_late() -> dict[str, Any]:
        came = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await came.wait()
            return {"type": "http.request", "body": b'{"seed": 1}', "more_body": False}

        loop = asyncio.get_running_loop()
        loop.call_soon(time.sleep, 0.3)
        loop.call_later(0.05 if sent else 60, came.set)
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", JSON.encode())]}
        return await read_body(Request(scope, receive), Options(upload_idle=0.1))

    if sent:
        assert asyncio.run(read_late()) == {"seed": 1}
    else:
        with pytest.raises(ApiError, match="came"):
            asyncio.run(read_late())


def closed(upload: UploadFile) -> int | None:
    """The size of a file, which is not needed any more."""
    upload.file.close()
    return upload.size


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return b'--cut\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (
        name,
        more,
        value,
    )


@pytest.mark.parametrize("chunk", [1, 7, 2**16])
def test_a_form(chunk: int) -> None:
    data = part(b"prompt", "ein Böot".encode()) + part(
        b"video", b"\xff\x00", b'; filename="B\xc3\xb6\xff"'
    )
    fields = read(data + b"--cut--", FORM, chunk)
    assert fields.keys() == {"prompt", "video"}
    assert fields["prompt"] == "ein Böot"
    assert isinstance(fields["video"], UploadFile)
    assert closed(fields["video"]) == 2
    assert fields["video"].filename == "Bö\ufffd"
    assert read(part(b"a", b"b") + b"--cut--", f"{FORM}; charset=UTF-8") == {"a": "b"}


@pytest.mark.parametrize("end", [b"", b"--cu", b"--cut", b"--cut\r\n", b"--cut-"])
def test_a_form_without_its_end(end: bytes) -> None:
    whole = part(b"prompt", b"a") + part(b"video", b"x" * 1000, b'; filename="a"')
    error = refused(whole + end, FORM)
    assert error.code == "invalid_value"
    assert "it is incomplete" in str(error)
    assert "incomplete" in str(refused(whole[:-500], FORM))


@pytest.mark.parametrize("charset", ["undefined", "punycode", "latin-1", "nonsense", "utf-16"])
def test_other_charsets(charset: str) -> None:
    error = refused(part(b"prompt", b"a") + b"--cut--", f"{FORM}; charset={charset}")
    assert str(error) == f"the charset of the form is {charset!r}, must be utf-8"


def test_bytes_that_are_no_text() -> None:
    assert "prompt is not UTF-8 at byte 1" in str(
        refused(part(b"prompt", b"a\xff") + b"--cut--", FORM)
    )
    assert "name of a field" in str(refused(part(b"\xff", b"a") + b"--cut--", FORM))
    assert "not UTF-8 at byte 11" in str(refused(b'{"prompt":"\xff"}'))
    assert refused('{"prompt": "a"}'.encode("utf-16")).code == "invalid_json"


def test_text_is_limited_and_media_are_not() -> None:
    much = b"x" * (MAX_TEXT + 1)
    for data, kind in [
        (b'{"prompt": "%s"}' % much, JSON),
        (b'{"%s": 1}' % much, JSON),
        (b'{"a": "data:", "seed": [%s1]}' % (b"1," * (MAX_TEXT // 2)), JSON),
        (b'{"a": "data:%s"}' % (b"\\/" * MAX_TEXT), JSON),
        (b'{"action": [%s[1]]}' % (b"[1]," * (MAX_COMMAS + 1)), JSON),
        (b"prompt=" + much, "application/x-www-form-urlencoded"),
        (part(b"prompt", much) + b"--cut--", FORM),
        (part(b"extra_params", b'{"a": "%s"}' % much) + b"--cut--", FORM),
    ]:
        error = refused(data, kind)
        assert (error.code, f"more than {MAX_TEXT} bytes of text" in str(error)) == (
            "payload_too_large",
            True,
        )
    url = b"data:video/mp4;base64," + much
    assert len(read(b'{"edge": {"control": "%s"}, "seed": 1}' % url)["edge"]["control"]) > MAX_TEXT
    assert len(read(part(b"edge", url) + b"--cut--", FORM)["edge"]) > MAX_TEXT
    file = part(b"edge", much, b'; filename="a"')
    assert closed(read(file + b"--cut--", FORM)["edge"]) == MAX_TEXT + 1


@given(
    st.lists(st.sampled_from([b'"data:', b'"', b"data:", b"abc", b"\\", b"1,"]), max_size=12),
    st.data(),
)
def test_the_count_of_text_does_not_depend_on_the_chunks(
    parts: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(parts)
    once, cut = Text(), Text()
    once.add(whole)
    at = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    for start, stop in zip([0, *at], [*at, len(whole)], strict=True):
        cut.add(whole[start:stop])
    assert (cut.size, cut.commas) == (once.size, once.commas)


def test_errors_repeat_little_of_what_was_sent() -> None:
    error = envelope(InvalidRequest("x" * 10**6, [[1] * 10**6] * 10**6, "y"))["error"]
    assert len(error["message"]) < 200
    assert error["param"] == "x" * 80
    long = {"a" * 500: "b"}
    assert str(InvalidRequest("a", long, "y")) == f"a is {{'{'a' * 75}..., must be y"
    assert envelope(ApiError("x", "half \ud800", param="\ud800"))["error"]["param"] == "\\ud800"
