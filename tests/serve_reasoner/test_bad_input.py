"""Wrong requests: status 400 and one short sentence that names the field, the value and the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from media_files import clip, data_url, picture, png
from servers import Server

pytestmark = pytest.mark.serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is sent beside the question, and what the answer must say."""

    part: Callable[[Path], dict[str, Any]]
    says: str
    options: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] = field(default_factory=dict)


def video(folder: Path) -> dict[str, Any]:
    path = folder / "bad-input.mp4"
    if not path.exists():
        clip(path)
    return {"type": "video_url", "video_url": {"url": path.as_uri()}}


def image(width: int = 64, height: int = 64) -> Callable[[Path], dict[str, Any]]:
    url = data_url(png(picture(width, height)), "image/png")
    return lambda _: {"type": "image_url", "image_url": {"url": url}}


def raw(kind: str, data: bytes, media_type: str) -> Callable[[Path], dict[str, Any]]:
    return lambda _: {"type": kind, kind: {"url": data_url(data, media_type)}}


def options(**values: Any) -> dict[str, Any]:
    return values


FPS = "mm_processor_kwargs.fps is {}, must be a number above 0 and at most 30"
CASES = {
    "fps 0": Case(part=video, options=options(fps=0), says=FPS.format("0")),
    "fps below 0": Case(part=video, options=options(fps=-1), says=FPS.format("-1")),
    "fps in words": Case(part=video, options=options(fps="four"), says=FPS.format("'four'")),
    "fps true": Case(part=video, options=options(fps=True), says=FPS.format("True")),
    "fps too high": Case(part=video, options=options(fps=31), says=FPS.format("31")),
    "fps in its scope": Case(
        part=video,
        options=options(videos_kwargs={"fps": 0}),
        says="mm_processor_kwargs.videos_kwargs.fps is 0, must be a number above 0",
    ),
    "more frames than there are": Case(
        part=video,
        options=options(num_frames=64),
        says="mm_processor_kwargs.num_frames is 64, must be at most 48, the frames of this clip",
    ),
    "no frames": Case(
        part=video,
        options=options(num_frames=0),
        says="mm_processor_kwargs.num_frames is 0, must be a whole number from 2 to 1800",
    ),
    "fps and frames": Case(
        part=video,
        options=options(fps=2, num_frames=8),
        says="mm_processor_kwargs.num_frames is 8, must be left out where fps is set",
    ),
    "sampling in words": Case(
        part=video,
        options=options(do_sample_frames="yes"),
        says="mm_processor_kwargs.do_sample_frames is 'yes', must be true or false",
    ),
    "unknown option": Case(
        part=video,
        options=options(frame_rate=4),
        says="a key of mm_processor_kwargs is 'frame_rate', must be one of fps, num_frames,",
    ),
    "another patch size": Case(
        part=image(),
        options=options(patch_size=8),
        says="a key of mm_processor_kwargs is 'patch_size', must be one of fps, num_frames,",
    ),
    "another merge size": Case(
        part=image(),
        options=options(images_kwargs={"merge_size": 1}),
        says="a key of mm_processor_kwargs.images_kwargs is 'merge_size', must be one of min_pixels,",
    ),
    "another temporal patch size": Case(
        part=video,
        options=options(videos_kwargs={"temporal_patch_size": 1}),
        says="a key of mm_processor_kwargs.videos_kwargs is 'temporal_patch_size', must be one of",
    ),
    "scope without options": Case(
        part=video,
        options=options(videos_kwargs=4),
        says="mm_processor_kwargs.videos_kwargs is 4, must be an object",
    ),
    "size in words": Case(
        part=image(),
        options=options(size="big"),
        says="mm_processor_kwargs.size is 'big', must be an object with shortest_edge",
    ),
    "no pixels": Case(
        part=image(),
        options=options(max_pixels=0),
        says="mm_processor_kwargs.max_pixels is 0, must be a whole number of at least 1",
    ),
    "too many pixels": Case(
        part=image(),
        options=options(min_pixels=2**24 + 1, max_pixels=2**30),
        says="mm_processor_kwargs.min_pixels is 16777217, must be a whole number from 1 to 16777216",
    ),
    "too large a size": Case(
        part=image(),
        options=options(size={"shortest_edge": 2**30, "longest_edge": 2**30}),
        says="mm_processor_kwargs.size is {'shortest_edge': 1073741824, 'longest_edge': 1073741824},",
    ),
    "frames that were not decoded": Case(
        part=video,
        options=options(fps=4, do_sample_frames=True),
        media=options(video={"fps": 2}),
        says="mm_processor_kwargs.fps is 4, must be left out, because the server decoded 4 of 48",
    ),
    "decoding no frames": Case(
        part=video,
        media=options(video={"num_frames": 0}),
        says="media_io_kwargs.video.num_frames is 0, must be a whole number of at least 1",
    ),
    "image as video": Case(
        part=raw("video_url", png(picture()), "video/mp4"),
        says="video_url is 'a PNG image', must be a video; send images as content of type image_url",
    ),
    "narrow image": Case(
        part=image(1, 400),
        says="image_url size is '1x400', must be at most 200 times as long as wide",
    ),
    "video as image": Case(
        part=raw("image_url", b"\0\0\0\x18ftypmp42" * 9, "image/png"),
        says="must be a complete image, such as PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC (it is of no",
    ),
    "truncated image": Case(
        part=raw("image_url", png(picture())[:200], "image/png"), says="image file is truncated"
    ),
    "empty video": Case(
        part=raw("video_url", b"", "video/mp4"),
        says="video_url is 'a file of 0 bytes', must be a video, such as MP4, MOV, WebM, MKV, AVI,",
    ),
    "a layout of pixels": Case(
        part=image(),
        options=options(input_data_format="channels_last"),
        says="a key of mm_processor_kwargs is 'input_data_format', must be one of fps,",
    ),
    "two sizes that contradict": Case(
        part=image(),
        options=options(min_pixels=8192, max_pixels=4096),
        says="mm_processor_kwargs.min_pixels is 8192, must be at most max_pixels, 4096",
    ),
    "an unknown way to read": Case(
        part=video,
        media=options(video={"frames": 4}),
        says="a key of media_io_kwargs.video is 'frames', must be one of num_frames, fps,",
    ),
    "a mode of pictures": Case(
        part=image(),
        media=options(image={"image_mode": "L"}),
        says="media_io_kwargs.image.image_mode is 'L', must be 'RGB'",
    ),
    "a private address": Case(
        part=lambda _: {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}},
        says="image_url is 'http://127.0.0.1:9/a.png', must be a URL that this server can and may",
    ),
    "no base64": Case(
        part=lambda _: {"type": "image_url", "image_url": {"url": "data:image/png;base64,?!"}},
        says="image_url is '2 characters', must be base64",
    ),
    "another scheme": Case(
        part=lambda _: {"type": "image_url", "image_url": {"url": "ftp://example.com/a.png"}},
        says="must be a URL of http, https, data or (where allowed) file",
    ),
    "file outside": Case(
        part=lambda _: {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
        says="--allowed-local-media-path",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_answer_is_one_sentence(reasoner_server: Server, media_folder: Path, name: str) -> None:
    case = CASES[name]
    parts = [case.part(media_folder), {"type": "text", "text": "what is shown?"}]
    with pytest.raises(openai.BadRequestError) as error:
        reasoner_server.client().chat.completions.create(
            model=reasoner_server.model,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item]
            max_tokens=4,
            extra_body={"mm_processor_kwargs": case.options, "media_io_kwargs": case.media},
        )
    message = error.value.body["message"]  # type: ignore[index]
    assert case.says in message
    assert len(message) < 300


def test_server_lives_on(reasoner_server: Server) -> None:
    reply = reasoner_server.client().chat.completions.create(
        model=reasoner_server.model,
        messages=[{"role": "user", "content": "still there?"}],
        max_tokens=4,
    )
    assert reply.choices[0].message.content
