"""Memory of the video autoencoder: its code followed block by block, with sizes for tensors.

What is alive together follows from every line of `models.vae`, so this module has its classes as
methods. A method's input belongs to its caller, who keeps it until the method returns; the result
is one more tensor alive. Workspaces of cuDNN are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod

from vllm_cosmos3.checkpoint.config import VAEConfig
from vllm_cosmos3.checkpoint.latents import chunk_sizes
from vllm_cosmos3.generator.memory.ledger import Ledger
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.plane import Part, Strips, divide

FLOAT32 = 4
CHUNKS = 3  # a first frame, a first chunk and one like all that follow


@dataclass(frozen=True, slots=True)
class Shape:
    """Channels, frames, rows and columns of one activation."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def values(self) -> int:
        return self.channels * self.frames * self.height * self.width


def decode_peak(
    config: VAEConfig,
    shape: Sequence[int],
    *,
    world: int,
    parallel: str,
    element_size: int,
    fused: bool,
) -> int:
    """Bytes at the peak of decoding latents of ``shape`` [1, C, T, h, w], on the fullest rank.

    Beside the latents. ``element_size`` are the bytes of a value. ``fused`` stands for a GPU: norm and SiLU are
    one pass, and frames leave for the host at once, whose memory on a CPU is the same.
    """
    _, _, frames, height, width = shape
    scale, grouped = config.scale_factor_spatial, config.scale_factor_temporal
    pixels = 3 * height * width * scale**2
    sizes = chunk_sizes(frames, height, width)

    def of_rank(rank: int) -> int:
        parts = divide(height, width, Axis("world", world, rank, None), parallel)
        ledger = Ledger()
        ledger.take(2 * prod(shape) * element_size)  # scaled back, in float32 for a moment
        # Equal parts need the same, so one of them is followed; the last when all others have begun.
        alike = sorted(Counter(map(_extent, parts)).items())
        walks = [Walk(Ledger(), element_size, fused, parts[0].strips) for _ in alike]
        previous = 0  # what the loops' variables still refer to
        for index, size in enumerate(sizes[:CHUNKS]):
            made = pixels * (grouped * size if index else 1)
            if index == CHUNKS - 1 and rank == 0 and not fused:
                before = frames - sizes[-1] - 1
                ledger.take(pixels * (1 + grouped * before))  # bytes of the chunks before
            with ledger.scope():
                ledger.take(previous, made * FLOAT32)
                for ((high, wide), count), walk in zip(alike, walks, strict=True):
                    walk.ledger = Ledger()
                    walk.decoder(config, Shape(config.z_dim, size, high, wide))
                    ledger.keep((count - 1) * walk.ledger.kept)
                    ledger.moment(walk.ledger.peak)
                    ledger.keep(walk.ledger.kept)
                    own = made * high * wide // (height * width)
                    ledger.moment(
                        own * element_size,
                        own * element_size,
                        own * (FLOAT32 if element_size < FLOAT32 else 0),
                    )
                ledger.give(previous)
                previous = made * (FLOAT32 + 1) + own * element_size if parts else 0
                ledger.take(previous, 2 * made * FLOAT32)  # levels of brightness, rounded, clamped
        return ledger.peak

    return max(map(of_rank, range(world)))


def decode_kept(
    config: VAEConfig,
    shape: Sequence[int],
    *,
    world: int,
    parallel: str,
    element_size: int,
    fused: bool,
) -> int:
    """Bytes that a clip of this ``shape`` keeps for its next latents, on the fullest rank."""

    def of_rank(rank: int) -> int:
        kept = 0
        for part in divide(shape[3], shape[4], Axis("world", world, rank, None), parallel):
            walk = Walk(Ledger(), element_size, fused, part.strips)
            for _ in range(CHUNKS):
                with walk.ledger.scope():
                    walk.decoder(config, Shape(config.z_dim, 1, *_extent(part)))
            kept += walk.ledger.kept
        return kept

    return max(map(of_rank, range(world)))


def encode_peak(
    config: VAEConfig,
    frames: int,
    height: int,
    width: int,
    *,
    world: int,
    parallel: str,
    element_size: int,
    fused: bool,
) -> int:
    """Bytes at the peak of encoding ``frames`` of height x width pixels, on the fullest rank."""
    scale, grouped = config.scale_factor_spatial, config.scale_factor_temporal
    pixels, rows, columns = 3 * frames * height * width, height // scale, width // scale
    latent = 1 + (frames - 1) // grouped
    sizes = chunk_sizes(latent, rows, columns)

    def of_rank(rank: int) -> int:
        ledger = Ledger()
        ledger.take(pixels, pixels * FLOAT32)
        ledger.moment(pixels * FLOAT32)
        ledger.take(config.z_dim * latent * rows * columns * FLOAT32)
        parts = divide(rows, columns, Axis("world", world, rank, None), parallel)
        for extent in sorted(set(map(_extent, parts))):
            high, wide = (n * scale for n in extent)
            own = 3 * frames * high * wide * element_size
            with ledger.scope():
                ledger.moment(own, own)  # the cast, and the patches copied from it
                ledger.take(own)
                walk = Walk(ledger, element_size, fused, parts[0].strips)
                p = config.patch_size
                for index, size in enumerate(sizes[:CHUNKS]):
                    made = grouped * size if index else 1
                    with ledger.scope():
                        walk.encoder(config, Shape(3 * p * p, made, high // p, wide // p))
                ledger.keep(-ledger.kept)
        return ledger.peak

    return max(map(of_rank, range(world)))


@dataclass(slots=True)
class Walk:
    """One clip on its way through one part of the plane, which ``strips`` may divide."""

    ledger: Ledger
    element_size: int
    fused: bool
    strips: Strips
    first: bool = True
    past: dict[str, int] = field(default_factory=dict)

    def decoder(self, config: VAEConfig, x: Shape) -> None:
        multiples = config.dim_mult[::-1]
        widths = [config.decoder_base_dim * factor for factor in (multiples[0], *multiples)]
        doubles_time = (*config.temporal_downsample[::-1], False)
        last = len(multiples) - 1
        self.take(x, x)  # a part of the latents, and after the pointwise convolution
        x = self.conv("in", x, widths[0])
        with self.replacing(x):
            x = self.middle(x)
        for index, (_, after) in enumerate(pairwise(widths)):
            with self.replacing(x):
                time = 2 if doubles_time[index] else 1
                x = self.up(index, x, after, config.num_res_blocks + 1, time, space=index < last)
        self.conv("out", x, config.out_channels, normed=True)
        self.first = False

    def encoder(self, config: VAEConfig, x: Shape) -> None:
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        halves_time = (*config.temporal_downsample, False)
        last = len(config.dim_mult) - 1
        x = self.conv("in", x, widths[0])
        for index, (_, after) in enumerate(pairwise(widths)):
            with self.replacing(x):
                time = 2 if halves_time[index] else 1
                x = self.down(index, x, after, config.num_res_blocks, time, space=index < last)
        with self.replacing(x):
            x = self.middle(x)
        self.conv("out", x, 2 * config.z_dim, normed=True)
        self.first = False

    def up(
        self, index: int, x: Shape, channels: int, depth: int, time: int, *, space: bool
    ) -> Shape:
        """`UpBlock`: its own first input stays, the inputs of its residual blocks do not."""
        shortcut = x
        x = self.resnets(f"up{index}", x, channels, depth)
        if not space:
            return x
        y = x
        if time > 1 and not self.first:
            y = self.conv(f"up{index}.time", x, 2 * channels, rows=0)
            y = replace(y, channels=channels, frames=2 * y.frames)
            self.take(y)  # both halves of the channels as frames: a copy
            self.give(y)
        wide = Shape(channels, y.frames, 2 * x.height, 2 * x.width)
        if self.fused:
            self.corners(x, y)
            self.take(wide)
            self.give(replace(wide, channels=4 * channels, height=x.height + 1, width=x.width + 1))
            self.give(x)
            return wide
        self.take(wide)
        self.give(*[y] * (y != x))
        surrounded = [self.around(wide, 2)] if self.strips.added(1) else []
        self.take(*surrounded, wide)
        self.give(*surrounded, wide)
        with self.ledger.scope():
            self.take(shortcut)  # with the bias
        self.give(x)
        return wide

    def corners(self, x: Shape, y: Shape) -> None:
        """Of `Upsampler`: from ``x``, or from its doubled frames ``y``, which are no longer needed."""
        around = self.around(y, 2)
        self.take(*[around] * (around != y))
        self.give(*[y] * (around != y != x))
        kernels = 16 * y.channels**2 * self.element_size
        self.ledger.moment(kernels, kernels)
        out = Shape(4 * y.channels, y.frames, x.height + 1, x.width + 1)
        self.ledger.moment(kernels, out.values * self.element_size)
        self.take(out)
        self.give(*[around] * (around != x))

    def down(
        self, index: int, x: Shape, channels: int, depth: int, time: int, *, space: bool
    ) -> Shape:
        """`DownBlock`: the shortcut comes first and stays until it is added."""
        scale = 2 if space else 1
        frames = -(-x.frames // time)
        out = Shape(channels, frames, x.height // scale, x.width // scale)
        copied = x.values * self.element_size * (1 + (x.frames % time > 0))
        self.ledger.moment(copied, copied)
        self.take(out)
        x = self.resnets(f"down{index}", x, channels, depth)
        if space:
            small = replace(x, height=x.height // 2, width=x.width // 2)
            self.take(self.around(x, 1), self.around(x, 2), small)
            self.give(self.around(x, 1), self.around(x, 2), x)
            x = small
        if time > 1:
            if self.first:
                self.give(self.extend(f"down{index}.time", x, 1, 0))
            else:
                y = self.conv(f"down{index}.time", x, channels, rows=0, stride=2)
                self.give(x)
                x = y
        self.take(out)  # the sum
        self.give(x, out)
        return out

    def middle(self, x: Shape) -> Shape:
        """`MidBlock`. Attention is within each frame and needs no matrix of scores."""
        y = self.resnet("middle0", x, x.channels)
        with self.ledger.scope():
            self.norm_in_torch(y)
            self.take(*[y] * 6)  # normed; queries, keys and values; attended; projected
        z = self.resnet("middle1", y, y.channels)
        self.give(y)
        return z

    def resnets(self, name: str, x: Shape, channels: int, depth: int) -> Shape:
        """Residual blocks one after the other; ``x`` itself stays with the caller."""
        y = self.resnet(f"{name}.0", x, channels)
        for index in range(1, depth):
            with self.replacing(y):
                y = self.resnet(f"{name}.{index}", y, channels)
        return y

    def resnet(self, name: str, x: Shape, channels: int) -> Shape:
        """`ResidualBlock`, whose sum takes the place of the second result."""
        y = replace(x, channels=channels)
        shortcut = [y] if x != y else []
        self.take(*shortcut)
        self.conv(f"{name}.1", x, channels, normed=True)
        self.conv(f"{name}.2", y, channels, normed=True, biased=True)
        self.give(y, *shortcut)
        return y

    def conv(
        self,
        name: str,
        x: Shape,
        channels: int,
        *,
        rows: int = 1,
        stride: int = 1,
        normed: bool = False,
        biased: bool = False,
    ) -> Shape:
        """`CausalConv3d` with a kernel of 3 frames that reaches ``rows`` far."""
        extended = self.extend(name, x, 3 - stride, rows, normed=normed, biased=biased)
        out = Shape(channels, (extended.frames - 3) // stride + 1, x.height, x.width)
        self.take(out)
        self.give(extended)
        return out

    def extend(
        self,
        name: str,
        x: Shape,
        frames: int,
        rows: int,
        *,
        normed: bool = False,
        biased: bool = False,
    ) -> Shape:
        """`CausalCache.extend`: for a moment the remembered frames are there twice."""
        wide = self.around(x, 2 * rows)
        past = replace(wide, frames=frames)
        extended = replace(wide, frames=x.frames + frames)
        with self.ledger.scope():
            self.take(extended)
            if normed and not self.fused:
                self.norm_silu_in_torch(x, biased=biased)
            self.take(past)
        size = past.values * self.element_size
        self.ledger.keep(size - self.past.get(name, 0))
        self.past[name] = size
        self.take(extended)
        return extended

    def norm_silu_in_torch(self, x: Shape, *, biased: bool) -> None:
        """`NormSiLU` without a kernel of its own, which needs nothing beside its result."""
        with self.ledger.scope():
            self.take(*[x] * biased)
            self.norm_in_torch(x)
            self.take(x, x)

    def norm_in_torch(self, x: Shape) -> None:
        if self.fused:
            return
        size = x.values * FLOAT32
        self.ledger.moment(
            size, *([size, x.values * self.element_size] if self.element_size < FLOAT32 else [])
        )
        self.ledger.moment(x.values * self.element_size, x.values * self.element_size)

    def around(self, x: Shape, rows: int) -> Shape:
        """``x`` with so many rows more along the divided dimension."""
        rows = self.strips.added(rows)
        if self.strips.dim == 3:
            return replace(x, height=x.height + rows)
        return replace(x, width=x.width + rows)

    def take(self, *shapes: Shape) -> None:
        self.ledger.take(*(x.values * self.element_size for x in shapes))

    def give(self, *shapes: Shape) -> None:
        self.ledger.give(*(x.values * self.element_size for x in shapes))

    @contextmanager
    def replacing(self, x: Shape) -> Iterator[None]:
        """``x`` is no longer needed when the block is done."""
        yield
        self.give(x)


def _extent(part: Part) -> tuple[int, int]:
    return part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]
