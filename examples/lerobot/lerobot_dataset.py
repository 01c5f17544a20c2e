"""Write what a policy imagines as a LeRobot dataset: python lerobot_dataset.py URL PICTURE FOLDER TASK...

An episode for each TASK, "pick up the cup" or any other: the server makes a video and its actions from the
first picture, as data to train on or to look at. Needs `pip install lerobot httpx` (0.4) and a server
of a checkpoint with actions, such as nvidia/Cosmos3-Nano. FIELDS (environment) has more fields, as JSON.
"""

import io
import json
import os
import sys
from pathlib import Path

import av
import httpx
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

CAMERA = "observation.images.main"


def episode(url: str, picture: bytes, task: str, fields: dict) -> tuple[list, np.ndarray, int]:
    """The frames of one imagined episode, its actions [T - 1, D], and frames per second."""
    extra = {"action_mode": "policy", "domain_name": "bridge_orig_lerobot", **fields}
    job = httpx.post(
        f"{url}/v1/videos",
        data={"prompt": task, "extra_params": json.dumps(extra)},
        files={"input_reference": picture},
        headers={"Prefer": "wait=3600"},  # answer when it is done
        timeout=None,
    ).json()
    if job.get("status") != "completed":
        sys.exit(job["error"]["message"])
    content = httpx.get(f"{url}/v1/videos/{job['id']}/content", timeout=None).content
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return frames, np.array(job["action"]["data"], np.float32), round(job["action"]["fps"])


url, picture, folder, *tasks = sys.argv[1:]
dataset = None
for task in tasks:
    fields = json.loads(os.environ.get("FIELDS", "{}"))
    frames, actions, fps = episode(url, Path(picture).read_bytes(), task, fields)
    if dataset is None:
        shape = {"names": ["height", "width", "channels"], "shape": frames[0].shape}
        features = {CAMERA: {"dtype": "video", **shape}}
        features["action"] = {"dtype": "float32", "shape": (actions.shape[1],), "names": None}
        dataset = LeRobotDataset.create("cosmos3/imagined", fps, features, root=folder)
    for frame, action in zip(frames, actions, strict=False):  # no action follows the last frame
        dataset.add_frame({CAMERA: frame, "action": action, "task": task})
    dataset.save_episode()
    print(f"{task}: {len(actions)} actions at {fps} a second")
if dataset is not None:
    dataset.finalize()
