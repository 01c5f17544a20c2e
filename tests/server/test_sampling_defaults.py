"""The server's own defaults for the fields of videos, and where they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.defaults import defaults_of
from vllm_cosmos3.server.http.request_fields import ClientRequest
from vllm_cosmos3.server.jobs.sampling_defaults import (
    read_sampling_defaults,
    shown_defaults,
    with_defaults,
)

SMALL = (
    '{"size": "320x192", "seconds": 2, "fps": 12, "num_inference_steps": 4, "guidance_scale": 0}'
)


def test_the_defaults_of_the_server_are_shown_for_videos_alone(tiny_checkpoint: Path) -> None:
    model = read_config(tiny_checkpoint)
    shown, usual = shown_defaults(model, read_sampling_defaults(SMALL)), defaults_of(model.kind)
    video = shown["text2video"]
    assert (video.width, video.height, video.num_frames, video.fps) == (320, 192, 25, 12)
    assert (video.num_inference_steps, video.guidance_scale) == (4, 0)
    assert video.flow_shift == usual["text2video"].flow_shift
    assert shown["text2image"] == usual["text2image"]
    assert shown_defaults(model, read_sampling_defaults("")) == usual


def test_a_request_comes_before_the_server() -> None:
    defaults = read_sampling_defaults(SMALL)
    fields = {"prompt": "a boat", "num_frames": 9, "width": 64, "height": 64}
    asked = ClientRequest(fields=fields, server_fields={}, references={}, warnings=())
    assert with_defaults(asked, "video", defaults).fields == {
        "prompt": "a boat", "num_frames": 9, "width": 64, "height": 64,
        "fps": 12, "num_inference_steps": 4, "guidance_scale": 0,
    }  # fmt: skip
    assert with_defaults(asked, "image", defaults) == asked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "default_sampling_params is '[]', must be a JSON object"),
        ("{", "default_sampling_params is '{', must be a JSON object"),
        ('{"num_frames": "many"}', "default_sampling_params.num_frames is 'many', must be"),
        ('{"image": "a.png"}', "default_sampling_params.image is 'given', must be left out"),
        (
            '{"steps": 4}',
            "unknown field default_sampling_params.steps; did you mean num_inference_steps?",
        ),
    ],
)
def test_wrong_defaults_name_the_option(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read_sampling_defaults(text)
    assert str(error.value).startswith(words)
