"""Bodies as browsers, phones and OpenAI's clients write them: files without names, Blobs, defaults."""

from __future__ import annotations

import base64
import io
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from media_files import picture
from PIL import Image
from starlette.datastructures import UploadFile
from test_body import FORM, read

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.http.api_errors import ApiError, error_response
from vllm_cosmos3.server.http.media_inputs import _data, _kind
from vllm_cosmos3.server.http.request_fields import IMAGE, VIDEO, translate
from vllm_cosmos3.server.media_errors import _wrong


def form(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """The fields of a form whose parts are (headers below Content-Disposition: form-data, body)."""
    text = b"".join(
        b"--cut\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), data)
        for head, data in parts
    )
    return read(text + b"--cut--\r\n", FORM)


NO_FILE = ('name="{}"; filename=""\r\nContent-Type: application/octet-stream', b"")
PROMPT = ('name="prompt"', b"a boat")


@pytest.mark.parametrize("name", ["input_reference", "edge", "control_reference", "anything"])
def test_a_file_that_nobody_chose_is_not_there(name: str) -> None:
    assert form(PROMPT, (NO_FILE[0].format(name), b"")) == {"prompt": "a boat"}


@pytest.mark.parametrize("kind", ["image/png", "Video/MP4", "application/octet-stream"])
@pytest.mark.parametrize("name", ["input_reference", "input_reference[image_url]", "depth"])
def test_a_part_of_a_media_type_is_a_file(name: str, kind: str) -> None:
    fields = form((f'name="{name}"\r\nContent-Type: {kind}', b"\xff\xd8\x00"))
    found = fields[name.partition("[")[0]]
    upload = found["image_url"] if isinstance(found, dict) else found
    assert isinstance(upload, UploadFile)
    assert upload.file.read() == b"\xff\xd8\x00"
    upload.file.close()


def test_bytes_without_a_name_or_type_say_what_is_missing() -> None:
    with pytest.raises(ApiError, match="a file has a name or a media type"):
        form(('name="input_reference"', b"\xff\xd8\x00"))


@pytest.mark.parametrize(
    ("head", "data", "fields"),
    [
        ('name="extra_params"; filename="blob"\r\nContent-Type: application/json', b'{"seed": 77}', {"seed": 77}),
        ('name="prompt"; filename="prompt.txt"\r\nContent-Type: text/plain', "ein Böot".encode(), {"prompt": "ein Böot"}),
        ('name="seed"; filename="blob"', b"7", {"seed": 7}),
        ('name="prompt"; filename="blob"', b"", {"prompt": ""}),
    ],
)  # fmt: skip
def test_text_of_a_file_part_is_the_field(head: str, data: bytes, fields: dict[str, Any]) -> None:
    assert translate(form((head, data)), VIDEO).fields == fields


def test_a_file_part_of_text_has_the_limit_of_text() -> None:
    with pytest.raises(ApiError) as refusal:
        form(('name="prompt"; filename="blob"', bytes(5 * 2**20)))
    assert refusal.value.code == "payload_too_large"
    with pytest.raises(ApiError, match="not UTF-8"):
        form(('name="prompt"; filename="photo.jpg"', b"\xff\xd8"))


@pytest.mark.parametrize("nothing", [False, 0, "", "false", "0", [], {}])
@pytest.mark.parametrize("name", ["stream", "partial_images", "lora", "source_video"])
def test_nothing_of_what_is_unsupported_is_accepted(name: str, nothing: object) -> None:
    translate({"prompt": "a", name: nothing}, IMAGE)
    with pytest.raises(InvalidRequest):
        translate({"prompt": "a", name: 1}, IMAGE)


def test_openais_defaults_written_out() -> None:
    given = {
        "prompt": "a", "background": "auto", "moderation": "auto", "n": 1, "output_compression": 100, "size": "auto",
        "output_format": "png", "partial_images": 0, "quality": "auto", "stream": False, "style": "vivid", "user": "u",
        "response_format": "url",
    }  # fmt: skip
    translated = translate(given, IMAGE)
    assert translated.fields == {"prompt": "a", "n": 1, "num_frames": 1}
    assert translated.server_fields["response_format"] == "url"


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_structured_prompt_is_an_object(name: str) -> None:
    found = translate({name: {"subjects": [{"description": "Böot"}]}}, VIDEO).fields[name]
    assert found == '{"subjects":[{"description":"B\\u00f6ot"}]}'


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes, lambda d: base64.b64encode(d) + b"\r\n", lambda d: base64.b64encode(d).replace(b"+", b"%2B")])  # fmt: skip
def test_base64_as_programs_write_it(encode: Any) -> None:
    data = bytes(range(256)) * 9
    assert _data("image", f"data:image/png;base64,{encode(data).decode()}") == data
    with pytest.raises(InvalidRequest):
        _data("image", "data:image/png;base64,AAA!")


def frames() -> list[Image.Image]:
    """Three pictures, new ones each time: Pillow leaves options of the last format in them."""
    return [picture(32, 24, seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("kind", "is_a"),
    [("GIF", "video"), ("WEBP", "image"), ("PNG", "image"), ("TIFF", "image"), ("MPO", "image")],
)
def test_pictures_with_a_second_one_inside(kind: str, is_a: str, tmp_path: Path) -> None:
    file = tmp_path / "x"
    first, *rest = frames()
    first.save(file, kind, save_all=True, append_images=rest)
    assert _kind("input_reference", "x", file) == is_a


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO", "BMP"])
def test_damaged_pictures_are_refused_or_left_to_the_validator(kind: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    first, *rest = frames()
    first.save(out, kind, **({} if kind == "BMP" else {"save_all": True, "append_images": rest}))
    seed, dice, file = out.getvalue(), random.Random(5), tmp_path / "x"
    for _ in range(40):
        data = bytearray(seed)
        if dice.randrange(2):
            data = data[: dice.randrange(1, len(data))]
        else:
            for _ in range(dice.choice([1, 4, 16, 64])):
                data[dice.randrange(len(data))] = dice.randrange(256)
        file.write_bytes(data)
        with suppress(InvalidRequest):  # any other exception would be a 500
            assert _kind("input_reference", "x", file) in ("image", "video")


def test_what_is_not_offered_is_not_to_be_repeated() -> None:
    answer = error_response(ApiError("not_implemented", "this is not offered"))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (501, "false")
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(
    "said",
    [
        "Cannot load local files without `--allowed-local-media-path`.",
        "The file path must be a subpath of the allowed local media path /x.",
        "[Errno 2] No such file or directory: '/x'",
    ],
)
def test_files_that_chat_may_not_read_are_the_clients_mistake(said: str) -> None:
    assert _wrong(said) is not None


def test_a_png_is_still_a_png(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x", "PNG")
    assert _kind("input_reference", "x", tmp_path / "x") == "image"
