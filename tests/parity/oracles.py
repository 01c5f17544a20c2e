"""The reference pipelines that several files compare with."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKLWan,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    UniPCMultistepScheduler,
)
from transformers import AutoTokenizer


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


def edge(checkpoint: Path) -> Cosmos3OmniPipeline:
    """The same of Edge, part by part: its files name a scheduler that no release of diffusers has."""
    pipeline = Cosmos3OmniPipeline(
        transformer=Cosmos3OmniTransformer.from_pretrained(checkpoint / "transformer"),
        text_tokenizer=AutoTokenizer.from_pretrained(checkpoint / "text_tokenizer"),
        vae=AutoencoderKLWan.from_pretrained(checkpoint / "vae"),
        scheduler=UniPCMultistepScheduler.from_pretrained(
            checkpoint / "scheduler", flow_shift=10.0, use_karras_sigmas=False
        ),
        enable_safety_checker=False,
        default_use_system_prompt=False,
        use_native_flow_schedule=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
