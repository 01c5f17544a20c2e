"""Make a picture: python image.py http://127.0.0.1:8000 "a paper boat" [fields as JSON]"""

import base64
import json
import sys
from pathlib import Path

from openai import APIStatusError, OpenAI

url, prompt, *more = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="EMPTY")
fields = json.loads(more[0]) if more else {}
try:
    answer = client.images.generate(prompt=prompt, extra_body=fields)
except APIStatusError as error:
    sys.exit(error.message)
Path("image.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
print("image.png")
