"""Keyword arguments of `Cosmos3.generate`, for editors and readers. Made by tools/keywords.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vllm_cosmos3.media import ImageSource, SoundSource, VideoSource

    Array: TypeAlias = np.ndarray[Any, Any] | torch.Tensor


class Keywords(TypedDict, total=False):
    """Fields of a request. One that is left out takes the default of its mode."""

    prompt: str | Mapping[str, object] | None
    """What to show: plain text, or a structured JSON caption."""

    negative_prompt: str | Mapping[str, object] | None
    """What to avoid (default for videos: a standard text)."""

    image: ImageSource | None
    """First frame of the video, or picture to edit (num_frames 1)."""

    video: VideoSource | None
    """Clip to continue."""

    condition_frame_indexes_vision: int | Sequence[int] | None
    """Latent frames taken from the video (k needs 4k+1 frames)."""

    condition_video_keep: Literal["first", "last"]
    """End of the video that supplies them (default first)."""

    action_mode: Literal["forward_dynamics", "inverse_dynamics", "policy"] | None
    """Forward_dynamics: actions to video; inverse_dynamics: video to actions; policy: both from an
    instruction."""

    domain_name: str | None
    """Embodiment of the actions, e.g. av, umi or droid_lerobot."""

    domain_id: int | None
    """Id of the embodiment; alternative to domain_name (0 to 1000)."""

    raw_action_dim: int | None
    """Numbers in one action (default: of the embodiment) (1 to 1000)."""

    action_chunk_size: int | None
    """Number of actions, one for each frame but the first (1 to 1000)."""

    action: Sequence[Sequence[float]] | Array | None
    """Action rows of forward_dynamics."""

    action_path: str | None
    """Action rows in a JSON file; alternative to action."""

    action_history: Sequence[Sequence[float]] | Array | None
    """Actions carried out before the first frame."""

    action_state: Sequence[float] | Array | None
    """Robot state at the first frame, if the model has one."""

    action_stats_path: str | None
    """Statistics as JSON, for actions in physical units."""

    action_normalization: Literal["minmax", "meanstd", "quantile", "quantile_rot"]
    """Normalization the model was trained with (default minmax)."""

    view_point: (
        Literal[
            "ego_view",
            "third_person_view",
            "wrist_view",
            "concat_view",
            "top_down_2d_view",
            "video_game_view",
        ]
        | None
    )
    """Camera position (default: of the embodiment)."""

    view_description: str | None
    """Description of the cameras."""

    image_size: Literal[256, 480, 704, 720, 768] | None
    """Resolution tier, with the size nearest in shape to the input."""

    edge: bool | VideoSource | Mapping[str, object] | None
    """Follow the edges of this clip, or (true) of the video; as an object: control_path,
    control_weight, preset_edge_threshold (none to very_high)."""

    blur: bool | VideoSource | Mapping[str, object] | None
    """Follow this blurred clip, or (true) the blurred video; as an object: control_path,
    control_weight, preset_blur_strength (none to very_high)."""

    depth: bool | VideoSource | Mapping[str, object] | None
    """Follow a depth clip, or an object with control_weight."""

    seg: bool | VideoSource | Mapping[str, object] | None
    """Follow a segmentation clip; as an object likewise."""

    wsm: bool | VideoSource | Mapping[str, object] | None
    """Follow a clip of world-scenario maps; as an object likewise."""

    control_guidance: float | None
    """Guidance of the controls (default: by control) (0 to 20)."""

    control_guidance_interval: Sequence[float] | None
    """Timesteps with control guidance (default: all)."""

    control_attention: Literal["averaged", "full"] | None
    """With several controls - averaged: attend to each control separately and average by weight, as
    trained (default); full: attend to all at once, as diffusers."""

    num_video_frames_per_chunk: int | None
    """Frames per chunk (default: at most 93; wsm: 101) (2 to 401 frames)."""

    num_conditional_frames: int | None
    """Frames reused from the previous chunk (default: 1) (0 to 400 frames)."""

    num_first_chunk_conditional_frames: int | None
    """Frames reused from the video in the first chunk (default: 0) (0 to 400 frames)."""

    max_frames: int | None
    """Most frames used of a control clip (default: 5000) (2 to 18000 frames)."""

    share_vision_temporal_positions: bool | None
    """Same time positions of controls and video (default: true)."""

    emphasize_control_in_prompt: bool | None
    """Append a sentence on the controls (default: true)."""

    show_control_condition: bool | None
    """Show the controls to the left of the video."""

    show_input: bool | None
    """Show the input video on the far left."""

    size: str | None
    """Output size, e.g. 1280x720; replaces width and height."""

    height: int | None
    """Height in pixels, a multiple of 16 (16 to 65536 pixels)."""

    width: int | None
    """Width in pixels, a multiple of 16 (16 to 65536 pixels)."""

    num_frames: int | None
    """Number of frames, rounded up to 4k+1; 1 makes an image (1 to 100000 frames)."""

    seconds: float | None
    """Length; alternative to num_frames (above 0 to 600 seconds)."""

    num_chunks: int
    """Consecutive chunks, each from the last frame of the one before (1 to 100 chunks; default
    1)."""

    fps: float | None
    """Frame rate in frames per second (1 to 60 frames per second)."""

    num_inference_steps: int | None
    """Denoising steps (1 to 200 steps)."""

    guidance_scale: float | None
    """Classifier-free guidance; 1: off, half the time (0 to 20)."""

    guidance_interval: Sequence[float] | None
    """Timesteps with guidance (default: all; Edge policy 960,1001)."""

    preset: Literal["exact", "high", "fast"] | None
    """Less exact is faster: sets other fields that are not given (default: exact, or the
    server's)."""

    step_cache: Literal["none", "sea"] | None
    """Sea (SeaCache): reuses steps; not exact (default: none)."""

    step_cache_threshold: float | None
    """Change that adds up until a step is computed; larger reuses more (default: 0.25) (0 to
    10)."""

    step_cache_max_reused: int | None
    """Most steps reused in a row (default: 2) (1 to 200 steps)."""

    step_cache_order: int | None
    """Extrapolation order: 0 repeats the last computed step, 1 extrapolates the last two (default:
    1) (0 to 1)."""

    flow_shift: float | None
    """Noise schedule shift; larger favours structure (0.01 to 100)."""

    schedule: Literal["native", "diffusers", "karras"]
    """Noise schedule: that of the reference, or the flow or Karras schedule of diffusers (karras
    needs sigma_min and sigma_max in the checkpoint) (default native)."""

    seed: int | None
    """Seed of the initial noise (default: random)."""

    noise: Literal["numpy", "torch"]
    """How noise is drawn from the seed: numpy as in the reference, or a torch generator (default
    numpy)."""

    n: int
    """Results, with seeds seed to seed+n-1 (1 to 10; default 1)."""

    generate_sound: bool
    """Generate a synchronized sound track."""

    sound_duration: float | None
    """Length of the sound (default: that of the video) (0.04 to 600 seconds)."""

    sound_path: SoundSource | None
    """Sound file, or clip with sound, that the video follows."""

    keep_sound: bool
    """Give the result the sound of the video or control clip."""

    use_resolution_template: bool
    """Append the sentence on resolution (default True)."""

    use_duration_template: bool
    """Append the sentence on duration (default True)."""

    negative_metadata_mode: Literal["none", "same", "inverse"] | None
    """Size and length in the negative prompt: none, the same, or the inverse (default: same; with
    actions none)."""

    use_system_prompt: bool
    """Put the model's system prompt before the prompt."""

    prompt_format: Literal["auto", "plain", "json"]
    """Where size and length go - plain: sentences appended to the prompt; json: keys of the JSON
    caption; auto: json if the prompt is a JSON object (default auto)."""

    max_sequence_length: int
    """Longest prompt in tokens; longer is cut (64 to 32768 tokens; default 4096)."""

    prompt_token_ids: int | Sequence[int] | None
    """Token ids of prompt and chat template; alternative to prompt."""

    negative_prompt_token_ids: int | Sequence[int] | None
    """The same for negative_prompt."""

    allow_untrained_size: bool
    """Accept larger or longer outputs than trained for."""

    output_type: Literal["pixels", "latent"]
    """Decoded pixels and sound, or latents only (default pixels)."""

    latents: Mapping[str, Array] | None
    """Initial noise by stream: vision [1,48,T,h,w], sound [64,T_s], action [T_a,64]."""
