"""The reference pipelines that several files compare with."""

from __future__ import annotations

from pathlib import Path

from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler


def guided(checkpoint: Path) -> Cosmos3OmniPipeline:
    """diffusers' pipeline in float32 with the noise levels of the base checkpoints."""
    pipeline = Cosmos3OmniPipeline.from_pretrained(
        checkpoint, enable_safety_checker=False, use_native_flow_schedule=True
    )
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=10.0, use_karras_sigmas=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
