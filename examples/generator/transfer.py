"""Repaint a clip along its own edges: python transfer.py URL PROMPT CLIP [fields as JSON]

The new video moves as the clip does and looks as the prompt says. Other controls are blur, and
depth, seg and wsm, which come as clips of their own: {"depth": "https://example.com/depth.mp4"}.
"""

import json
import sys
from pathlib import Path

from openai import OpenAI

url, prompt, clip, *more = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="EMPTY")
fields = {"edge": {"preset_edge_threshold": "low"}, "control_guidance": 1.5}
fields |= json.loads(more[0]) if more else {}
video = client.videos.create_and_poll(
    prompt=prompt,
    input_reference=Path(clip),
    poll_interval_ms=200,
    extra_body={"extra_params": json.dumps(fields)},
)
if video.status == "failed":
    sys.exit(video.error.message)
client.videos.download_content(video.id).write_to_file("repainted.mp4")
print("repainted.mp4")
