"""Options and media of a request are checked before a pixel is made, and the field is named."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.reasoner.media.processing import check_frames, check_options, check_size

# Options of transformers' processors that end the engine, or that nothing here would follow.
NO_OPTIONS = [
    "input_data_format",
    "data_format",
    "image_mean",
    "image_std",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "do_convert_rgb",
    "do_center_crop",
    "crop_size",
    "do_pad",
    "default_to_square",
    "return_tensors",
    "return_metadata",
    "video_metadata",
    "max_frames",
    "min_frames",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "device",
    "disable_grouping",
    "cap_pixels_per_frame",
    "truncation",
]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"do_sample_frames": None},
            "mm_processor_kwargs.do_sample_frames is missing, must be true",
        ),
        ({"min_pixels": None}, "mm_processor_kwargs.min_pixels is missing"),
        ({"min_pixels": [5]}, r"mm_processor_kwargs.min_pixels is \[5\], must be a whole number"),
        (
            {"num_frames": 1},
            "mm_processor_kwargs.num_frames is 1, must be a whole number from 2 to",
        ),
        ({"num_frames": [4, 1]}, "num_frames is 1, must be a whole number from 2 to"),
        ({"fps": [1, None]}, "mm_processor_kwargs.fps is missing, must be a number above 0"),
        ({"fps": []}, r"mm_processor_kwargs.fps is \[\], must be a number above 0"),
        ({"size": {"height": 64, "width": 64}}, "must be an object with shortest_edge and longest"),
        (
            {"resample": 99},
            r"mm_processor_kwargs.resample is 99, must be one of \[0, 1, 2, 3, 4, 5",
        ),
        ({"videos_kwargs": {"fps": 0}}, "mm_processor_kwargs.videos_kwargs.fps is 0"),
        ({"images_kwargs": {"fsp": 0}}, "a key of mm_processor_kwargs.images_kwargs is 'fsp'"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels is 9, must be at most max_pixels, 8"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "must be an object with shortest_edge"),
        ({"do_resize": 1}, "mm_processor_kwargs.do_resize is 1, must be true or false"),
        ({"resample": "bicubic"}, "mm_processor_kwargs.resample is 'bicubic', must be one of"),
        (
            {"images_kwargs": {"fps": 2}},
            "a key of mm_processor_kwargs.images_kwargs is 'fps', must",
        ),
        ({"text_kwargs": {}}, "a key of mm_processor_kwargs is 'text_kwargs', must be one of fps"),
        *(
            ({name: None}, f"a key of mm_processor_kwargs is '{name}', must be")
            for name in NO_OPTIONS
        ),
        ({"videos_kwargs": {"videos_kwargs": {}}}, "a key of mm_processor_kwargs.videos_kwargs is"),
    ],
    ids=str,
)
def test_wrong_options_are_named_with_their_place(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        check_options(options)


@pytest.mark.parametrize(
    "options",
    [
        {"fps": None, "num_frames": None, "size": None},
        {"fps": [1, 2.5]},
        {"num_frames": [4, 5]},
        {"size": {"shortest_edge": 1}},
        {"resample": 3, "do_resize": True},
        {"images_kwargs": {"resample": 0}, "videos_kwargs": {"fps": 2}},
    ],
    ids=str,
)
def test_right_options_pass(options: dict[str, Any]) -> None:
    check_options(options)


def test_sizes_that_cannot_be_cut() -> None:
    processor = Qwen2VLImageProcessor(patch_size=16)
    check_size("image_url", 33, 31, {}, processor)
    check_size("image_url", 64, 32, {"do_resize": False}, processor)
    for do_resize in (False, None):
        with pytest.raises(InvalidRequest, match="'64x31', must be multiples of 32 where mm_proc"):
            check_size("image_url", 64, 31, {"do_resize": do_resize}, processor)


@pytest.mark.parametrize(
    ("total", "options", "says"),
    [
        (13, {"num_frames": 16}, "num_frames is 16, must be at most 13, the frames of this clip"),
        (900, {"num_frames": 800}, "num_frames is 800, must be at most 768, which the checkpoint"),
        (13, {"num_frames": 2}, "num_frames is 2, must be at least 4 for this clip"),
        (1, {}, "'a clip of 1 frame', must be a clip of at least 2 frames"),
    ],
    ids=str,
)
def test_frames_that_a_clip_does_not_have(total: int, options: dict[str, Any], says: str) -> None:
    metadata = {"total_num_frames": total, "fps": 24.0, "do_sample_frames": True}
    with pytest.raises(InvalidRequest, match=says):
        check_frames(total, metadata, options, Qwen3VLVideoProcessor())


def test_pictures_as_a_clip_need_a_rate() -> None:
    metadata = {"total_num_frames": 4, "fps": 0.0, "do_sample_frames": False}
    with pytest.raises(InvalidRequest, match=r"media_io_kwargs.video.fps is 0.0, must be a number"):
        check_frames(4, metadata, {}, Qwen3VLVideoProcessor())
