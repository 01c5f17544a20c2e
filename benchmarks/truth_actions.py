"""How well the demo checkpoint's actions hold in its world: forward and inverse dynamics, and the policy.

    python -m benchmarks.truth_actions demo --count 256

Forward dynamics: how far things end from where the rows take them. Inverse dynamics: how far the path of the
rows is from the gripper's. Policy, in closed loop: the rows of each chunk are carried out in the world,
which is drawn anew for the next chunk, and in the end the named thing must be lifted and no other.
Held-out scenes; pixels of a 320x192 picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.actions import (
    CHUNK,
    WIDTH,
    action_fields,
    closed_loop,
    lifted,
    path_of,
    picking,
    rows_of,
)
from training.observing import observe
from training.rendering import true_clip
from training.scenes import Scene, window
from training.shares import Share
from vllm_cosmos3 import Cosmos3

FIRST = 55_000_000  # seed of the first scene
CHUNKS = 2  # of the policy


def forward_error(model: Cosmos3, scene: Scene, **fields: Any) -> float:
    """Pixels between where things end in the clip and in the world; as far as the picture is wide if unseen."""
    part = window(scene, CHUNK, CHUNK + 1)
    picture, rows = true_clip(part, [0])[0].numpy(), rows_of(part.gripper).tolist()
    known = action_fields(scene, "forward_dynamics") | {"image": picture, "action": rows}
    seen = {thing.colour: thing for thing in observe(model.generate(**known | fields).video).things}
    errors = [
        float(np.abs(seen[thing.colour].centres[-1] - thing.path[-1]).max())
        if thing.colour in seen
        else float(scene.canvas.width)
        for thing in part.things
    ]
    return max(errors)


def inverse_error(model: Cosmos3, scene: Scene, **fields: Any) -> float:
    """Mean of the pixels between the gripper's path and that of the rows."""
    part = window(scene, CHUNK // 2, CHUNK + 1)
    known = action_fields(scene, "inverse_dynamics") | {"video": true_clip(part).numpy()}
    rows = model.generate(**known | fields).action
    x, y = part.gripper.path[0, :2]
    return float(np.abs(path_of(rows[:, :WIDTH], (x, y))[:, :2] - part.gripper.path[:, :2]).mean())


def carried_out_by(model: Cosmos3, scene: Scene, **fields: Any) -> Scene:
    """What the policy does, chunk after chunk; `lifted` says whether it succeeds."""
    known = action_fields(scene, "policy") | fields
    return closed_loop(scene, lambda picture: model.generate(**known, image=picture).action, CHUNKS)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("checkpoint")
    p.add_argument("--device", help="default: what vLLM was built for")
    p.add_argument("--count", type=int, default=256, help="scenes (default: 256)")
    p.add_argument("--policy-only", action="store_true", help="for a checkpoint of that kind")
    a = p.parse_args(argv)
    drawn = [picking(FIRST + i, CHUNKS) for i in range(a.count)]
    measured = {} if a.policy_only else {"forward": forward_error, "inverse": inverse_error}
    with Cosmos3(a.checkpoint, device=a.device) as model:
        for name, error in measured.items():
            errors = np.array([error(model, scene) for scene in drawn])
            low, middle, high = np.quantile(errors, (0.05, 0.5, 0.95))
            print(f"{name} dynamics: {errors.mean():.1f} pixels, median {middle:.1f}, 5 to 95 %: {low:.1f} to {high:.1f}", flush=True)  # fmt: skip
        wins = [lifted(carried_out_by(model, scene)) for scene in drawn]
    print(f"policy in closed loop: {Share(sum(wins), len(wins))}")


if __name__ == "__main__":
    main()
