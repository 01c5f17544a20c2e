"""Output of a request: pixels, sound and latents of each result, and the record of how they were made.

All arrays are numpy, on the host. `Progress` is what callbacks get while a request runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.request.fields import Spec

__all__ = ["Output", "Progress", "Report", "Sample"]

VIDEO_SUFFIXES = (".mp4",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LATENT_SUFFIXES = (".safetensors",)
ACTION_SUFFIXES = (".json",)
CRF = Spec(kind="int", low=0, high=51, help="quality of H.264, 0 is lossless, 51 is worst")
QUALITY = Spec(kind="int", low=0, high=100, help="of JPEG and WebP, 100 is best")


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """The results of one request: ``samples`` has ``n`` of them, the properties show the first.

    ``timings`` are seconds per phase, ``effective`` every resolved parameter, ``warnings`` what the
    request should know about.

    ``peak_memory`` are the most bytes that were in use on the device of rank 0, weights included:
    by this request if it ran alone, and else since the first of those in flight with it began. On
    a CPU it is the peak of the process so far. ``reused_steps`` were taken from the step cache.
    """

    samples: tuple[Sample, ...]
    fps: float
    sample_rate: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    effective: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    peak_memory: int = 0
    reused_steps: int = 0

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
    def suffix(self) -> str:
        """The usual file type of what was made."""
        if self.video is not None:
            return ".mp4"
        return ".png" if self.image is not None else ".safetensors"

    def save(self, path: str | Path, *, crf: int = 18, quality: int = 95) -> list[Path]:
        """Write every sample and return the files: ``path``, or path-0, path-1, ... for several.

        The suffix chooses the format: .mp4 (H.264 with AAC sound; ``crf`` 0 is lossless, 51 is
        worst), .png, .jpg and .webp (``quality`` 0 to 100), or .safetensors for latents; without one
        the usual is added. Actions are rows in JSON: with .json alone, else in a second file,
        path_action.json, listed after all the others. They can be read back as ``action_path``.

        On a rank that got no results nothing is written.

        Raises:
            InvalidRequest: the suffix does not suit what was made.
        """
        if all(sample.empty for sample in self.samples):
            return []
        crf, quality = CRF.checked("crf", crf), QUALITY.checked("quality", quality)
        path = Path(path)
        path = path if path.suffix else path.with_suffix(self.suffix)
        if len(self.samples) == 1:
            files = [path]
        else:
            files = [path.with_stem(f"{path.stem}-{i}") for i in range(len(self.samples))]
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = []
        for file, sample in zip(files, self.samples, strict=True):
            self._write(file, sample, crf, quality)
            if sample.action is not None and file.suffix.lower() not in ACTION_SUFFIXES:
                beside.append(file.with_name(f"{file.stem}_action.json"))
                _write_rows(beside[-1], sample.action)
        return files + beside

    def _write(self, path: Path, sample: Sample, crf: int, quality: int) -> None:
        suffix = path.suffix.lower()
        if sample.clip is not None and _holds(sample.clip, path, crf):
            return
        if sample.video is not None and suffix in VIDEO_SUFFIXES:
            media.write_video(
                path,
                sample.video,
                fps=self.fps,
                sound=sample.sound,
                sample_rate=self.sample_rate or 48000,
                crf=crf,
            )
        elif sample.image is not None and suffix in IMAGE_SUFFIXES:
            media.write_image(path, sample.image, quality=quality)
        elif sample.action is not None and suffix in ACTION_SUFFIXES:
            _write_rows(path, sample.action)
        elif sample.latents is not None and suffix in LATENT_SUFFIXES:
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(x) for name, x in sample.latents.items()}, path)
        else:
            kinds = {".mp4": VIDEO_SUFFIXES, ".png": IMAGE_SUFFIXES}
            actions = () if sample.action is None else ACTION_SUFFIXES
            possible = ", ".join((*kinds.get(self.suffix, LATENT_SUFFIXES), *actions))
            raise InvalidRequest("path", str(path), f"a file of type {possible}")


def _holds(clip: media.Clip, path: Path, crf: int) -> bool:
    """Whether ``path`` is the file of ``clip``, in this quality, and still there."""
    return clip.crf == crf and path.exists() and clip.path.resolve() == path.resolve()


def _write_rows(path: Path, rows: np.ndarray) -> None:
    path.write_text(json.dumps(rows.tolist()) + "\n")
