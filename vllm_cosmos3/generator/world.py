"""The pipeline of a causal simulator: sessions, of which every chunk is one request in the usual four calls.

A chunk is denoised after [text | clean history | chunk], with no mask within it. Then its frames are shown,
and with the next chunk they are added to the history: run once more, clean, each layer's keys and values
kept. All of a session stays on the ranks between its chunks, and a chunk that fails or is cancelled
leaves the session where the last one has ended.
"""

from __future__ import annotations

import gc
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.latents import patch_grid
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import SessionLost
from vllm_cosmos3.generator.frames import on_host
from vllm_cosmos3.generator.loading import LoadedModels, load_models
from vllm_cosmos3.generator.memory.estimate import session_work
from vllm_cosmos3.generator.memory.reservation import MemoryBudget, Reservation
from vllm_cosmos3.generator.models.history import HistoryKV
from vllm_cosmos3.generator.models.modalities import Domain
from vllm_cosmos3.generator.models.transformer import Context
from vllm_cosmos3.generator.models.vae import DecodedClip, to_frames, to_pixels
from vllm_cosmos3.generator.movable import MovableWeights
from vllm_cosmos3.generator.output import Output, Sample
from vllm_cosmos3.generator.pipeline import peak_memory
from vllm_cosmos3.generator.sampling.noise import rollout_noise, rollout_step_noise
from vllm_cosmos3.generator.sampling.packing import Stream
from vllm_cosmos3.generator.sampling.positions import generation_start, rollout_positions
from vllm_cosmos3.generator.sampling.schedule import explicit
from vllm_cosmos3.generator.sampling.solvers import SolverState, sde
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.parallel.timers import Timers
from vllm_cosmos3.request.world import ChunkPlan, Opening


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Frames with the actions that lead to them: ``rows`` [T_a, 64] of an embodiment, ``x`` [1, C, T, h, w].

    ``silent``: the actions are none, and their values count nowhere.
    """

    first: int
    x: Tensor
    rows: Tensor
    domain_id: Domain
    silent: bool

    def part(self, start: int, stop: int) -> Chunk:
        """The latent frames from ``start`` to before ``stop`` of the video."""
        a, b = start - self.first, stop - self.first
        rows, domain_id = self._of_frames(self.rows, a, b), self.domain_id
        if isinstance(domain_id, Tensor):
            domain_id = self._of_frames(domain_id, a, b)
        return Chunk(
            first=start,
            x=self.x[:, :, a:b],
            rows=rows,
            domain_id=domain_id,
            silent=self.silent,
        )

    def _of_frames(self, by_row: Tensor, start: int, stop: int) -> Tensor:
        return by_row.unflatten(0, (self.x.shape[2], -1))[start:stop].flatten(0, 1)


@dataclass(slots=True, kw_only=True, eq=False)
class SessionState:
    """A session between its chunks, on one rank."""

    opening: Opening
    reservation: Reservation
    history: HistoryKV
    clip: DecodedClip
    last: Chunk | None = None  # of which not all may be in the history

    @property
    def next(self) -> int:
        """The latent frame that comes next."""
        return 0 if self.last is None else self.last.first + self.last.x.shape[2]


@dataclass(slots=True, kw_only=True, eq=False)
class ChunkState:
    """One chunk in flight. ``index`` counts the calls of ``step``."""

    plan: ChunkPlan
    session: SessionState
    chunk: Chunk
    clip: DecodedClip
    timers: Timers
    index: int = 0
    context: Context | None = None  # of its denoising
    frames: list[np.ndarray] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.index == self.plan.steps


class WorldPipeline(MovableWeights):
    """The models of a simulator on one rank, its sessions, and the four calls. Build it with ``load``."""

    def __init__(
        self, model: ModelConfig, models: LoadedModels, mesh: Mesh, device: torch.device
    ) -> None:
        super().__init__(models)
        self.model, self.config = model, models.config
        self.transformer, self.vae = models.transformer, models.vae
        self.mesh, self.device = mesh, device
        self.budget = MemoryBudget(model, models.config, mesh.world, device)
        self.sessions: dict[str, SessionState] = {}

    @classmethod
    def load(cls, config: EngineConfig, mesh: Mesh, device: torch.device | str) -> WorldPipeline:
        """Read the checkpoint and fill this rank's part of every model: as `Pipeline.load`."""
        device = torch.device(device)
        model = config.read_model()
        return cls(model, load_models(model, config, mesh, device), mesh, device)

    @torch.inference_mode()
    def encode(self, plan: ChunkPlan) -> ChunkState:
        """Open the session, if this is its first chunk, and make its chunk ready.

        Raises:
            SessionLost: there is no such session any more.
            OutOfMemory: a new session does not fit beside those that are open.
        """
        timers = Timers(self.device)
        if plan.opening is None:
            session = self._session(plan)
        else:
            with timers.phase("text"):
                session = self._open(plan.opening)
        opening = session.opening
        shape = (*opening.frame[:2], plan.frames, *opening.frame[3:])
        if opening.source is not None and plan.opening is not None:
            with timers.phase("vae_encode"):
                x = self._first_frame(opening.source, shape)
        else:
            x = rollout_noise(shape, seed=opening.seed, first=plan.first).to(self.device)
        rows = plan.rows
        if rows is None:
            count = plan.frames * self._rows_per_frame
            rows = np.zeros((count, self.model.transformer.action_dim), np.float32)
        chunk = Chunk(
            first=plan.first,
            x=x,
            rows=torch.from_numpy(rows).to(self.device),
            domain_id=self._domain(plan.domain_ids),
            silent=plan.rows is None,
        )
        return ChunkState(
            plan=plan, session=session, chunk=chunk, clip=session.clip.copy(), timers=timers
        )

    @torch.inference_mode()
    def step(self, state: ChunkState) -> int:
        """One forward: frames before the chunk are added to the history, and then the chunk is denoised."""
        plan = state.plan
        if state.index < len(plan.commits):
            with state.timers.phase("commit", paced=True):
                self._commit(state.session, *plan.commits[state.index])
        else:
            with state.timers.phase("denoise", paced=True):
                self._denoise(state, state.index - len(plan.commits))
        state.index += 1
        return 0

    def preview(self, state: ChunkState) -> None:
        """Nothing: a chunk is soon there itself."""

    @torch.inference_mode()
    def decode(self, state: ChunkState, clip: Clip | None = None) -> None:
        """The frames of the chunk on the host of the first rank, after those of the session before."""
        state.context = None
        with state.timers.phase("vae_decode"):
            decoding = self.vae.decode(state.chunk.x, state.clip)
            if self.mesh.world.rank:
                deque(decoding, maxlen=0)  # the ranks need each other's borders
            else:
                state.frames += on_host(map(to_frames, decoding))

    def finish(self, state: ChunkState) -> Output:
        """The frames. From now on the session goes on after them."""
        session, plan = state.session, state.plan
        session.last, session.clip = state.chunk, state.clip
        if plan.opening is not None:
            self.sessions[plan.session] = session
        video = np.concatenate(state.frames) if state.frames else None
        return Output(
            samples=(Sample(seed=session.opening.seed, video=video),),
            fps=session.opening.fps,
            timings=state.timers.totals(),
            peak_memory=peak_memory(self.device),
        )

    def forget(self) -> None:
        """Close all sessions: their history is on the device, and of these weights."""
        self.sessions.clear()

    def release(self, name: str) -> None:
        """Close a session, if there is one of this name, and give its memory back."""
        if self.sessions.pop(name, None) is not None:
            gc.collect()
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()

    # Sessions.

    def _session(self, plan: ChunkPlan) -> SessionState:
        session = self.sessions.get(plan.session)
        if session is None:
            raise SessionLost(
                "the session is gone: it was closed, or workers or weights were replaced; open a new one"
            )
        if session.next != plan.first:
            raise SessionLost(
                f"the session is at latent frame {session.next}, not at {plan.first}; open a new one"
            )
        return session

    def _open(self, opening: Opening) -> SessionState:
        """A session without a frame. It holds its memory as long as somebody refers to it."""
        reservation = self.budget.reserve(session_work(self.model, opening), 0, lambda: None)
        ids = torch.tensor(opening.token_ids, device=self.device)
        return SessionState(
            opening=opening,
            reservation=reservation,
            history=HistoryKV(
                self.transformer.understand(ids),
                tokens=self._frame_tokens(opening),
                sinks=opening.sinks,
                window=opening.history,
                chunk=opening.chunk,
            ),
            clip=self.vae.begin_clip(*opening.frame[3:]),
        )

    def _first_frame(self, source: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """The latents of a picture, of which the canvas may have more at the right and bottom."""
        pixels = to_pixels(torch.from_numpy(source).to(self.device))
        return self.vae.encode(pixels)[:, :, :, : shape[3], : shape[4]]

    def _domain(self, ids: tuple[int, ...]) -> Domain:
        """The embodiment of a chunk: of each row, only where they differ."""
        return ids[0] if len(set(ids)) == 1 else torch.tensor(ids, device=self.device)

    @property
    def _rows_per_frame(self) -> int:
        assert self.model.causal is not None
        return self.model.causal.rows_per_frame

    def _frame_tokens(self, opening: Opening) -> int:
        _, rows, columns = patch_grid(opening.frame, self.transformer.config.latent_patch_size)
        return self._rows_per_frame + rows * columns

    # Forwards.

    def _commit(self, session: SessionState, start: int, stop: int) -> None:
        """Add latent frames of the last chunk to the history, unless a chunk that failed has done so."""
        if stop <= session.history.committed:
            return
        assert session.last is not None
        chunk = session.last.part(start, stop)
        # What is remembered is as exact as can be.
        self.transformer.precision.native = self.model.quantization is None
        streams, context = self._streams(chunk, free=False), self._context(session, chunk)
        time = torch.zeros((), device=self.device)
        x_sD = self.transformer.embed(streams, context, time, chunk.domain_id)
        self.transformer.run_layers(x_sD, context)
        session.history.commit(self._order(chunk))

    def _denoise(self, state: ChunkState, index: int) -> None:
        plan, session, chunk = state.plan, state.session, state.chunk
        schedule = explicit(plan.sigmas)
        quantization = self.model.quantization
        self.transformer.precision.native = quantization is None or quantization.native(
            index, schedule.steps
        )
        if state.context is None:
            state.context = self._context(session, chunk)
        time = torch.tensor(schedule.timesteps[index], dtype=torch.float32, device=self.device)
        streams = self._streams(chunk, free=True)
        ((_, velocity),) = self.transformer(streams, state.context, time, chunk.domain_id)
        noise = rollout_step_noise(
            tuple(chunk.x.shape), seed=session.opening.seed, first=plan.first, index=index
        )
        x, _ = sde(chunk.x, velocity, SolverState(), schedule.sigmas, index, noise.to(self.device))
        state.chunk = Chunk(
            first=chunk.first, x=x, rows=chunk.rows, domain_id=chunk.domain_id, silent=chunk.silent
        )

    def _streams(self, chunk: Chunk, *, free: bool) -> tuple[Stream, Stream]:
        """Actions, then patches: those are timestep-conditioned where they are ``free``."""
        known = torch.zeros_like(chunk.rows, dtype=torch.bool)
        mask = torch.full((1, 1, chunk.x.shape[2], 1, 1), free, device=self.device)
        return (
            Stream(name="action", x=chunk.rows, clean_latent=chunk.rows, denoise_mask=known),
            Stream(name="vision", x=chunk.x, clean_latent=chunk.x, denoise_mask=mask),
        )

    def _context(self, session: SessionState, chunk: Chunk) -> Context:
        """What the tokens of a chunk see before them, and their positions."""
        config, opening = self.transformer.config, session.opening
        _, rows, columns = patch_grid(opening.frame, config.latent_patch_size)
        positions = rollout_positions(
            (chunk.first, chunk.first + chunk.x.shape[2]),
            rows,
            columns,
            self._rows_per_frame,
            start=generation_start(len(opening.token_ids), config),
            fps=opening.fps,
            config=config,
        )
        silent = len(chunk.rows) if chunk.silent else 0
        before = session.history.before(silent)
        return Context(texts=(before,), rope=self.transformer.rope(positions))

    def _order(self, chunk: Chunk) -> list[Tensor]:
        """Places of the tokens of each frame among those of a chunk, in which all actions come first."""
        frames, actions = chunk.x.shape[2], self._rows_per_frame
        _, rows, columns = patch_grid(
            tuple(chunk.x.shape), self.transformer.config.latent_patch_size
        )
        places = torch.arange(frames * (actions + rows * columns), device=self.device)
        acted, patches = places.split([frames * actions, frames * rows * columns])
        parts = zip(acted.chunk(frames), patches.chunk(frames), strict=True)
        return [torch.cat(part) for part in parts]
