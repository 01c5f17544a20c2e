"""Geometry of latents: the latent frames of pixel frames and back, and the tokens of a stream.

The autoencoder makes one latent frame of the first pixel frame, and one of every ``scale`` after it
(`VAEConfig.scale_factor_temporal`), so whole latent frames hold ``scale * k + 1`` pixel frames.
"""

from __future__ import annotations

from vllm_cosmos3.checkpoint.config import VAEConfig

TIME_AXIS = {"vision": 2, "sound": 1}  # of the latents of a stream; all others have it first
CHUNK_POSITIONS = 4096  # of latents that the autoencoder takes at once: a frame of 1280x720
CHUNK_FRAMES = 4  # at most, so that frames of a small video leave while the next ones are made


def time_steps(name: str, shape: tuple[int, ...]) -> int:
    """Positions on the time axis of a stream of latents of this ``shape``."""
    return shape[TIME_AXIS.get(name, 0)]


def latent_frames(frames: int, vae: VAEConfig) -> int:
    """Whole latent frames of a video of ``frames`` pixel frames, at least one."""
    return 1 + (frames - 1) // vae.scale_factor_temporal


def pixel_frames(latents: int, vae: VAEConfig) -> int:
    """Pixel frames of a video of so many latent frames: the inverse of `latent_frames`."""
    return 1 + (latents - 1) * vae.scale_factor_temporal


def round_frames(frames: int, vae: VAEConfig) -> int:
    """The smallest number of pixel frames, at least ``frames``, that fills whole latent frames."""
    return pixel_frames(latent_frames(frames + vae.scale_factor_temporal - 1, vae), vae)


def vision_shape(frames: int, height: int, width: int, vae: VAEConfig) -> tuple[int, ...]:
    """Shape [1, C, T, h, w] of the latents of so many pixel frames of ``height`` x ``width``."""
    rows, columns = (max(side // vae.scale_factor_spatial, 1) for side in (height, width))
    return 1, vae.z_dim, latent_frames(frames, vae), rows, columns


def chunk_sizes(frames: int, height: int, width: int, *, begun: bool = False) -> list[int]:
    """Latent frames of each chunk in which the autoencoder takes a clip of ``height`` x ``width`` latents.

    The first frame is alone, unless the clip has ``begun`` before. A larger chunk moves the frames
    that convolutions remember less often, and needs more memory: about as much for every size.
    """
    first = [] if begun else [1]
    size = max(1, min(CHUNK_FRAMES, CHUNK_POSITIONS // (height * width)))
    whole, rest = divmod(frames - len(first), size)
    return first + [size] * whole + [rest] * (rest > 0)


def patch_grid(shape: tuple[int, ...], patch: int) -> tuple[int, int, int]:
    """Frames, patch rows and patch columns of a latent of ``shape`` [1, C, T, h, w]."""
    return shape[2], -(-shape[3] // patch), -(-shape[4] // patch)


def token_count(name: str, shape: tuple[int, ...], patch: int) -> int:
    """Tokens in the generation sequence of a stream of latents of this ``shape``."""
    if name == "vision":
        frames, rows, columns = patch_grid(shape, patch)
        return frames * rows * columns
    return time_steps(name, shape)
