"""Drive a path from a picture: python av_forward.py URL PICTURE POSES.json [fields as JSON]

POSES.json has the camera's poses, 4 x 4 matrices in metres: one for each frame of the video.
"""

import json
import sys
from pathlib import Path

import httpx

from vllm_cosmos3.poses import relative_rows

url, picture, poses, *more = sys.argv[1:]
rows = relative_rows(json.loads(Path(poses).read_text()), translation_scale=1.35)
Path("rows.json").write_text(json.dumps(rows.tolist()))
fields = json.loads(more[0]) if more else {}
extra = {
    "action_mode": "forward_dynamics",
    "domain_name": "av",
    "action": rows.tolist(),
    "action_chunk_size": len(rows),
    **fields,
}
answer = httpx.post(
    f"{url}/v1/videos/sync",
    data={
        "prompt": "You are an autonomous vehicle planning system.",
        "extra_params": json.dumps(extra),
    },
    files={"input_reference": Path(picture).read_bytes()},
    timeout=None,
)
if answer.status_code != 200:
    sys.exit(answer.json()["error"]["message"])
Path("drive.mp4").write_bytes(answer.content)
print("drive.mp4, rows.json")
