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
from numpy.typing import NDArray

from training.actions import (
    CHUNK,
    WIDTH,
    Rows,
    action_fields,
    closed_loops,
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
AT_ONCE = 64  # scenes of a list of requests, whose clips are in memory together

# Of each, the scenes are those of one list, and ``fields`` are of all its requests.


def forward_errors(model: Cosmos3, scenes: Sequence[Scene], **fields: Any) -> list[float]:
    """Pixels between where things end in the clip and in the world; as far as the picture is wide if unseen."""
    parts = [window(scene, CHUNK, CHUNK + 1) for scene in scenes]
    requests = [
        action_fields(scene, "forward_dynamics")
        | {"image": true_clip(part, [0])[0].numpy(), "action": rows_of(part.gripper).tolist()}
        for scene, part in zip(scenes, parts, strict=True)
    ]
    outputs = model.generate(requests, **fields)
    return [_off(part, output.video) for part, output in zip(parts, outputs, strict=True)]


def _off(part: Scene, video: NDArray[np.uint8]) -> float:
    seen = {thing.colour: thing for thing in observe(video).things}
    return max(
        float(np.abs(seen[thing.colour].centres[-1] - thing.path[-1]).max())
        if thing.colour in seen
        else float(part.canvas.width)
        for thing in part.things
    )


def inverse_errors(model: Cosmos3, scenes: Sequence[Scene], **fields: Any) -> list[float]:
    """Mean of the pixels between the gripper's path and that of the rows."""
    parts = [window(scene, CHUNK // 2, CHUNK + 1) for scene in scenes]
    requests = [
        action_fields(scene, "inverse_dynamics") | {"video": true_clip(part).numpy()}
        for scene, part in zip(scenes, parts, strict=True)
    ]
    outputs = model.generate(requests, **fields)
    paths = [part.gripper.path for part in parts]
    found = [
        path_of(output.action[:, :WIDTH], tuple(path[0, :2]))
        for output, path in zip(outputs, paths, strict=True)
    ]
    return [float(np.abs(a[:, :2] - b[:, :2]).mean()) for a, b in zip(found, paths, strict=True)]


def carried_out_by(model: Cosmos3, scenes: Sequence[Scene], **fields: Any) -> list[Scene]:
    """What the policy does, chunk after chunk; `lifted` says whether it succeeds."""
    known = [action_fields(scene, "policy") for scene in scenes]

    def rows(pictures: list[NDArray[np.uint8]]) -> list[Rows]:
        pairs = zip(known, pictures, strict=True)
        outputs = model.generate([one | {"image": picture} for one, picture in pairs], **fields)
        return [output.action for output in outputs]

    return closed_loops(scenes, rows, CHUNKS)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("checkpoint")
    p.add_argument(
        "--device", help="e.g. cuda:0,0 for two replicas (default: what vLLM was built for)"
    )
    p.add_argument("--replicas", type=int, default=1, help="that share the scenes (default: 1)")
    p.add_argument("--count", type=int, default=256, help="scenes (default: 256)")
    p.add_argument("--policy-only", action="store_true", help="for a checkpoint of that kind")
    a = p.parse_args(argv)
    drawn = [picking(FIRST + i, CHUNKS) for i in range(a.count)]
    lists = [drawn[first : first + AT_ONCE] for first in range(0, len(drawn), AT_ONCE)]
    measured = {} if a.policy_only else {"forward": forward_errors, "inverse": inverse_errors}
    with Cosmos3(a.checkpoint, device=a.device, data_parallel_size=a.replicas) as model:
        for name, errors_of in measured.items():
            errors = np.array([error for scenes in lists for error in errors_of(model, scenes)])
            low, middle, high = np.quantile(errors, (0.05, 0.5, 0.95))
            print(f"{name} dynamics: {errors.mean():.1f} pixels, median {middle:.1f}, 5 to 95 %: {low:.1f} to {high:.1f}", flush=True)  # fmt: skip
        done = [scene for scenes in lists for scene in carried_out_by(model, scenes)]
    wins = [lifted(scene) for scene in done]
    print(f"policy in closed loop: {Share(sum(wins), len(wins))}")


if __name__ == "__main__":
    main()
