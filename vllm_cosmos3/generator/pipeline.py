"""One request from plan to output in four calls: encode, step, decode, finish.

The calls work on one explicit `RequestState` and nothing loops over steps below them: whoever calls may
stop, report or serve another request between two steps. Requests of one batch may share their steps. On
several ranks each rank makes the same calls; only the first one gets pixels out. Everything that
distinguishes one kind of request from another is in the streams of its plan.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.latents import pixel_frames
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.generator.frames import on_host, shown_frames, written
from vllm_cosmos3.generator.loading import LoadedModels, load_models
from vllm_cosmos3.generator.memory import work_of
from vllm_cosmos3.generator.memory.estimate import TEXT_BYTES
from vllm_cosmos3.generator.memory.reservation import MemoryBudget, Reservation
from vllm_cosmos3.generator.models.modalities import MODALITIES
from vllm_cosmos3.generator.models.text_cache import TextKVCache
from vllm_cosmos3.generator.models.transformer import Context
from vllm_cosmos3.generator.models.vae import to_frames, to_pixels
from vllm_cosmos3.generator.movable import MovableWeights
from vllm_cosmos3.generator.output import Output, Sample
from vllm_cosmos3.generator.prediction import Predictor, stacked
from vllm_cosmos3.generator.preview import reduced, seconds_and_jpeg
from vllm_cosmos3.generator.sampling.guidance import (
    Scales,
    branches_needed,
    branches_of_rank,
    guidance_per_step,
    guide,
    idle_ranks,
)
from vllm_cosmos3.generator.sampling.noise import initial_noise, step_noise
from vllm_cosmos3.generator.sampling.packing import Stream, filled_up, start_stream
from vllm_cosmos3.generator.sampling.schedule import Schedule, make_schedule
from vllm_cosmos3.generator.sampling.solvers import (
    SOLVERS,
    SolverState,
    stacked_states,
    unstacked_states,
)
from vllm_cosmos3.generator.text import keep_texts, read_prompts
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.parallel.timers import Timers
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.plan import Plan, StreamPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """The given part of a stream, on the device: its values, and where the rest is free."""

    clean_latent: Tensor
    denoise_mask: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """State of one request in flight. ``index`` counts steps over all its samples.

    ``streams`` and ``solver`` have those of each sample that is denoised now, one after the other.
    """

    plan: Plan
    reservation: Reservation
    schedule: Schedule
    guidance: tuple[Scales, ...]  # for each step: see sampling.guidance
    timers: Timers
    timesteps: Tensor  # the schedule's, on the device: a copy in each step would wait for the GPU
    contexts: dict[int, Context]  # by branch
    predictor: Predictor
    index: int = 0
    reused: int = 0  # steps that were not computed
    batch_size: int = 1  # most samples in one forward, of this and other requests
    known: tuple[Conditioning, ...] = ()  # by stream, like all tuples below
    streams: tuple[Stream, ...] = ()
    solver: tuple[SolverState, ...] = ()
    denoised: list[dict[str, Tensor]] = field(default_factory=list)  # by sample and chunk
    frames: list[Tensor] = field(default_factory=list)  # of all chunks but each sample's last
    samples: list[Sample] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every step of every sample was made."""
        return self.index == self.plan.steps

    @property
    def place(self) -> int:
        """Chunks that are denoised, of all samples; those that are made together count once."""
        return self.index // self.plan.parameters.num_inference_steps

    @property
    def step(self) -> int:
        """Steps of the chunk at work that are made."""
        return self.index % self.plan.parameters.num_inference_steps

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the samples at work."""
        first = self.place // len(self.plan.chunks) * self.plan.together
        return self.plan.seeds[first : first + self.plan.together]


class Pipeline(MovableWeights):
    """The models of one checkpoint on one rank, and the four calls. Build it with ``load``."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: prompts.Tokenizer,
        models: LoadedModels,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        super().__init__(models)
        self.model, self.tokenizer, self.config = model, tokenizer, models.config
        self.transformer, self.vae, self.coders = models.transformer, models.vae, models.coders
        self.mesh, self.device = mesh, device
        self.texts = TextKVCache(TEXT_BYTES)
        self.budget = MemoryBudget(model, models.config, mesh.world, device)

    @classmethod
    def load(cls, config: EngineConfig, mesh: Mesh, device: torch.device | str) -> Pipeline:
        """Read the checkpoint and fill this rank's part of every model.

        Raises:
            CheckpointError: a file is missing, corrupt or of another architecture.
            OutOfMemory: the weights do not fit into the device.
        """
        device = torch.device(device)
        model = config.read_model()
        tokenizer = prompts.load_tokenizer(config.model)
        return cls(model, tokenizer, load_models(model, config, mesh, device), mesh, device)

    def forget(self) -> None:
        self.texts.clear()

    @torch.inference_mode()
    def encode(self, plan: Plan) -> RequestState:
        """Read the prompts, once for all samples, and encode what is given of each stream.

        Raises:
            OutOfMemory: the request does not fit beside those in flight.
        """
        reservation = self.budget.reserve(work_of(plan), self.texts.nbytes, self.texts.clear)
        schedule = make_schedule(
            plan.parameters.schedule,
            steps=plan.parameters.num_inference_steps,
            shift=plan.parameters.flow_shift,
            scheduler=self.model.scheduler,
        )
        guidance, timers = _guidance(plan, schedule), Timers(self.device)
        timesteps = torch.tensor(schedule.timesteps, dtype=torch.float32, device=self.device)
        with timers.phase("text"):
            branches = branches_of_rank(guidance, self.mesh.cfg)
            contexts = read_prompts(plan, branches, self.transformer, self.texts)
        with timers.phase("vae_encode"):
            known = tuple(self._known(stream) for stream in plan.streams)
        return RequestState(
            plan=plan,
            reservation=reservation,
            schedule=schedule,
            guidance=guidance,
            timers=timers,
            timesteps=timesteps,
            contexts=contexts,
            predictor=self._predictor(plan, contexts),
            known=known,
        )

    def step(self, state: RequestState) -> int:
        """One denoising step of one sample, or of those that are made together.

        Returns how many steps of the request were reused so far rather than computed.
        """
        reused: int
        (reused,) = self.step_together([state])
        return reused

    @torch.inference_mode()
    def step_together(self, states: Sequence[RequestState]) -> list[int]:
        """The same of several requests of one batch in one forward. All are at the same step.

        The first step of a sample draws its noise.
        """
        first = states[0]
        chunk = first.place % len(first.plan.chunks)
        for state in states:
            if state.step == 0 and state.plan.later_chunks:
                self._take_over(state, chunk)
        with ExitStack() as timing:
            for state in states:
                timing.enter_context(state.timers.phase("denoise", paced=True))
            for state in states:
                if state.step == 0:
                    self._start(state, chunk)
            self._advance(states, chunk)
        samples = sum(len(state.seeds) for state in states)
        for state in states:
            state.batch_size = max(state.batch_size, samples)
            self._leave(state)
        return [state.reused for state in states]

    @torch.inference_mode()
    def preview(self, state: RequestState) -> tuple[float, bytes] | None:
        """Seconds and a JPEG: one frame of the estimated video, decoded small, on the first rank.

        None where no video is generated, or nothing of it is estimated yet. Its memory is part of what
        is reserved for the decoding of the whole.
        """
        planned = state.plan.chunks[state.place % len(state.plan.chunks)]
        moving = (place for place, stream in enumerate(planned) if stream.generated)
        for place, solver in zip(moving, state.solver, strict=False):
            if planned[place].name == "vision" and solver.estimates:
                clean = state.streams[place].apply_clean(solver.estimates[0]).x
                return seconds_and_jpeg(self.vae, reduced(clean), self.mesh.world)
        return None

    @torch.inference_mode()
    def decode(self, state: RequestState, clip: Clip | None = None) -> None:
        """Turn the latents of every sample into pixels and sound on the host.

        The video of a request for a single one is written to ``clip`` meanwhile.
        """
        keep_texts(state.plan, state.contexts, self.texts)
        state.contexts.clear()
        state.predictor.clear()
        plan, count = state.plan, len(state.plan.chunks)
        samples = [
            state.denoised[place : place + count] for place in range(0, len(state.denoised), count)
        ]
        if plan.decoded:
            self._decode_all(state, [chunks[-1] for chunks in samples], clip)
        else:
            for seed, chunks in zip(plan.seeds, samples, strict=True):
                state.samples.append(self._undecoded(state, seed, chunks))
        state.denoised.clear()
        state.frames.clear()

    def finish(self, state: RequestState) -> Output:
        """The result, with the seconds that each phase took."""
        timings = state.timers.totals()
        timings["per_step"] = timings["denoise"] / state.plan.steps
        return Output(
            samples=tuple(state.samples),
            fps=state.plan.parameters.fps,
            sample_rate=self.model.sample_rate,
            timings=timings,
            effective=state.plan.effective,
            reused_steps=state.reused,
            batch_size=state.batch_size,
            warnings=(*state.plan.warnings, *idle_ranks(state.guidance, self.mesh.cfg)),
            peak_memory=peak_memory(self.device),
        )

    def release(self, name: str) -> None:
        """Nothing: all of a request ends with it."""

    def _known(self, stream: StreamPlan, taken: Tensor | None = None) -> Conditioning:
        """The given part of a stream: by its source, or the pixels ``taken`` from elsewhere."""
        modality = MODALITIES[stream.name]
        clean = torch.zeros(stream.shape, device=self.device)
        if modality.given_as_latents:
            assert stream.source is not None  # zeros, where nothing is given
            clean = torch.from_numpy(stream.source).to(self.device)
        elif stream.source is not None and stream.name in self.coders:
            clean = self.coders[stream.name].encode(torch.from_numpy(stream.source).to(self.device))
        elif stream.known and (pixels := self._given_pixels(stream, taken)) is not None:
            frames = pixel_frames(stream.known[-1] + 1, self.model.vae)
            given = self.vae.encode(pixels[:, :, :frames])
            height, width = stream.shape[3:]  # of a canvas that was filled up, the picture
            for frame in stream.known:
                clean[:, :, frame] = given[:, :, frame, :height, :width]
        mask = modality.denoise_mask(stream).to(self.device)
        return Conditioning(clean_latent=clean, denoise_mask=mask)

    def _given_pixels(self, stream: StreamPlan, taken: Tensor | None) -> Tensor | None:
        """Pixels [1, 3, T, H, W] to encode: of the stream's source, or else ``taken``."""
        if stream.source is not None:
            return to_pixels(torch.from_numpy(stream.source).to(self.device))
        return None if taken is None else filled_up(taken, stream.canvas)

    # Denoising.

    def _take_over(self, state: RequestState, chunk: int) -> None:
        """Encode what is known of a chunk: of a later one also the end of the one before."""
        plan, end = state.plan, None
        if chunk:
            end = self._end(state, state.denoised[-1]["vision"])
        if state.index:  # else it has been encoded already
            with state.timers.phase("vae_encode"):
                state.known = tuple(self._known(stream, end) for stream in plan.chunks[chunk])

    def _end(self, state: RequestState, latents: Tensor) -> Tensor:
        """The last pixels of a chunk, float32 [1, 3, overlap, H, W]; the first rank keeps all of it."""
        plan, frames = state.plan, []
        keep = plan.decoded and self.mesh.world.rank == 0
        with state.timers.phase("vae_decode"):
            end = torch.empty(0, device=self.device)
            for pixels in self.vae.decode(latents):
                end = torch.cat([end, pixels], dim=2) if end.numel() else pixels
                end = end[:, :, max(0, end.shape[2] - plan.overlap) :]
                if keep:
                    frames.append(to_frames(pixels).cpu())
        if plan.decoded:
            skip = plan.overlap if len(state.frames) % len(plan.later_chunks) else 0
            state.frames.append(torch.cat(frames)[skip:] if keep else end.new_empty(0))
        return end

    def _predictor(self, plan: Plan, *contexts: dict[int, Context]) -> Predictor:
        """The predictor of a request, or of several of one batch."""
        return Predictor(
            transformer=self.transformer,
            plan=plan,
            contexts=contexts,
            mesh=self.mesh,
            offloaded=self.config.enable_layerwise_offload,
        )

    def _start(self, state: RequestState, chunk: int) -> None:
        plan = state.plan
        planned = plan.chunks[chunk]
        shapes, streams = _shapes(planned), []
        for seed in state.seeds:
            noise = initial_noise(
                shapes, seed=seed, rule=plan.parameters.noise, chunk=chunk, fresh=_fresh(plan)
            )
            noise |= {name: torch.from_numpy(x) for name, x in plan.initial.items()}
            streams += [
                start_stream(
                    stream.name,
                    noise=noise[stream.name].to(self.device),
                    clean_latent=known.clean_latent,
                    denoise_mask=known.denoise_mask,
                )
                for stream, known in zip(planned, state.known, strict=True)
            ]
        state.streams = tuple(streams)
        state.predictor.start(fresh=bool(plan.later_chunks))
        moving = sum(stream.generated for stream in planned)
        state.solver = (SolverState(),) * moving * len(state.seeds)

    def _leave(self, state: RequestState) -> None:
        """Count a step; what is denoised is kept until it is decoded."""
        state.index += 1
        if state.step:
            return
        names = [stream.name for stream in state.plan.streams]
        xs = [stream.x for stream in state.streams]
        for first in range(0, len(xs), len(names)):
            sample = xs[first : first + len(names)]
            state.denoised.append(dict(zip(names, sample, strict=True)))
        state.streams, state.solver = (), ()

    def _advance(self, states: Sequence[RequestState], chunk: int) -> None:
        """Predict, guide, step, and put back what is known. The solver works in float32.

        What is not of one sample alone is that of any of the states.
        """
        one = states[0]
        plan, schedule, index = one.plan, one.schedule, one.step
        planned = plan.chunks[chunk]
        moving = [place for place, stream in enumerate(planned) if stream.generated]
        if not moving:  # the whole chunk is given, for a later one to go on from
            return
        self._set_precision(index, plan.parameters.num_inference_steps)
        scales, timestep = one.guidance[index], one.timesteps[index]
        needed = branches_needed(scales)
        predictor = self._shared_predictor(states)
        streams = [stream for state in states for stream in state.streams]
        reused = predictor.decide(streams, index, schedule.sigmas[index], needed)
        one.reused += reused.issuperset(needed)
        predict = partial(predictor.predict, streams, moving, timestep, index, reused)
        latents = tuple(stacked([s.x for s in streams[at :: len(planned)]]) for at in moving)
        velocities = guide(predict, scales, self.mesh.cfg, latents)
        fresh = self._fresh_noise(states, chunk)
        solvers = [solver for state in states for solver in state.solver]
        for number, place in enumerate(moving):
            mine = slice(number, None, len(moving))
            noise = stacked([each[planned[place].name] for each in fresh]) if fresh else None
            before = stacked_states(solvers[mine])
            x, after = SOLVERS[plan.solver].step(
                latents[number], velocities[number], before, schedule.sigmas, index, noise
            )
            parts = x.chunk(len(streams) // len(planned))
            solvers[mine] = unstacked_states(after, len(parts))
            for at, part in zip(range(place, len(streams), len(planned)), parts, strict=True):
                streams[at] = streams[at].apply_clean(part)
        for state in states:
            count, moved = len(state.streams), len(state.solver)
            state.streams, streams = tuple(streams[:count]), streams[count:]
            state.solver, solvers = tuple(solvers[:moved]), solvers[moved:]

    def _shared_predictor(self, states: Sequence[RequestState]) -> Predictor:
        """The predictor of exactly these requests: another one when a request joins or leaves them."""
        contexts = [state.contexts for state in states]
        predictor = states[0].predictor
        if list(map(id, predictor.contexts)) != list(map(id, contexts)):
            predictor = self._predictor(states[0].plan, *contexts)
            for state in states:
                state.predictor = predictor
        return predictor

    def _fresh_noise(self, states: Sequence[RequestState], chunk: int) -> list[dict[str, Tensor]]:
        """The noise of this step of each sample, where the solver draws any."""
        found = []
        for state in states:
            plan = state.plan
            if not SOLVERS[plan.solver].draws_noise:
                return []
            for seed in state.seeds:
                noise = step_noise(
                    _shapes(plan.chunks[chunk]),
                    seed=seed,
                    rule=plan.parameters.noise,
                    index=state.step,
                    chunk=chunk,
                    fresh=_fresh(plan),
                )
                found.append({name: x.to(self.device) for name, x in noise.items()})
        return found

    def _set_precision(self, index: int, steps: int) -> None:
        """That of the generation layers in this step: requests take turns between two steps."""
        quantization = self.model.quantization
        self.transformer.precision.native = quantization is None or quantization.native(
            index, steps
        )

    # Decoding.

    def _undecoded(self, state: RequestState, seed: int, chunks: list[dict[str, Tensor]]) -> Sample:
        """The latents: of video in several chunks those of one chunk after the other."""
        vision = torch.cat([chunk["vision"] for chunk in chunks], dim=2)
        latents = {**chunks[-1], "vision": vision}
        with state.timers.phase("to_cpu"):
            arrays = {name: x.cpu().numpy() for name, x in latents.items()}
        return Sample(seed=seed, latents=arrays, **_read(state.plan, latents))

    def _decode_all(
        self, state: RequestState, samples: list[dict[str, Tensor]], clip: Clip | None
    ) -> None:
        """The samples, of whose last chunks these are the latents, on the first rank."""
        plan = state.plan
        decoding = [self.vae.decode(latents["vision"]) for latents in samples]  # begins when read
        if self.mesh.world.rank:
            with state.timers.phase("vae_decode"):
                deque(chain(*decoding), maxlen=0)  # the ranks need each other's borders
            state.samples += [Sample(seed=seed) for seed in plan.seeds]
            return
        single, earlier = len(samples) == 1, len(plan.later_chunks)
        try:
            for place, (seed, latents) in enumerate(zip(plan.seeds, samples, strict=True)):
                before = state.frames[place * earlier : (place + 1) * earlier]
                shown = shown_frames(plan, before, on_host(map(to_frames, decoding[place])))
                sample = self._decoded(state, seed, latents, shown, clip if single else None)
                state.samples.append(sample)
        except Exception:  # such as a full disk: the other ranks wait at the next border
            if self.mesh.world.size > 1:
                deque(chain(*decoding), maxlen=0)
            raise

    def _decoded(
        self,
        state: RequestState,
        seed: int,
        latents: dict[str, Tensor],
        shown: Iterable[np.ndarray],
        clip: Clip | None,
    ) -> Sample:
        """A sample of the frames ``shown``, with what was made beside them."""
        made = _read(state.plan, latents)
        if state.plan.sound is not None:
            made["sound"] = state.plan.sound
        for name in self.coders.keys() & latents.keys() - made.keys():
            with state.timers.phase(name):
                made[name] = self.coders[name].decode(latents[name]).float().cpu().numpy()
        if latents["vision"].shape[2] == 1:
            clip = None  # a picture
        with state.timers.phase("vae_decode"):
            video = written(
                shown,
                clip,
                fps=state.plan.parameters.fps,
                waveform=made.get("sound"),
                sample_rate=self.model.sample_rate,
            )
        if len(video) == 1:
            return Sample(seed=seed, image=video[0], **made)
        return Sample(seed=seed, video=video, clip=clip, **made)


def _guidance(plan: Plan, schedule: Schedule) -> tuple[Scales, ...]:
    """The scales of every step: of the controls, if there are any, and of the prompt."""
    numbers = plan.parameters
    asked = [(numbers.guidance_scale, numbers.guidance_interval)]
    if numbers.control_guidance is not None:
        asked.insert(0, (numbers.control_guidance, numbers.control_guidance_interval))
    return tuple(zip(*(guidance_per_step(schedule.timesteps, *one) for one in asked), strict=True))


def _fresh(plan: Plan) -> int:
    """Noises that a chunk draws after its initial one."""
    return plan.parameters.num_inference_steps if SOLVERS[plan.solver].draws_noise else 0


def _shapes(planned: Sequence[StreamPlan]) -> dict[str, tuple[int, ...]]:
    """The shapes of latents by modality, in the order in which noise is drawn."""
    shapes = {stream.name: stream.shape for stream in planned}
    return {name: shapes[name] for name in MODALITIES if name in shapes}


def _read(plan: Plan, latents: dict[str, Tensor]) -> dict[str, Any]:
    """Outputs that are latents themselves, by modality."""
    read = ((name, MODALITIES[name].read(plan, x)) for name, x in latents.items())
    return {name: made for name, made in read if made is not None}


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on an accelerator, resident in this process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.max_memory_allocated(device))
