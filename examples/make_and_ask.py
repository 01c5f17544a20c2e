"""Makes a clip and asks about it: generator and reasoner of one server, with the demo checkpoint.

    vllm-cosmos3 serve demo
    python examples/make_and_ask.py

The questions are those that the demo checkpoint was trained on. The clip is saved as OUT/clip.mp4; the box in its
first frame and the point in its last are drawn into OUT/asked.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import av
import httpx
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).parent / "reasoner"))
from answers import parse_boxes, parse_points
from client import Reasoner, run
from scenes import write_clip

FPS = 12
FIELDS = {
    "prompt": "a small red square pushes a small blue circle to the right",
    "size": "320x192",
    "num_frames": 17,
    "fps": FPS,
    "num_inference_steps": 16,
    "guidance_scale": 3.0,
    "generate_sound": False,
    "seed": 1,
}
QUESTIONS = (
    "What happens in the video?",
    "How many things are there?",
    "What colour is the circle?",
    "What shape is the red thing?",
    "What is the background like?",
    "Is there a gripper?",
    "When do the two things touch?",
    "Is the motion physically plausible?",
)
BOX = "Locate the red square in the first frame and output its bounding box in JSON."
POINT = "Point to the blue circle in the last frame and output the point in JSON."
NEXT, SEEN = "What happens next?", 6  # frames of the clip's beginning, before the two touch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=Path("cosmos3-examples"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    answer = httpx.post(f"{args.url}/v1/videos/sync", json=FIELDS, timeout=None)
    if answer.is_error:
        sys.exit(answer.json()["error"]["message"])
    clip, beginning = args.out / "clip.mp4", args.out / "beginning.mp4"
    clip.write_bytes(answer.content)
    print(f"{clip}: {FIELDS['prompt']}")
    with av.open(str(clip)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    write_clip(beginning, lambda time: frames[round(time * (SEEN - 1))], SEEN / FPS, FPS)

    reasoner = Reasoner(base_url=f"{args.url}/v1", fps=None, greedy=True, max_tokens=64)
    for question in QUESTIONS:
        print(f"{question}  {reasoner.ask(question, video=clip).text}")
    print(f"{NEXT}  {reasoner.ask(NEXT, video=beginning).text}")
    (box,) = parse_boxes(reasoner.ask(BOX, video=clip).text)
    (point,) = parse_points(reasoner.ask(POINT, video=clip).text)

    first, last = frames[0], frames[-1]
    edges, (x, y) = box.pixels(*first.size), point.pixels(*last.size)
    print(f"{box.label} in the first frame: {edges}; {point.label} in the last frame: {(x, y)}")
    ImageDraw.Draw(first).rectangle(edges, outline="white")
    ImageDraw.Draw(last).line((x - 5, y, x + 5, y), fill="white")
    ImageDraw.Draw(last).line((x, y - 5, x, y + 5), fill="white")
    picture = Image.new("RGB", (first.width + last.width, first.height))
    picture.paste(first)
    picture.paste(last, (first.width, 0))
    picture.save(args.out / "asked.png")
    print(f"drawn: {args.out / 'asked.png'}")


if __name__ == "__main__":
    run(main)
