"""Causal simulators: how their files tell them apart, and what a rollout of one is made with. No torch.

They have Nano's towers. What is theirs stands in a block of ``transformer/config.json``: chunks of
latent frames are generated one after the other, each after a history of clean ones and with actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import CheckpointError, Unsupported

BLOCK = "cosmos3_nano_sim_bimanual"  # of Sim-Transfer, too
LEGACY_BLOCK = "cosmos_dreams"
AUTO_BLOCK = "cosmos3_nano_sim_auto"
UNIFIED, RAW = 5, 3  # versions of the contract on actions: of all embodiments together, or of each
UNIFIED_WIDTH = 59
CAMERA, CAMERA_SLOTS = "camera_pose", 9  # the only numbers of a unified row that a camera has
FULL_HISTORY = 226  # latent frames of the longest rollout that was trained, 901 pixel frames
TEXT_TOKENS = 4096  # of a prompt, beyond which training has cut
LATER_STEPS = (0, 2)  # entries of the noise levels for every chunk but one that starts the video

SERVED = {UNIFIED: "sim-bimanual", RAW: "sim-bimanual-camera"}
UNSERVED = {  # recognised, and why not served: "<folder> is ..."
    "sim-transfer": "a Cosmos3-Nano-Sim-Transfer checkpoint, and this version cannot add the frames"
    " of a control video to the history of a rollout",
    "sim-auto": "a Cosmos3-Nano-Sim-Auto checkpoint, and this version has neither the attention"
    " between its cameras nor the LiDAR autoencoder",
    "transfer-auto": "a Cosmos3-Transfer-Auto checkpoint, and this version has neither the attention"
    " between its cameras nor the LiDAR autoencoder",
    "sim-legacy": f"an early export of a simulator ({LEGACY_BLOCK} in transformer/config.json), of"
    f" which nobody serves the format any more: export it again, with {BLOCK}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpace:
    """Action rows of one embodiment: how wide they are, and their units.

    ``offset`` and ``scale`` [width] lead from the model's units to the user's; None where rows arrive
    in the model's. Of a row, ``slots`` may be other than zero.
    """

    name: str
    domain_id: int
    width: int
    slots: int
    offset: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalConfig:
    """The block of a causal simulator.

    After its first latent frame a video is made in chunks of ``chunk_size``. ``window_frames`` clean
    ones are remembered beside the first ``sink_frames``; None: all. ``sigmas`` are the noise levels
    of a chunk that begins the video. ``rows_per_frame`` actions lead to each latent frame. Captions
    are ``json`` or plain text.
    """

    chunk_size: int
    window_frames: int | None
    sink_frames: int
    sigmas: tuple[float, ...]
    rows_per_frame: int
    spaces: Mapping[str, ActionSpace]
    default_space: str
    json: bool

    def sigmas_at(self, frame: int) -> tuple[float, ...]:
        """The noise levels of a chunk whose first latent frame this is."""
        if frame == 0 or len(self.sigmas) <= max(LATER_STEPS):
            return self.sigmas
        return tuple(self.sigmas[index] for index in LATER_STEPS)


def simulator_kind(transformer: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:
    """The kind of a simulator or of a model of several cameras, by its JSON files; None for others."""
    name = str(pipeline.get("_class_name"))
    if AUTO_BLOCK in transformer or "SimAuto" in name:
        return "sim-auto"
    if "multiview" in transformer or "multiview" in str(transformer.get("backbone_type")):
        return "transfer-auto"
    if BLOCK in transformer:
        conditioning = _mapping(_mapping(transformer[BLOCK]).get("conditioning"))
        if "SimTransfer" in name or conditioning.get("mode") == "control_video":
            return "sim-transfer"
        return SERVED[RAW if conditioning.get("schema_version") == RAW else UNIFIED]
    return "sim-legacy" if LEGACY_BLOCK in transformer else None


def _mapping(value: Any) -> Mapping[str, Any]:
    """An object, or an empty one in place of anything else, which `read_causal` refuses by name."""
    return value if isinstance(value, dict) else {}


def read_causal(file: Path, values: Mapping[str, Any]) -> CausalConfig | None:
    """The block of a causal simulator in ``file``, whose values these are; None if it has none.

    Raises:
        CheckpointError: a key is missing, or has a value of another kind.
        Unsupported: it asks for what no other checkpoint does.
    """
    if BLOCK not in values:
        return None
    block = _Block(f"{file.parent.name}/{file.name}: {BLOCK}", values[BLOCK])
    block.expect(schema_version=1, attention_mode="three_way", video_temporal_causal=True)
    block.equal(values, "latent_patch_size", "base_fps", "enable_fps_modulation")
    sampler, conditioning = block.inner("fixed_step_sampler_config"), block.inner("conditioning")
    sampler.expect(sample_type="sde", num_train_timesteps=1000)
    conditioning.expect(mode="action")
    conditioning.equal(values, "num_embodiment_domains")
    spaces = _spaces(conditioning)
    default = conditioning.value("default_embodiment", str)
    if default not in spaces:
        raise CheckpointError(
            f"{conditioning.where}: default_embodiment is {default!r}, must be one of "
            f"{', '.join(spaces)}"
        )
    return CausalConfig(
        chunk_size=block.count("chunk_size"),
        window_frames=block.count("window_frames", optional=True),
        sink_frames=block.count("sink_frames", least=0),
        sigmas=_sigmas(sampler),
        rows_per_frame=conditioning.count("action_tokens_per_frame"),
        spaces=spaces,
        default_space=default,
        json=conditioning.values["schema_version"] == RAW,
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """A JSON object and where it stands."""

    where: str
    values: Any

    def inner(self, name: str) -> _Block:
        return _Block(f"{self.where}.{name}", self.value(name, dict))

    def value(self, name: str, kind: type | tuple[type, ...]) -> Any:
        found = self.values.get(name) if isinstance(self.values, dict) else None
        if not isinstance(found, kind) or isinstance(found, bool):
            shown = kind.__name__ if isinstance(kind, type) else "a number"
            raise CheckpointError(f"{self.where}: {name} is {found!r}, must be {shown}")
        return found

    def count(self, name: str, *, least: int = 1, optional: bool = False) -> Any:
        if optional and isinstance(self.values, dict) and self.values.get(name) is None:
            return None
        found = self.value(name, int)
        if found < least:
            raise CheckpointError(f"{self.where}: {name} is {found}, must be at least {least}")
        return found

    def numbers(self, name: str) -> tuple[float, ...]:
        found = self.value(name, list)
        if not found or not all(isinstance(n, (int, float)) for n in found):
            raise CheckpointError(f"{self.where}: {name} is {found!r}, must be a list of numbers")
        return tuple(map(float, found))

    def expect(self, **expected: object) -> None:
        """Refuse what the implementation does not have."""
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{self.where} is {self.values!r}, must be a JSON object")
        for name, value in expected.items():
            if self.values.get(name) != value:
                raise Unsupported(
                    f"{self.where}: {name} is {self.values.get(name)!r}, this version runs only {value!r}"
                )

    def equal(self, others: Mapping[str, Any], *names: str) -> None:
        """Numbers that stand in the outer object, too, must be the same there."""
        for name in names:
            if self.values.get(name, others.get(name)) != others.get(name):
                raise CheckpointError(
                    f"{self.where}: {name} is {self.values[name]!r}, and {others.get(name)!r} outside of "
                    "the block, must be equal"
                )


def _spaces(contract: _Block) -> dict[str, ActionSpace]:
    version = contract.values.get("schema_version")
    if version not in (RAW, UNIFIED):
        raise Unsupported(
            f"{contract.where}: schema_version is {version!r}, this version runs only "
            f"{RAW} and {UNIFIED}"
        )
    spaces = {}
    for name in contract.value("embodiments", dict):
        row = _Block(f"{contract.where}.embodiments.{name}", contract.values["embodiments"][name])
        domain = row.count("domain_id", least=0)
        if version == UNIFIED:
            width = row.count("input_action_dim")
            slots = CAMERA_SLOTS if name == CAMERA else width
            spaces[name] = ActionSpace(name=name, domain_id=domain, width=width, slots=slots)
            continue
        width = row.count("raw_action_dim")
        transform = row.inner("normalizer").inner("transform")
        transform.expect(type="affine", forward_clamp=False)
        offset, scale = transform.numbers("offset"), transform.numbers("scale")
        if not len(offset) == len(scale) == width or 0 in scale:
            raise CheckpointError(
                f"{transform.where}: offset and scale must be {width} numbers, and those of scale not 0"
            )
        spaces[name] = ActionSpace(
            name=name, domain_id=domain, width=width, slots=width, offset=offset, scale=scale
        )
    return spaces


def _sigmas(sampler: _Block) -> tuple[float, ...]:
    sigmas = sampler.numbers("t_list")
    falling = all(a > b for a, b in zip(sigmas, (*sigmas[1:], 0.0), strict=True))
    if sigmas[0] != 1.0 or not falling:
        raise CheckpointError(
            f"{sampler.where}: t_list is {list(sigmas)}, must fall from 1 and stay above 0"
        )
    return sigmas
