"""``merge-lora``: a checkpoint of its own from a checkpoint and LoRA adapters of its generator."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.cli.flags import add_engine_flags
from vllm_cosmos3.engine_options import EngineConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint folder or Hugging Face repository")  # fmt: skip
    parser.add_argument("lora", nargs="+", metavar="ADAPTER[:SCALE]", help="safetensors file or folder of an adapter; several add up")  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    add_engine_flags(parser, ("revision", "lora_alpha"))


def run(args: argparse.Namespace) -> int:
    """Write the merged checkpoint, and say what was merged."""
    from vllm_cosmos3.checkpoint.adapters.merged_checkpoint import write_merged

    folder = resolve(args.checkpoint, args.revision)
    engine = EngineConfig(model=folder, lora=args.lora, lora_alpha=args.lora_alpha)
    adapters = engine.read_model().adapters
    for adapter in adapters:
        facts = adapter.record()
        print(f"{adapter.name} at {adapter.scale:g}: {facts['matrices']} matrices of rank {facts['rank']}, {adapter.dialect} names", file=sys.stderr)  # fmt: skip
    write_merged(folder, adapters, args.out)
    print(args.out)
    return 0
