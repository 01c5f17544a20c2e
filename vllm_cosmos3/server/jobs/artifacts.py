"""What the first rank leaves of a request in the folder of its job, and the stage that does so.

Runs in the workers: frames are encoded where they are made, and only names cross processes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_cosmos3 import media
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.generator.pipeline import Pipeline, RequestState
from vllm_cosmos3.server.frame_check import frame_check
from vllm_cosmos3.server.jobs.job_files import BEFORE, CLIP, LAST, RECORD, SPRITES, THUMBNAIL

REST, CUT = "rest.mp4", "cut.mp4"  # while a video is joined to the one that it goes on from
COLUMNS, ROWS, TILE = (
    4,
    4,
    160,
)  # of the sprite sheet: tiles across, tiles down, pixels wide at most


@dataclass(frozen=True, slots=True, eq=False)
class Artifacts:
    """The result of one request, ready to be written."""

    output: Output

    def save(self, folder: Path) -> list[Path]:
        """The files of a video or of pictures, and their record.

        Its timings have "encode", the seconds that the files took. Of a video that was encoded
        while it was decoded they are those of its small pictures alone.
        """
        folder.mkdir(parents=True, exist_ok=True)
        encode = 0.0
        check = frame_check()
        report: dict[str, Any] = {}
        files: list[Path] = []
        for index, sample in enumerate(self.output.samples):
            frames = sample.video if sample.video is not None else sample.image
            if frames is None:
                return []  # not the rank that has the pixels
            if frames.ndim == 3 and self.output.effective["num_frames"] != 1:
                frames = frames[None]  # a video was asked for: so few actions make no second frame
            if check is not None:
                try:
                    frames, report = check(frames)
                except Cosmos3Error as error:  # a verdict, of which the other ranks know nothing
                    refusal = {"code": error.code, "message": str(error)}
                    (folder / RECORD).write_text(json.dumps({"error": refusal}))
                    return []
            start = time.perf_counter()
            if frames.ndim == 3:
                file = folder / f"{index}.png"
                media.write_image(file, frames)
            else:
                file = folder / CLIP
                rate = self.output.sample_rate or 48_000
                written = sample.clip is not None
                _write_clip(folder, frames, self.output.fps, sample.sound, rate, written=written)
                width = self.output.effective["width"]
                assert isinstance(width, int)  # so is it settled
                last = np.ascontiguousarray(frames[-1][:, -width:])
                Image.fromarray(last).save(folder / LAST, compress_level=1)
            encode += time.perf_counter() - start
            files.append(file)
        record = {
            "timings": {**self.output.timings, "encode": encode},
            "peak_memory": self.output.peak_memory,
            "batch_size": self.output.batch_size,
            "guardrails": report,
            "warnings": list(self.output.warnings),
            "files": [file.name for file in files],
            "action": action_json(self.output),
        }
        (folder / RECORD).write_text(json.dumps(record))
        return files


class ServedPipeline(Pipeline):
    """The pipeline, whose results are files."""

    def decode(self, state: RequestState, clip: media.Clip | None = None) -> None:
        """Encodes while it decodes, unless the frames are to be checked or joined to others."""
        if clip is not None and (frame_check() or (clip.path.parent / BEFORE).is_file()):
            clip = None
        if clip is not None:
            clip.path.parent.mkdir(parents=True, exist_ok=True)
        super().decode(state, clip)

    def preview(self, state: RequestState) -> tuple[float, bytes] | None:
        """Nothing where frames are to be checked before anybody sees them."""
        return None if frame_check() else super().preview(state)

    def finish(self, state: RequestState) -> Any:
        return Artifacts(super().finish(state))


def _write_clip(
    folder: Path,
    frames: media.Pixels,
    fps: float,
    sound: np.ndarray | None,
    rate: int,
    *,
    written: bool,
) -> None:
    """A video with its small pictures; after the one that it goes on from, if there is one."""
    before = folder / BEFORE
    if not before.is_file():
        if not written:
            media.write_video(folder / CLIP, frames, fps=fps, sound=sound, sample_rate=rate)
        chosen = frames[_spread(len(frames))]
    else:  # the first frame is its last one
        _cut(before, frames.shape[2], fps)
        b_frames = media.has_b_frames(before)
        media.write_video(folder / REST, frames[1:], fps=fps, b_frames=b_frames)
        count = media.join_videos(before, folder / REST, folder / CLIP, fps=fps)
        for part in (before, folder / REST):
            part.unlink()
        places = _spread(count)
        clip = enumerate(media.frames_of(folder / CLIP, limit=count))
        shown = {index: frame for index, frame in clip if index in places}
        chosen = np.stack([shown[index] for index in places])
    (folder / THUMBNAIL).write_bytes(media.thumbnail(chosen[0]))
    (folder / SPRITES).write_bytes(media.encode_image(sprites(chosen), "webp"))


def _cut(clip: Path, width: int, fps: float) -> None:
    """Leave of a video what was made: nothing is shown beside what goes on from it."""
    if next(media.frames_of(clip, limit=1)).shape[1] <= width:
        return
    part = clip.with_name(CUT)
    with media.VideoWriter(part, fps=fps) as video:
        for frame in media.frames_of(clip, limit=sys.maxsize):
            video.write(np.ascontiguousarray(frame[None, :, -width:]))
    part.replace(clip)


def _spread(frames: int) -> np.ndarray:
    """Places of sixteen frames, evenly spread."""
    return np.linspace(0, frames - 1, COLUMNS * ROWS).round().astype(int)


def action_json(output: Output) -> dict[str, Any] | None:
    """The actions of the first result as clients read them; None if none were asked for."""
    rows = output.action
    if rows is None:
        return None
    names = ("raw_action_dim", "action_mode", "domain_id", "domain_name", "fps")
    physical = output.effective["action_stats_path"] is not None
    return {
        "data": rows.tolist(),
        "shape": list(rows.shape),
        "dtype": str(rows.dtype),
        **{name: output.effective[name] for name in names},
        "units": "physical" if physical else "normalized",
    }


def sprites(frames: media.Pixels) -> media.Pixels:
    """Sixteen frames as one picture of small tiles."""
    width = min(TILE, frames.shape[2])
    height = max(1, round(width * frames.shape[1] / frames.shape[2]))
    tiles = media.cover_crop(frames, height=height, width=width)
    rows = tiles.reshape(ROWS, COLUMNS, height, width, 3).swapaxes(1, 2)
    return rows.reshape(ROWS * height, COLUMNS * width, 3)
