"""No request goes round the caps on video by the way in which it lets its media be read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from media_files import clip, data_url, picture, png
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.plugin import register
from vllm_cosmos3.reasoner.media.limits import CONNECTOR, FRAMES


def connector(**video: Any) -> Any:
    register()
    return MEDIA_CONNECTOR_REGISTRY.load(
        CONNECTOR, media_io_kwargs={"video": video} if video else None, allowed_media_domains=None
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    return data_url(clip(tmp_path / "a.mp4", frames=20).read_bytes(), "video/mp4")


@pytest.mark.parametrize(
    ("name", "said"), [("opencv", "'opencv'"), ("nope", "'nope'"), (None, "'null'"), (7, "7")]
)
def test_another_loader_is_refused_before_anything_is_read(name: object, said: str) -> None:
    says = f"media_io_kwargs.video.video_backend is {said}, must be left out"
    with pytest.raises(InvalidRequest, match=says):
        connector(num_frames=-1, video_backend=name)


def test_ours_may_be_named_and_keeps_its_cap(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FRAMES, "5")
    fetched = connector(num_frames=-1, video_backend="cosmos3").fetch_video(url)
    frames, _ = getattr(fetched, "media", fetched)
    assert len(frames) == 5


@pytest.mark.parametrize("kind", ["video/jpeg", "VIDEO/JPEG", "video/jpeg;a=b"])
def test_frames_sent_as_pictures_count_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FRAMES, "3")
    one = data_url(png(picture()), "image/png").partition(",")[2]
    few, many = (f"data:{kind};base64,{','.join([one] * count)}" for count in (3, 4))
    with pytest.raises(InvalidRequest, match="video_url is '4 pictures', must be at most 3"):
        asyncio.run(connector().fetch_video_async(many))
    with pytest.raises(InvalidRequest, match="4 pictures"):
        connector().fetch_video(many)
    if kind == "video/jpeg":
        fetched = connector(num_frames=-1).fetch_video(few)
        frames, _ = getattr(fetched, "media", fetched)
        assert len(frames) == 3


def test_pictures_and_files_are_vllms(tmp_path: Path) -> None:
    image = connector().fetch_image(data_url(png(picture()), "image/png"))
    assert getattr(image, "media", image).size == picture().size
