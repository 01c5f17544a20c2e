"""Requests with actions: the table of embodiments, what contradicts it, rows, units and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request import actions, planner, prompts
from vllm_cosmos3.request.embodiments import EMBODIMENTS, VIEWS, find_embodiment
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.request.sizes import nearest_size

PICTURE = np.random.RandomState(0).randint(0, 256, (48, 80, 3), dtype=np.uint8)
CLIP = np.stack([PICTURE] * 5)
POLICY = {"action_mode": "policy", "domain_name": "umi", "image": PICTURE, "size": "96x64"}
FORWARD = POLICY | {"action_mode": "forward_dynamics", "action": np.ones((16, 10))}
INVERSE = {"action_mode": "inverse_dynamics", "domain_name": "av", "video": CLIP}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ModelConfig:
    return read_config(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> prompts.Tokenizer:
    return prompts.load_tokenizer(tiny_checkpoint)


@pytest.fixture
def plan(model: ModelConfig, tokenizer: prompts.Tokenizer) -> Any:
    def make(**fields: Any) -> Plan:
        return planner.make_plan(from_fields({"prompt": "go", **fields}), model, tokenizer)

    return make


def refusal(model: ModelConfig, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        actions.resolve_action(from_fields({"prompt": "go", **fields}), model)
    return caught.value


# The table.


def test_names_are_unique_and_widths_fit_the_model(model: ModelConfig) -> None:
    names = [name for row in EMBODIMENTS for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    for row in EMBODIMENTS:
        assert row.domain_id < model.transformer.num_embodiment_domains
        assert row.widths
        assert max(row.widths) <= model.transformer.action_dim
        assert row.view_point in VIEWS


def test_a_name_in_any_case_and_a_number_alone() -> None:
    assert find_embodiment(" AV ", None).name == "av"
    assert find_embodiment(None, 8).name == "droid_lerobot"


# Contradictions.


@pytest.mark.parametrize(
    ("fields", "field", "code"),
    [
        ({"domain_name": "av"}, "domain_name", "conflict"),
        ({"image_size": 256}, "image_size", "conflict"),
        (POLICY | {"domain_name": None}, "domain_name", "missing_required"),
        (POLICY | {"domain_name": "robot"}, "domain_name", "invalid_value"),
        (POLICY | {"domain_name": None, "domain_id": 31}, "domain_id", "invalid_value"),
        (POLICY | {"domain_id": 1}, "domain_id", "conflict"),
        (POLICY | {"raw_action_dim": 9}, "raw_action_dim", "conflict"),
        (POLICY | {"domain_name": "libero"}, "raw_action_dim", "missing_required"),
        (POLICY | {"image": None}, "image", "missing_required"),
        (POLICY | {"action": [[1.0] * 10]}, "action", "conflict"),
        (POLICY | {"action_path": "a.json"}, "action_path", "conflict"),
        (POLICY | {"action_state": [0.0] * 9}, "action_state", "conflict"),
        (POLICY | {"action_history": [[0.0] * 9]}, "action_history", "conflict"),
        (POLICY | {"action_history": np.ones((1001, 10))}, "action_history", "too_large"),
        (POLICY | {"num_frames": 9, "action_chunk_size": 4}, "num_frames", "conflict"),
        (POLICY | {"seconds": 1}, "seconds", "conflict"),
        (POLICY | {"image_size": 480}, "image_size", "conflict"),
        (POLICY | {"generate_sound": True}, "generate_sound", "unsupported_combination"),
        (POLICY | {"num_frames": 1, "image": None}, "action_mode", "unsupported_combination"),
        (FORWARD | {"action": None}, "action", "missing_required"),
        (FORWARD | {"action": np.ones((4, 9))}, "action", "conflict"),
        (FORWARD | {"action_path": "a.json"}, "action_path", "conflict"),
        (FORWARD | {"action_chunk_size": 6, "num_chunks": 2}, "action_chunk_size", "invalid_value"),
        (FORWARD | {"num_frames": 8, "num_chunks": 2}, "num_frames", "invalid_value"),
        (FORWARD | {"num_chunks": 3}, "action_chunk_size", "invalid_value"),  # six rows each
        (FORWARD | {"action_chunk_size": 3}, "action_chunk_size", "invalid_value"),
        (FORWARD | {"action": np.ones((3, 10))}, "action_chunk_size", "invalid_value"),
        (INVERSE | {"video": None}, "video", "missing_required"),
        (INVERSE | {"video": None, "image": PICTURE}, "image", "conflict"),
        (
            INVERSE | {"condition_frame_indexes_vision": [0]},
            "condition_frame_indexes_vision",
            "conflict",
        ),
    ],
)
def test_refused(model: ModelConfig, fields: dict[str, Any], field: str, code: str) -> None:
    error = refusal(model, **{k: v for k, v in fields.items() if v is not None})
    assert (error.field, error.code) == (field, code)


LENGTHS: list[tuple[dict[str, Any], str, str]] = [
    (POLICY | {"action_chunk_size": 500}, "action_chunk_size", "at most 400"),
    (POLICY | {"num_frames": 501}, "num_frames", "at most 401"),
    (FORWARD | {"action": np.ones((500, 10))}, "action", "at most 400 rows a chunk"),
    (
        FORWARD | {"action": np.ones((1000, 10)), "num_chunks": 2},
        "action",
        "'500 rows a chunk', must be at most 400 rows a chunk",
    ),
]


@pytest.mark.parametrize(("fields", "field", "sentence"), LENGTHS)
def test_more_actions_than_frames_that_were_trained(
    plan: Any, fields: dict[str, Any], field: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(**fields)
    assert (caught.value.field, caught.value.code) == (field, "too_large")
    assert f"{sentence} at 96x64, or allow_untrained_size set" in str(caught.value)
    made = plan(**fields, allow_untrained_size=True)
    assert made.streams[1].shape[0] == 500
    assert any("is above the trained 400 at 96x64" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("trained", "most", "size"),
    [(400, 400, "96x64"), (300, 300, "832x480"), (200, 300, "1280x720")],
)
def test_as_many_actions_as_were_trained(plan: Any, trained: int, most: int, size: str) -> None:
    made = plan(**POLICY | {"size": size}, action_chunk_size=trained)
    assert not any("above the trained" in warning for warning in made.warnings)
    made = plan(**POLICY | {"size": size}, action_chunk_size=most)
    warned = any("above the trained" in warning for warning in made.warnings)
    assert warned == (most > trained)
    with pytest.raises(InvalidRequest, match=f"at most {most} at {size}"):
        plan(**POLICY | {"size": size}, action_chunk_size=most + 1)


@pytest.mark.parametrize("large", [False, True])
def test_no_chunk_is_longer_than_the_field_allows(
    model: ModelConfig, tmp_path: Path, large: bool
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([[0.0] * 10] * 1001))
    anyhow = {"allow_untrained_size": large}
    error = refusal(model, **POLICY, **anyhow, num_frames=5001)
    assert (error.field, error.possible) == ("num_frames", "at most 1001")
    error = refusal(model, **FORWARD | {"action": np.ones((1001, 10))}, **anyhow)
    assert (error.field, error.possible) == ("action", "at most 1000 rows a chunk")
    rows = {k: v for k, v in FORWARD.items() if k != "action"} | {"action_path": str(file)}
    assert refusal(model, **rows, **anyhow).field == "action_path"


def test_a_checkpoint_without_actions(model: ModelConfig) -> None:
    from dataclasses import replace

    without = replace(model, transformer=replace(model.transformer, action_gen=False))
    assert refusal(without, **POLICY).code == "unsupported_by_model"
    narrow = replace(model, transformer=replace(model.transformer, action_dim=8))
    assert refusal(narrow, **POLICY).field == "raw_action_dim"
    few = replace(model, transformer=replace(model.transformer, num_embodiment_domains=6))
    assert refusal(few, **POLICY).field == "domain_id"


def test_a_short_clip_is_told_how_long_it_must_be(plan: Any) -> None:
    with pytest.raises(InvalidRequest, match="at least 9 frames long for 8 actions"):
        plan(**INVERSE, action_chunk_size=8, size="96x64")


# The plan.


def test_defaults_follow_from_the_embodiment(plan: Any) -> None:
    made = plan(**{k: v for k, v in POLICY.items() if k != "size"})
    vision, rows = made.streams
    assert vision.shape == (1, 48, 5, 3, 5)  # of the picture: the canvas is larger
    assert vision.source.shape == (1, 192, 320, 3)
    assert (vision.known, vision.rate) == ((0,), 20.0)
    assert (rows.shape, rows.channels, rows.known, rows.first_frame) == ((16, 64), 10, (), 1)
    assert (
        made.parameters.num_inference_steps,
        made.parameters.guidance_scale,
        made.parameters.flow_shift,
    ) == (30, 1.0, 10.0)
    assert (made.domain_id, len(made.token_ids)) == (6, 1)
    names = ("size", "output_size", "num_frames", "view_point", "mode")
    assert {name: made.effective[name] for name in names} == {
        "size": "320x192", "output_size": "80x48", "num_frames": 17, "view_point": "wrist_view", "mode": "policy"
    }  # fmt: skip
    assert json.dumps(dict(made.effective))


@pytest.mark.parametrize(
    ("history", "state", "first"), [(0, 0, 1), (3, 0, -2), (0, 1, 0), (2, 1, -2)]
)
def test_history_and_state_go_before_the_chunk(
    plan: Any, history: int, state: int, first: int
) -> None:
    fields: dict[str, Any] = {"action_chunk_size": 4}
    if history:
        fields["action_history"] = np.full((history, 10), 2.0)
    if state:
        fields["action_state"] = [5.0] * 10
    rows = plan(**POLICY, **fields).streams[1]
    assert rows.first_frame == first
    assert rows.known == tuple(range(history + state))
    expected = [2.0] * history + [5.0] * state + [0.0] * 4
    assert rows.source[:, 0].tolist() == expected
    assert not rows.source[:, 10:].any()


def test_the_rows_that_come_back_are_those_of_the_chunk(plan: Any) -> None:
    made = plan(**POLICY, action_chunk_size=4, action_state=[5.0] * 10)
    latents = np.arange(5 * 64, dtype=np.float32).reshape(5, 64)
    assert np.array_equal(made.actions.read(latents), latents[1:, :10])
    assert made.actions.read(latents).dtype == np.float32
    assert plan(**FORWARD).actions is None


@pytest.mark.parametrize(("rows", "said"), [(3, "repeated 1 times"), (4, None), (6, "first 4")])
def test_rows_are_brought_to_the_chunk(plan: Any, rows: int, said: str | None) -> None:
    given = np.arange(rows, dtype=float)[:, None].repeat(10, 1)
    made = plan(**FORWARD | {"action": given}, action_chunk_size=4)
    assert made.streams[1].source[:, 0].tolist() == [0, 1, 2, min(rows - 1, 3)]
    assert [said in w for w in made.warnings if "action" in w] == ([True] if said else [])


def test_the_chunk_is_as_long_as_the_rows_or_the_video(plan: Any) -> None:
    assert plan(**FORWARD | {"action": np.ones((8, 10))}).effective["action_chunk_size"] == 8
    assert plan(**POLICY, num_frames=13).effective["action_chunk_size"] == 12
    odd = plan(**POLICY, num_frames=12)
    assert (odd.streams[0].shape[2], odd.streams[1].length) == (3, 11)
    assert any("3 frames early" in warning for warning in odd.warnings)


def test_inverse_dynamics_knows_every_frame(plan: Any) -> None:
    vision, rows = plan(**INVERSE, action_chunk_size=4, image_size=256).streams
    assert (vision.known, rows.known, len(vision.source)) == ((0, 1), (), 5)


# Files.


def test_rows_from_a_file(plan: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]")
    from_file = FORWARD | {"action": None, "action_path": str(file), "action_chunk_size": 4}
    made = plan(**from_file)
    assert made.streams[1].source[0, :10].tolist() == list(range(1, 11))
    file.write_text('{"rows": 1}')
    with pytest.raises(InvalidRequest, match="action_path"):
        plan(**FORWARD | {"action": None, "action_path": str(file)})
    file.write_text("[[1,")
    with pytest.raises(InvalidRequest, match="can be read"):
        plan(**FORWARD | {"action": None, "action_path": str(file)})


STATISTICS = {
    "min": [-2.0] * 10, "max": [4.0] * 10, "mean": [1.0] * 10, "std": [3.0] * 10,
    "q01": [-1.0] * 9 + [0.5], "q99": [3.0] * 9 + [0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "value", "inside"),
    [
        ("minmax", 4.0, 1.0),
        ("meanstd", 4.0, 1.0),
        ("quantile", 3.0, 1.0),
        ("quantile_rot", 6.0, 1.0),
    ],
)
def test_units_of_a_statistics_file(
    plan: Any, tmp_path: Path, method: str, value: float, inside: float
) -> None:
    file = tmp_path / "stats.json"
    doubled = {name: [2 * x for x in values] for name, values in STATISTICS.items()}
    file.write_text(json.dumps({"global": STATISTICS, "global_raw": doubled}))
    units = {"action_stats_path": str(file), "action_normalization": method}
    rows = plan(**FORWARD | {"action": np.full((4, 10), value)}, **units).streams[1].source
    assert rows[0, 0] == pytest.approx(inside)
    made = plan(**POLICY, **units, action_state=[value] * 10)
    assert made.actions.read(made.streams[1].source[[0, 0]])[0, 0] == pytest.approx(value)


def test_flat_statistics_and_wrong_ones(plan: Any, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(STATISTICS))
    made = plan(**POLICY, action_stats_path=str(file), action_normalization="quantile")
    latents = np.zeros((16, 64), np.float32)
    assert made.actions.read(latents)[0].tolist() == [1.0] * 9 + [0.5]  # the last never changes
    file.write_text(json.dumps({"min": [0.0] * 10, "max": [1.0] * 9}))
    with pytest.raises(InvalidRequest, match="10 finite numbers under max"):
        plan(**POLICY, action_stats_path=str(file))


@pytest.mark.parametrize(
    ("method", "statistics", "words"),
    [
        ("minmax", {"min": [1.0] * 10, "max": [1.0] * 9 + [0.5]}, "max is nowhere below min"),
        ("quantile", {"q01": [1.0] * 10, "q99": [-1.0] * 10}, "q99 is nowhere below q01"),
        ("meanstd", {"mean": [1.0] * 10, "std": [-1.0] * 10}, "std is nowhere below 0"),
        ("minmax", {"min": [0.0] * 10, "max": [1e39] * 10}, "10 finite numbers under max"),
    ],
)
def test_statistics_that_are_none(
    plan: Any, tmp_path: Path, method: str, statistics: dict[str, list[float]], words: str
) -> None:
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(statistics))
    with pytest.raises(InvalidRequest, match=words) as caught:
        plan(**POLICY, action_stats_path=str(file), action_normalization=method)
    assert caught.value.field == "action_stats_path"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("action", np.full((4, 10), 1e39)),
        ("action_path", [[-1e39] * 10] * 4),
        ("action_history", [[0.0] * 10, [0.0] * 9 + [1e39]]),
        ("action_state", [1e39] * 10),
    ],
)
def test_numbers_beyond_float32_are_refused(
    plan: Any, tmp_path: Path, name: str, value: Any
) -> None:
    if name == "action_path":
        (tmp_path / "rows.json").write_text(json.dumps(value))
        value = str(tmp_path / "rows.json")
    fields = POLICY if name in ("action_history", "action_state") else FORWARD | {"action": None}
    with pytest.raises(InvalidRequest, match=r"is -?1e\+39, must be within the range") as caught:
        plan(**{k: v for k, v in (fields | {name: value}).items() if v is not None})
    assert caught.value.field == name


def test_numbers_that_statistics_bring_beyond_float32(plan: Any, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    file.write_text(json.dumps({"min": [2.0] * 10, "max": [2.0] * 10}))
    with pytest.raises(InvalidRequest, match=r"action_state is 1e\+35, must be within the range"):
        plan(**POLICY, action_stats_path=str(file), action_normalization="minmax", action_state=[1e35] * 10)  # fmt: skip
    limits = {"min": [-3e38] * 10, "max": [3e38] * 10}  # their difference is beyond it
    file.write_text(json.dumps(limits))
    made = plan(**POLICY, action_stats_path=str(file), action_normalization="minmax", action_state=[3e38] * 10)  # fmt: skip
    assert made.streams[1].source[0, :10] == pytest.approx(1)


# Pictures and captions.


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 400), st.integers(1, 400), st.sampled_from(["256x256", "320x192", "96x64"])
)  # fmt: skip
def test_pictures_fit_their_canvas(width: int, height: int, canvas: str) -> None:
    to_width, to_height = map(int, canvas.split("x"))
    picture = np.random.RandomState(0).randint(0, 256, (1, height, width, 3), dtype=np.uint8)
    out, (rows, columns) = media.fit_inside(picture, height=to_height, width=to_width)
    assert out.shape == (1, to_height, to_width, 3)
    assert rows <= min(height, to_height)
    assert columns <= min(width, to_width)
    if width <= to_width and height <= to_height:
        assert np.array_equal(out[:, :rows, :columns], picture)
    else:
        assert abs(columns * height - rows * width) <= max(width, height)  # the same shape
    reach = 2 * max(rows, columns)
    assert {tuple(p) for p in out[0, rows:, :columns].reshape(-1, 3)} <= {
        tuple(p) for p in out[0, : min(rows, reach), :columns].reshape(-1, 3)
    }


@pytest.mark.parametrize(
    ("tier", "size", "canvas"),
    [
        (256, (640, 480), (320, 256)),
        (480, (640, 540), (736, 544)),
        (480, (500, 500), (640, 640)),
        (720, (1920, 1080), (1280, 720)),
        (704, (100, 300), (704, 1280)),
    ],
)
def test_canvases(tier: int, size: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert nearest_size(tier, *size) == canvas


FACTS = prompts.Facts(num_frames=17, fps=5.0, height=544, width=736, aspect_ratio="4,3")


def test_the_caption_of_an_instruction() -> None:
    text = prompts.action_text(
        " Put the pot to the left of the purple item ", FACTS, style="auto",
        view=VIEWS["ego_view"], duration=True, resolution=True,
    )  # fmt: skip
    assert text == (
        '{"cinematography": {"framing": "This video is captured from a first-person perspective'
        ' looking at the scene."}, "actions": [{"time": "0:00-0:03", "description": "Put the pot to'
        ' the left of the purple item."}], "duration": "3s", "fps": 5.0, "resolution": {"H": 544,'
        ' "W": 736}, "aspect_ratio": "4,3"}'
    )


@pytest.mark.parametrize(
    ("size", "ratio"), [("512x384", "4,3"), ("96x96", "1,1"), ("112x48", "7,3")]
)
def test_the_caption_names_the_shape_of_any_canvas(
    plan: Any, tokenizer: prompts.Tokenizer, size: str, ratio: str
) -> None:
    words = tokenizer.decode(plan(**POLICY | {"size": size}).token_ids[0])
    assert f'"aspect_ratio": "{ratio}"}}' in words
    own = tokenizer.decode(plan(**POLICY | {"size": size}, prompt='{"subjects": 1}').token_ids[0])
    assert "resolution" in own
    assert "aspect_ratio" not in own


def test_a_plain_instruction_and_a_caption_of_ones_own() -> None:
    more = {"view": "From above.", "duration": True, "resolution": True}
    text = prompts.action_text("Open it.", FACTS, style="plain", **more)
    assert text == (
        "Open it. From above. The video is 3.4 seconds long and is of 5 FPS."
        " This video is of 544x736 resolution."
    )
    own = json.loads(prompts.action_text('{"subjects": 1}', FACTS, style="auto", **more))
    assert list(own) == ["subjects", "duration", "fps", "resolution", "aspect_ratio"]


def test_the_document_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "actions.md").read_text()
    for row in EMBODIMENTS:
        names = ", ".join(f"`{name}`" for name in (row.name, *row.aliases))
        cells = [names, str(row.domain_id), ", ".join(map(str, row.widths)), row.composition]
        cells += [f"{row.fps:g}", str(row.action_chunk_size), f"`{row.view_point}`"]
        assert f"| {' | '.join([*cells, str(row.image_size)])} |" in text
