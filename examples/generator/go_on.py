"""A video that is told in turns: each prompt goes on from the last frame of the video before.

python go_on.py http://127.0.0.1:8000 "A paper boat on a stream" "It reaches a waterfall" ...
"""

import json
import sys

from openai import OpenAI

url, *prompts = sys.argv[1:]
options = json.loads(prompts.pop()) if prompts[-1].startswith("{") else {}
client = OpenAI(base_url=f"{url}/v1", api_key="none")
before = {}
for prompt in prompts:
    job = client.videos.create_and_poll(prompt=prompt, extra_body={**options, **before})
    if job.status != "completed":
        sys.exit(f"{job.error.code}: {job.error.message}")
    before = {"continue_from": job.id}
    print(f"{job.seconds} s: {prompt}")
client.videos.download_content(job.id).write_to_file("story.mp4")
