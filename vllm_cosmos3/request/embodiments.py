"""Embodiments that actions belong to: one row each, with the layout of its action vector.

An action row says how an embodiment gets from one frame to the next. Most are built from the same blocks:
a pose is a translation (3) and the first two columns of a rotation matrix (6), both relative to the
frame before (see `poses`); a gripper is one number. Domain ids and widths are those of the models'
training; frame rate, chunk and view are those of the data that the models were trained or shown
with. A request may choose others of the last three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_cosmos3.errors import InvalidRequest, did_you_mean

VIEWS = {  # label: the sentence of the training captions, word for word
    "ego_view": "This video is captured from a first-person perspective looking at the scene.",
    "third_person_view": "This video is captured from a third-person perspective looking towards"
    " the agent from the front.",
    "wrist_view": "This video is captured from a wrist-mounted camera.",
    "concat_view": "This video contains concatenated views from multiple camera perspectives.",
    "top_down_2d_view": "This video is captured from a top-down view of a flat 2D scene.",
    "video_game_view": "This video is captured from an in-game camera perspective in a virtual"
    " environment.",
}


def spelled(name: str, value: Any) -> dict[str, Any]:
    """A field as vLLM-Omni's documents write it, in ours: ``image_size`` may be a height and a width,
    and ``view_point`` the number of a view.
    """
    if name == "image_size" and isinstance(value, list) and len(value) == 2:
        return dict(zip(("height", "width"), value, strict=True))
    numbered = name == "view_point" and isinstance(value, int) and not isinstance(value, bool)
    if numbered and 0 <= value < len(VIEWS):
        return {name: tuple(VIEWS)[value]}
    return {name: value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embodiment:
    """One embodiment.

    ``domain_id`` chooses the matrices of the transformer, ``raw_action_dim`` is the width of an
    action row (None: it depends on the data set, and the request has to say), ``other_widths`` are
    those of further action spaces that checkpoints use. ``composition`` says what the numbers are,
    with units before normalisation; ``translation_scale`` is what the data set multiplied its
    translations with. ``image_size`` is the tier of sizes of its pictures.
    """

    name: str
    domain_id: int
    raw_action_dim: int | None
    composition: str
    fps: float = 24.0
    action_chunk_size: int = 16
    view_point: str = "ego_view"
    image_size: int = 480
    translation_scale: float = 1.0
    aliases: tuple[str, ...] = ()
    other_widths: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that an action row may have, the usual one first."""
        usual = () if self.raw_action_dim is None else (self.raw_action_dim,)
        return usual + self.other_widths


_POSE = "translation [m] (3), rotation (6)"
_ARM = f"{_POSE}, gripper (1)"

EMBODIMENTS = (
    Embodiment(
        name="av",
        domain_id=1,
        raw_action_dim=9,
        composition="of the camera: translation [m, times 1.35] (3), rotation (6)",
        translation_scale=1.35,
        fps=10.0,
        action_chunk_size=60,
    ),
    Embodiment(
        name="camera_pose",
        domain_id=2,
        raw_action_dim=9,
        composition=f"of the camera: {_POSE}",
        fps=30.0,
        action_chunk_size=60,
    ),
    Embodiment(
        name="hand_pose",
        domain_id=3,
        raw_action_dim=57,
        composition=f"of the head: {_POSE}; of each hand: {_POSE}, five fingertips [m] (15)",
        fps=15.0,
    ),
    Embodiment(
        name="pusht",
        domain_id=4,
        raw_action_dim=2,
        composition="target of the pusher in the plane (2)",
        view_point="top_down_2d_view",
    ),
    Embodiment(
        name="libero",
        domain_id=5,
        raw_action_dim=None,
        composition="translation [m] (3), rotation (3, 6 or 9), gripper (1)",
        fps=20.0,
        view_point="concat_view",
        image_size=256,
        other_widths=(7, 10, 13),
    ),
    Embodiment(
        name="umi",
        domain_id=6,
        raw_action_dim=10,
        composition=_ARM,
        fps=20.0,
        view_point="wrist_view",
        image_size=256,
    ),
    Embodiment(
        name="bridge_orig_lerobot",
        domain_id=7,
        raw_action_dim=10,
        composition=_ARM,
        fps=5.0,
        aliases=("bridge",),
    ),
    Embodiment(
        name="droid_lerobot",
        domain_id=8,
        raw_action_dim=10,
        composition=f"{_ARM}; or joints [rad] (7), gripper (1)",
        fps=15.0,
        view_point="concat_view",
        aliases=("droid",),
        other_widths=(8,),
    ),
    Embodiment(
        name="robomind-franka",
        domain_id=8,
        raw_action_dim=10,
        composition=_ARM,
        fps=10.0,
        view_point="concat_view",
    ),
    Embodiment(
        name="galbot",
        domain_id=9,
        raw_action_dim=30,
        composition="a humanoid with an extra pose (30)",
        aliases=("embodiment_b",),
    ),
    Embodiment(
        name="robomind-franka-dual",
        domain_id=12,
        raw_action_dim=20,
        composition=f"of each arm: {_ARM}",
        fps=10.0,
        view_point="concat_view",
    ),
    Embodiment(
        name="robomind-ur",
        domain_id=13,
        raw_action_dim=10,
        composition=_ARM,
        fps=10.0,
        view_point="third_person_view",
    ),
    Embodiment(
        name="agibotworld",
        domain_id=15,
        raw_action_dim=29,
        composition=f"of the head: {_POSE}; of each arm: {_ARM}",
        fps=10.0,
        view_point="concat_view",
        aliases=(
            "agibot_gear_gripper",
            "agibot_gear_gripper_ext",
            "embodiment_c_gripper",
            "embodiment_c_gripper_ext",
        ),
    ),
    Embodiment(
        name="xdof_yam",
        domain_id=16,
        raw_action_dim=20,
        composition=f"of each arm: {_ARM}",
        aliases=("molmoact2_yam", "abc_yam"),
    ),
    Embodiment(
        name="robotwin",
        domain_id=17,
        raw_action_dim=14,
        composition="of each arm: joints [rad] (6), gripper (1)",
    ),
    Embodiment(
        name="fractal",
        domain_id=20,
        raw_action_dim=10,
        composition=_ARM,
        fps=3.0,
    ),
    Embodiment(
        name="drawanything",
        domain_id=21,
        raw_action_dim=3,
        composition="pen (3)",
    ),
    Embodiment(
        name="behavior1k_lerobot",
        domain_id=22,
        raw_action_dim=23,
        composition="base (3), trunk (4), joints of both arms [rad] (14), grippers (2)",
    ),
    Embodiment(
        name="maniparena",
        domain_id=23,
        raw_action_dim=20,
        composition=f"of each arm: {_ARM}",
    ),
)

_BY_NAME = {name: row for row in EMBODIMENTS for name in (row.name, *row.aliases)}


def find_embodiment(domain_name: str | None, domain_id: int | None) -> Embodiment:
    """The row of a name or alias, in any case, or else the first one of a domain id.

    Raises:
        InvalidRequest: there is none, or the two do not agree.
    """
    if domain_name is None:
        return _of_id(domain_id)
    row = _BY_NAME.get(domain_name.strip().lower())
    if row is None:
        possible, hint = (
            f"one of {', '.join(_BY_NAME)}",
            did_you_mean(domain_name.lower(), _BY_NAME),
        )
        raise InvalidRequest(
            "domain_name", domain_name, f"{possible} ({hint})" if hint else possible
        )
    if domain_id is not None and domain_id != row.domain_id:
        possible = f"{row.domain_id} or left out, as domain_name is {domain_name}"
        raise InvalidRequest("domain_id", domain_id, possible, "conflict")
    return row


def _of_id(domain_id: int | None) -> Embodiment:
    if domain_id is None:
        possible = f"given with action_mode: one of {', '.join(_BY_NAME)}"
        raise InvalidRequest("domain_name", None, possible, "missing_required")
    for row in EMBODIMENTS:
        if row.domain_id == domain_id:
            return row
    known = ", ".join(str(number) for number in sorted({row.domain_id for row in EMBODIMENTS}))
    raise InvalidRequest("domain_id", domain_id, f"one of {known}")
