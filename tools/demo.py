"""What `make demo` runs: the demo checkpoints make three clips, and a reasoner says what they show.

A clip from a prompt, one with sound from a picture, and what a policy does with a gripper in a world that answers,
on whatever device vLLM was built for; 24 MiB of weights, trained on a small world of flat things. Each
clip is shown in the terminal and read back by the world's checker, which sees pixels alone. Then stock
`vllm serve` is started and asked about each with the official openai client.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "examples" / "reasoner")]
from client import message  # noqa: E402
from local_server import ServerFailed, local_server, program  # noqa: E402
from training.actions import FPS, action_fields, closed_loop, lifted, picking  # noqa: E402
from training.captions import draw_caption, instruction  # noqa: E402
from training.contact_sheet import write_sheet  # noqa: E402
from training.observing import observe  # noqa: E402
from training.rendering import true_clip  # noqa: E402
from training.scenes import Canvas, Scene, draw_scene  # noqa: E402
from training.sounds import tones_in  # noqa: E402
from vllm_cosmos3.cli.terminal import quiet_libraries  # noqa: E402
from vllm_cosmos3.errors import Cosmos3Error  # noqa: E402
from vllm_cosmos3.media import write_video  # noqa: E402

if TYPE_CHECKING:  # vLLM takes its time, and has much to say
    from vllm_cosmos3 import Cosmos3

QUESTION = "What happens in the video?"
COMMON = {
    "size": "320x192", "num_frames": 17, "fps": 12, "num_inference_steps": 16, "guidance_scale": 3.0,
    "generate_sound": False,
}  # fmt: skip
PUSHED, PICKED = 12, 8  # seeds of the scenes of the picture and of the policy
CHUNKS = 2  # of the policy
FRAMES = 5  # of a clip that are shown
WIDEST = 160  # columns

Pixels = NDArray[np.uint8]
console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Asked:
    """A clip that is asked for: from what, the prompt, of which checkpoint, and how it is made.

    ``make`` writes the file and returns the clip, uint8 [T, H, W, 3], and what the checker says of it.
    """

    source: str
    prompt: str
    checkpoint: str
    make: Callable[[Cosmos3, Path], tuple[Pixels, str]]


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A clip that was made, its file, and what the checker sees in it."""

    asked: Asked
    clip: Pixels
    file: Path
    seen: str


def asked() -> list[Asked]:
    """The three clips."""
    prompt = "a gripper lifts an orange circle"
    pushed = draw_scene(PUSHED, Canvas(fps=12), {"push": 1})
    picture, text = true_clip(pushed, [0])[0].numpy(), draw_caption(pushed).text
    picked = picking(PICKED, CHUNKS)
    return [
        Asked("a prompt", prompt, "demo", partial(generated, {"prompt": prompt, "seed": 1})),
        Asked("a picture, with sound", text, "demo", partial(generated, {
            "prompt": text, "seed": 2, "image": picture, "generate_sound": True,
        })),
        Asked("a policy that acts", instruction(picked), "demo-policy", partial(by_policy, picked)),
    ]  # fmt: skip


def generated(fields: dict[str, Any], model: Cosmos3, file: Path) -> tuple[Pixels, str]:
    """A clip of the generator's own."""
    out = model.generate(**COMMON | fields)
    out.save(file)
    tones = "" if out.sound is None else heard(out.sound)
    return out.video, f"{observe(out.video)}{tones}"


def heard(sound: NDArray[np.float32]) -> str:
    """The tones in samples [2, N], in words."""
    tones = [f"a tone of {tone.material} after {tone.seconds:.1f} s" for tone in tones_in(sound)]
    return f"; {' and '.join(tones) or 'silence'}"


def by_policy(scene: Scene, model: Cosmos3, file: Path) -> tuple[Pixels, str]:
    """The world's clip of what a policy does in it, chunk after chunk."""
    fields = action_fields(scene, "policy")
    done = closed_loop(
        scene, lambda picture: model.generate(**fields, image=picture).action, CHUNKS
    )
    clip = true_clip(done).numpy()
    write_video(file, clip, fps=FPS)
    verdict = "lifted" if lifted(done) else "not lifted"
    thing = scene.things[0]
    return clip, f"{observe(clip)}; the {thing.colour} {thing.shape} is {verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="for what the demo makes")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        made = make_clips(folder)
        said = ask_reasoner(made, log=folder / "server.log")
    except (ServerFailed, Cosmos3Error) as failure:
        return failed(str(failure), folder)
    except openai.OpenAIError as error:
        return failed(f"the server did not answer: {error}", folder)
    except KeyboardInterrupt:
        console.print("\nstopped; the server is stopped as well")
        return 130
    summary(made, said)
    farewell(folder, time.monotonic() - began)
    return 0


def make_clips(folder: Path) -> list[Made]:
    """Make, show and save the clips, and a contact sheet of all."""
    headline("1. Three clips", "of 24 MiB of weights, checkpoints/demo and demo-policy")
    made: list[Made] = []
    with quiet_libraries():
        from vllm_cosmos3 import Cosmos3

        for checkpoint, some in groupby(asked(), lambda one: one.checkpoint):
            with Cosmos3(checkpoint, progress=False) as model:
                for one in some:
                    made.append(make_clip(model, one, folder / f"clip-{len(made) + 1}.mp4"))
    write_sheet([one.clip for one in made], folder / "sheet.png", FRAMES)
    return made


def make_clip(model: Cosmos3, one: Asked, file: Path) -> Made:
    console.print(f"\nfrom {one.source}: [bold]{one.prompt}[/bold]")
    began = time.monotonic()
    clip, seen = one.make(model, file)
    seconds = time.monotonic() - began
    show(clip)
    console.print(f"[dim]{file}, {len(clip)} frames in {seconds:.1f} s[/dim]")
    console.print(f"the checker says: {seen}")
    return Made(one, clip, file, seen)


def ask_reasoner(made: Sequence[Made], *, log: Path) -> list[str]:
    """Start the reasoner and ask it about each clip."""
    headline("2. A server", "stock vLLM with this plugin")
    command = [program(), "serve", "demo", "--surface", "reasoner", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--max-num-seqs", "16"]
    console.print(" ".join(["vllm-cosmos3", *command[1:]]), soft_wrap=True)
    console.print(f"The log is in {log}; a CPU takes half a minute to start.")
    with local_server(command, log=log) as server:
        console.print(f"ready after {server.seconds_to_start:.0f} s at {server.url}/v1")
        return answers(made, f"{server.url}/v1")


def answers(made: Sequence[Made], base_url: str) -> list[str]:
    """What the reasoner at ``base_url`` says of each clip."""
    client = openai.OpenAI(base_url=base_url, api_key="EMPTY")
    said = []
    for one in made:
        answer = client.chat.completions.create(
            model="demo", messages=[message(QUESTION, video=one.file)], max_tokens=64, temperature=0
        )
        said.append((answer.choices[0].message.content or "").strip())
    client.close()
    return said


def show(clip: Pixels) -> None:
    """Frames of a clip side by side, as half blocks in 24-bit colours, where a terminal has them."""
    if not console.is_terminal or console.color_system is None:
        return
    columns = (min(console.width, WIDEST) - FRAMES) // FRAMES
    rows = 2 * round(columns * clip.shape[1] / clip.shape[2] / 2)
    places = np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)
    small = [
        np.asarray(Image.fromarray(clip[i]).resize((columns, rows), Image.Resampling.BOX))
        for i in places
    ]
    text = Text(no_wrap=True)
    for row in range(0, rows, 2):
        for frame in small:
            for upper, lower in zip(frame[row], frame[row + 1], strict=True):
                above, below = (Color.from_rgb(*map(int, pixel)) for pixel in (upper, lower))
                text.append("▀", Style(color=above, bgcolor=below))
            text.append(" ")
        text.append("\n")
    console.print(text, end="", overflow="crop")


def summary(made: Sequence[Made], said: Sequence[str]) -> None:
    headline("3. Asked, seen, said", f"the question was: {QUESTION}")
    table = Table("from", "asked", "the checker says", "the reasoner says", show_lines=True)
    for one, words in zip(made, said, strict=True):
        table.add_row(one.asked.source, one.asked.prompt, one.seen, words)
    console.print(table)


def headline(title: str, note: str) -> None:
    console.print(f"\n[bold]{title}[/bold] [dim]{note}[/dim]")


def failed(problem: str, folder: Path) -> int:
    log = folder / "server.log"
    where = f"The whole log: {log}\n" if log.exists() else ""
    sys.stdout.flush()
    print(
        f"\nThe demo failed: {problem}\n{where}"
        f"What to do: `{shown_program()} doctor` checks this machine and names the fix. The server "
        f"needs about 4 GiB of free memory.\nThen run the demo again.",
        file=sys.stderr,
    )
    return 1


def farewell(folder: Path, seconds: float) -> None:
    steps = {
        "make serve": "the same checkpoint behind an API, to stay",
        f'{shown_program()} generate demo --prompt "a red square moves to the right" --size 320x192 '
        "--num-frames 17 --fps 12 --out out": "a clip of your own",
        f"{shown_program()} serve nvidia/Cosmos3-Nano": "the real weights, on a GPU",
    }
    console.print(
        f"\n[bold]Done[/bold] in {seconds:.0f} s; the server is stopped. Clips and a contact sheet "
        f"are in {folder}. Next:"
    )
    for command, meaning in steps.items():
        console.print(f"  {command}\n      [dim]{meaning}[/dim]", soft_wrap=True)


def shown_program() -> str:
    return os.path.relpath(program())


if __name__ == "__main__":
    sys.exit(main())
