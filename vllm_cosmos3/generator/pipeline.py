"""One request from plan to output in four calls: encode, step, decode, finish.

The calls work on one explicit `RequestState` and nothing loops over steps below them: whoever calls may
stop, report or serve another request between two steps. On several ranks each rank makes the same
calls; only the first one gets pixels out. Everything that distinguishes one kind of request from
another is in the streams of its plan.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.latents import patch_grid, pixel_frames
from vllm_cosmos3.checkpoint.tensors import sound_tensors, transformer_tensors, vae_tensors
from vllm_cosmos3.checkpoint.weights import Table, identity_table, load_dummy_weights, load_weights
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.generator.memory import check_weights, resolve_residency, usual_work, work_of
from vllm_cosmos3.generator.memory.estimate import TEXT_BYTES
from vllm_cosmos3.generator.memory.reservation import MemoryBudget, Reservation, memory_of
from vllm_cosmos3.generator.models.sound import SoundVAE
from vllm_cosmos3.generator.models.text_cache import TextKVCache
from vllm_cosmos3.generator.models.transformer import (
    Context,
    TextKV,
    Transformer,
    join,
    weight_table,
)
from vllm_cosmos3.generator.models.vae import VideoVAE, to_frames, to_pixels
from vllm_cosmos3.generator.output import Output, Sample
from vllm_cosmos3.generator.sampling import positions
from vllm_cosmos3.generator.sampling.guidance import (
    Scales,
    branches_of_rank,
    guidance_per_step,
    guide,
    idle_ranks,
)
from vllm_cosmos3.generator.sampling.noise import initial_noise, step_noise
from vllm_cosmos3.generator.sampling.packing import (
    Stream,
    filled_up,
    frame_mask,
    row_mask,
    start_stream,
)
from vllm_cosmos3.generator.sampling.schedule import Schedule, make_schedule
from vllm_cosmos3.generator.sampling.solvers import SOLVERS, SolverState
from vllm_cosmos3.media import Clip, VideoWriter
from vllm_cosmos3.parallel.attention import make_attend
from vllm_cosmos3.parallel.graphs import Recording, launches_matter
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.parallel.timers import Timers
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.plan import Plan, StreamPlan

JOINED_TOKENS = 2048  # of all branches, up to which one forward is faster than one for each

Forward = Callable[..., Sequence[tuple[Tensor, ...]]]  # of the timestep and each stream's x


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """The given part of a stream, on the device: its values, and where the rest is free."""

    clean_latent: Tensor
    denoise_mask: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """All there is about one request in flight. ``index`` counts steps over all its samples."""

    plan: Plan
    reservation: Reservation
    schedule: Schedule
    guidance: tuple[Scales, ...]  # for each step: see sampling.guidance
    timers: Timers
    timesteps: Tensor  # the schedule's, on the device: a copy in each step would wait for the GPU
    index: int = 0
    contexts: dict[int, Context] = field(default_factory=dict)  # by branch
    forwards: dict[tuple[int, ...], Forward] = field(default_factory=dict)  # by branches
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


class Pipeline:
    """The models of one checkpoint on one rank, and the four calls. Build it with ``load``."""

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
        self.texts = TextKVCache(TEXT_BYTES)
        self.budget = MemoryBudget(model, config, mesh.world, device)

    @classmethod
    def load(cls, config: EngineConfig, mesh: Mesh, device: torch.device | str) -> Pipeline:
        """Read the checkpoint and fill this rank's part of every model.

        Raises:
            CheckpointError: a file is missing, corrupt or of another architecture.
            OutOfMemory: the weights do not fit into the device.
        """
        device = torch.device(device)
        model = read_config(config.model, config.checkpoint_kind)
        tokenizer = prompts.load_tokenizer(config.model)
        usual, limit = usual_work(model), memory_of(device, config.memory_limit)
        config = resolve_residency(model, config, usual, limit)
        check_weights(model, config, usual, limit)
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
            layer_device=host if config.enable_layerwise_offload else device,
        )
        shapes = transformer_tensors(model.transformer)
        _fill(transformer, weight_table(model.transformer), config, "transformer", shapes, device)
        transformer.rest_on_host(text=text_rests, layers=config.enable_layerwise_offload)
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
        state = RequestState(
            plan=plan,
            reservation=reservation,
            schedule=schedule,
            guidance=_guidance(plan, schedule),
            timers=Timers(self.device),
            timesteps=torch.tensor(schedule.timesteps, dtype=torch.float32, device=self.device),
        )
        with state.timers.phase("text"):
            for branch in branches_of_rank(state.guidance, self.mesh.cfg):
                state.contexts[branch] = self._understand(state, branch)
        with state.timers.phase("vae_encode"):
            state.known = tuple(self._known(stream) for stream in plan.streams)
        return state

    @torch.inference_mode()
    def step(self, state: RequestState) -> None:
        """One denoising step of one sample. The first step of a sample draws its noise."""
        plan = state.plan
        place, index = divmod(state.index, plan.parameters.num_inference_steps)
        sample, chunk = divmod(place, len(plan.chunks))
        if index == 0 and plan.later_chunks:
            self._take_over(state, chunk)
        with state.timers.phase("denoise", paced=True):
            if index == 0:
                self._start(state, plan.seeds[sample], chunk)
            self._advance(state, plan.seeds[sample], chunk, index)
        state.index += 1
        if index + 1 == plan.parameters.num_inference_steps:
            streams = zip(plan.streams, state.streams, strict=True)
            state.denoised.append({stream.name: now.x for stream, now in streams})
            state.streams, state.solver = (), ()

    @torch.inference_mode()
    def decode(self, state: RequestState, clip: Clip | None = None) -> None:
        """Turn the latents of every sample into pixels and sound on the host.

        The video of a request for a single one is written to ``clip`` meanwhile.
        """
        for branch, context in state.contexts.items():
            self.texts.keep(tuple(state.plan.token_ids[branch]), *context.texts)
        state.contexts.clear()
        state.forwards.clear()
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
            sample_rate=self.model.sound.sampling_rate if self.model.sound else None,
            timings=timings,
            effective=state.plan.effective,
            warnings=(*state.plan.warnings, *idle_ranks(state.guidance, self.mesh.cfg)),
            peak_memory=peak_memory(self.device),
        )

    # Encoding.

    def _understand(self, state: RequestState, branch: int) -> Context:
        """Keys and values of one branch's text, and the positions of all that follows it."""
        plan = state.plan
        ids = plan.token_ids[branch]
        start = positions.generation_start(len(ids), self.model.transformer)
        parts: list[Tensor] = []
        controls = []
        for stream in (plan.streams[place] for place in plan.seen(branch)):
            begin = positions.next_start(parts[-1]) if stream.positions_after and parts else start
            parts.append(self._positions(stream, begin))
            if stream.control_weight is not None:
                controls.append((parts[-1].shape[1], stream.control_weight))
        rope = self.transformer.rope(torch.cat(parts, dim=1), tuple(controls))
        text = self._text(state, tuple(ids))
        return Context(texts=(text,), rope=rope)

    def _text(self, state: RequestState, ids: tuple[int, ...]) -> TextKV:
        """Keys and values of a text, which another branch or a recent request may have read."""
        for branch, context in state.contexts.items():
            if state.plan.token_ids[branch] == ids:
                return context.texts[0]
        text = self.texts.find(ids)
        if text is None:
            text = self.transformer.understand(torch.tensor(ids, device=self.device))
        return text

    def _positions(self, stream: StreamPlan, start: float) -> Tensor:
        config = self.model.transformer
        if stream.name == "sound":
            return positions.sound_positions(stream.length, start=start, config=config)
        if stream.name == "action":
            return positions.action_positions(
                stream.length, start=start, fps=stream.rate, first=stream.first_frame, config=config
            )
        frames, rows, columns = patch_grid(stream.shape, config.latent_patch_size)
        return positions.vision_positions(
            frames, rows, columns, start=start, fps=stream.rate, config=config
        )

    def _known(self, stream: StreamPlan, taken: Tensor | None = None) -> Conditioning:
        """What is given of a stream: by its source, or the pixels ``taken`` from elsewhere."""
        clean = torch.zeros(stream.shape, device=self.device)
        if stream.name == "sound":
            free = torch.ones((1, stream.length), dtype=torch.bool)
            return Conditioning(clean_latent=clean, denoise_mask=free.to(self.device))
        if stream.name == "action":
            assert stream.source is not None  # zeros, where nothing is given
            clean = torch.from_numpy(stream.source).to(self.device)
            free = row_mask(stream.shape, stream.known, stream.channels)
            return Conditioning(clean_latent=clean, denoise_mask=free.to(self.device))
        pixels = taken if taken is None else filled_up(taken, stream.canvas)
        if stream.source is not None:
            pixels = to_pixels(torch.from_numpy(stream.source).to(self.device))
        if stream.known and pixels is not None:
            given = self.vae.encode(
                pixels[:, :, : pixel_frames(stream.known[-1] + 1, self.model.vae)]
            )
            height, width = stream.shape[3:]  # of a canvas that was filled up, the picture
            for frame in stream.known:
                clean[:, :, frame] = given[:, :, frame, :height, :width]
        return Conditioning(
            clean_latent=clean, denoise_mask=frame_mask(stream.length, stream.known).to(self.device)
        )

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

    def _start(self, state: RequestState, seed: int, chunk: int) -> None:
        plan = state.plan
        planned = plan.chunks[chunk]
        shapes = {stream.name: stream.shape for stream in planned}
        noise = initial_noise(
            shapes, seed=seed, rule=plan.parameters.noise, chunk=chunk, fresh=_fresh(plan)
        )
        noise |= {name: torch.from_numpy(x) for name, x in plan.initial.items()}
        state.streams = tuple(
            start_stream(
                stream.name,
                noise=noise[stream.name].to(self.device),
                clean_latent=known.clean_latent,
                denoise_mask=known.denoise_mask,
            )
            for stream, known in zip(planned, state.known, strict=True)
        )
        if plan.later_chunks:  # what is free of the streams is part of a forward, and changes
            state.forwards.clear()
        state.solver = tuple(SolverState() for stream in planned if stream.generated)

    def _advance(self, state: RequestState, seed: int, chunk: int, index: int) -> None:
        """Predict, guide, step, and put back what is known. The solver works in float32."""
        plan, schedule = state.plan, state.schedule
        planned = plan.chunks[chunk]
        moving = [place for place, stream in enumerate(planned) if stream.generated]
        if not moving:  # the whole chunk is given, for a later one to go on from
            return
        predict = partial(self._predict, state, moving, state.timesteps[index])
        latents = tuple(state.streams[place].x for place in moving)
        velocities = guide(predict, state.guidance[index], self.mesh.cfg, latents)
        solver = SOLVERS[plan.solver]
        fresh: dict[str, Tensor] = {}
        if solver.draws_noise:
            shapes = {stream.name: stream.shape for stream in planned}
            fresh = step_noise(
                shapes,
                seed=seed,
                rule=plan.parameters.noise,
                index=index,
                chunk=chunk,
                fresh=_fresh(plan),
            )
        streams, remembered = list(state.streams), []
        for place, v, before in zip(moving, velocities, state.solver, strict=True):
            stream = state.streams[place]
            noise = fresh[stream.name].to(self.device) if fresh else None
            x, after = solver.step(stream.x, v, before, schedule.sigmas, index, noise)
            streams[place] = stream.apply_clean(x)
            remembered.append(after)
        state.streams, state.solver = tuple(streams), tuple(remembered)

    def _predict(
        self, state: RequestState, moving: Sequence[int], timestep: Tensor, branches: Sequence[int]
    ) -> list[tuple[Tensor, ...]]:
        """The velocities of what is ``moving``, by branch: together where the tokens are few."""
        found: dict[int, tuple[Tensor, ...]] = {}
        for group in _groups(state, branches):
            seen = state.plan.seen(group[0])
            xs = (state.streams[place].x for place in seen)
            made = self._forward(state, group)(timestep, *xs)
            for branch, velocities in zip(group, made, strict=True):
                named = zip(seen, velocities, strict=True)
                found[branch] = tuple(v for place, v in named if place in moving)
        return [found[branch] for branch in branches]

    def _forward(self, state: RequestState, branches: tuple[int, ...]) -> Forward:
        """The transformer for these branches: made once, as it may be a recording."""
        if branches not in state.forwards:
            context = join([state.contexts[branch] for branch in branches])
            streams = [state.streams[place] for place in state.plan.seen(branches[0])]
            forward = partial(_evaluate, self.transformer, streams, context, state.plan)
            tokens = context.rope.table.shape[0]
            # Of several chunks each has forwards of its own.
            whole = not state.plan.later_chunks
            steps = state.plan.steps if whole else state.plan.parameters.num_inference_steps
            recorded = not self.config.enable_layerwise_offload and launches_matter(
                tokens, steps, self.mesh.world, self.device
            )
            state.forwards[branches] = Recording(forward) if recorded else forward
        return state.forwards[branches]

    # Decoding.

    def _undecoded(self, state: RequestState, seed: int, chunks: list[dict[str, Tensor]]) -> Sample:
        """The latents: of video in several chunks those of one chunk after the other."""
        vision = torch.cat([chunk["vision"] for chunk in chunks], dim=2)
        latents = {**chunks[-1], "vision": vision}
        with state.timers.phase("to_cpu"):
            arrays = {name: x.cpu().numpy() for name, x in latents.items()}
        return Sample(seed=seed, latents=arrays, action=_actions(state.plan, latents))

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
                shown = _shown(plan, before, on_host(map(to_frames, decoding[place])))
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
        """A sample of the frames ``shown``, with its sound and actions."""
        waveform, action = self._waveform(state, latents), _actions(state.plan, latents)
        if latents["vision"].shape[2] == 1:
            clip = None  # a picture
        with state.timers.phase("vae_decode"):
            video = self._written(state.plan, shown, waveform, clip)
        if len(video) == 1:
            return Sample(seed=seed, image=video[0], sound=waveform, action=action)
        return Sample(seed=seed, video=video, sound=waveform, action=action, clip=clip)

    def _waveform(self, state: RequestState, latents: dict[str, Tensor]) -> np.ndarray | None:
        """The sound on the host, float32 [2, N], if there is any."""
        with state.timers.phase("sound"):
            if self.sound is None or "sound" not in latents:
                return None
            waveform: np.ndarray = self.sound.decode(latents["sound"]).float().cpu().numpy()
        return waveform

    def _written(
        self,
        plan: Plan,
        shown: Iterable[np.ndarray],
        waveform: np.ndarray | None,
        clip: Clip | None,
    ) -> np.ndarray:
        """All frames, written to ``clip`` as they come."""
        writing: AbstractContextManager[VideoWriter | None] = nullcontext()
        if clip is not None:
            rate = self.model.sound.sampling_rate if self.model.sound else 48_000
            writing = VideoWriter(
                clip.path, fps=plan.parameters.fps, sound=waveform, sample_rate=rate, crf=clip.crf
            )
        parts = []
        with writing as writer:
            for frames in shown:
                parts.append(frames)
                if writer is not None:
                    writer.write(frames)
        return np.concatenate(parts)


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


def _actions(plan: Plan, latents: dict[str, Tensor]) -> np.ndarray | None:
    """The actions that a request has made."""
    return None if plan.actions is None else plan.actions.read(latents["action"].cpu().numpy())


def on_host(chunks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Each chunk as an array, copied from an accelerator while the next one is being made.

    The copy goes through pinned memory, which torch keeps and uses again.
    """
    waiting: deque[tuple[Tensor, torch.Event]] = deque()
    for chunk in chunks:
        if chunk.device.type == "cpu":
            yield chunk.numpy()
            continue
        pinned = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True)
        pinned.copy_(chunk, non_blocking=True)
        copied = torch.Event(chunk.device)
        copied.record()
        waiting.append((pinned, copied))
        if len(waiting) > 1:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(pinned: Tensor, copied: torch.Event) -> np.ndarray:
    copied.synchronize()
    array: np.ndarray = pinned.numpy().copy()
    return array


def _shown(
    plan: Plan, before: Sequence[Tensor], last: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """The frames of a sample in order: of earlier chunks, then of the last without its overlap.

    What is shown beside them is joined on; frames beyond those that were asked for are left out.
    """
    at, hidden = 0, plan.overlap if before else 0
    for part in chain((chunk.numpy() for chunk in before), _without(last, hidden)):
        frames = part[: plan.parameters.num_frames - at]
        beside = [shown[at : at + len(frames)] for shown in plan.side_by_side]
        at += len(frames)
        yield np.concatenate([*beside, frames], axis=2) if beside else frames


def _without(chunks: Iterable[np.ndarray], hidden: int) -> Iterator[np.ndarray]:
    """All chunks without the first ``hidden`` frames."""
    for chunk in chunks:
        if hidden < len(chunk):
            yield chunk[hidden:]
        hidden = max(0, hidden - len(chunk))


def _groups(state: RequestState, branches: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Branches that are evaluated together: of the same streams, and where the tokens are few."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for branch in branches:
        alike.setdefault(state.plan.seen(branch), []).append(branch)
    for group in alike.values():
        tokens = state.contexts[group[0]].rope.length
        size = len(group) if tokens * len(group) <= JOINED_TOKENS else 1
        for first in range(0, len(group), size):
            yield tuple(group[first : first + size])


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
