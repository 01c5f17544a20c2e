"""What the official ``openai`` package sends and reads, against the generator alone."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import av
import openai
import pytest
from generators import LONG, PICTURE, SMALL
from media_files import clip, picture, png
from openai import OpenAI
from PIL import Image
from servers import Server

pytestmark = [
    pytest.mark.serve,
    # OpenAI has announced the end of its own service; the calls are still in the client.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def client(generator_server: Server) -> OpenAI:
    return generator_server.client()


def frames(data: bytes) -> int:
    with av.open(BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_images_generate(client: OpenAI) -> None:
    fields = {k: v for k, v in PICTURE.items() if k != "size"}
    answer = client.images.generate(
        prompt="a boat", model="tiny", size="64x48", n=2, extra_body=fields
    )  # fmt: skip
    pictures = [Image.open(BytesIO(base64.b64decode(item.b64_json or ""))) for item in answer.data]
    assert [image.size for image in pictures] == [(64, 48), (64, 48)]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    again = client.images.generate(prompt="a boat", size="64x48", n=1, extra_body=fields)
    assert base64.b64decode(again.data[0].b64_json or "") == base64.b64decode(
        answer.data[0].b64_json or ""
    )


def test_images_edit(client: OpenAI) -> None:
    file = ("boat.png", png(picture(128, 64)), "image/png")
    fields = {"num_inference_steps": 1, "seed": 1}
    answer = client.images.edit(image=file, prompt="paint it red", model="tiny", extra_body=fields)
    (edited,) = (Image.open(BytesIO(base64.b64decode(each.b64_json or ""))) for each in answer.data)
    assert edited.size == (512, 256)
    sized = client.images.edit(
        image=[file], prompt="paint it red", n=2, size="64x48", extra_body=fields
    )  # type: ignore[call-overload]
    pictures = [Image.open(BytesIO(base64.b64decode(each.b64_json or ""))) for each in sized.data]
    assert [each.size for each in pictures] == [(64, 48), (64, 48)]
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_create_and_poll_then_download(client: OpenAI) -> None:
    fields = {k: v for k, v in SMALL.items() if k != "size"}
    video = client.videos.create_and_poll(
        prompt="a boat", size="64x64", poll_interval_ms=50, extra_body=fields
    )
    assert (video.status, video.progress, video.size) == ("completed", 100, "64x64")
    assert float(video.seconds) == pytest.approx(5 / 24, abs=1e-4)
    assert video.expires_at is not None
    assert frames(client.videos.download_content(video.id).read()) == 5
    small = Image.open(
        BytesIO(client.videos.download_content(video.id, variant="thumbnail").read())
    )
    assert (small.format, small.size) == ("WEBP", (64, 64))
    sheet = Image.open(
        BytesIO(client.videos.download_content(video.id, variant="spritesheet").read())
    )
    assert sheet.size == (256, 256)


def test_create_retrieve_list_delete(client: OpenAI) -> None:
    video = client.videos.create(prompt="a lake", seconds="0.2", size="64x64", extra_body=dict(LONG) | {"num_frames": None, "size": "64x64"})  # fmt: skip
    assert video.status in ("queued", "in_progress")
    assert client.videos.retrieve(video.id).prompt == "a lake"
    assert video.id in [item.id for item in client.videos.list(limit=5)]
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve(video.id)
    assert caught.value.code == "not_found"


def test_pages_follow_the_cursor(client: OpenAI) -> None:
    made = [
        client.videos.create(prompt=f"boat {i}", size="64x64", extra_body={"num_frames": 5, "num_inference_steps": 1}).id
        for i in range(3)
    ]  # fmt: skip
    seen = [item.id for item in client.videos.list(limit=2)]
    assert seen[:3] == made[::-1]
    assert len(seen) == len(set(seen))


def test_nested_extra_params_of_the_client(client: OpenAI) -> None:
    video = client.videos.create(
        prompt="a boat",
        size="64x64",
        extra_body={"extra_params": {"num_frames": 5, "num_inference_steps": 1, "use_system_prompt": True, "guidance_interval": [100, 900]}},
    )  # fmt: skip
    effective = client.videos.retrieve(video.id).cosmos3["effective"]  # type: ignore[attr-defined]
    assert effective["use_system_prompt"] is True
    assert effective["guidance_interval"] == [100, 900]


def test_a_picture_becomes_the_first_frame(client: OpenAI) -> None:
    video = client.videos.create_and_poll(
        prompt="it moves",
        size="64x64",
        input_reference=("first.png", png(picture(64, 64)), "image/png"),
        poll_interval_ms=50,
        extra_body={"num_frames": 5, "num_inference_steps": 1},
    )
    assert video.status == "completed"
    assert video.cosmos3["mode"] == "image2video"  # type: ignore[attr-defined]


def test_a_clip_is_continued(client: OpenAI, tmp_path: Path) -> None:
    source = clip(tmp_path / "clip.mp4", frames=9).read_bytes()
    video = client.videos.create_and_poll(
        prompt="it goes on",
        size="64x64",
        input_reference=("clip.mp4", source, "video/mp4"),
        poll_interval_ms=50,
        extra_body={"num_frames": 13, "num_inference_steps": 1},
    )
    assert video.status == "completed"
    assert video.cosmos3["mode"] == "video2video"  # type: ignore[attr-defined]


def test_remix_keeps_everything_but_the_prompt(client: OpenAI) -> None:
    first = client.videos.create(prompt="a boat", size="64x64", extra_body={"num_frames": 5, "num_inference_steps": 1})  # fmt: skip
    second = client.videos.remix(first.id, prompt="a train")
    assert second.remixed_from_video_id == first.id
    before, after = (v.cosmos3["effective"] for v in (first, second))  # type: ignore[attr-defined]
    assert {k for k in before if before[k] != after[k]} <= {"prompt", "prompt_tokens"}


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    block = model.cosmos3  # type: ignore[attr-defined]
    assert {"text2image", "video2video", "policy"} <= set(block["modes"])
    assert block["sound"] is True
    assert block["defaults"]["text2video"]["num_frames"] == 189
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_are_those_of_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a boat", size="64x64", extra_body={"num_frame": 5})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "num_frame")
    assert "num_frames" in caught.value.message
