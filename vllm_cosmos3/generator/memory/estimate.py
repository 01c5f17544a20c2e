"""The memory of a rank, phase by phase, and what a request keeps between calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.kinds import KINDS, base_kind
from vllm_cosmos3.checkpoint.latents import pixel_frames, token_count
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.generator.memory.ledger import Ledger
from vllm_cosmos3.generator.memory.vae_activations import decode_kept, decode_peak, encode_peak
from vllm_cosmos3.generator.memory.weight_bytes import FLOAT32, layer_bytes, loading, weights
from vllm_cosmos3.generator.models.stored_modalities import coders
from vllm_cosmos3.request.defaults import TEXT_TOKENS, Parameters
from vllm_cosmos3.request.parameters import prompt_parameters
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import output_streams
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.request.world import Opening, SessionRequest, opening_of

WORKSPACES = 2**30  # bytes: see the package
RESERVE = WORKSPACES + 2**29  # with the CUDA context
LAYERS_AHEAD = 1  # layers that are fetched from the host while one computes
TEXT_BYTES = 1 << 29  # of keys and values kept of recent texts: about 3,600 tokens of Nano
INT64 = 8
OTHER_ATTENTION_BYTES = FLOAT32  # of a query head: the logarithm of its sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Sizes of the work of one request.

    ``streams`` are names and latent shapes, ``text`` the tokens of each text, of which some of the
    ``branches`` of guidance may share one, ``sources`` the frames, height and width of what is encoded
    for known frames. ``chunks`` are made one after the other, and all but the last are decoded while the
    request goes on, even if the result is not to be ``decoded``. ``residuals`` are the outputs of the
    layers that a step cache keeps of each branch. ``history`` are the tokens of the
    frames that a session of a simulator remembers and works at; there are so many ``sessions``. Of the
    ``samples`` so many are denoised ``together``; what is ``packed`` are copies of texts for that.
    """

    streams: tuple[tuple[str, tuple[int, ...]], ...]
    text: tuple[int, ...]
    branches: int
    sources: tuple[tuple[int, int, int], ...] = ()
    samples: int = 1
    chunks: int = 1
    decoded: bool = True
    residuals: int = 0
    history: int = 0
    sessions: int = 1
    together: int = 1
    packed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of the fullest rank.

    ``weights`` rest on the device by part, ``host`` in the host's memory. ``loading`` is the peak
    of the start. ``held`` is the most that a request keeps from one call to the next; ``phases``
    are the peaks of its calls beside the weights, with what it holds. ``reserve`` is for what torch's
    allocator does not see: `RESERVE` on a GPU, nothing on a CPU.
    """

    weights: Mapping[str, int]
    host: Mapping[str, int]
    loading: int
    held: int
    phases: Mapping[str, int]
    reserve: int

    @property
    def resident(self) -> int:
        """All weights on the device."""
        return sum(self.weights.values())

    @property
    def request(self) -> int:
        """Bytes of one request beside the weights."""
        return max(self.phases.values())

    @property
    def peak(self) -> int:
        """The most that is ever allocated, when there is one request at a time."""
        return max(self.loading, self.resident + self.request)

    @property
    def needed(self) -> int:
        """Bytes that a device must have."""
        return self.peak + self.reserve


def usual_work(model: ModelConfig, request: GenerateRequest | None = None) -> Work:
    """The sizes of a request with long texts: of the largest default, if no other is given.

    Raises:
        InvalidRequest: as `prompt_parameters`.
    """
    if model.causal is not None:
        return session_work(model, opening_of(model, SessionRequest(), TEXT_TOKENS))
    if request is None:
        images = KINDS[model.kind].modes == ("text2image",)
        request = GenerateRequest(prompt="any", num_frames=1 if images else None)
    return work_with(resolved_parameters(model, request), model)


def resolved_parameters(model: ModelConfig, request: GenerateRequest) -> Parameters:
    """The numbers of a request for an image or a video from text.

    All kinds take the same memory for the same sizes; a video of text stands for the others.
    """
    return prompt_parameters(request, replace(model, kind=base_kind(model.kind)))


def work_with(numbers: Parameters, model: ModelConfig) -> Work:
    """The sizes that these numbers lead to, with long texts."""
    streams = tuple((stream.name, stream.shape) for stream in output_streams(numbers, model))
    branches = 1 if numbers.guidance_scale == 1 else 2
    return Work(
        streams=streams,
        text=(TEXT_TOKENS,) * branches,
        branches=branches,
        residuals=numbers.reuse.kept if numbers.reuse else 0,
    )


def work_of(plan: Plan) -> Work:
    """The sizes of a planned request."""
    reuse = plan.parameters.reuse
    return Work(
        streams=tuple((stream.name, stream.shape) for stream in plan.streams),
        text=tuple(map(len, dict.fromkeys(plan.token_ids))),
        branches=len(plan.token_ids),
        sources=tuple(
            stream.source.shape[:3]
            for stream in plan.streams
            if stream.source is not None and stream.name == "vision"
        ),
        samples=len(plan.seeds),
        chunks=len(plan.chunks),
        decoded=plan.decoded,
        residuals=reuse.kept if reuse else 0,
        together=plan.together,
        packed=plan.together if plan.together > 1 or plan.batch is not None else 0,
    )


def session_work(model: ModelConfig, opening: Opening, sessions: int = 1) -> Work:
    """The sizes of a session of a simulator, while a whole chunk of it is made."""
    causal = model.causal
    assert causal is not None  # as there is an opening
    shape = (*opening.frame[:2], opening.chunk, *opening.frame[3:])
    rows = (opening.chunk * causal.rows_per_frame, model.transformer.action_dim)
    streams = (("action", rows), ("vision", shape))
    patch = model.transformer.latent_patch_size
    frame = sum(token_count(name, each, patch) for name, each in streams) // opening.chunk
    return Work(
        streams=streams,
        text=(len(opening.token_ids),),
        branches=1,
        sources=() if opening.source is None else (opening.source.shape[:3],),
        history=frame * (opening.sinks + opening.history + opening.chunk),
        sessions=sessions,
    )


def estimate(model: ModelConfig, engine: EngineConfig, work: Work) -> MemoryEstimate:
    """The memory that ``work`` takes under ``engine``, whose residency must be decided."""
    element_size = FLOAT32 if engine.dtype == "float32" else 2
    tp = engine.parallel.tensor_parallel_size
    on_device = weights(model, tensor_parallel_size=tp, element_size=element_size)
    host: dict[str, int] = {}
    if engine.und_residency == "host":
        host |= {name: on_device.pop(name) for name in ("understanding", "embedding")}
    if engine.enable_layerwise_offload:
        host["generation"] = on_device.pop("generation")
    request = _Request(model, engine, work, element_size)
    return MemoryEstimate(
        weights=on_device,
        host=host,
        loading=loading(
            model, on_device, element_size=element_size, dummy=engine.load_format == "dummy"
        ),
        held=request.held,
        phases=request.phases(),
        reserve=RESERVE if request.fused else 0,
    )


class _Request:
    """The arithmetic of one request on one rank."""

    def __init__(
        self, model: ModelConfig, engine: EngineConfig, work: Work, element_size: int
    ) -> None:
        self.model, self.engine, self.work, self.element_size = model, engine, work, element_size
        self.config, self.parallel = model.transformer, engine.parallel
        # The kernels that fuse norms, rotations and SiLU are those of a GPU and of half precision.
        self.fused = engine.device.split(":")[0] != "cpu"
        patch = self.config.latent_patch_size
        self.tokens = sum(token_count(name, shape, patch) for name, shape in work.streams)
        self.latents = sum(prod(shape) for _, shape in work.streams) * FLOAT32
        # Of the fullest rank. Of two the second has all branches but the first, see `sampling.guidance`.
        shared = self.parallel.cfg_parallel_size > 1
        self.branches = max(1, work.branches - shared)
        texts = sorted(work.text, reverse=True)
        self.text = texts[:1] if shared and self.branches == 1 else texts
        self.layer = layer_bytes(
            model,
            tensor_parallel_size=self.parallel.tensor_parallel_size,
            element_size=element_size,
        )

    @property
    def texts(self) -> int:
        """Keys and values of this rank's heads and branches."""
        return sum(self.text) * self._token

    @property
    def _token(self) -> int:
        """Keys and values of one token in all layers."""
        config, parallel = self.config, self.parallel
        heads = config.num_key_value_heads // (
            parallel.tensor_parallel_size * parallel.ulysses_degree
        )
        return 2 * heads * config.head_dim * config.num_hidden_layers * self.element_size

    @property
    def context(self) -> int:
        """The context of the generation tokens: texts, and rotary tables of their own positions."""
        table = self.own_tokens * (self.config.head_dim * self.element_size + INT64)
        return self.texts + self.branches * table

    @property
    def own_tokens(self) -> int:
        return -(-self.tokens // self.parallel.ulysses_degree)

    @property
    def held(self) -> int:
        """Between two steps: text, what is known, the latents, and the solver's three of them.

        Of a session between two chunks: text, history, the last latents, what the decoder remembers.
        """
        if self.work.history:
            return self.texts + self.work.history * self._token + self.latents + self._clip
        done = (self.work.samples * self.work.chunks - self.work.together) * self.latents
        working = self.latents * 5 * self.work.together
        return self.context + self._packed + working + done + self._residuals

    @property
    def _packed(self) -> int:
        """Texts of samples in one forward with their tokens behind, and rotary tables: see `PackedTexts`."""
        tokens = self.branches * self.own_tokens
        tables = self.context - self.texts
        return self.work.packed * (self.texts + tokens * self._token + tables)

    @property
    def _clip(self) -> int:
        """What the video decoder of a session remembers from chunk to chunk."""
        vision = next(shape for name, shape in self.work.streams if name == "vision")
        return decode_kept(
            self.model.vae,
            vision,
            world=self.parallel.world_size,
            parallel=self.parallel.vae_parallel,
            element_size=self.element_size,
            fused=self.fused,
        )

    @property
    def _residuals(self) -> int:
        """What the step cache keeps of this rank's branches, and the filtered latents."""
        if not self.work.residuals:
            return 0
        count = self.work.residuals * self.branches
        return count * self.own_tokens * self.config.hidden_size * self.element_size + self.latents

    def phases(self) -> dict[str, int]:
        phases = {"text": self._text(), "denoise": self._denoise()}
        if self.work.sources:
            phases["encode"] = self._encode()
        if self.work.decoded or self.work.chunks > 1:
            phases |= self._decode()
        others = (self.work.sessions - 1) * self.held
        return {name: size + others for name, size in phases.items()}

    def _text(self) -> int:
        ledger = Ledger()
        streamed = self.engine.und_residency == "host"
        ledger.take(self.context)
        if self.work.history:
            ledger.take(self.held)
        if streamed:  # the embedding with the first layer behind it, then layers
            ledger.moment(self._embedding(), self.layer * LAYERS_AHEAD)
            ledger.take(self.layer * (1 + LAYERS_AHEAD))
        fused = self.fused and self.config.backbone.qk_norm_for_text
        self._layer(ledger, max(self.text), keys=0, fused=fused)  # keys go into the cache
        return ledger.peak

    def _embedding(self) -> int:
        tp = self.parallel.tensor_parallel_size
        return weights(self.model, tensor_parallel_size=tp, element_size=self.element_size)[
            "embedding"
        ]

    def _encode(self) -> int:
        peaks = [
            encode_peak(
                self.model.vae,
                *source,
                world=self.parallel.world_size,
                parallel=self.parallel.vae_parallel,
                element_size=self.element_size,
                fused=self.fused,
            )
            for source in self.work.sources
        ]
        return (self.held if self.work.history else self.context) + self.latents + max(peaks)

    def _denoise(self) -> int:
        """One forward; then velocities of all branches, and the solver's next state."""
        config, own = self.config, self.own_tokens
        ledger = Ledger()
        ledger.take(self.held)
        if self.work.history:  # those of the chunk before are held
            ledger.take(self.latents, self.context - self.texts)
        latents, tokens = self.latents * self.work.together, self.tokens * self.work.together
        ledger.moment(latents * (2 * self.work.branches + 4))
        ledger.take(latents)  # of the other branch's velocities
        ledger.take(self.layer * (1 + LAYERS_AHEAD) * self.engine.enable_layerwise_offload)
        width = config.hidden_size * self.element_size
        ledger.take(tokens * width)  # all tokens, of which this rank takes its own
        ledger.moment(2 * tokens * width)  # gathered at the end
        if self.work.residuals:  # spectra of the latents; input and output of the layers
            ledger.moment(8 * self.latents)
            ledger.take(2 * own * width)
        keys = max(self.text) + tokens
        self._layer(ledger, own * self.work.together, keys, fused=self.fused)
        return ledger.peak

    def _layer(self, ledger: Ledger, tokens: int, keys: int, *, fused: bool) -> None:
        """A layer for ``tokens``: attention, then the MLP beside what is still referenced.

        ``fused`` says that queries and keys are normed and turned in place.
        """
        config, parallel = self.config, self.parallel
        tp = parallel.tensor_parallel_size
        width = tokens * config.hidden_size * self.element_size
        query = tokens * config.num_attention_heads * config.head_dim * self.element_size // tp
        key = tokens * config.num_key_value_heads * config.head_dim * self.element_size // tp
        inner = tokens * config.intermediate_size * self.element_size // tp
        inputs = len(config.backbone.mlp_inputs) * inner
        with ledger.scope():
            ledger.take(2 * width)  # hidden states and residual
            self._quantized(ledger, width, config.hidden_size * (query + 2 * key) // tokens)
            ledger.take(query + 2 * key)
            if not fused:
                ledger.take(2 * width, query + key)  # normed, and turned
                ledger.moment(tokens * config.hidden_size * FLOAT32 * 2)
            with ledger.scope():
                heads = config.num_key_value_heads // (tp * parallel.ulysses_degree)
                if parallel.ulysses_degree > 1:
                    ledger.take(query + 2 * key, query)
                ledger.take(2 * keys * heads * config.head_dim * self.element_size)
                ledger.take(
                    query, query // (config.head_dim * self.element_size) * OTHER_ATTENTION_BYTES
                )
            reduced = width if tp > 1 else 0
            ledger.take(width + reduced)
            self._quantized(ledger, width, config.hidden_size * inputs // tokens)
            ledger.take(inputs)
            ledger.take(inner)
            ledger.give(inputs)
            self._quantized(ledger, inner, config.hidden_size * inner // tokens)
            ledger.take(width + reduced)

    def _quantized(self, ledger: Ledger, activations: int, matrix: int) -> None:
        """Beside a product with an FP8 matrix: its input in FP8, or the matrix as it was.

        Both are given as the bytes that they have unquantized.
        """
        if self.model.quantization is None:
            return
        values = activations // self.element_size
        # Without the kernel that quantizes: in float32, scaled, and FP8.
        ledger.moment(values if self.fused else values * (2 * FLOAT32 + 1))
        values = matrix // self.element_size
        ledger.moment(values * FLOAT32, matrix)

    def _decode(self) -> dict[str, int]:
        latents = self.work.samples * self.work.chunks * self.latents
        stays = self.work.chunks > 1 or self.work.history
        latents += self.held if stays else min(self.texts, TEXT_BYTES)
        # Of several the last is the result; the others are controls.
        vision = next(shape for name, shape in reversed(self.work.streams) if name == "vision")
        if self.work.history:  # the first frame of a session comes before its chunks
            vision = (*vision[:2], 1 + vision[2], *vision[3:])
        peak = decode_peak(
            self.model.vae,
            vision,
            world=self.parallel.world_size,
            parallel=self.parallel.vae_parallel,
            element_size=self.element_size,
            fused=self.fused,
        )
        vae = self.model.vae
        pixels = (
            3 * pixel_frames(vision[2], vae) * vision[3] * vision[4] * vae.scale_factor_spatial**2
        )
        if not self.fused:  # on a CPU the frames of the chunks before are in the same memory
            peak += (self.work.chunks - 1) * pixels
        phases = {"decode": latents + peak}
        for name, coder in coders(self.model).items():
            for shape in (shape for each, shape in self.work.streams if each == name):
                phases[name] = latents + coder.nbytes(self.model, shape)
        return phases
