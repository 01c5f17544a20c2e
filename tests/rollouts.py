"""Sessions of tiny simulators, without a stage: the same steps for every test that compares latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_cosmos3.generator.world import WorldPipeline
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.world import ChunkPlan, SessionRequest, World, make_world

PICTURE = np.random.RandomState(0).randint(0, 256, (64, 48, 3), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A session of an export, and what is done in it: the embodiment of each step, or of each of its rows, None for nothing."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    steps: tuple[str | tuple[str, ...] | None, ...]

    @property
    def request(self) -> SessionRequest:
        given = {"prompt": "A robot arm", "size": "48x64", "seed": 5, "fps": 20.0}
        return SessionRequest(**given | self.fields)


CASES = {
    "camera, everything remembered": Case(
        kind="sim-bimanual-camera",
        fields={"image": PICTURE},
        steps=("camera_pose", "camera_pose"),
    ),
    "camera, first frame generated, window of 3": Case(
        kind="sim-bimanual-camera",
        fields={"history": 3, "sinks": 1},
        steps=("camera_pose", None, "camera_pose"),
    ),
    "unified, whole chunks remembered, two bodies": Case(
        kind="sim-bimanual",
        fields={"image": PICTURE, "history": 4, "sinks": 1, "commit": "chunk"},
        steps=("agibotworld", "camera_pose", None, ("agibotworld",) * 3 + ("camera_pose",) * 5),
    ),
}


def actions(world: World, case: Case) -> list[np.ndarray | None]:
    """What is done in each step, in the embodiment's units."""
    draw = np.random.RandomState(1)
    rows = []
    for name in case.steps:
        if name is None:
            rows.append(None)
            continue
        if isinstance(name, tuple):
            whole = draw.standard_normal(world.shape).astype(np.float32)
            for row, own in zip(whole, name, strict=True):
                row[world.causal.spaces[own].slots :] = 0
            rows.append(whole)
            continue
        space = world.causal.spaces[name]
        rows.append(draw.standard_normal((world.shape[0], space.slots)).astype(np.float32))
    return rows


def open_world(pipeline: WorldPipeline, case: Case, name: str = "one") -> World:
    tokenizer = load_tokenizer(pipeline.model.path)
    return make_world(case.request, pipeline.model, tokenizer, name)


def run(pipeline: WorldPipeline, plan: ChunkPlan, world: World) -> tuple[np.ndarray, Any]:
    """Latents and frames of one chunk."""
    state = pipeline.encode(plan)
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    output = pipeline.finish(state)
    world.done(plan)
    return state.chunk.x.numpy(), output.video


def rollout(pipeline: WorldPipeline, case: Case) -> tuple[Sequence[np.ndarray], Sequence[Any]]:
    """Latents and frames of all chunks; the session is closed."""
    world = open_world(pipeline, case)
    made = [run(pipeline, world.open(), world)]
    for rows, name in zip(actions(world, case), case.steps, strict=True):
        made.append(run(pipeline, world.step(rows, name), world))
    pipeline.release(world.name)
    latents, frames = zip(*made, strict=True)
    return latents, frames


def checkpoints(folder: Path) -> dict[str, Path]:
    """Both exports in float32."""
    from vllm_cosmos3.checkpoint.synthetic import write_checkpoint

    found = {kind: folder / kind for kind in ("sim-bimanual", "sim-bimanual-camera")}
    for kind, place in found.items():
        write_checkpoint(place, kind=kind, dtype="float32")
    return found
