"""What a clip costs before the model sees it: our way through vLLM's interface against the reference's.

Each clip goes through both, in turn, in one process: the data URL is loaded (base64, decoding), then
processed (sampling, resizing, patches, prompt). Prints medians of wall and CPU milliseconds a clip.

    vllm-cosmos3 make-checkpoint CKPT --size nano --no-weights
    python benchmarks/processor.py CKPT
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from clips import ClipShape, make_all
from vllm_cosmos3.plugin import ARCHITECTURE, register
from vllm_cosmos3.reasoner.media.limits import PROCESSOR

# name: VLLM_COSMOS3_PROCESSOR, and whether vLLM normalises on the device (0.26 cannot)
WAYS = {
    "ours": ("cosmos3", True),
    "reference": ("reference", True),
    "reference, float": ("reference", False),
}
PROMPT = "<|vision_start|><|video_pad|><|vision_end|>what happens?"


def main() -> None:
    args = arguments()
    register()
    shape = ClipShape(width=args.width, height=args.height, seconds=args.seconds, fps=args.clip_fps)
    clips = [
        f"data:video/mp4;base64,{base64.b64encode(clip).decode()}"
        for clip in make_all("video", shape, range(args.clips))
    ]
    torch.set_num_threads(1)  # as vLLM's renderer does
    processors = {
        name: processor(args.checkpoint, on_device) for name, (_, on_device) in WAYS.items()
    }
    rows = []
    for fps in args.fps:
        times: dict[str, list[tuple[float, ...]]] = {name: [] for name in WAYS}
        for clip in (clips[0], *clips):  # the first once more: what is made on first use
            for name, found in processors.items():
                os.environ[PROCESSOR] = WAYS[name][0]
                times[name].append(once(found, clip, fps))
        rows += [row(fps, name, taken[1:]) for name, taken in times.items()]
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="its weights are not read")
    parser.add_argument("--fps", type=float, nargs="+", default=[1, 2], help="sampled")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clip-fps", type=float, default=24)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def processor(checkpoint: str, on_device: bool) -> Any:  # noqa: FBT001
    """vLLM's multimodal processor of the reasoner, without caches."""
    config = ModelConfig(
        model=checkpoint,
        hf_overrides={"architectures": [ARCHITECTURE]},
        max_model_len=32768,
        media_io_kwargs={"video": {"num_frames": -1}},
        mm_device_do_normalize=on_device,
    )
    return MULTIMODAL_REGISTRY.create_processor(config)


def once(found: Any, url: str, fps: float) -> tuple[float, ...]:
    """Seconds of one clip: load and process, each as wall and CPU time."""
    marks = [(time.perf_counter(), time.process_time())]
    clip = MediaConnector(found.info.ctx.get_mm_config().media_io_kwargs).fetch_video(url)
    marks.append((time.perf_counter(), time.process_time()))
    inputs = ProcessorInputs(
        found.info.get_tokenizer().encode(PROMPT),
        found.info.parse_mm_data({"video": [clip]}),
        None,
        hf_processor_mm_kwargs={"fps": fps, "do_sample_frames": True},
    )
    found.apply(inputs, TimingContext(enabled=False))
    marks.append((time.perf_counter(), time.process_time()))
    return tuple(
        after - before
        for earlier, later in pairwise(marks)
        for before, after in zip(earlier, later, strict=True)
    )


def row(fps: float, name: str, taken: list[tuple[float, ...]]) -> dict[str, Any]:
    names = ("load_wall", "load_cpu", "process_wall", "process_cpu")
    medians = [1e3 * statistics.median(column) for column in zip(*taken, strict=True)]
    found = dict(zip(names, medians, strict=True))
    return {"fps": fps, "way": name, **found, "cpu": found["load_cpu"] + found["process_cpu"]}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'ms a clip':>22}{'load':>16}{'process':>16}{'CPU':>8}{'x ours':>8}")
    print(f"{'fps':>4}{'':18}{'wall':>8}{'CPU':>8}{'wall':>8}{'CPU':>8}")
    for found in rows:
        ours = next(r for r in rows if (r["fps"], r["way"]) == (found["fps"], "ours"))
        print(
            f"{found['fps']:4g} {found['way']:17}{found['load_wall']:8.1f}{found['load_cpu']:8.1f}"
            f"{found['process_wall']:8.1f}{found['process_cpu']:8.1f}{found['cpu']:8.1f}"
            f"{found['cpu'] / ours['cpu']:8.1f}"
        )


if __name__ == "__main__":
    main()
