"""Our pixel work against vLLM's and transformers' own: the same token ids, the same bytes.

Both go through vLLM's processor interface with the tiny checkpoint; only VLLM_COSMOS3_PROCESSOR
differs. The reference sends bytes too where vLLM normalises on the device.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Container
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import HANG
from media_files import data_url, encoded, picture, png
from PIL import Image
from torch import nn
from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_size
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_size
from transformers.video_utils import VideoMetadata
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.plugin import ARCHITECTURE, register
from vllm_cosmos3.reasoner.media import patches, video_loader
from vllm_cosmos3.reasoner.media.limits import PROCESSOR
from vllm_cosmos3.reasoner.media.normalisation import normalise_pixels
from vllm_cosmos3.reasoner.media.patches import (
    PatchingVideoProcessor,
    frames_to_patches,
    size_after,
)
from vllm_cosmos3.reasoner.media.processing import check_frames
from vllm_cosmos3.reasoner.media.video_reader import RECENT_SAMPLES, RecentSamples, VideoReader

pytestmark = pytest.mark.parity

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
Processed = tuple[list[int], list[torch.Tensor], list[list[int]]]
Process = Callable[..., Processed]


def make_processor(checkpoint: Path, **flags: Any) -> Any:
    register()
    config = ModelConfig(
        model=str(checkpoint),
        hf_overrides={"architectures": [ARCHITECTURE]},
        max_model_len=32768,
        media_io_kwargs={"video": {"num_frames": -1}},
        **flags,
    )
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Any:
    return make_processor(tiny_checkpoint)


@pytest.fixture
def process(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Process:
    return run_with(processor, monkeypatch)


def run_with(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Process:
    """``process(name, kind, urls, **options)``: prompt ids, pixels and grids by this processor."""

    def run(name: str, kind: str, urls: list[str], **options: Any) -> Processed:
        monkeypatch.setenv(PROCESSOR, name)
        connector = MediaConnector(processor.info.ctx.get_mm_config().media_io_kwargs)
        media = [getattr(connector, f"fetch_{kind}")(url) for url in urls]
        token = f"<|vision_start|><|{kind}_pad|><|vision_end|>"
        inputs = ProcessorInputs(
            processor.info.get_tokenizer().encode(token * len(urls) + "what is shown?"),
            processor.info.parse_mm_data({kind: media}),
            None,
            hf_processor_mm_kwargs=options,
        )
        result = processor.apply(inputs, TimingContext(enabled=False))
        items = result["mm_kwargs"][kind]
        pixels = [item[PIXELS[kind]].data for item in items]
        return (
            result["prompt_token_ids"],
            pixels,
            [item[f"{kind}_grid_thw"].data.tolist() for item in items],
        )

    return run


def assert_same(process: Process, kind: str, urls: list[str], **options: Any) -> None:
    ids, pixels, grids = process("cosmos3", kind, urls, **options)
    their_ids, their_pixels, their_grids = process("reference", kind, urls, **options)
    assert ids == their_ids
    assert grids == their_grids
    assert [p.dtype for p in pixels] == [torch.uint8] * len(urls)
    for ours, theirs in zip(pixels, their_pixels, strict=True):
        if theirs.dtype == torch.uint8:
            assert torch.equal(ours, theirs)
        else:  # normalised on the host, by older vLLM, and cast to the model's bfloat16
            normalised = (
                ours.view(len(ours), 3, -1) / 127.5 - 1
            )  # the tiny checkpoint's mean, deviation
            torch.testing.assert_close(
                normalised.view(ours.shape).to(theirs.dtype), theirs, rtol=0, atol=2**-8
            )


SIZES = [
    (1, 1), (1, 199), (199, 1), (16, 16), (31, 33), (32, 32), (47, 100), (64, 64), (65, 63), (96, 31),
    (127, 128), (128, 96), (129, 97), (150, 10), (160, 160), (199, 201), (224, 224), (255, 256),
    (257, 255), (300, 40), (320, 180), (333, 77), (336, 336), (400, 3), (448, 200), (480, 270),
    (500, 500), (512, 64), (641, 479), (900, 901),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_pictures_of_every_size(process: Process, size: tuple[int, int]) -> None:
    assert_same(process, "image", [data_url(png(picture(*size, seed=size[0])), "image/png")])


def _saved(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return data_url(buffer.getvalue(), f"image/{kind.lower()}")


def _transparent() -> Image.Image:
    image = picture(90, 70).convert("RGBA")
    image.putalpha(picture(90, 70, seed=5).convert("L"))
    return image


def _turned() -> str:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved(picture(120, 50), "JPEG", exif=exif)


MODES: dict[str, Callable[[], str]] = {
    "RGB": lambda: _saved(picture(90, 70), "PNG"),
    "RGBA": lambda: _saved(_transparent(), "PNG"),
    "L": lambda: _saved(picture(90, 70).convert("L"), "PNG"),
    "LA": lambda: _saved(_transparent().convert("LA"), "PNG"),
    "1": lambda: _saved(picture(90, 70).convert("1"), "PNG"),
    "P": lambda: _saved(picture(90, 70).convert("P"), "PNG"),
    "I;16": lambda: _saved(
        Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90)), "PNG"
    ),
    "CMYK": lambda: _saved(picture(90, 70).convert("CMYK"), "JPEG"),
    "turned by EXIF": _turned,
    "WebP": lambda: _saved(picture(90, 70), "WEBP"),
}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode(process: Process, mode: str) -> None:
    assert_same(process, "image", [MODES[mode]()])


@pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`")  # vLLM does
@pytest.mark.parametrize(
    "options",
    [
        {"min_pixels": 64 * 64, "max_pixels": 128 * 128},
        {"size": {"shortest_edge": 4096, "longest_edge": 32768}},
        {"images_kwargs": {"do_resize": False}},
    ],
    ids=str,
)
def test_options_of_pictures(process: Process, options: dict[str, Any]) -> None:
    urls = [data_url(png(picture(*size)), "image/png") for size in ((192, 96), (64, 64))]
    assert_same(process, "image", urls, **options)


CLIPS: dict[str, dict[str, Any]] = {
    "25 frames": {"frames": 25},
    "5 frames": {"frames": 5, "fps": 3},
    "odd size": {"width": 131, "height": 77, "frames": 31, "pixels": "yuv444p"},
    "large": {"width": 640, "height": 352, "frames": 12, "fps": 6},
    "tall": {"width": 64, "height": 320, "frames": 40},
    "NTSC": {"frames": 61, "fps": Fraction(30000, 1001), "g": "7"},
    "VP9": {"codec": "libvpx-vp9", "container": "webm", "frames": 33},
    "HEVC": {"codec": "libx265", "frames": 33, "x265-params": "log-level=none"},
    "MPEG-4 in AVI": {"codec": "mpeg4", "container": "avi", "frames": 40, "fps": 10},
    "MJPEG": {"codec": "mjpeg", "container": "avi", "pixels": "yuvj420p", "frames": 20, "fps": 10},
}
CONTAINERS: dict[str, dict[str, Any]] = {
    "MP4": {},
    "MOV": {"container": "mov"},
    "fragments": {"movflags": "frag_keyframe+empty_moov", "g": "12"},
    "HEVC": {"codec": "libx265", "x265-params": "log-level=none"},
    "Matroska": {"container": "matroska"},
    "WebM": {"codec": "libvpx-vp9", "container": "webm"},
    "AVI": {"codec": "mpeg4", "container": "avi"},
    "GIF": {"codec": "gif", "container": "gif", "pixels": "rgb8"},
    "Flash": {"container": "flv"},
}
LOST: dict[str, Container[int]] = {
    "one frame": (31,),
    "every seventh": range(3, 75, 7),
    "a pause": range(30, 62),
}
SAMPLING: list[dict[str, Any]] = [
    {},
    {"fps": 1.0, "do_sample_frames": True},
    {"fps": 7.5, "do_sample_frames": True},
    {"num_frames": 5, "do_sample_frames": True},
    {"do_sample_frames": False},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("name", CLIPS)
def test_clips(process: Process, name: str, options: dict[str, Any]) -> None:
    assert_same(process, "video", [data_url(encoded(**CLIPS[name]), "video/mp4")], **options)


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("name", CONTAINERS)
def test_clips_with_gaps(process: Process, name: str, lost: str) -> None:
    data = encoded(**CONTAINERS[name], frames=75, fps=25, without=LOST[lost])
    url = data_url(data, "video/mp4")
    for options in ({}, {"fps": 4.0, "do_sample_frames": True}):
        assert_same(process, "video", [url], **options)


def test_frames_in_the_order_they_are_shown(process: Process) -> None:
    data = encoded(container="avi", frames=40, bf="2")  # H.264; nothing in it says the order
    for options in ({}, {"fps": 4.0, "do_sample_frames": True}):
        assert_same(process, "video", [data_url(data, "video/x-msvideo")], **options)


@pytest.mark.parametrize(
    "flags",
    [
        {"video_pruning_rate": 0.5},
        {"mm_processor_kwargs": {"fps": 3.0, "size": {"shortest_edge": 4096}}},
    ],
    ids=str,
)
def test_flags_of_the_operator(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    process = run_with(make_processor(tiny_checkpoint, **flags), monkeypatch)
    assert_same(process, "video", [data_url(encoded(frames=30), "video/mp4")])


def test_keys_of_the_caches_tell_clips_and_options_apart(processor: Any) -> None:
    def key(data: bytes, **options: Any) -> str:
        clip = MediaConnector({"video": {"num_frames": -1}}).fetch_video(
            data_url(data, "video/mp4")
        )
        inputs = ProcessorInputs(
            processor.info.get_tokenizer().encode("<|vision_start|><|video_pad|><|vision_end|>"),
            processor.info.parse_mm_data({"video": [clip]}),
            None,
            hf_processor_mm_kwargs=options,
        )
        found = processor.apply(inputs, TimingContext(enabled=False))["mm_hashes"]["video"]
        return str(found[0])

    one, other = encoded(frames=20), encoded(frames=21)
    asked = [(one, {}), (one, {"fps": 4.0}), (one, {"fps": 5.0}), (other, {"fps": 4.0})]
    keys = [key(data, **options) for data, options in asked]
    assert len({*keys}) == 4
    assert [key(data, **options) for data, options in asked] == keys


def test_dummy_inputs_of_the_memory_profile(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dummies() -> Any:
        counts = {"image": 1, "video": 1}
        if hasattr(processor, "get_dummy_mm_inputs"):  # from vLLM 0.32
            return processor.get_dummy_mm_inputs(counts)
        model = processor.info.ctx.model_config
        return MULTIMODAL_REGISTRY.get_dummy_mm_inputs(model, counts, processor=processor)

    made = {}
    for name in ("cosmos3", "reference"):
        monkeypatch.setenv(PROCESSOR, name)
        inputs = dummies()
        shapes = {
            kind: inputs["mm_kwargs"][kind][0][pixels].data.shape for kind, pixels in PIXELS.items()
        }
        made[name] = (inputs["prompt_token_ids"], shapes)
    assert made["cosmos3"] == made["reference"]


@pytest.mark.parametrize("rates", [[2.0, 4.0], [1, 4]], ids=str)
def test_several_clips_and_their_own_rates(process: Process, rates: list[float]) -> None:
    urls = [data_url(encoded(frames=n), "video/mp4") for n in (24, 49)]
    assert_same(process, "video", urls, fps=rates, do_sample_frames=True)
    ids, *_ = process("cosmos3", "video", urls, fps=[*map(float, rates)], do_sample_frames=True)
    assert ids == process("cosmos3", "video", urls, fps=rates, do_sample_frames=True)[0]
    with pytest.raises(InvalidRequest, match="must be a list of 2, one for each clip"):
        process("cosmos3", "video", urls, fps=rates[:1])


@settings(max_examples=200, deadline=None)
@given(total=st.integers(1, 1000), count=st.integers(2, 1000))
def test_numbers_of_frames_are_refused_where_vllm_has_no_times_for_them(
    processor: Any, total: int, count: int
) -> None:
    video = processor.info.get_video_processor()
    metadata = {"total_num_frames": total, "fps": 24.0, "frames_indices": [*range(total)]}
    times = processor.info._get_video_second_idx(metadata, True, None, count)  # noqa: FBT003
    works = len(times) == -(-count // video.temporal_patch_size)
    try:
        found = check_frames(
            total, {**metadata, "do_sample_frames": True}, {"num_frames": count}, video
        )
    except InvalidRequest:
        assert not works
    else:
        assert works
        assert found == count


@pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`")  # vLLM does
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("scoped", [False, True])
def test_too_much_enlarging_is_refused_before_it_is_done(
    process: Process, processor: Any, monkeypatch: pytest.MonkeyPatch, kind: str, *, scoped: bool
) -> None:
    data = png(picture(28, 28)) if kind == "image" else encoded(width=32, height=32, frames=8)
    urls = [data_url(data, f"{kind}/x")] * 3
    options: dict[str, Any] = {"size": {"shortest_edge": 2**18, "longest_edge": 2**24}}
    if scoped:
        options = {f"{kind}s_kwargs": options}
    try:
        process("reference", kind, urls, **options)
    except ValueError as refused:  # vLLM 0.30 says of a scoped size of clips that it is given twice
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            process("cosmos3", kind, urls, **options)
        return
    ids, pixels, _ = process("cosmos3", kind, urls, **options)
    tokens = sum(len(patches) for patches in pixels) // 4
    model = processor.info.ctx.model_config
    monkeypatch.setattr(model, "max_model_len", tokens)
    assert process("cosmos3", kind, urls, **options)[0] == ids
    monkeypatch.setattr(model, "max_model_len", tokens - 1)
    monkeypatch.setattr(patches, "frames_to_patches", lambda *_, **__: pytest.fail("made pixels"))
    with pytest.raises(
        InvalidRequest, match=f"size is .* become {tokens} tokens, .* {tokens - 1}$"
    ):
        process("cosmos3", kind, urls, **options)


def test_errors_are_the_references(process: Process) -> None:
    said = []
    url = data_url(encoded(), "video/mp4")
    for name in ("cosmos3", "reference"):
        with pytest.raises(Exception, match=r"\w") as error:  # whatever theirs is
            process(name, "video", [url], videos_kwargs={"image_mean": "grey"})
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["patch_size", "device"])
def test_what_the_operator_decides_is_no_option(process: Process, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"a key of mm_processor_kwargs is '{name}', must be"):
        process("cosmos3", "image", [data_url(png(picture()), "image/png")], **{name: "meta"})


def test_a_clip_of_one_frame_is_a_clear_error(process: Process) -> None:
    url = data_url(encoded(frames=1), "video/mp4")
    with pytest.raises(InvalidRequest, match="a clip of 1 frame', must be a clip of at least 2"):
        process("cosmos3", "video", [url])
    options = {"do_resize": False, "size": {"shortest_edge": 4096, "longest_edge": 65536}}
    _, _, grids = process("cosmos3", "video", [url], **options)
    assert grids == [[1, 4, 6]]


@settings(max_examples=200, deadline=None)
@given(
    frames=st.integers(2, 64),
    height=st.integers(4, 2000),
    width=st.integers(4, 2000),
    bounds=st.tuples(st.integers(1, 200_000), st.integers(200_000, 30_000_000)),
)
def test_sizes_are_those_of_the_references_arithmetic(
    frames: int, height: int, width: int, bounds: tuple[int, int]
) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    low, high = bounds
    options = {"size": SizeDict(shortest_edge=low, longest_edge=high), "resample": 3, "factor": 32}
    size = size_after(
        Qwen3VLVideoProcessor().resize, (1, frames, 3, height, width), temporal_factor=2, **options
    )
    expected = video_size(frames, height, width, 2, 32, min_pixels=low, max_pixels=high)
    assert (size.height, size.width) == expected
    size = size_after(Qwen2VLImageProcessor().resize, (1, 3, height, width), **options)
    assert (size.height, size.width) == image_size(height, width, 32, low, high)


@settings(max_examples=100, deadline=None)
@given(
    frames=st.integers(1, 7),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.sampled_from([2, 14, 16]),
    merge=st.integers(1, 2),
    planes=st.booleans(),
)
def test_layout_is_the_references(
    frames: int, rows: int, columns: int, patch: int, merge: int, *, planes: bool
) -> None:
    shape = (frames, 3, rows * merge * patch, columns * merge * patch)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8)
    if not planes:  # as decoders give them: colours innermost
        clip = clip.contiguous(memory_format=torch.channels_last)
    ours, grid = frames_to_patches(
        frames, lambda place: tuple(clip[place]), patch=patch, temporal=2, merge=merge
    )
    theirs, *their_grid = Qwen3VLVideoProcessor().patchify(clip.contiguous()[None], patch, merge, 2)
    assert grid == their_grid
    assert torch.equal(ours, theirs[0])


@settings(max_examples=100, deadline=None)
@given(total=st.integers(1, 4000), fps=st.floats(0.5, 60), asked=st.floats(0.1, 30))
def test_frames_are_the_references_and_are_expected_next_time(
    total: int, fps: float, asked: float
) -> None:
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    expected = Qwen3VLVideoProcessor().sample_frames(metadata, fps=asked)
    numbers = PatchingVideoProcessor().sample_frames(metadata, fps=asked)
    assert numbers.tolist() == expected.tolist()
    assert {*numbers.tolist()} <= {*RECENT_SAMPLES.numbers(total, fps)}


def test_only_sampled_frames_are_decoded_and_the_next_time_ahead(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []  # how many frames, by the loader and by the processor
    decoded: list[int] = []
    decode = VideoReader.decode

    def counting(clip: VideoReader, numbers: Any) -> None:
        decode(clip, numbers)
        asked.append(len(numbers))
        decoded.append(len(clip._decoded))

    monkeypatch.setattr(VideoReader, "decode", counting)
    recent = RecentSamples()
    for module in (patches, video_loader):
        monkeypatch.setattr(module, "RECENT_SAMPLES", recent)
    options = {"fps": 3.0, "do_sample_frames": True}
    for _ in range(2):
        process("cosmos3", "video", [data_url(encoded(frames=96), "video/mp4")], **options)
    assert [count for count in asked if count != 1] == [0, 12, 12, 12]
    assert max(decoded) == 12


@pytest.mark.parametrize("clips", [1, 2])
def test_the_patches_of_one_clip_are_not_copied(
    process: Process, monkeypatch: pytest.MonkeyPatch, clips: int
) -> None:
    made: list[torch.Tensor] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        found = frames_to_patches(*args, **kwargs)
        made.append(found[0])
        return found

    monkeypatch.setattr(patches, "frames_to_patches", remembered)
    url = data_url(encoded(frames=8), "video/mp4")
    _, pixels, _ = process("cosmos3", "video", [url] * clips)
    assert [type(found) for found in pixels] == [torch.Tensor] * clips
    assert (pixels[0].data_ptr() == made[0].data_ptr()) == (clips == 1)
    assert all(torch.equal(found, patch) for found, patch in zip(pixels, made, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normalising_in_front_of_the_encoder(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    settings_of = Qwen2VLImageProcessor.from_pretrained(tiny_checkpoint)
    patches = torch.randint(0, 256, (6, 3 * 2 * 16 * 16), dtype=torch.uint8)
    expected = settings_of.rescale_and_normalize(
        patches.view(6, 3, 2, 256).flatten(2)[..., None],
        settings_of.do_rescale,
        settings_of.rescale_factor,
        settings_of.do_normalize,
        settings_of.image_mean,
        settings_of.image_std,
    )
    embed = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
    embed.forward = lambda x: x  # type: ignore[method-assign,assignment]
    normalise_pixels(embed, str(tiny_checkpoint), None)
    normalised = embed(patches.to(dtype))
    assert normalised.dtype == dtype
    torch.testing.assert_close(normalised, expected.view(6, -1).to(dtype), rtol=0, atol=1e-6)


def test_a_forked_process_has_threads_of_its_own() -> None:
    """vLLM forks its engine where it may, after it has tried the processor out."""
    code = """
import os, signal, torch
from vllm_cosmos3.reasoner.media.patches import frames_to_patches
torch.set_num_threads(1)
planes = (torch.zeros(256, 256, dtype=torch.uint8),) * 3
for _ in range(2):
    frames_to_patches(8, lambda place: planes, patch=16, temporal=2, merge=2)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        frames_to_patches(8, lambda place: planes, patch=16, temporal=2, merge=2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], timeout=HANG, check=True)
