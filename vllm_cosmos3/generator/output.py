"""Output of a request: pixels, sound and latents of each result, and the record of how they were made.

All arrays are numpy, on the host. `Progress` is what callbacks get while a request runs.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest, Unsupported
from vllm_cosmos3.files import replacing, write_text
from vllm_cosmos3.generator.formats import (
    CLIP_FORMATS,
    FRAMES,
    IMAGE_FORMATS,
    write_clip,
    write_picture,
)
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.request.fields import Spec

if TYPE_CHECKING:
    import torch

__all__ = ["Output", "Progress", "Report", "Sample"]

LATENT_SUFFIXES = (".safetensors",)
ACTION_SUFFIXES = (".json",)
CRF = Spec(kind="int", low=0, high=51, help="H.264 quality, 0 (lossless) to 51")
QUALITY = Spec(kind="int", low=0, high=100, help="JPEG and WebP quality, 100 is best")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One result, of one seed.

    ``video`` is uint8 [T, H, W, 3], ``image`` uint8 [H, W, 3] where one frame was asked for,
    ``sound`` float32 [2, N] in [-1, 1], ``action`` float32 [T_a, raw_action_dim], ``latents``
    float32 by stream: vision [1, 48, T, h, w], sound [64, T_s], action [T_a, 64]. What was not
    asked for is None. ``clip`` is the file that holds the video already.
    """

    seed: int
    video: np.ndarray | None = None
    image: np.ndarray | None = None
    sound: np.ndarray | None = None
    action: np.ndarray | None = None
    latents: Mapping[str, np.ndarray] | None = None
    clip: media.Clip | None = None

    @property
    def empty(self) -> bool:
        """Whether the result is on another rank."""
        return self.video is None and self.image is None and self.latents is None

    @property
    def frames(self) -> np.ndarray:
        """The pixels, uint8 [T, H, W, 3], where a picture is one frame.

        Raises:
            Unsupported: there are none, as latents were asked for.
        """
        if self.video is not None:
            return self.video
        if self.image is not None:
            return self.image[None]
        raise Unsupported("there are no pixels, only latents: ask for them without output_type")

    def pil(self) -> list[Image.Image]:
        """The frames as pictures of Pillow."""
        return [Image.fromarray(frame) for frame in self.frames]

    def torch(self) -> torch.Tensor:
        """The frames as a tensor on the CPU, uint8 [T, 3, H, W], as torchvision has them."""
        from torch import from_numpy

        return from_numpy(self.frames).permute(0, 3, 1, 2)

    def described(self, fps: float, sample_rate: int | None) -> str:
        """Its size, length and seed in words."""
        words = []
        if self.video is not None:
            frames, height, width, _ = self.video.shape
            words += [f"{width}x{height}", f"{frames} frames at {fps:g} fps, {frames / fps:.2f} s"]
        elif self.image is not None:
            words.append(f"{self.image.shape[1]}x{self.image.shape[0]}")
        elif self.latents is not None:
            words += [f"{name} {list(x.shape)}" for name, x in self.latents.items()]
        else:
            words.append("on another rank")
        if self.sound is not None:
            words[-1] += f" with sound at {sample_rate} Hz"
        if self.action is not None:
            words.append(f"{len(self.action)} actions")
        return ", ".join([*words, f"seed {self.seed}"])

    def __repr__(self) -> str:
        shapes = {name: getattr(self, name) for name in ("video", "image", "sound", "action")}
        shown = [f"{name}={list(x.shape)}" for name, x in shapes.items() if x is not None]
        shown += [f"latents={{{', '.join(self.latents)}}}"] if self.latents is not None else []
        return f"Sample({', '.join([f'seed={self.seed}', *shown])})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """The results of one request: ``samples`` has ``n`` of them, the properties show the first.

    ``timings`` are seconds per phase, ``effective`` every resolved parameter, ``warnings`` what the
    request should know about.

    ``peak_memory`` are the most bytes that were in use on the device of rank 0, weights included:
    by this request if it ran alone, and else since the first of those in flight with it began. On
    a CPU it is the peak of the process so far. ``reused_steps`` were taken from the step cache.
    ``batch_size`` are the most samples that were denoised in one forward, of this and other requests.
    """

    samples: tuple[Sample, ...]
    fps: float
    sample_rate: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    effective: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    peak_memory: int = 0
    reused_steps: int = 0
    batch_size: int = 1

    @property
    def video(self) -> np.ndarray | None:
        return self.samples[0].video

    @property
    def image(self) -> np.ndarray | None:
        return self.samples[0].image

    @property
    def sound(self) -> np.ndarray | None:
        return self.samples[0].sound

    @property
    def action(self) -> np.ndarray | None:
        return self.samples[0].action

    @property
    def latents(self) -> Mapping[str, np.ndarray] | None:
        return self.samples[0].latents

    @property
    def frames(self) -> np.ndarray:
        """The pixels, uint8 [T, H, W, 3], where a picture is one frame."""
        return self.samples[0].frames

    def pil(self) -> list[Image.Image]:
        """The frames as pictures of Pillow."""
        return self.samples[0].pil()

    def torch(self) -> torch.Tensor:
        """The frames as a tensor on the CPU, uint8 [T, 3, H, W], as torchvision has them."""
        return self.samples[0].torch()

    def __repr__(self) -> str:
        each = [sample.described(self.fps, self.sample_rate) for sample in self.samples]
        return f"<Output: {'; '.join(each)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: clips to play and pictures, each with its size and seed."""
        return "".join(map(self._shown, self.samples))

    def _shown(self, sample: Sample) -> str:
        words = html.escape(sample.described(self.fps, self.sample_rate))
        if sample.video is not None:
            with TemporaryDirectory() as folder:
                data = _in_url(self._write(Path(folder) / "clip.mp4", sample, 18, 95)[0])
            shown = f'<video controls loop src="data:video/mp4;base64,{data}"></video>'
        elif sample.image is not None:
            data = base64.b64encode(media.encode_image(sample.image, "png")).decode()
            shown = f'<img alt="{words}" src="data:image/png;base64,{data}">'
        else:
            return f"<p>{words}</p>"
        return f"<figure>{shown}<figcaption>{words}</figcaption></figure>"

    @property
    def suffix(self) -> str:
        """The usual file type of what was made."""
        if self.video is not None:
            return ".mp4"
        return ".png" if self.image is not None else ".safetensors"

    def save(self, path: str | Path, *, crf: int = 18, quality: int = 95) -> list[Path]:
        """Write every sample and return the files: ``path``, or path-0, path-1, ... for several.

        The suffix chooses the format, and without one the usual is added. Clips: .mp4 (H.264 with
        AAC sound; ``crf`` 0 is lossless, 51 is worst), .webm (VP9 with Opus), .gif, .npy (the array
        of `frames`), or a picture for each frame where the name has a place for its number, such as
        frames/%05d.png, which is what frames/ is short for; of a picture it is frames/00000.png.
        Pictures: .png, .jpg and .webp (``quality`` 0 to 100) and .npy. Latents: .safetensors. Actions are
        rows in JSON: with .json alone, else in a second file, path_action.json, listed after all the
        others. They can be read back as ``action_path``.

        On a rank that got no results nothing is written.

        Raises:
            InvalidRequest: the suffix does not suit what was made.
        """
        if all(sample.empty for sample in self.samples):
            return []
        crf, quality = CRF.checked("crf", crf), QUALITY.checked("quality", quality)
        if os.fspath(path).endswith(os.sep):
            path = Path(path) / (FRAMES if self.video is not None else f"{0:05}{self.suffix}")
        path = Path(path)
        path = path if path.suffix else path.with_suffix(self.suffix)
        if len(self.samples) == 1:
            names = [path]
        else:
            names = [path.with_stem(f"{path.stem}-{i}") for i in range(len(self.samples))]
        path.parent.mkdir(parents=True, exist_ok=True)
        files, beside = [], []
        for name, sample in zip(names, self.samples, strict=True):
            files += self._write(name, sample, crf, quality)
            if sample.action is not None and name.suffix.lower() not in ACTION_SUFFIXES:
                beside.append(name.with_name(f"{name.stem.replace('%', '')}_action.json"))
                _write_rows(beside[-1], sample.action)
        return files + beside

    def _write(self, path: Path, sample: Sample, crf: int, quality: int) -> list[Path]:
        """The files of one sample but for its actions beside them."""
        suffix = path.suffix.lower()
        if sample.clip is not None and _holds(sample.clip, path, crf):
            return [path]
        if sample.action is not None and suffix in ACTION_SUFFIXES:
            _write_rows(path, sample.action)
            return [path]
        possible: tuple[str, ...]
        if sample.video is not None:
            possible = CLIP_FORMATS
            if files := write_clip(
                path,
                sample.video,
                fps=self.fps,
                sound=sample.sound,
                sample_rate=self.sample_rate,
                crf=crf,
                quality=quality,
            ):
                return files
        elif sample.image is not None:
            possible = IMAGE_FORMATS
            if write_picture(path, sample.image, quality=quality):
                return [path]
        else:
            possible = LATENT_SUFFIXES
            if sample.latents is not None and suffix in LATENT_SUFFIXES:
                from safetensors.numpy import save_file

                arrays = {name: np.ascontiguousarray(x) for name, x in sample.latents.items()}
                with replacing(path) as part:
                    save_file(arrays, part)
                return [path]
        actions = () if sample.action is None else ACTION_SUFFIXES
        names = ", ".join((*possible, *actions))
        raise InvalidRequest("path", str(path), f"a file of type {names}")


def _in_url(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _holds(clip: media.Clip, path: Path, crf: int) -> bool:
    """Whether ``path`` is the file of ``clip``, in this quality, and still there."""
    return clip.crf == crf and path.exists() and clip.path.resolve() == path.resolve()


def _write_rows(path: Path, rows: np.ndarray) -> None:
    write_text(path, json.dumps(rows.tolist()) + "\n")
