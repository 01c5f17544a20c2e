"""What `make demo` runs: a tiny Cosmos 3 checkpoint, two questions and a video, no GPU.

Makes the checkpoint unless it is there, serves its reasoner on a free port of this machine, draws a
picture and a clip, asks about both with the official openai client, and stops the server. Then the
generator makes a video with sound from the picture, which is read back and described.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import av
import openai

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples" / "reasoner"))
from client import Reasoner, message, typewriter  # noqa: E402
from local_server import ServerFailed, local_server, program  # noqa: E402
from scenes import media  # noqa: E402

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

# What the constrained answers may say: random weights then choose among readable sentences.
PICTURE = "The picture shows (a red|a blue|a green) cube and (a tray|a gripper|a table)\\."
CLIP = "The gripper (lifts|drops|ignores) the (red|blue|green) cube, then it (moves|stops)\\."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="for what the demo makes")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        checkpoint = step_checkpoint(folder)
        picture, clip = step_media(folder)
        step_reasoner(checkpoint, picture, clip, log=folder / "server.log")
        step_generator(checkpoint, picture, folder)
    except ServerFailed as failure:
        return failed(str(failure), folder)
    except subprocess.CalledProcessError as error:
        return failed(f"{error.cmd[0]} ended with status {error.returncode}", folder)
    except openai.OpenAIError as error:
        return failed(f"the server did not answer: {error}", folder)
    except KeyboardInterrupt:
        print("\nstopped; the server is stopped as well")
        return 130
    farewell(checkpoint, time.monotonic() - started)
    return 0


def step_checkpoint(folder: Path) -> Path:
    checkpoint = folder / "checkpoint"
    headline("1. A checkpoint", "random weights in the file layout of nvidia/Cosmos3-Nano")
    if (checkpoint / "model_index.json").exists():
        print(f"{checkpoint} is there already")
    else:
        subprocess.run([program(), "make-checkpoint", str(checkpoint)], check=True)
    return checkpoint


def step_media(folder: Path) -> tuple[Path, Path]:
    headline("2. A picture and a clip", "drawn here, nothing is downloaded")
    paths = media("table.png", folder), media("table.mp4", folder)
    print("\n".join(str(path) for path in paths))
    return paths


def step_reasoner(checkpoint: Path, picture: Path, clip: Path, *, log: Path) -> None:
    headline("3. A server", "stock vLLM with this plugin")
    command = [program(), "serve", str(checkpoint), "--surface", "reasoner", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--max-num-seqs", "16"]
    print(" ".join(["vllm-cosmos3", *command[1:]]))
    print(f"The log is in {log}; a CPU takes half a minute to start.")
    with local_server(command, log=log, waiting=Progress(log)) as server:
        print(f"{erase()}ready after {server.seconds_to_start:.0f} s at {server.url}/v1")
        headline("4. Two questions", "streamed through the official openai client")
        reasoner = Reasoner(base_url=f"{server.url}/v1")
        client = openai.OpenAI(base_url=reasoner.base_url, api_key="EMPTY")
        model = client.models.list().data[0].id
        for source, kind, question, pattern in (
            (picture, "image", "Caption the image in detail.", PICTURE),
            (clip, "video", "Describe the video in detail.", CLIP),
        ):
            print(f"\n{BOLD}{question}{PLAIN} ({source})")
            print(f"{DIM}any text:{PLAIN} ", end="")
            answer = Reasoner(base_url=reasoner.base_url, model=model, max_tokens=48).ask(
                question, **{kind: source}, show=typewriter
            )
            print(f"\n{DIM}held to a pattern:{PLAIN} ", end="")
            stream_constrained(client, model, message(question, **{kind: source}), pattern)
            print(f"{DIM}{answer.prompt_tokens} tokens of {kind} and text were read{PLAIN}")
        print(
            "\nThe weights are random, so the free text is noise. The second line shows structured\n"
            "output: the server lets the model choose only among sentences that fit a pattern.\n"
            "Words that make sense come from a trained checkpoint."
        )


def step_generator(checkpoint: Path, picture: Path, folder: Path) -> None:
    headline("5. A video with sound", "from the picture, in a process of its own")
    command = [program(), "generate", str(checkpoint), "--out", str(folder), "--name", "video"]
    command += ["--prompt", "The gripper lifts the red cube.", "--image", str(picture)]
    command += ["--size", "320x192", "--num-frames", "49", "--num-inference-steps", "8"]
    command += ["--generate-sound", "--seed", "0"]
    print(" ".join(["vllm-cosmos3", *command[1:]]), flush=True)
    subprocess.run(command, check=True)
    with av.open(str(folder / "video" / "vision.mp4")) as made:
        picture_stream, sound = made.streams.video[0], made.streams.audio[0]
        frames = sum(1 for _ in made.decode(video=0))
        print(
            f"read back: {frames} frames of {picture_stream.width}x{picture_stream.height} at "
            f"{float(picture_stream.average_rate):g} fps ({picture_stream.codec_context.name}), "
            f"{sound.codec_context.name} sound of {sound.channels} channels at {sound.rate} Hz"
        )
    print(
        "The weights are random, so the frames are noise; a trained checkpoint fills the same file."
    )


def stream_constrained(
    client: openai.OpenAI, model: str, user: dict[str, object], pattern: str
) -> None:
    """Print an answer that fits the regular expression, as it arrives."""
    for chunk in client.chat.completions.create(
        model=model,
        messages=[user],
        max_tokens=200,
        seed=0,
        stream=True,
        extra_body={"structured_outputs": {"regex": pattern}},
    ):
        typewriter(chunk.choices[0].delta.content or "" if chunk.choices else "")
    print(flush=True)


class Progress:
    """Says what the server is doing, by its log: one line that rewrites itself in a terminal."""

    STAGES = (  # text in vLLM's log, and what follows it
        ("", "importing vLLM"),
        ("Resolved architecture", "preparing the API server"),
        ("LLM engine", "starting the engine"),
        ("Starting to load model", "loading the weights"),
        ("init engine", "opening the API"),
    )

    def __init__(self, log: Path) -> None:
        self.log, self.shown = log, ""

    def __call__(self, seconds: float) -> None:
        text = self.log.read_text(errors="replace")
        stage = [meaning for marker, meaning in self.STAGES if marker in text][-1]
        if sys.stdout.isatty():
            print(f"{erase()}{seconds:3.0f} s  {stage} ...", end="", flush=True)
        elif stage != self.shown:
            print(f"{seconds:3.0f} s  {stage}", flush=True)
        self.shown = stage


def erase() -> str:
    return "\r\033[K" if sys.stdout.isatty() else ""


def headline(title: str, note: str) -> None:
    print(f"\n{BOLD}{title}{PLAIN} {DIM}{note}{PLAIN}", flush=True)


def failed(problem: str, folder: Path) -> int:
    log = folder / "server.log"
    where = f"The whole log: {log}\n" if log.exists() else ""
    sys.stdout.flush()
    print(
        f"\nThe demo failed: {problem}\n{where}"
        f"What to do: `{shown_program()} doctor` checks this machine and names the fix. The server "
        f"needs about 4 GiB of free memory.\nThen run the demo again; remove {folder} first to make "
        "everything anew.",
        file=sys.stderr,
    )
    return 1


def farewell(checkpoint: Path, seconds: float) -> None:
    python = shown_python()
    steps = {
        "make serve": "the same server, to stay",
        f"{shown_program()} serve nvidia/Cosmos3-Nano": "real weights, on a GPU",
        f"{python} examples/reasoner/grounding.py": "one of ten workflows: boxes, times, plans",
        f"{python} benchmarks/reasoner.py --serve {checkpoint} --quick": "load and latency",
    }
    print(f"\n{BOLD}Done{PLAIN} in {seconds:.0f} s; the server is stopped. Next:")
    for command, meaning in steps.items():
        print(f"  {command}\n      {DIM}{meaning}{PLAIN}")


def shown_program() -> str:
    return os.path.relpath(program())


def shown_python() -> str:
    return os.path.relpath(sys.executable)


if __name__ == "__main__":
    sys.exit(main())
