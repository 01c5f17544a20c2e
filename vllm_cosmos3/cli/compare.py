"""``vllm-cosmos3 compare``: what each faster mode costs on a checkpoint, with the user's own prompts.

Every prompt runs through every mode from the same noise. The table is printed; the clips, the same
table on a page that shows them side by side, and all numbers go to a folder.
"""

from __future__ import annotations

import argparse
import json
import math
import pkgutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.cli.flags import add_engine_flags, add_flag, given
from vllm_cosmos3.cli.results import sample_folder
from vllm_cosmos3.cli.terminal import quiet_libraries
from vllm_cosmos3.cli.versions import check_vllm
from vllm_cosmos3.compare.modes import PARTS, read_modes
from vllm_cosmos3.engine_options import EngineOptions
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.files import write_text
from vllm_cosmos3.request.request import SPECS

if TYPE_CHECKING:  # vLLM, which --help should not wait for
    from vllm_cosmos3.compare.measuring import Judge, Measured

FIELDS = (
    "size", "num_frames", "fps", "num_inference_steps", "guidance_scale", "flow_shift",
    "step_cache_threshold", "step_cache_max_reused", "step_cache_order", "allow_untrained_size",
)  # fmt: skip
ENGINE = (
    "revision", "dtype", "device", "attention_backend", "load_format", "und_residency",
    "enable_layerwise_offload", "memory_limit", "checkpoint_kind",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s MODEL --prompts FILE --out DIR [options]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder, repository, demo, demo-4step or demo-policy",
    )
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file with a prompt on each line")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for clips, page and numbers")  # fmt: skip
    parser.add_argument("--modes", nargs="+", default=["fp8", "sea", "fp8+sea"], metavar="MODE", help=f"{', '.join(PARTS)}, or several joined by + (default: fp8 sea fp8+sea); exact is always measured")  # fmt: skip
    parser.add_argument("--judge", metavar="MODULE:NAME", help="function of a prompt and a clip (uint8 array [T,H,W,3]) that says whether the clip shows it")  # fmt: skip
    request = parser.add_argument_group("what is made of each prompt")
    for name in FIELDS:
        add_flag(request, name, SPECS[name], None)
    add_engine_flags(parser.add_argument_group("model and device"), ENGINE)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write page and numbers."""
    from vllm_cosmos3.checkpoint.hub import resolve

    modes, prompts = read_modes(args.modes), read_prompts(args.prompts)
    judge = None if args.judge is None else read_judge(args.judge)
    options = EngineOptions(args.model, **given(args, ENGINE))
    folder = args.out.resolve()  # "." has no name
    out = sample_folder(folder.parent, folder.name)
    check_vllm()
    with quiet_libraries():
        from vllm_cosmos3.compare.measuring import measure
        from vllm_cosmos3.compare.page import page, table
        from vllm_cosmos3.engine import device_of

        device = device_of(options.device)
        config = options.on(resolve(options.model, options.revision), str(device))
        found = measure(config, modes, prompts, given(args, FIELDS), out, judge, told)
    print(table(found))
    write_text(out / "index.html", page(found, f"{options.model}, {options.dtype}, {device}"))
    record = [recorded(each) for each in found]
    write_text(out / "compare.json", json.dumps(record, indent=2) + "\n")
    print(f"\n{out / 'index.html'}")
    return 0


def recorded(each: Measured) -> dict[str, Any]:
    """One prompt in one mode as JSON, which has no infinite numbers."""
    psnr = each.psnr if math.isfinite(each.psnr) else None
    return asdict(each) | {"file": each.file.name, "psnr": psnr}


def told(each: Measured) -> None:
    print(f"{each.mode}: {each.seconds:.2f} s, {each.prompt[:60]}", file=sys.stderr)


def read_prompts(file: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        InvalidRequest: it cannot be read, or has none.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidRequest(
            "prompts", str(file), f"a text file that can be read ({reason})"
        ) from None
    if not (prompts := [line for line in lines if line]):
        raise InvalidRequest("prompts", str(file), "a file with at least one prompt")
    return prompts


def read_judge(name: str) -> Judge:
    """The function of this name.

    Raises:
        InvalidRequest: there is none.
    """
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidRequest(
            "judge", name, f"module:function that can be imported ({error})"
        ) from None
    if not callable(found):
        raise InvalidRequest("judge", name, "module:function")
    judge: Judge = found
    return judge
