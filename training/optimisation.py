"""The training loop that all parts share: Muon and AdamW, EMA, each kind of step as one CUDA graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from training import ranks

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024
_TOGETHER = 10  # steps between looks at the clock, at which ranks also average their weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast. ``steps`` ends a run as well as ``seconds``, whichever is first."""

    seconds: float
    rate: float  # of AdamW
    muon_rate: float = 0.0  # 0: AdamW for all
    steps: int | None = None
    warmup: int = 200
    hold: float = 0.0  # share of the run at the full rate, before the cosine
    decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    label: str = ""
    every: int = 500

    def factor(self, done: int, share: float) -> float:
        """Of the rates, after ``done`` steps and ``share`` of the run."""
        tail = max(0.0, share - self.hold) / (1 - self.hold)
        return min(1.0, (done + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, tail)))


class Muon:
    """Momentum with orthogonalised updates, for matrices; those of one shape go together.

    An update has the size of AdamW's: 0.2 for each value (Liu et al. 2025).
    """

    def __init__(self, matrices: Sequence[nn.Parameter], rate: Tensor, decay: float) -> None:
        self.rate, self.decay, self.momentum = rate, decay, 0.95
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(matrix.shape), []).append(matrix)
        self.groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device))
            for shape, group in shapes.items()
        ]

    @torch.no_grad()
    def step(self) -> None:
        for group, buffer in self.groups:
            gradient = torch.stack([p.grad for p in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp(buffer, self.momentum))
            update = update.float() * (0.2 * max(update.shape[1:]) ** 0.5)
            for p, u in zip(group, update.unbind(), strict=True):
                p.mul_(1 - self.rate * self.decay)
                p.sub_(u * self.rate)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """About the nearest orthogonal matrices [N, rows, columns], by Newton-Schulz in bfloat16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of step: its loss reads static buffers; it is taken about ``every`` so many steps."""

    loss: Callable[[], Tensor]
    every: int = 1


def train(
    named: Sequence[tuple[str, nn.Parameter]],
    kinds: Sequence[Kind],
    plan: Plan,
    save: Callable[[], None] | None = None,
    save_every: float = 120.0,
) -> dict[str, object]:
    """Train; the parameters end as their average.

    Of several kinds of steps the one goes that has waited longest for its turn. ``save`` is called from time to
    time while the parameters are their average. Under torchrun each rank takes the same kinds of steps on its own
    data, and all end with the same parameters.
    """
    params = [p for _, p in named if p.requires_grad]
    device = params[0].device
    cuda = device.type == "cuda"
    matrices = [p for n, p in named if p.requires_grad and plan.muon_rate and _is_hidden(n, p)]
    chosen = {id(p) for p in matrices}
    others = [p for p in params if id(p) not in chosen]
    rate, muon_rate, new = (torch.zeros((), device=device) for _ in range(3))
    muon = Muon(matrices, muon_rate, plan.decay) if matrices else None
    graphed = {"lr": rate, "fused": True, "capturable": True} if cuda else {"lr": 0.0}
    adam = torch.optim.AdamW(
        others, betas=(0.9, 0.98), eps=1e-8, weight_decay=plan.decay, **graphed
    )
    ranks.begin_equal(params)
    average = [p.detach().clone() for p in params]
    held = torch.zeros(len(kinds), device=device)

    def step(index: int) -> None:
        for p in params:
            p.grad = None
        loss = kinds[index].loss()
        loss.backward()
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(params, plan.clip, foreach=True)
        adam.step()
        if muon:
            muon.step()
        with torch.no_grad():
            change = torch._foreach_sub(params, average)
            torch._foreach_mul_(change, new)
            torch._foreach_add_(average, change)
            held[index].copy_(loss.detach())

    runs: list[Callable[[], None]] = [partial(step, index) for index in range(len(kinds))]
    began = time.time()
    if cuda:
        runs = _captured(step, len(kinds), params)
    print(f"{plan.label}: ready after {time.time() - began:.1f} s", flush=True)

    began, saved, log, done = time.time(), time.time(), [], 0
    clock = torch.zeros(1, device=device)
    taken = [-kind.every for kind in kinds]  # when each kind of step was taken last
    while True:
        if done % _TOGETHER == 0:
            if cuda:
                torch.cuda.synchronize()  # so that the clock is true
            clock.fill_(time.time() - began)
            ranks.average([clock, *params])
            used = float(clock)
        share = max(used / plan.seconds, done / plan.steps if plan.steps else 0.0)
        if share >= 1:
            break
        factor = plan.factor(done, share)
        muon_rate.fill_(plan.muon_rate * factor)
        rate.fill_(plan.rate * factor)
        if not cuda:
            adam.param_groups[0]["lr"] = plan.rate * factor
        new.fill_(max(1 - plan.ema, 5 / (done + 5)))
        waited = [(done - last) / kind.every for last, kind in zip(taken, kinds, strict=True)]
        index = max(range(len(kinds)), key=lambda i: (waited[i], i))
        taken[index] = done
        runs[index]()
        done += 1
        if done % plan.every == 0 or done in (20, 100):
            values = [round(v, 5) for v in held.tolist()]
            log.append([done, round(time.time() - began, 1), *values])
            print(f"{plan.label} step {done} {log[-1][1]} s loss {values}", flush=True)
            if not all(map(math.isfinite, values)):
                raise SystemExit(f"{plan.label}: loss is {values}")
        if save and time.time() - saved > save_every and done % 20 == 0:
            _swap(params, average)
            save()
            _swap(params, average)
            saved = time.time()
    ranks.average(average)
    _swap(params, average)
    seconds = time.time() - began
    print(f"{plan.label}: {done} steps in {seconds:.1f} s, {done / seconds:.1f}/s", flush=True)
    return {"label": plan.label, "steps": done, "seconds": round(seconds, 1), "log": log}


def _captured(
    step: Callable[[int], None], count: int, params: Sequence[nn.Parameter]
) -> list[Callable[[], None]]:
    """Each kind of step as a CUDA graph. The rates are zero meanwhile: nothing moves."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(count):
            for _ in range(3):
                step(index)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    runs, pool = [], None
    for index in range(count):
        for p in params:
            p.grad = None
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread may ask for events meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step(index)
        pool = graph.pool()
        runs.append(graph.replay)
    return runs


@torch.no_grad()
def _swap(params: Sequence[Tensor], average: Sequence[Tensor]) -> None:
    for p, a in zip(params, average, strict=True):
        kept = p.clone()
        p.copy_(a)
        a.copy_(kept)


def _is_hidden(name: str, p: nn.Parameter) -> bool:
    """A matrix inside of the layers: neither a table nor what reads latents or writes them."""
    return p.ndim == 2 and ".layers." in f".{name}" and min(p.shape) >= 32
