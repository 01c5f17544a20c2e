"""Requests with actions against Cosmos3OmniPipeline of diffusers: the same noise, float32.

Both sides get the same prompt, picture or clip and actions, and end with latents and actions that
agree to 1e-4 of their scale. The oracle keeps fractions of a level where it reduces a picture, so
the pictures here are smaller than their canvas; and it would first stretch them to multiples of 16,
which the models' own framework does not, and which is turned off.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as reference_module
from oracles import guided
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.generator.sampling.noise import initial_noise
from vllm_cosmos3.media import fit_inside
from vllm_cosmos3.request.embodiments import VIEWS, find_embodiment
from vllm_cosmos3.request.sizes import nearest_size

pytestmark = pytest.mark.parity

BOUND = 1e-4
PROMPT = "Put the pot on the left"
SEED = 11


@dataclass(frozen=True, kw_only=True)
class Case:
    mode: str
    domain: str
    chunk: int = 8
    fps: float = 10.0
    picture: tuple[int, int] = (150, 101)  # width, height
    view: str = "ego_view"
    steps: int = 3
    guidance: float = 1.0
    rows: int = 8  # that are given to forward dynamics
    width: int = 9  # of an action


CASES = {
    "av forward": Case(mode="forward_dynamics", domain="av"),
    "av inverse, no padding": Case(mode="inverse_dynamics", domain="av", picture=(320, 192)),
    "av policy, guided": Case(mode="policy", domain="av", guidance=3.0, fps=12.5),
    "umi forward, mirrored, few rows": Case(
        mode="forward_dynamics", domain="umi", fps=20, picture=(210, 170), rows=5, width=10
    ),
    "umi inverse, mirrored": Case(
        mode="inverse_dynamics", domain="umi", fps=20, picture=(250, 177), view="wrist_view"
    ),
    "umi policy, high": Case(mode="policy", domain="umi", fps=20, picture=(49, 130), steps=4),
    "droid forward, many rows": Case(
        mode="forward_dynamics", domain="droid_lerobot", fps=15, chunk=4, width=10
    ),
    "droid inverse, long picture": Case(
        mode="inverse_dynamics", domain="droid_lerobot", fps=15, chunk=4, picture=(300, 19)
    ),
    "droid policy, chunk of 6": Case(
        mode="policy", domain="droid_lerobot", fps=15, chunk=6, view="concat_view"
    ),
    "agibot forward": Case(
        mode="forward_dynamics", domain="agibotworld", fps=30, picture=(160, 160), width=29
    ),
    "agibot inverse": Case(
        mode="inverse_dynamics", domain="agibotworld", fps=23.976, view="third_person_view"
    ),
    "agibot policy, guided": Case(
        mode="policy", domain="agibotworld", chunk=16, fps=5, guidance=2.0
    ),
}


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint_fp32: Path) -> Cosmos3OmniPipeline:
    pipeline = guided(tiny_checkpoint_fp32)
    pipeline.video_processor.register_to_config(do_resize=False)
    return pipeline


def clip(case: Case, seed: int = 1) -> list[Image.Image]:
    """The picture of a case, or for inverse dynamics its whole clip: soft random blocks."""
    frames = case.chunk + 1 if case.mode == "inverse_dynamics" else 1
    small = np.random.RandomState(seed).randint(0, 256, (frames, 5, 9, 3), dtype=np.uint8)
    return [Image.fromarray(x).resize(case.picture, Image.Resampling.BICUBIC) for x in small]


def given_rows(case: Case) -> np.ndarray | None:
    if case.mode != "forward_dynamics":
        return None
    return np.random.RandomState(2).standard_normal((case.rows, case.width)).astype(np.float32)


def fields(case: Case) -> dict[str, Any]:
    """The case as a request to us."""
    frames = clip(case)
    media = {"video": frames} if case.mode == "inverse_dynamics" else {"image": frames[0]}
    rows = given_rows(case)
    return {
        "prompt": PROMPT,
        "action_mode": case.mode,
        "domain_name": case.domain,
        "action_chunk_size": case.chunk,
        "fps": case.fps,
        "image_size": 256,
        "view_point": case.view,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "seed": SEED,
        "noise": "torch",
        "output_type": "latent",
        **({} if rows is None else {"action": rows}),
        **media,
    }


def reference(
    oracle: Cosmos3OmniPipeline, case: Case, **more: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Final video latents of the oracle, and its actions."""
    rows, frames = given_rows(case), clip(case)
    inverse = case.mode == "inverse_dynamics"
    out = oracle(
        prompt=PROMPT,
        action=reference_module.CosmosActionCondition(
            mode=case.mode,
            chunk_size=case.chunk,
            domain_name=case.domain,
            resolution_tier=256,
            raw_actions=None if rows is None else torch.from_numpy(rows),
            video=frames if inverse else None,
            image=None if inverse else frames[0],
            view_point=case.view,
        ),
        fps=case.fps,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        use_system_prompt=False,
        **more,
    )
    return out.video.numpy(), None if out.action is None else out.action[0].numpy()


def assert_close(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() <= BOUND * np.abs(theirs).max()


@pytest.mark.parametrize("name", CASES)
def test_final_latents_and_actions(oracle: Cosmos3OmniPipeline, ours: Cosmos3, name: str) -> None:
    case = CASES[name]
    mine = ours.generate(**fields(case))
    video, action = reference(oracle, case)
    assert_close(mine.latents["vision"], video)
    if action is None:
        assert mine.action is None
        assert case.mode == "forward_dynamics"
    else:
        assert_close(mine.action, action)


@pytest.mark.parametrize(("history", "state"), [(0, 1), (3, 0), (2, 1)])
def test_history_and_state(
    oracle: Cosmos3OmniPipeline,
    ours: Cosmos3,
    monkeypatch: pytest.MonkeyPatch,
    history: int,
    state: int,
) -> None:
    """Rows before the chunk, which the oracle has no argument for: they are put into its latents.

    Its own chunk begins at frame 1; the rows before it are that much earlier.
    """
    case, before, width = Case(mode="policy", domain="droid_lerobot", chunk=4), history + state, 8
    rows = np.random.RandomState(3).standard_normal((before, width)).astype(np.float32)
    fields_of_rows: dict[str, Any] = {"raw_action_dim": width}
    if history:
        fields_of_rows["action_history"] = rows[:history]
    if state:
        fields_of_rows["action_state"] = rows[history]
    mine = ours.generate(**fields(case), **fields_of_rows)

    prepare, positions = oracle.prepare_latents, reference_module.get_3d_mrope_ids_vae_tokens

    def with_rows(**arguments: Any) -> tuple[Any, ...]:
        out = list(prepare(**arguments))
        shapes = {"vision": tuple(out[0].shape), "action": (before + case.chunk, 64)}
        out[2] = initial_noise(shapes, seed=SEED, rule="torch")["action"]
        out[2][:before, :width] = torch.from_numpy(rows)
        out[2][:, width:] = 0
        out[7] = (torch.arange(before + case.chunk) < before).float()[:, None]
        out[10], out[11] = width, list(range(before))
        return tuple(out)

    def earlier(**arguments: Any) -> Any:
        if "start_frame_offset" in arguments:
            arguments["start_frame_offset"] -= before
        return positions(**arguments)

    monkeypatch.setattr(oracle, "prepare_latents", with_rows)
    monkeypatch.setattr(reference_module, "get_3d_mrope_ids_vae_tokens", earlier)
    video, action = reference(oracle, case)
    assert_close(mine.latents["vision"], video)
    assert_close(mine.action, action[before:])


def test_the_table_of_embodiments() -> None:
    for name, number in reference_module._EMBODIMENT_TO_DOMAIN_ID.items():
        if name != "no_action":
            assert find_embodiment(name, None).domain_id == number
    for name, width in reference_module._EMBODIMENT_TO_RAW_ACTION_DIM.items():
        assert find_embodiment(name, None).raw_action_dim == width
    for name, sentence in reference_module._ACTION_VIEWPOINT_TEMPLATES.items():
        assert VIEWS[name] == sentence


@pytest.mark.parametrize("tier", [256, 480, 704, 720])
def test_the_canvas_of_any_shape(tier: int) -> None:
    bins = reference_module._ACTION_RESOLUTION_BINS[str(tier)]
    classify = reference_module.VideoProcessor.classify_height_width_bin
    for width in range(100, 2000, 37):
        height, canvas = classify(700, width, ratios=bins)
        assert nearest_size(tier, width, 700) == (canvas, height)


@pytest.mark.parametrize("size", [(640, 540), (401, 997)])
def test_a_picture_is_reduced_as_torchvision_does(size: tuple[int, int]) -> None:
    """As the models' own framework does, on bytes; a level may be rounded to either side."""
    picture = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    mine, (rows, columns) = fit_inside(picture[None], height=256, width=320)
    theirs = resize(
        torch.from_numpy(picture).movedim(2, 0),
        [rows, columns],
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    difference = mine[0, :rows, :columns].astype(int) - theirs.movedim(0, 2).numpy().astype(int)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.05
