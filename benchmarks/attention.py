"""Attention with FP8 products on Hopper: the rate and the error of every kernel that is installed.

    python benchmarks/attention.py --compile-only    # whatever compiles itself at its first call
    python benchmarks/attention.py --json attention.json

Attention without a mask, at the shapes of Cosmos3-Nano. Each kernel runs in a process of its own, so
that one that faults or hangs costs its row alone; all of them load at the same time and are measured
one after the other. Errors are norms of differences from float32 over those of the result, for some
of the queries and all keys, with everything that was quantised: of normal noise, and of tensors as
models have them, whose scores spread more and whose keys and values have a mean in each channel.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clock import mean_seconds, synchronize
from machine import heading, provenance

HEADS, KV_HEADS, HEAD = 32, 8, 128
GROUP = HEADS // KV_HEADS
SHAPES = ("44160x44672", "18720x19232")  # of a video of 1280x720 and of 832x480, with 512 of text
SLICE = 256  # queries whose error is measured
TINY = (SLICE, 512)  # queries and keys of the first call
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
CASES = {  # of errors: the inputs, and whether the mean of keys and of values is subtracted
    "noise": ("noise", False, False),
    "means": ("means", False, False),
    "means, K smoothed": ("means", True, False),
    "means, K and V smoothed": ("means", True, True),
}
Inputs = tuple[Tensor, Tensor, Tensor]  # q [S, H, D], k and v [K, h, D], bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """What is subtracted from each key and value, float32 [h, D]; None where nothing is."""

    k: Tensor | None
    v: Tensor | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, *, keys: bool, values: bool) -> Means:
        return cls(
            k.mean(0, dtype=torch.float32) if keys else None,
            v.mean(0, dtype=torch.float32) if values else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """``attend`` takes what ``quantise`` made of q, k, v and the means, and gives [S, H, D].

    ``smooths`` says whether the means change anything, ``timed`` whether speed is what it is for.
    """

    quantise: Callable[[Tensor, Tensor, Tensor, Means], Any]
    attend: Callable[[Any], Tensor]
    smooths: bool = True
    timed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One kernel at one shape: seconds of the kernel alone, and with quantising and smoothed keys."""

    kernel: str
    shape: str
    work: float
    seconds: float | None = None
    whole_seconds: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    obstacle: str = ""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    if args.compile_only:
        for name, obstacle, seconds in loaded(args.kernels, device, args.timeout):
            print(f"{name}: {obstacle or 'ready'} after {seconds:.0f} s", flush=True)
        return 0
    measure = measured_apart if device.type == "cuda" else measured_here
    figures = list(measure(args.kernels, args.shapes, device, args.timeout))
    order = [(name, shape) for shape in args.shapes for name in args.kernels]
    figures.sort(key=lambda figure: order.index((figure.kernel, figure.shape)))
    facts = provenance(device, "nvidia-cudnn-frontend", "sageattention", "flash-attn-3")
    print(heading(facts), table(figures), sep="\n", flush=True)
    if args.json:
        report = {"machine": facts, "figures": [asdict(figure) for figure in figures]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


# Measuring one kernel


def figures_of(name: str, shapes: Sequence[str], device: torch.device) -> Iterator[Figure]:
    """At each shape; what goes wrong is the obstacle of its figure."""
    kernel = KERNELS[name]
    for shape in shapes:
        queries, keys = map(int, shape.split("x"))
        what: dict[str, Any] = {
            "kernel": name,
            "shape": shape,
            "work": 4.0 * queries * keys * HEADS * HEAD,
        }
        try:
            with torch.no_grad():
                what["errors"] = errors_of(kernel, keys, device)
                if kernel.timed:
                    inputs = drawn("noise", queries, keys, device)
                    ready = prepared(kernel, inputs, keys=False)
                    what["seconds"] = rate(lambda x=ready: kernel.attend(x), device)
                    del ready
                    what["whole_seconds"] = rate(
                        lambda x=inputs: kernel.attend(prepared(kernel, x, keys=kernel.smooths)),
                        device,
                    )
        except Exception as error:  # noqa: BLE001  any library's own kind: the row says it
            what["obstacle"] = one_line(error)
        yield Figure(**what)


def prepared(kernel: Kernel, inputs: Inputs, *, keys: bool, values: bool = False) -> Any:
    q, k, v = inputs
    return kernel.quantise(q, k, v, Means.of(k, v, keys=keys, values=values))


def errors_of(kernel: Kernel, keys: int, device: torch.device) -> dict[str, float]:
    """By CASES, of SLICE queries that see all keys."""
    errors = {}
    for case, (kind, smooth_keys, smooth_values) in CASES.items():
        if (smooth_keys or smooth_values) and not kernel.smooths:
            continue
        inputs = drawn(kind, SLICE, keys, device)
        result = kernel.attend(prepared(kernel, inputs, keys=smooth_keys, values=smooth_values))
        errors[case] = distance(result, exact(*inputs))
    return errors


def drawn(kind: str, queries: int, keys: int, device: torch.device) -> Inputs:
    """The same for every kernel. "means" have scores of deviation 2, and a mean in each channel of a head."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    q, k, v = (
        normal(queries, HEADS, HEAD),
        normal(keys, KV_HEADS, HEAD),
        normal(keys, KV_HEADS, HEAD),
    )
    if kind == "means":
        q, k, v = 2 * q, k + 3 * normal(KV_HEADS, HEAD), v + 0.5 * normal(KV_HEADS, HEAD)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, a head at a time."""
    heads = []
    for head in range(q.shape[1]):
        mine, theirs, values = q[:, head].float(), k[:, head // GROUP], v[:, head // GROUP]
        weights = (mine @ theirs.float().T / math.sqrt(HEAD)).softmax(-1)
        heads.append(weights @ values.float())
    return torch.stack(heads, dim=1)


def distance(result: Tensor, expected: Tensor) -> float:
    return float((result.float() - expected).norm() / expected.norm())


def rate(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, for about half a second of them after two warm ones."""
    for count in (2, 1):
        once = mean_seconds(call, device, count)
    return mean_seconds(call, device, min(200, max(3, int(0.5 / once))))


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[0][:160].replace("|", "/")


# A process for each kernel


def measured_here(
    names: Sequence[str], shapes: Sequence[str], device: torch.device, _timeout: float
) -> Iterator[Figure]:
    for name in names:
        yield from figures_of(name, shapes, device)


def measured_apart(
    names: Sequence[str], shapes: Sequence[str], device: torch.device, timeout: float
) -> Iterator[Figure]:
    """Every kernel makes its first call at once; then whichever is ready is measured, alone."""
    for name, process, pipe, hindrance in started(names, device, timeout):
        missing, obstacle = list(shapes), hindrance
        if not obstacle:
            pipe.send(shapes)
        while missing and not obstacle:
            if not pipe.poll(timeout):
                obstacle = f"no answer in {timeout:.0f} s"
                continue
            try:
                figure = pipe.recv()
            except EOFError:
                obstacle = ended(process)
                continue
            missing.remove(figure.shape)
            print(table([figure]).splitlines()[-1], file=sys.stderr, flush=True)
            yield figure
        process.kill()
        process.join()
        for shape in missing:
            yield Figure(kernel=name, shape=shape, work=0.0, obstacle=obstacle)


def loaded(
    names: Sequence[str], device: torch.device, timeout: float
) -> Iterator[tuple[str, str, float]]:
    """The first call of every kernel: its name, what hindered it, and the seconds until it was done."""
    since = time.monotonic()
    for name, process, _, obstacle in started(names, device, timeout):
        process.kill()
        yield name, obstacle, time.monotonic() - since


def started(
    names: Sequence[str], device: torch.device, timeout: float
) -> Iterator[tuple[str, multiprocessing.process.BaseProcess, Connection, str]]:
    """Processes in the order in which their first call is done, and what hindered it."""
    context = multiprocessing.get_context("spawn")
    until = time.monotonic() + timeout
    waiting: dict[Connection, tuple[str, multiprocessing.process.BaseProcess]] = {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, str(device)), daemon=True)
        process.start()
        theirs.close()
        waiting[ours] = name, process
    while waiting:
        ready = set(wait(list(waiting), max(0.0, until - time.monotonic())))
        pipe = next((pipe for pipe in waiting if pipe in ready), next(iter(waiting)))
        name, process = waiting.pop(pipe)
        obstacle = f"no first call in {timeout:.0f} s"
        if ready:
            try:
                obstacle = pipe.recv()
            except EOFError:
                obstacle = ended(process)
        since = time.monotonic()
        yield name, process, pipe, obstacle
        until += time.monotonic() - since  # the others wait for this one now


def ended(process: multiprocessing.process.BaseProcess) -> str:
    process.join()
    return f"the process ended with code {process.exitcode}"


def serve(pipe: Connection, name: str, device: str) -> None:
    """The process of one kernel: a small first call, then figures when shapes come."""
    kernel, where = KERNELS[name], torch.device(device)
    try:
        with torch.no_grad():
            kernel.attend(prepared(kernel, drawn("noise", *TINY, where), keys=True))
            synchronize(where)
    except Exception as error:  # noqa: BLE001  any library's own kind: the row says it
        pipe.send(one_line(error))
        return
    pipe.send("")
    for figure in figures_of(name, pipe.recv(), where):
        pipe.send(figure)


# Quantising: one scale for each head of the keys, and for all queries that share it


@dataclass(frozen=True, slots=True, eq=False)
class PerHead:
    """E4M3 q, k and v as they were laid out, float32 scales [h], and the mean that values lost."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    v_mean: Tensor | None


def with_mean(out: Tensor, v_mean: Tensor | None) -> Tensor:
    """The result [S, H, D] of values that lost their mean [h, D]."""
    return out if v_mean is None else out + v_mean.repeat_interleave(GROUP, 0).to(out.dtype)


def per_head(q: Tensor, k: Tensor, v: Tensor, means: Means) -> PerHead:
    q_scale = largest(q, None).view(KV_HEADS, -1).amax(1) / LARGEST
    k_scale = largest(k, means.k).amax(1) / LARGEST
    v_scale = largest(v, means.v).amax(1) / LARGEST
    return PerHead(
        e4m3(q, None, q_scale.repeat_interleave(GROUP)),
        e4m3(k, means.k, k_scale),
        e4m3(v, means.v, v_scale),
        *(q_scale, k_scale, v_scale, means.v),
    )


def per_tensor(q: Tensor, k: Tensor, v: Tensor, means: Means, *, repeated: bool) -> PerHead:
    """The same scale for all heads, which is all that cuDNN takes; ``repeated`` lays keys out for each query head."""
    pairs = ((q, None), (k, means.k), (v, means.v))
    scales = [largest(x, mean).amax() / LARGEST for x, mean in pairs]
    q8, k8, v8 = (
        e4m3(x, mean, scale.expand(x.shape[1]))
        for (x, mean), scale in zip(pairs, scales, strict=True)
    )
    if repeated:
        k8, v8 = (x.view(torch.uint8).repeat_interleave(GROUP, 1).view(E4M3) for x in (k8, v8))
    return PerHead(q8, k8, v8, *scales, means.v)


def largest(x: Tensor, mean: Tensor | None) -> Tensor:
    """The largest distance of x [N, H, D] from the mean, float32 [H, D], never zero."""
    low, high = (extreme.float() for extreme in torch.aminmax(x, dim=0))
    if mean is not None:
        low, high = low - mean, high - mean
    return torch.maximum(high, -low).clamp(min=1e-8)


def e4m3(x: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor:
    """E4M3 of (x - mean) / scale: the mean is float32 [H, D], the scale [H]."""
    mean = zeros_for(x) if mean is None else mean
    scale = scale[:, None].expand_as(mean).contiguous()
    if x.is_cuda:
        import fp8_attention

        return fp8_attention.quantised(x, mean, scale)
    return ((x.float() - mean) / scale).clamp(-LARGEST, LARGEST).to(E4M3)


def zeros_for(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)


# The kernels


def unchanged(q: Tensor, k: Tensor, v: Tensor, _means: Means) -> Inputs:
    return q, k, v


def vllm_flash(inputs: Inputs, **scales: Tensor) -> Tensor:
    """FlashAttention 3 as vLLM builds it: its FP8 adds every block's product to the sum in float32."""
    from kernels import flash

    return flash(3, *inputs, **scales)


def vllm_flash_fp8(x: PerHead) -> Tensor:
    names = {"q_descale": x.q_scale, "k_descale": x.k_scale, "v_descale": x.v_scale}
    scales = {name: scale[None] for name, scale in names.items()}
    return with_mean(vllm_flash((x.q, x.k, x.v), **scales), x.v_mean)


def upstream_flash_fp8(x: PerHead) -> Tensor:
    """FlashAttention 3 as its authors build it (package flash_attn_3): sums stay in the tensor cores."""
    import flash_attn_interface

    out: Tensor = flash_attn_interface.flash_attn_func(
        *(x.q[None], x.k[None], x.v[None]),
        q_descale=x.q_scale[None],
        k_descale=x.k_scale[None],
        v_descale=x.v_scale[None],
    )
    return with_mean(out[0], x.v_mean)


def flashinfer_fp8(x: PerHead) -> Tensor:
    """FlashInfer's own derivative of FlashAttention 3. Its first call compiles it, for minutes."""
    import flashinfer

    out: Tensor = flashinfer.single_prefill_with_kv_cache(
        *(x.q, x.k, x.v),
        scale_q=x.q_scale.repeat_interleave(GROUP),
        scale_k=x.k_scale,
        scale_v=x.v_scale,
        o_dtype=torch.bfloat16,
        backend="fa3",
    )
    return with_mean(out, x.v_mean)


def cudnn_fp8(x: PerHead) -> Tensor:
    """cuDNN's, whose results are E4M3 too on Hopper; here they are converted, which is timed with it."""
    graph, o8 = cudnn_graph(len(x.q), len(x.k), x.k.shape[1], x.q.device)
    graph({"q": x.q, "k": x.k, "v": x.v, "o": o8}, (x.q_scale, x.k_scale, x.v_scale))
    return with_mean(o8.to(torch.bfloat16) * x.v_scale, x.v_mean)


@cache
def cudnn_graph(
    queries: int, keys: int, kv_heads: int, device: torch.device
) -> tuple[Callable[..., None], Tensor]:
    """A built graph as a function of its tensors and scales, and where it writes.

    The result is at most as large as the largest value, so it is scaled as the values are.
    Probabilities, at most 1, are multiplied by 64 as in cuDNN's own tests.
    """
    import cudnn

    handle = cudnn.create_handle()
    cudnn.set_stream(handle, torch.cuda.current_stream(device).cuda_stream)
    fp8, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=fp8,
        intermediate_data_type=float32,
        compute_data_type=float32,
    )

    def sizes(length: int, heads: int) -> dict[str, Any]:
        stride = (length * heads * HEAD, HEAD, heads * HEAD, 1)
        return {"dim": (1, heads, length, HEAD), "stride": stride}

    shapes = {"q": (queries, HEADS), "k": (keys, kv_heads), "v": (keys, kv_heads)}
    nodes = {n: graph.tensor(name=n, data_type=fp8, **sizes(*at)) for n, at in shapes.items()}
    ones = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1)}
    factors = {
        name: graph.tensor(name=name, data_type=float32, **ones)
        for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    }
    o, _, s_most, o_most = graph.sdpa_fp8(
        **nodes,
        **factors,
        generate_stats=False,
        attn_scale=1 / math.sqrt(HEAD),
        use_causal_mask=False,
    )
    place = sizes(queries, HEADS)
    o.set_output(True).set_dim(place["dim"]).set_stride(place["stride"]).set_data_type(fp8)
    for most in (s_most, o_most):
        most.set_output(True).set_dim(ones["dim"]).set_stride(ones["stride"])
        most.set_data_type(float32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)
    spare = torch.empty(2, dtype=torch.float32, device=device)
    by_64 = torch.tensor([1 / 64, 64.0], dtype=torch.float32, device=device)

    def run(tensors: dict[str, Tensor], scales: Sequence[Tensor]) -> None:
        pack = {node: tensors[name] for name, node in nodes.items()}
        q_scale, k_scale, v_scale = scales
        values = (q_scale, k_scale, v_scale, by_64[0], by_64[1], 1 / v_scale)
        pack |= dict(zip(factors.values(), values, strict=True))
        pack |= {o: tensors["o"], s_most: spare[0], o_most: spare[1]}
        graph.execute(pack, workspace, handle=handle)

    return run, torch.empty(queries, HEADS, HEAD, dtype=E4M3, device=device)


def sage_quantised(q: Tensor, k: Tensor, v: Tensor, means: Means) -> tuple[Any, ...]:
    """INT8 queries and keys with a scale for each thread's rows, E4M3 values with one for each channel."""
    from sageattention.core import per_channel_fp8, per_thread_int8_triton

    blocks = {"BLKQ": 64, "WARPQ": 16, "BLKK": 128, "WARPK": 128}
    k_mean = None if means.k is None else means.k.to(k.dtype)[None, None]
    int8 = per_thread_int8_triton(q[None], k[None], k_mean, tensor_layout="NHD", **blocks)
    v = v if means.v is None else (v - means.v).to(v.dtype)
    v = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, -len(v) % 128))
    v8, v_scale, _ = per_channel_fp8(v[None], tensor_layout="NHD", smooth_v=False)
    return (*int8, v8, v_scale, means.v)


def sage(x: tuple[Any, ...]) -> Tensor:
    """SageAttention 2++ for Hopper, as sageattn_qk_int8_pv_fp8_cuda_sm90 calls it."""
    from sageattention.core import sm90_compile

    q, q_scale, k, k_scale, v, v_scale, v_mean = x
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    sm90_compile.qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf(
        *(q, k, v, out, q_scale, k_scale, v_scale),
        *(0, 0, 3),  # [1, S, H, D], not causal, a scale for each thread
        *(1 / math.sqrt(HEAD), 0),
    )
    return with_mean(out[0], v_mean)


def triton_quantised(tile: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, means: Means) -> Any:
    from fp8_attention import Tile, quantise

    k_mean, v_mean = (zeros_for(k) if mean is None else mean for mean in (means.k, means.v))
    return quantise(q, k, v, k_mean=k_mean, v_mean=v_mean, tile=Tile(**tile))


def triton(x: Any) -> Tensor:
    from fp8_attention import attend

    return attend(x)


def plain(x: PerHead) -> Tensor:
    """The same FP8 values in float32 arithmetic: the part of the error that is not the kernel's."""
    q, k, v = (
        tensor.float() * scale.repeat_interleave(tensor.shape[1] // KV_HEADS)[None, :, None]
        for tensor, scale in ((x.q, x.q_scale), (x.k, x.k_scale), (x.v, x.v_scale))
    )
    return with_mean(exact(q, k, v), x.v_mean)


def triton_kernel(**tile: Any) -> Kernel:
    return Kernel(quantise=partial(triton_quantised, tile), attend=triton)


KERNELS = {
    "FlashAttention 3 of vLLM, bfloat16": Kernel(
        quantise=unchanged, attend=vllm_flash, smooths=False
    ),
    "FlashAttention 3 of vLLM": Kernel(quantise=per_head, attend=vllm_flash_fp8),
    "FlashAttention 3, upstream": Kernel(quantise=per_head, attend=upstream_flash_fp8),
    "FlashInfer": Kernel(quantise=per_head, attend=flashinfer_fp8),
    "cuDNN": Kernel(quantise=partial(per_tensor, repeated=False), attend=cudnn_fp8),
    "cuDNN, keys repeated": Kernel(quantise=partial(per_tensor, repeated=True), attend=cudnn_fp8),
    "SageAttention 2++": Kernel(quantise=sage_quantised, attend=sage),
    "Triton, 128 queries": triton_kernel(),
    "Triton, 64 queries": triton_kernel(queries=64, warps=4),
    "Triton, 64 queries, exact sums": triton_kernel(queries=64, warps=4, exact=True),
    "FP8 values in float32": Kernel(quantise=per_head, attend=plain, timed=False),
}


def table(figures: list[Figure]) -> str:
    """Markdown."""
    head = ["queries x keys", "kernel", "ms", "TFLOP/s", "TFLOP/s with quantising"]
    columns = [*head, *(f"error: {case}" for case in CASES)]
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for figure in figures:
        rates = [
            f"{figure.work / seconds / 1e12:.0f}" if seconds else ""
            for seconds in (figure.seconds, figure.whole_seconds)
        ]
        errors = [f"{figure.errors[case]:.4f}" if case in figure.errors else "" for case in CASES]
        ms = f"{1000 * figure.seconds:.2f}" if figure.seconds else ""
        cells = [figure.shape, figure.kernel, ms, *rates, *errors]
        if figure.obstacle:
            cells[-1] = f"{cells[-1]} {figure.obstacle}".strip()
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="NAME"
    )
    parser.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), help="queries x keys", metavar="QxK"
    )
    parser.add_argument(
        "--compile-only", action="store_true", help="a small first call of each, and no figures"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        help="seconds for all first calls, and for each figure",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
