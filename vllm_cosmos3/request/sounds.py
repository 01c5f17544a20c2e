"""Sound of a request: its stream, and the sound that a user gives, which the video follows or keeps.

With ``sound_path`` the whole stream of sound is known, as in the mode audio_image2video of the Cosmos
Framework, and the result has the sound as it was given. ``keep_sound`` needs no stream: the model does
not hear it.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media_budget import Lease
from vllm_cosmos3.request.defaults import Parameters
from vllm_cosmos3.request.plan import StreamPlan
from vllm_cosmos3.request.request import GenerateRequest


def sound_stream(
    duration: float, model: ModelConfig, given: np.ndarray | None = None
) -> StreamPlan:
    """The stream of ``duration`` seconds of sound, known throughout where its samples are ``given``."""
    sound = model.sound
    assert sound is not None  # the parameters have refused checkpoints without sound
    length = math.ceil(int(duration * sound.sampling_rate) / sound.hop_size)
    return StreamPlan(
        name="sound",
        shape=(sound.vocoder_input_dim, length),
        rate=model.transformer.sound_latent_fps,
        known=() if given is None else tuple(range(length)),
        source=given,
    )


def given_sound(
    request: GenerateRequest, model: ModelConfig, parameters: Parameters, lease: Lease
) -> np.ndarray | None:
    """The sound that the result gets, float32 [2, N] as long as the video; None if none is given.

    Raises:
        InvalidRequest: it cannot be read, there is none to keep, or the model cannot follow it.
    """
    if request.sound_path is not None:
        if model.sound is None or not model.sound.encoder_enabled:
            possible = "left out: this checkpoint has no encoder for sound"
            raise InvalidRequest("sound_path", "given", possible, "unsupported_by_model")
        source, field = request.sound_path, "sound_path"
    elif request.keep_sound:
        source, field = _kept(request)
    else:
        return None
    samples = int(parameters.seconds * model.sample_rate)
    rate = model.sample_rate
    return media.read_sound(source, samples=samples, rate=rate, field=field, lease=lease)


def _kept(request: GenerateRequest) -> tuple[media.SoundSource, str]:
    """The clip whose sound is kept, the video or else the first control, and its field."""
    clips = {name: control.clip for name, control in request.controls.items()}
    for field, clip in ({"video": request.video} | clips).items():
        if isinstance(clip, media.SoundSource):
            return clip, field
    possible = "False, or given with a video file: frames have no sound"
    raise InvalidRequest("keep_sound", request.keep_sound, possible, "conflict")
