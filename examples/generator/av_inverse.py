"""The path that a clip was driven: python av_inverse.py URL CLIP ROWS.json [fields as JSON]

Draws it red beside the path of ROWS.json (blue), both from above, in path.png.
"""

import json
import sys
from pathlib import Path

import httpx
import numpy as np
from PIL import Image, ImageDraw

from vllm_cosmos3.poses import absolute_poses

url, clip, rows, *more = sys.argv[1:]
driven = np.array(json.loads(Path(rows).read_text()))
extra = {"action_mode": "inverse_dynamics", "domain_name": "av", "action_chunk_size": len(driven)}
extra |= json.loads(more[0]) if more else {}
prompt = "You are an autonomous vehicle planning system."
job = httpx.post(
    f"{url}/v1/videos",
    data={"prompt": prompt, "extra_params": json.dumps(extra)},
    files={"input_reference": Path(clip).read_bytes()},
    headers={"Prefer": "wait=3600"},  # answer when it is done
    timeout=None,
).json()
if job.get("status") != "completed":
    sys.exit(job["error"]["message"])
paths = [absolute_poses(x, translation_scale=1.35) for x in (driven, job["action"]["data"])]
points = [path[:, [0, 2], 3] for path in paths]  # right and forward, in metres
low, high = np.concatenate(points).min(0), np.concatenate(points).max(0)
image = Image.new("RGB", (480, 480), "white")
for path, colour in zip(points, ("blue", "red"), strict=True):
    x, y = ((path - low) / max((high - low).max(), 1e-6) * 440 + 20).T
    ImageDraw.Draw(image).line(list(zip(x, 480 - y, strict=True)), fill=colour, width=3)
image.save("path.png")
print(f"path.png: ends {np.linalg.norm(points[0][-1] - points[1][-1]):.2f} m apart")
