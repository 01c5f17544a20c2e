"""Sessions of a simulator on one rank: what they keep, what a failed chunk leaves, and what they take."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from live_tensors import LiveTensors
from ranks import in_new_process
from rollouts import CASES, PICTURE, Case, actions, checkpoints, open_world, rollout, run

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, OutOfMemory, SessionLost, Sleeping
from vllm_cosmos3.generator.memory import estimate, session_work
from vllm_cosmos3.generator.memory.reservation import GIB
from vllm_cosmos3.generator.world import WorldPipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.world import SessionRequest, make_world

CASE = CASES["camera, first frame generated, window of 3"]
START = {"prompt": "A robot arm", "size": "48x64", "seed": 5, "history": 6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("simulators"))


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Iterator[Cosmos3]:
    with Cosmos3(folders["sim-bimanual-camera"], dtype="float32", device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pipeline(folders: dict[str, Path]) -> WorldPipeline:
    mesh = init_mesh(ParallelConfig())
    config = EngineConfig(model=folders[CASE.kind], dtype="float32", device="cpu")
    loaded = WorldPipeline.load(config, mesh, "cpu")
    close_mesh(mesh)
    return loaded


def test_a_chunk_that_fails_leaves_the_session_where_it_was(pipeline: WorldPipeline) -> None:
    whole, shown = rollout(pipeline, CASE)
    world = open_world(pipeline, CASE)
    made = [run(pipeline, world.open(), world)]
    for rows, name in zip(actions(world, CASE), CASE.steps, strict=True):
        plan = world.step(rows, name)
        for calls in (1, plan.steps - 1):  # in the middle of the commits, and of the denoising
            state = pipeline.encode(plan)
            for _ in range(calls):
                pipeline.step(state)
        pipeline.decode(state)  # and before the last call
        made.append(run(pipeline, world.step(rows, name), world))
    for (latents, frames), before, seen in zip(made, whole, shown, strict=True):
        assert np.array_equal(latents, before)
        assert np.array_equal(frames, seen)
    with pytest.raises(SessionLost, match="at latent frame 13, not at 5"):
        pipeline.encode(replace(world.step(None), first=5))
    pipeline.release(world.name)
    with pytest.raises(SessionLost, match="the session is gone"):
        pipeline.encode(world.step(None))


def test_sessions_take_turns(model: Cosmos3) -> None:
    rows = np.random.RandomState(2).standard_normal((2, 16, 9)).astype(np.float32)
    with model.session(**START, image=PICTURE) as alone:
        expected = list(alone.rollout(rows))
        assert (alone.frames, alone.action_shape, alone.domains) == (33, (16, 9), ("camera_pose",))
    with model.session(**START, image=PICTURE) as one, model.session(**START) as other:
        assert other.first.shape == (1, 64, 48, 3)
        made = [one.first]
        for chunk in rows:
            made.append(one.step(chunk))
            assert other.step(-chunk).shape == (16, 64, 48, 3)
    for frames, before in zip(made, expected, strict=True):
        assert np.array_equal(frames, before)
    with pytest.raises(Cosmos3Error, match="closed"):
        one.step(rows[0])
    one.close()
    assert not model._runner._pipeline.sessions  # type: ignore[union-attr]


def test_sessions_end_when_weights_move(model: Cosmos3) -> None:
    with model.session(**START) as session:
        model.sleep()
        with pytest.raises(Sleeping, match="this Cosmos3 sleeps"):
            session.step(np.zeros((16, 9)))
        model.wake_up()
        with pytest.raises(SessionLost, match="the session is gone"):
            session.step(np.zeros((16, 9)))
    with model.session(**START) as session:
        assert session.step(np.zeros((16, 9))).shape == (16, 64, 48, 3)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (np.zeros((15, 9)), r"actions is \[15, 9\], must be numbers of the shape \[16, 9\]"),
        (np.zeros((16, 10)), r"\[16, 10\]"),
        (np.zeros(16), r"\[16\]"),
        ([["left"] * 9] * 16, "must be numbers"),
        (np.full((16, 9), np.nan), "must be finite"),
        (np.full((16, 9), 3e38), "within the range of float32"),
    ],
)
def test_actions_that_cannot_be_carried_out(model: Cosmos3, given: object, reason: str) -> None:
    with model.session(**START) as session:
        with pytest.raises(InvalidRequest, match=reason):
            session.step(given)
        with pytest.raises(InvalidRequest, match="one of camera_pose"):
            session.step(None, domain_name="agibotworld")
        assert session.frames == 1


def test_a_camera_has_nine_numbers_of_a_unified_row(folders: dict[str, Path]) -> None:
    with Cosmos3(folders["sim-bimanual"], dtype="float32", device="cpu") as model:
        with model.session(**START, domain_name="Camera_Pose") as session:
            narrow = np.ones((8, 9), np.float32)
            wide = np.pad(narrow, ((0, 0), (0, 50)))
            first = session.step(narrow)
            with pytest.raises(InvalidRequest, match="0 beyond the first 9 numbers"):
                session.step(wide + 1)
            with pytest.raises(InvalidRequest, match="must be one name, or 8 of embodiments"):
                session.step(wide, domain_name=["camera_pose"] * 3)
        with model.session(**START, domain_name="camera_pose") as session:
            assert np.array_equal(session.step(wide), first)


def test_what_a_session_is_not(model: Cosmos3, tiny_checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"a session: Cosmos3\.session"):
        model.generate(prompt="A robot arm", size="64x64", num_frames=5)
    for field, value in (("size", "50x50"), ("fps", 0), ("commit", "never"), ("history", 0)):
        with pytest.raises(InvalidRequest, match=f"^{field} is"):
            model.session(**START | {field: value})
    with pytest.raises(InvalidRequest, match="did you mean history"):
        model.session(histori=3)
    with (
        Cosmos3(tiny_checkpoint, device="cpu") as base,
        pytest.raises(InvalidRequest, match="kind of this checkpoint is base"),
    ):
        base.session("A robot arm")


LARGE = Case(
    kind="sim-bimanual-camera",
    fields={"size": "320x192", "history": 9, "image": np.zeros((192, 320, 3), np.uint8)},
    steps=("camera_pose",) * 3,
)


def peaks(folder: Path) -> tuple[int, int, int, int]:
    """Measured and planned: at the peak of a session, and between its chunks."""
    mesh = init_mesh(ParallelConfig())
    config = EngineConfig(model=folder, und_residency="gpu")
    with LiveTensors() as live:
        pipeline = WorldPipeline.load(config, mesh, "cpu")
        weights = live.now
        world = open_world(pipeline, LARGE)
        run(pipeline, world.open(), world)
        for rows in actions(world, LARGE):
            run(pipeline, world.step(rows), world)
        gc.collect()
        held = live.now - weights
    memory = estimate(pipeline.model, config, session_work(pipeline.model, world.opening))
    return live.peak - weights, memory.request, held, memory.held


def test_the_memory_of_a_session_is_planned(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    peak, planned, held, kept = in_new_process(peaks, tmp_path / LARGE.kind)
    assert abs(planned - peak) <= 0.1 * peak, (peak, planned)
    assert abs(kept - held) <= 0.1 * held, (held, kept)


def test_a_session_that_does_not_fit_is_refused(folders: dict[str, Path]) -> None:
    folder = folders["sim-bimanual-camera"]
    size = sizes(folder)
    limit = (size[0] + 1.5 * size[1]) / GIB
    options = {"dtype": "float32", "device": "cpu", "und_residency": "gpu"}
    with Cosmos3(folder, **options, memory_limit=limit) as model:
        needs = r"the session needs .* close 1 other session"
        with model.session(**START), pytest.raises(OutOfMemory, match=needs):
            model.session(**START)
        with model.session(**START) as again:
            assert len(again.step()) == 16


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the weights with the peak of a session, and of what one keeps."""
    model = read_config(folder)
    engine = EngineConfig(model=folder, dtype="float32", device="cpu", und_residency="gpu")
    world = make_world(SessionRequest(**START), model, load_tokenizer(folder), "one")
    memory = estimate(model, engine, session_work(model, world.opening))
    return memory.resident + memory.request - memory.held, memory.held
