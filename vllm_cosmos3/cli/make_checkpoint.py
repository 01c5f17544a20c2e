"""``make-checkpoint``: a small random checkpoint in the published layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_cosmos3.checkpoint.kinds import KINDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to write; made if it does not exist")
    parser.add_argument("--size", choices=("tiny", "nano", "super", "edge"), default="tiny")
    parser.add_argument(
        "--kind", choices=tuple(KINDS), help="default: edge for the size edge, else base"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none", help="fp8: as the published FP8 revisions")  # fmt: skip
    parser.add_argument(
        "--no-weights",
        action="store_true",
        help="configuration and tokenizer only, for --load-format dummy and for sizing",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a folder that holds something else"
    )


def run(args: argparse.Namespace) -> int:
    from vllm_cosmos3.checkpoint.synthetic import write_checkpoint

    write_checkpoint(
        args.folder,
        size=args.size,
        kind=args.kind or ("edge" if args.size == "edge" else "base"),
        seed=args.seed,
        dtype=args.dtype,
        quantization=args.quantization,
        weights=not args.no_weights,
        force=args.force,
    )
    print(args.folder)
    return 0
