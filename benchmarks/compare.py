"""The generator beside diffusers: the same work, in one process, in turn.

    vllm-cosmos3 make-checkpoint NANO --size nano --no-weights
    python benchmarks/compare.py NANO --device cuda --rows t2i-720p t2v-256p --json compare.json

Both get the same random weights (drawn by tensor name), token ids, initial noise, schedule, steps,
guidance and dtype, and run A B A B. Three pairings: both as they come; torch's attention in both;
our attention kernel in both, put into diffusers by its attention processor. The rows say how many
evaluations of the transformer each made, counted by a hook, and how far the latents are apart.

A run is a whole request that ends with frames in host memory: uint8 ours, floats theirs, whose
conversion is theirs to choose. ``--measured-steps N`` makes 1 + N steps and counts the others as
the median of the last N: such figures are marked with ~. diffusers is needed here and only here.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor, nn

from clock import Mark, between, mark, seconds, synchronize
from latency import ROWS, request
from machine import heading, provenance
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config, read_json
from vllm_cosmos3.checkpoint.shards import identity_table
from vllm_cosmos3.checkpoint.tensors import Tensors, transformer_tensors, vae_tensors
from vllm_cosmos3.checkpoint.weights import load_dummy_weights
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.generator.models.vae import to_frames
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.attention import Attend, make_attend
from vllm_cosmos3.parallel.graphs import Recording
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import from_fields, parse_size

FLOW_SHIFT = 10.0
PAIRINGS = {  # what they are called: our contender and theirs
    "as they come": ("ours", "diffusers"),
    "our attention in both": ("ours", "diffusers, our attention"),
    "torch's attention in both": ("ours, sdpa", "diffusers"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of request, as both make it. ``made`` of ``steps`` steps are run."""

    name: str
    row: dict[str, Any]
    tokens: tuple[int, int]
    steps: int
    made: int

    def fields(self, number: int) -> dict[str, Any]:
        """Each round has a prompt and a seed of its own, so that no cache can answer for it."""
        return request(self.row, list(self.tokens), number)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Seconds of a whole request, with the steps that were not made, and of each step but the first."""

    total: float
    steps: list[float]
    evaluations: int
    latents: Tensor


Contender = Callable[[Case, int], Run]
Runs = dict[tuple[str, str], list[Run]]  # by row and contender
Decodes = dict[str, dict[str, float]]  # seconds by row and side


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    try:
        model = read_config(args.model)
    except Cosmos3Error as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    facts = provenance(device)
    print(heading(facts), flush=True)
    theirs = Theirs(model, device, dtype)
    cases = [case(name, args) for name in args.rows]
    runs, decodes = measure(model, theirs, "auto", cases, args)
    release(device)
    again, _ = measure(model, theirs, "sdpa", cases, args)
    for key, more in again.items():  # diffusers as it comes is in both
        runs.setdefault(key, []).extend(more)
    report = {"machine": facts, "dtype": args.dtype, **summary(cases, runs, decodes)}
    print(tables(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def case(name: str, args: argparse.Namespace) -> Case:
    """A row of the latency benchmark, with fixed texts, or what the options made of it."""
    row = dict(ROWS[name])
    if args.frames and row["num_frames"] > 1:
        row["num_frames"] = args.frames
    steps = args.steps or row["num_inference_steps"]
    made = min(steps, 1 + args.measured_steps) if args.measured_steps else steps
    row |= {"num_inference_steps": made, "flow_shift": FLOW_SHIFT, "noise": "torch"}
    return Case(name=name, row=row, tokens=tuple(args.tokens), steps=steps, made=made)


def measure(
    model: ModelConfig, theirs: Theirs, attention: str, cases: list[Case], args: argparse.Namespace
) -> tuple[Runs, Decodes]:
    """Ours with ``attention`` in turn with theirs: as it comes, and with our choice of attention."""
    device, dtype = theirs.device, getattr(torch, args.dtype)
    pipeline = ours(model, device, args.dtype, attention)
    contenders: dict[str, Contender] = {
        "ours" if attention == "auto" else f"ours, {attention}": partial(run_ours, pipeline),
        "diffusers": partial(theirs.run, None),
    }
    if attention == "auto":
        attend = make_attend(device=device, dtype=dtype, head_dim=model.transformer.head_dim)
        contenders["diffusers, our attention"] = partial(theirs.run, attend)
    runs: Runs = {}
    decodes: Decodes = {}
    for each in cases:
        runs |= in_turn(each, contenders, args)
        if attention == "auto":
            latents = runs[each.name, "ours"][-1].latents
            decodes[each.name] = decode_seconds(pipeline, theirs, latents)
    return runs, decodes


def release(device: torch.device) -> None:
    """The memory of models that are not used any more, which point at themselves."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def in_turn(each: Case, contenders: Mapping[str, Contender], args: argparse.Namespace) -> Runs:
    """Every contender once per round, after ``--warm`` rounds that do not count."""
    runs: Runs = {(each.name, name): [] for name in contenders}
    for round_ in range(args.warm + args.rounds):
        for name, run in contenders.items():
            done = run(each, round_)
            counts = round_ >= args.warm
            if counts:
                runs[each.name, name].append(done)
            print(
                f"{each.name}, {name}{'' if counts else ', warm-up'}: {done.total:.2f} s, step "
                f"{1000 * statistics.median(done.steps):.1f} ms, {done.evaluations} evaluations",
                flush=True,
            )
    return runs


# Ours.


def ours(model: ModelConfig, device: torch.device, dtype: str, attention: str) -> Pipeline:
    """The package's pipeline with random weights."""
    config = EngineConfig(
        model=model.path,
        dtype=dtype,
        device=str(device),
        load_format="dummy",
        attention_backend=attention,
        und_residency="gpu",  # although another model is there
    )
    mesh = init_mesh(ParallelConfig())
    try:
        return Pipeline.load(config, mesh, device)
    finally:
        close_mesh(mesh)


def run_ours(pipeline: Pipeline, each: Case, number: int) -> Run:
    device = pipeline.device
    with counted(pipeline.transformer) as calls:
        synchronize(device)
        start = time.perf_counter()
        state = pipeline.encode(
            make_plan(from_fields(each.fields(number)), pipeline.model, pipeline.tokenizer)
        )
        marks = []
        while not state.done:
            pipeline.step(state)
            marks.append(mark(device))
        latents = state.denoised[0]["vision"]
        pipeline.decode(state)
        pipeline.finish(state)
        synchronize(device)
        total = time.perf_counter() - start
    return finished(each, total, marks, sum(calls), latents)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """For each evaluation of ``module`` how many results it had: ours has one for each branch.

    A recorded graph calls no module when it is replayed, so recordings are counted themselves.
    """
    calls: list[int] = []
    recorded = Recording.__call__

    def replay(recording: Recording, *given: Tensor) -> Any:
        before = len(calls)
        made = recorded(recording, *given)
        calls[before:] = [len(made)]
        return made

    hook = module.register_forward_hook(lambda _module, _given, made: calls.append(len(made)))
    with patch.object(Recording, "__call__", replay):
        yield calls
    hook.remove()


def finished(each: Case, total: float, marks: list[Mark], evaluations: int, latents: Tensor) -> Run:
    """Add the steps that were not made. Of one step alone there is nothing to tell: it is the total."""
    steps = [between(*pair) for pair in pairwise(marks)]
    total += (each.steps - each.made) * (statistics.median(steps) if steps else 0.0)
    kept = latents.float().cpu()
    return Run(total=total, steps=steps or [total], evaluations=evaluations, latents=kept)


# Theirs.


class Theirs:
    """diffusers' pipeline with the same random weights, and both of its attention processors."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        folder = model.path
        transformer = empty(diffusers.Cosmos3OmniTransformer, folder / "transformer", dtype)
        transformer.time_embedder.float()  # as its loader keeps it
        fill(transformer, transformer_tensors(model.transformer), device)
        config = model.transformer
        with device:  # its table of frequencies is no tensor of the checkpoint
            transformer.rotary_emb = type(transformer.rotary_emb)(
                config.head_dim, config.rope_theta, config.rope_axes_dim
            )
        vae = empty(diffusers.AutoencoderKLWan, folder / "vae", dtype)
        fill(vae, vae_tensors(model.vae), device)
        scheduler = diffusers.UniPCMultistepScheduler.from_config(
            read_json(folder / "scheduler" / "scheduler_config.json"),
            flow_shift=FLOW_SHIFT,
            use_karras_sigmas=False,
        )
        self.pipeline = diffusers.Cosmos3OmniPipeline(
            transformer=transformer,
            text_tokenizer=load_tokenizer(folder),
            vae=vae,
            scheduler=scheduler,
            enable_safety_checker=False,
            use_native_flow_schedule=True,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self._processors = transformer.attn_processors

    def run(self, attend: Attend | None, each: Case, number: int) -> Run:
        """With ``attend`` in place of torch's attention, if there is one."""
        pipeline, fields = self.pipeline, each.fields(number)
        transformer = pipeline.transformer
        own = dict(self._processors)
        transformer.set_attn_processor(own if attend is None else OurAttention(attend))
        ids = fields["prompt_token_ids"], fields["negative_prompt_token_ids"]
        pipeline.tokenize_prompt = lambda *_, **__: ids
        width, height = parse_size(fields["size"])
        marks: list[Mark] = []
        kept: list[Tensor] = []

        def after_step(_: object, _i: int, _t: object, tensors: dict[str, Tensor]) -> Any:
            marks.append(mark(self.device))
            kept[:] = [tensors["latents"]]
            return tensors

        with counted(transformer) as calls:
            synchronize(self.device)
            start = time.perf_counter()
            pipeline(
                prompt="",
                negative_prompt="",
                num_frames=fields["num_frames"],
                width=width,
                height=height,
                fps=fields["fps"],
                num_inference_steps=each.made,
                guidance_scale=fields["guidance_scale"],
                generator=torch.Generator().manual_seed(fields["seed"]),
                callback_on_step_end=after_step,
                output_type="np",
            )
            synchronize(self.device)
            total = time.perf_counter() - start
        return finished(each, total, marks, len(calls), kept[0])

    def decode(self, latents: Tensor) -> None:
        """Pixels of normalised latents, as the pipeline makes them."""
        vae = self.pipeline.vae
        config = vae.config
        mean, std = (
            torch.tensor(values, dtype=vae.dtype, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        vae.decode(latents.to(vae.dtype) * std + mean)


def empty(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of diffusers without memory for its weights."""
    with torch.device("meta"):
        return kind.from_config(read_json(folder / "config.json")).to(dtype).eval()


def fill(module: nn.Module, shapes: Tensors, device: torch.device) -> None:
    """The weights that the package draws for tensors of these names."""
    module.to_empty(device=device)
    module.requires_grad_(requires_grad=False)
    if unknown := {name for name, _ in module.named_parameters()} - shapes.keys():
        raise SystemExit(f"compare: this diffusers has tensors of its own: {sorted(unknown)[:5]}")
    load_dummy_weights(module, identity_table(shapes), shapes, device=device)


class OurAttention:
    """An attention processor of diffusers' blocks around a kernel of ours.

    It projects, norms and rotates with the block's own layers, and leaves only the attention to
    ``attend``: of the text to itself, causally, and of the latents to both.
    """

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        block: Any,
        text: Tensor,
        latents: Tensor,
        rotary: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, block.head_dim))

        of_text, of_latents = rotary[:2], rotary[2:]
        q_text = rotated(block.norm_q(heads(block.to_q(text))), *of_text)
        k_text = rotated(block.norm_k(heads(block.to_k(text))), *of_text)
        v_text = heads(block.to_v(text))
        q = rotated(block.norm_added_q(heads(block.add_q_proj(latents))), *of_latents)
        k = rotated(block.norm_added_k(heads(block.add_k_proj(latents))), *of_latents)
        v = heads(block.add_v_proj(latents))
        read = self._attend(q_text, k_text, v_text, causal=True)
        seen = self._attend(q, torch.cat([k_text, k]), torch.cat([v_text, v]), causal=False)
        return block.to_out(read.flatten(1)), block.to_add_out(seen.flatten(1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of every head; the tables [S, D] hold every frequency twice."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


# What comes out.


def decode_seconds(pipeline: Pipeline, theirs: Theirs, latents: Tensor) -> dict[str, float]:
    """Both decoders on the same latents, in turn; ours ends with bytes on the device."""
    latents = latents.to(pipeline.device)

    def decode() -> None:
        with torch.inference_mode():
            for chunk in pipeline.vae.decode(latents):
                to_frames(chunk)

    def decode_theirs() -> None:
        with torch.inference_mode():
            theirs.decode(latents)

    both: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for _ in range(2):
        both["ours"].append(seconds(decode, pipeline.device, repeat=1, warm=0))
        both["diffusers"].append(seconds(decode_theirs, pipeline.device, repeat=1, warm=0))
    return {name: min(values) for name, values in both.items()}


def summary(
    cases: list[Case],
    runs: Runs,
    decodes: Decodes,
) -> dict[str, Any]:
    """Medians of each contender, and the pairings."""
    contenders = [
        {
            "row": row,
            "contender": name,
            "total": statistics.median(run.total for run in mine),
            "step": statistics.median(step for run in mine for step in run.steps),
            "evaluations": mine[0].evaluations,
            "runs": [run.total for run in mine],
        }
        for (row, name), mine in runs.items()
    ]
    by_name = {(each["row"], each["contender"]): each for each in contenders}
    pairings = []
    for each in cases:
        for pairing, names in PAIRINGS.items():
            mine, other = (by_name[each.name, name] for name in names)
            apart = apart_by(*(runs[each.name, name][-1].latents for name in names))
            pairings.append(
                {
                    "row": each.name,
                    "pairing": pairing,
                    "made_steps": each.made,
                    "steps": each.steps,
                    "ours": mine,
                    "diffusers": other,
                    "ratio": other["total"] / mine["total"],
                    "step_ratio": other["step"] / mine["step"],
                    "relative_difference": apart,
                }
            )
    return {
        "cases": [asdict(each) for each in cases],
        "contenders": contenders,
        "pairings": pairings,
        "decode": decodes,
    }


def apart_by(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference of two latents over the norm of the second. NaN stays NaN."""
    theirs = theirs.reshape(ours.shape)
    return float((ours - theirs).norm() / theirs.norm())


def tables(report: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "",
        "| request | pairing | ours s | diffusers s | ratio | step ours ms | theirs ms | ratio "
        "| evaluations | latents apart |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in report["pairings"]:
        mine, other = each["ours"], each["diffusers"]
        about = "" if each["made_steps"] == each["steps"] else "~"
        cells = [
            each["row"],
            each["pairing"],
            f"{about}{mine['total']:.2f}",
            f"{about}{other['total']:.2f}",
            f"{each['ratio']:.2f}",
            f"{1000 * mine['step']:.1f}",
            f"{1000 * other['step']:.1f}",
            f"{each['step_ratio']:.2f}",
            f"{mine['evaluations']}, {other['evaluations']}",
            f"{each['relative_difference']:.1e} after {each['made_steps']} steps",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| decoding | ours s | diffusers s | ratio |", "|---|---|---|---|"]
    for row, both in report["decode"].items():
        mine, other = both["ours"], both["diffusers"]
        lines.append(f"| {row} | {mine:.2f} | {other:.2f} | {other / mine:.2f} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    possible = [name for name in ROWS if name.startswith("t2")]
    parser.add_argument("model", type=Path, help="checkpoint folder; no weights are read")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--rows", nargs="+", choices=possible, default=["t2i-720p", "t2v-256p"], metavar="ROW"
    )
    parser.add_argument("--frames", type=int, help="of the videos, instead of 189")
    parser.add_argument("--steps", type=int, help="instead of 35")
    parser.add_argument("--measured-steps", type=int, help="after one other; omitted: all steps")
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=[512, 512], metavar=("PROMPT", "NEGATIVE")
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of each that count")
    parser.add_argument("--warm", type=int, default=1, help="rounds before them")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
