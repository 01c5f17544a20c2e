"""Make a video and watch it being made: python video.py URL PROMPT [fields as JSON]"""

import json
import sys

import httpx

url, prompt, *more = sys.argv[1:]
fields = json.loads(more[0]) if more else {}
with httpx.Client(base_url=url, timeout=None) as client:
    answer = client.post("/v1/videos", json={"prompt": prompt, **fields})
    if answer.is_error:
        sys.exit(answer.json()["error"]["message"])
    name = answer.json()["id"]
    with client.stream("GET", f"/v1/videos/{name}/events") as events:
        for line in events.iter_lines():
            if line.startswith("data: "):
                job = json.loads(line.removeprefix("data: "))
                print(f"{job['progress']:3d} %  {job['cosmos3']['phase']}")
    if job["status"] == "failed":
        sys.exit(job["error"]["message"])
    with open("video.mp4", "wb") as file:
        file.write(client.get(f"/v1/videos/{name}/content").content)
print("video.mp4")
