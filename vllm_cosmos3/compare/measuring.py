"""Measurements of the yardstick: every prompt through every mode from the same noise, on one device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from vllm_cosmos3 import media
from vllm_cosmos3.compare.likeness import likeness
from vllm_cosmos3.compare.modes import EXACT, Mode
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.generator.pipeline import Pipeline, RequestState
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest

Judge = Callable[[str, np.ndarray], bool]  # whether a clip [T, H, W, 3] shows what the prompt says


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """One prompt in one mode.

    ``file`` is the clip or picture. Compared with the exact mode: ``psnr`` in dB (infinite where all
    pixels are equal), ``ssim`` up to 1, ``lpips`` from 0 (None without its weights), ``errors`` the
    relative error of the latents after each step. ``shown`` is the judge's word, None where nobody was asked.
    """

    mode: str
    prompt: str
    file: Path
    seconds: float
    reused: int
    steps: int
    peak: int
    psnr: float
    ssim: float
    lpips: float | None
    errors: tuple[float, ...]
    shown: bool | None


def measure(
    config: EngineConfig,
    modes: Sequence[Mode],
    prompts: Sequence[str],
    fields: Mapping[str, Any],
    out: Path,
    judge: Judge | None,
    report: Callable[[Measured], None],
) -> list[Measured]:
    """All prompts in all modes, in the order of ``modes``, which begin with the exact one.

    Weights are loaded once for all modes that share them, and ``report`` is called in that order. Clips go to
    ``out``, as do the exact latents meanwhile.

    Raises:
        Unsupported: torchmetrics is not installed.
        InvalidRequest: a field or a mode does not suit the checkpoint.
    """
    alike = likeness()
    found: list[Measured] = []
    exact: dict[int, np.ndarray] = {}
    with TemporaryDirectory(dir=out) as kept:  # gigabytes, which may not fit elsewhere
        for engine in _engines(modes):
            with _loaded(replace(config, **engine)) as pipeline:
                own = [mode for mode in modes if mode.engine == engine]
                for mode, (index, prompt) in product(own, enumerate(prompts)):
                    request = GenerateRequest(
                        **{"seed": index, **fields, **mode.fields, "prompt": prompt}
                    )
                    if index == 0 and pipeline.device.type != "cpu":  # kernels are chosen once
                        _made(pipeline, request)
                    pipeline.texts.clear()  # which the modes before may have read
                    state, pixels, latents, seconds = _made(pipeline, request)
                    latents_file = Path(kept) / f"{index}.npy"
                    if mode.name == EXACT:
                        np.save(latents_file, latents)
                        exact[index] = pixels
                    before = np.load(latents_file, mmap_mode="r")
                    like = alike(pixels, exact[index])
                    fps = state.plan.parameters.fps
                    measured = Measured(
                        mode=mode.name,
                        prompt=prompt,
                        file=_written(out / f"{index:03}-{mode.name}", pixels, fps),
                        seconds=seconds,
                        reused=state.reused,
                        steps=state.plan.steps,
                        peak=pipeline.finish(state).peak_memory,
                        psnr=like.psnr,
                        ssim=like.ssim,
                        lpips=like.lpips,
                        errors=tuple(map(_relative, latents, before)),
                        shown=None if judge is None else judge(prompt, pixels),
                    )
                    found.append(measured)
                    report(measured)
    names = [mode.name for mode in modes]
    return sorted(found, key=lambda measured: names.index(measured.mode))


def _engines(modes: Sequence[Mode]) -> list[Mapping[str, Any]]:
    engines: list[Mapping[str, Any]] = []
    for mode in modes:
        if mode.engine not in engines:
            engines.append(mode.engine)
    return engines


@contextmanager
def _loaded(config: EngineConfig) -> Iterator[Pipeline]:
    mesh = init_mesh(config.parallel)
    try:
        pipeline = Pipeline.load(config, mesh, config.device)
    finally:
        close_mesh(mesh)
    try:
        yield pipeline
    finally:
        del pipeline
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def _made(
    pipeline: Pipeline, request: GenerateRequest
) -> tuple[RequestState, np.ndarray, np.ndarray, float]:
    """A request, its pixels [T, H, W, 3], its latents after each step, and its seconds.

    The copies of the latents are in the seconds of every mode alike.
    """
    start = time.perf_counter()
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    latents = []
    while not state.done:
        pipeline.step(state)
        after = {stream.name: stream.x for stream in state.streams} or state.denoised[-1]
        latents.append(after["vision"].cpu().numpy())
    pipeline.decode(state)
    (sample,) = state.samples
    pixels = sample.video if sample.video is not None else sample.image
    assert pixels is not None  # of one rank, decoded
    seconds = time.perf_counter() - start
    return state, pixels if pixels.ndim == 4 else pixels[None], np.stack(latents), seconds


def _written(place: Path, pixels: np.ndarray, fps: float) -> Path:
    if len(pixels) == 1:
        media.write_image(place.with_suffix(".png"), pixels[0])
        return place.with_suffix(".png")
    media.write_video(place.with_suffix(".mp4"), pixels, fps=fps)
    return place.with_suffix(".mp4")


def _relative(made: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(made - exact) / np.linalg.norm(exact))
