"""One request from plan to output in five calls: plan, encode, step, decode, finish.

The calls work on one explicit `State` and nothing loops over steps below them: whoever calls may
stop, report or serve another request between two steps. On several ranks each rank makes the same
calls; only the first one gets pixels out. Everything that distinguishes one kind of request from
another is in the streams of its plan.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vllm_cosmos3 import conditions, prompts
from vllm_cosmos3.config import EngineConfig, ModelConfig, read_config
from vllm_cosmos3.inventory import sound_tensors, transformer_tensors, vae_tensors
from vllm_cosmos3.memory import decided, usual_work, work_of
from vllm_cosmos3.memory.estimate import TEXT_BYTES
from vllm_cosmos3.models.sound import SoundVAE
from vllm_cosmos3.models.texts import RecentTexts
from vllm_cosmos3.models.transformer import Context, Transformer, join, weight_table
from vllm_cosmos3.models.vae import VideoVAE, to_frames, to_pixels
from vllm_cosmos3.models.weights import Table, identity_table, load_dummy_weights, load_weights
from vllm_cosmos3.output import Output, Sample
from vllm_cosmos3.plan import Plan, StreamPlan
from vllm_cosmos3.request import GenerateRequest
from vllm_cosmos3.runtime.attention import make_attend
from vllm_cosmos3.runtime.budget import Budget, Promise, memory_of
from vllm_cosmos3.runtime.graphs import Recording, launches_matter
from vllm_cosmos3.runtime.mesh import Mesh
from vllm_cosmos3.sampling import positions
from vllm_cosmos3.sampling.guidance import (
    branches_of_rank,
    guidance_per_step,
    guide,
    idle_ranks,
)
from vllm_cosmos3.sampling.noise import initial_noise, step_noise
from vllm_cosmos3.sampling.packing import (
    Stream,
    free_frames,
    free_rows,
    patch_grid,
    start_stream,
)
from vllm_cosmos3.sampling.schedule import Schedule, make_schedule
from vllm_cosmos3.sampling.solvers import SOLVERS
from vllm_cosmos3.sampling.solvers import State as SolverState

JOINED_TOKENS = 2048  # of all branches, up to which one forward is faster than one for each

Forward = Callable[..., Sequence[tuple[Tensor, ...]]]  # of the timestep and each stream's x


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """The given part of a stream, on the device: its values, and where the rest is free."""

    clean: Tensor
    free: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class State:
    """All there is about one request in flight. ``index`` counts steps over all its samples."""

    plan: Plan
    promise: Promise
    schedule: Schedule
    guidance: tuple[tuple[float], ...]  # for each step, one scale: see sampling.guidance
    timers: Timers
    timesteps: Tensor  # the schedule's, on the device: a copy in each step would wait for the GPU
    index: int = 0
    contexts: dict[int, Context] = field(default_factory=dict)  # by branch
    forwards: dict[tuple[int, ...], Forward] = field(default_factory=dict)  # by branches
    known: tuple[Known, ...] = ()  # by stream, like all tuples below
    streams: tuple[Stream, ...] = ()
    solver: tuple[SolverState, ...] = ()
    denoised: list[tuple[Tensor, ...]] = field(default_factory=list)  # by sample
    samples: list[Sample] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every step of every sample was made."""
        return self.index == self.plan.steps


class Pipeline:
    """The models of one checkpoint on one rank, and the five calls. Build it with ``load``."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: prompts.Tokenizer,
        transformer: Transformer,
        vae: VideoVAE,
        sound: SoundVAE | None,
        mesh: Mesh,
        device: torch.device,
        config: EngineConfig,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.transformer, self.vae, self.sound = transformer, vae, sound
        self.mesh, self.device = mesh, device
        self.texts = RecentTexts(TEXT_BYTES)
        self.budget = Budget(model, config, mesh.world, device)

    @classmethod
    def load(cls, config: EngineConfig, mesh: Mesh, device: torch.device | str) -> Pipeline:
        """Read the checkpoint and fill this rank's part of every model.

        Raises:
            CheckpointError: a file is missing, corrupt or of another architecture.
        """
        device = torch.device(device)
        model = read_config(config.model, config.checkpoint_kind)
        tokenizer = prompts.load_tokenizer(config.model)
        config = decided(model, config, usual_work(model), memory_of(device, config.memory_limit))
        dtype = getattr(torch, config.dtype)
        attend = make_attend(
            config.attention_backend,
            device=device,
            dtype=dtype,
            head_dim=model.transformer.head_dim,
        )
        host, text_rests = torch.device("cpu"), config.und_residency == "host"
        transformer = Transformer(
            model.transformer,
            mesh,
            attend,
            dtype=dtype,
            device=device,
            text_device=host if text_rests else device,
            layer_device=host if config.layerwise_offload else device,
        )
        shapes = transformer_tensors(model.transformer)
        _fill(transformer, weight_table(model.transformer), config, "transformer", shapes, device)
        transformer.rest_on_host(text=text_rests, layers=config.layerwise_offload)
        with device:
            vae = VideoVAE(model.vae, mesh.world, config.parallel.vae_parallel).to(dtype)
        shapes = vae_tensors(model.vae)
        _fill(vae, identity_table(shapes), config, "vae", shapes, device)
        if device.type != "cpu":
            vae.channels_last()
        sound = None
        if model.sound is not None:
            with device:
                sound = SoundVAE(model.sound, encoder=False)
            shapes = sound_tensors(model.sound)
            table = identity_table({n: s for n, s in shapes.items() if n.startswith("decoder.")})
            _fill(sound, table, config, "sound_tokenizer", shapes, device)
        return cls(model, tokenizer, transformer, vae, sound, mesh, device, config)

    def plan(self, request: GenerateRequest) -> Plan:
        """Check a request against this checkpoint. The same on every rank; touches no weight."""
        return conditions.make_plan(request, self.model, self.tokenizer)

    @torch.inference_mode()
    def encode(self, plan: Plan) -> State:
        """Read the prompts, once for all samples, and encode what is given of each stream.

        Raises:
            OutOfMemory: the request does not fit beside those in flight.
        """
        promise = self.budget.promise(work_of(plan), self.texts.nbytes, self.texts.clear)
        schedule = make_schedule(
            plan.schedule,
            steps=plan.num_inference_steps,
            shift=plan.flow_shift,
            scheduler=self.model.scheduler,
        )
        scales = guidance_per_step(schedule.timesteps, plan.guidance_scale, plan.guidance_interval)
        state = State(
            plan=plan,
            promise=promise,
            schedule=schedule,
            guidance=tuple((scale,) for scale in scales),
            timers=Timers(self.device),
            timesteps=torch.tensor(schedule.timesteps, dtype=torch.float32, device=self.device),
        )
        with state.timers.phase("text"):
            for branch in branches_of_rank(state.guidance, self.mesh.cfg):
                state.contexts[branch] = self._understand(plan, branch)
        with state.timers.phase("vae_encode"):
            state.known = tuple(self._known(stream) for stream in plan.streams)
        return state

    @torch.inference_mode()
    def step(self, state: State) -> None:
        """One denoising step of one sample. The first step of a sample draws its noise."""
        sample, index = divmod(state.index, state.plan.num_inference_steps)
        with state.timers.phase("denoise", paced=True):
            if index == 0:
                self._start(state, state.plan.seeds[sample])
            self._advance(state, state.plan.seeds[sample], index)
        state.index += 1
        if index + 1 == state.plan.num_inference_steps:
            state.denoised.append(tuple(stream.x for stream in state.streams))
            state.streams, state.solver = (), ()

    @torch.inference_mode()
    def decode(self, state: State) -> None:
        """Turn the latents of every sample into pixels and sound on the host."""
        for branch, context in state.contexts.items():
            self.texts.keep(tuple(state.plan.token_ids[branch]), *context.texts)
        state.contexts.clear()
        state.forwards.clear()
        for seed, latents in zip(state.plan.seeds, state.denoised, strict=True):
            named = {stream.name: x for stream, x in zip(state.plan.streams, latents, strict=True)}
            make = self._decoded if state.plan.decoded else self._undecoded
            state.samples.append(make(state, seed, named))
        state.denoised.clear()

    def finish(self, state: State) -> Output:
        """The result, with the seconds that each phase took."""
        timings = state.timers.totals()
        timings["per_step"] = timings["denoise"] / state.plan.steps
        return Output(
            samples=tuple(state.samples),
            fps=state.plan.fps,
            sample_rate=self.model.sound.sampling_rate if self.model.sound else None,
            timings=timings,
            effective=state.plan.effective,
            warnings=(*state.plan.warnings, *idle_ranks(state.guidance, self.mesh.cfg)),
            peak_memory=peak_memory(self.device),
        )

    # Encoding.

    def _understand(self, plan: Plan, branch: int) -> Context:
        """Keys and values of one branch's text, and the positions of all that follows it."""
        ids = plan.token_ids[branch]
        start = positions.generation_start(len(ids), self.model.transformer)
        positions_3S = torch.cat([self._positions(s, start) for s in plan.streams], dim=1)
        text = self.texts.find(tuple(ids))
        if text is None:
            text = self.transformer.understand(torch.tensor(ids, device=self.device))
        return Context(texts=(text,), rope=self.transformer.rope(positions_3S))

    def _positions(self, stream: StreamPlan, start: float) -> Tensor:
        config = self.model.transformer
        if stream.name == "sound":
            return positions.sound_positions(stream.length, start=start, config=config)
        if stream.name == "action":
            return positions.action_positions(
                stream.length, start=start, fps=stream.rate, first=stream.first, config=config
            )
        frames, rows, columns = patch_grid(stream.shape, config.latent_patch_size)
        return positions.vision_positions(
            frames, rows, columns, start=start, fps=stream.rate, config=config
        )

    def _known(self, stream: StreamPlan) -> Known:
        clean = torch.zeros(stream.shape, device=self.device)
        if stream.name == "sound":
            free = torch.ones((1, stream.length), dtype=torch.bool)
            return Known(clean=clean, free=free.to(self.device))
        if stream.name == "action":
            assert stream.source is not None  # zeros, where nothing is given
            clean = torch.from_numpy(stream.source).to(self.device)
            free = free_rows(stream.shape, stream.known, stream.channels)
            return Known(clean=clean, free=free.to(self.device))
        if stream.source is not None:
            pixels = torch.from_numpy(stream.source).to(self.device)
            given = self.vae.encode(to_pixels(pixels))
            height, width = stream.shape[3:]  # of a canvas that was filled up, the picture
            for frame in stream.known:
                clean[:, :, frame] = given[:, :, frame, :height, :width]
        return Known(clean=clean, free=free_frames(stream.length, stream.known).to(self.device))

    # Denoising.

    def _start(self, state: State, seed: int) -> None:
        plan = state.plan
        shapes = {stream.name: stream.shape for stream in plan.streams}
        noise = initial_noise(shapes, seed=seed, rule=plan.noise)
        noise |= {name: torch.from_numpy(x) for name, x in plan.initial.items()}
        state.streams = tuple(
            start_stream(
                stream.name,
                noise=noise[stream.name].to(self.device),
                clean=known.clean,
                free=known.free,
            )
            for stream, known in zip(plan.streams, state.known, strict=True)
        )
        state.solver = tuple(SolverState() for _ in plan.streams)

    def _advance(self, state: State, seed: int, index: int) -> None:
        """Predict, guide, step, and put back what is known. The solver works in float32."""
        plan, schedule = state.plan, state.schedule
        predict = partial(self._predict, state, state.timesteps[index])
        latents = tuple(stream.x for stream in state.streams)
        velocities = guide(predict, state.guidance[index], self.mesh.cfg, latents)
        solver = SOLVERS[plan.solver]
        fresh: dict[str, Tensor] = {}
        if solver.draws_noise:
            shapes = {stream.name: stream.shape for stream in plan.streams}
            fresh = step_noise(shapes, seed=seed, rule=plan.noise, index=index)
        streams, remembered = [], []
        for stream, v, before in zip(state.streams, velocities, state.solver, strict=True):
            noise = fresh[stream.name].to(self.device) if fresh else None
            x, after = solver.step(stream.x, v, before, schedule.sigmas, index, noise)
            streams.append(stream.restored(x))
            remembered.append(after)
        state.streams, state.solver = tuple(streams), tuple(remembered)

    def _predict(
        self, state: State, timestep: Tensor, branches: Sequence[int]
    ) -> list[tuple[Tensor, ...]]:
        """The velocities of some branches: evaluated together where the tokens are few."""
        tokens = state.contexts[branches[0]].rope.length
        group = len(branches) if tokens * len(branches) <= JOINED_TOKENS else 1
        velocities: list[tuple[Tensor, ...]] = []
        for first in range(0, len(branches), group):
            forward = self._forward(state, tuple(branches[first : first + group]))
            velocities += forward(timestep, *(stream.x for stream in state.streams))
        return velocities

    def _forward(self, state: State, branches: tuple[int, ...]) -> Forward:
        """The transformer for these branches: made once, as it may be a recording."""
        if branches not in state.forwards:
            context = join([state.contexts[branch] for branch in branches])
            forward = partial(_evaluate, self.transformer, state.streams, context, state.plan)
            tokens = context.rope.table.shape[0]
            recorded = not self.config.layerwise_offload and launches_matter(
                tokens, state.plan.steps, self.mesh.world, self.device
            )
            state.forwards[branches] = Recording(forward) if recorded else forward
        return state.forwards[branches]

    # Decoding.

    def _undecoded(self, state: State, seed: int, latents: dict[str, Tensor]) -> Sample:
        with state.timers.phase("to_cpu"):
            arrays = {name: x.cpu().numpy() for name, x in latents.items()}
        return Sample(seed=seed, latents=arrays, action=_actions(state.plan, latents))

    def _decoded(self, state: State, seed: int, latents: dict[str, Tensor]) -> Sample:
        first = self.mesh.world.rank == 0
        with state.timers.phase("vae_decode"):
            # Bytes at once: a chunk of floats lives only until the next one.
            chunks = [to_frames(chunk) for chunk in self.vae.decode(latents["vision"]) if first]
        if not first:
            return Sample(seed=seed)
        waveform = None
        with state.timers.phase("sound"):
            if self.sound is not None and "sound" in latents:
                waveform = self.sound.decode(latents["sound"])
        with state.timers.phase("to_cpu"):
            pixels_THWC = torch.cat(chunks).cpu().numpy()
            sound = None if waveform is None else waveform.float().cpu().numpy()
        if len(pixels_THWC) == 1:
            return Sample(seed=seed, image=pixels_THWC[0])
        action = _actions(state.plan, latents)
        return Sample(seed=seed, video=pixels_THWC, sound=sound, action=action)


class Timers:
    """Seconds per phase of one request, measured on the device without stopping it.

    An accelerator is asked for the times at the end. A ``paced`` phase lets the host run at most
    one phase ahead, so that progress tells the truth and a cancelled request stops soon.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, torch.Event, torch.Event]] = []
        self._seconds: dict[str, float] = dict.fromkeys(
            ("text", "vae_encode", "denoise", "vae_decode", "sound", "to_cpu"), 0.0
        )

    @contextmanager
    def phase(self, name: str, *, paced: bool = False) -> Iterator[None]:
        if self._device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        if paced and self._spans:
            self._spans[-1][2].synchronize()
        before, after = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._spans.append((name, before, after))

    def totals(self) -> dict[str, float]:
        """Seconds of every phase so far. Waits for the device."""
        for name, before, after in self._spans:
            after.synchronize()
            self._seconds[name] += before.elapsed_time(after) / 1000
        self._spans.clear()
        return dict(self._seconds)


def _evaluate(
    transformer: Transformer,
    streams: Sequence[Stream],
    context: Context,
    plan: Plan,
    timestep: Tensor,
    *xs: Tensor,
) -> tuple[tuple[Tensor, ...], ...]:
    """The transformer as a function of what changes from step to step."""
    now = [replace(stream, x=x) for stream, x in zip(streams, xs, strict=True)]
    velocities: tuple[tuple[Tensor, ...], ...] = transformer(now, context, timestep, plan.domain_id)
    return velocities


def _actions(plan: Plan, latents: dict[str, Tensor]) -> np.ndarray | None:
    """The actions that a request has made."""
    return None if plan.actions is None else plan.actions.read(latents["action"].cpu().numpy())


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on an accelerator, resident in this process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_allocated(device))


def _fill(
    module: torch.nn.Module,
    table: Table,
    config: EngineConfig,
    folder: str,
    shapes: dict[str, tuple[int, ...]],
    device: torch.device,
) -> None:
    if config.load_format == "dummy":
        load_dummy_weights(module, table, shapes, device=device)
    else:
        load_weights(module, table, config.model / folder, shapes)
    module.eval()
