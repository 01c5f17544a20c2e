"""Let a picture move: python image_to_video.py URL PROMPT PICTURE [fields as JSON]"""

import json
import sys
from pathlib import Path

from openai import OpenAI

url, prompt, picture, *more = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="EMPTY")
fields = json.loads(more[0]) if more else {}
video = client.videos.create_and_poll(
    prompt=prompt, input_reference=Path(picture), poll_interval_ms=200, extra_body=fields
)
if video.status == "failed":
    sys.exit(video.error.message)
client.videos.download_content(video.id).write_to_file("moved.mp4")
print("moved.mp4")
