"""Asks a Cosmos 3 reasoner about text, pictures and clips through its OpenAI-compatible API.

    reasoner = Reasoner("http://127.0.0.1:8000/v1")
    answer = reasoner.ask("Describe the video in detail.", video="clip.mp4")

Media are paths, URLs or bytes. The answers are read by ``answers.py``.
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import openai

from answers import AnswerError, Json, split_reasoning
from scenes import media

Media = str | Path | bytes
Kind = Literal["image", "video"]

# The sampling settings that NVIDIA documents for the two ways of asking.
WITHOUT_REASONING: Json = {
    "temperature": 0.7,
    "top_p": 0.8,
    "presence_penalty": 1.5,
    "top_k": 20,
    "repetition_penalty": 1.0,
}
WITH_REASONING: Json = WITHOUT_REASONING | {
    "temperature": 0.6,
    "top_p": 0.95,
    "presence_penalty": 0.0,
}
GREEDY: Json = {"temperature": 0.0}
REASONING_FORMAT = """

Answer the question using the following format:

<think>
Your reasoning.
</think>

Write your final answer immediately after the </think> tag."""

FPS = 4.0  # of a clip that are seen, as in the cookbook


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; ``reasoning`` is empty unless the model thought aloud."""

    text: str
    reasoning: str
    cut_off: bool  # at max_tokens
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoner:
    """A connection. ``model`` is asked from the server when it is not given.

    ``constrain`` holds answers to the JSON schema where a question has one. ``file_urls`` sends paths
    as file:// URLs, for a server on this machine that runs with --allowed-local-media-path. ``fps``
    frames a second of a clip are seen, None being as many as the checkpoint says; the server needs
    --trust-request-mm-kwargs for it where vLLM has that option, and `vllm-cosmos3 serve` sets it.
    ``greedy`` takes the most likely token each time instead of sampling.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    constrain: bool = False
    file_urls: bool = False
    fps: float | None = FPS
    greedy: bool = False
    max_tokens: int = 4096
    seed: int = 0

    def ask(
        self,
        question: str,
        *,
        image: Media | None = None,
        video: Media | None = None,
        reasoning: bool = False,
        schema: Json | None = None,
        show: Callable[[str], object] = lambda piece: None,
    ) -> Answer:
        """One question about at most one picture and one clip. ``show`` gets the text as it streams.

        Raises openai.OpenAIError when the server refuses or cannot be reached.
        """
        client = openai.OpenAI(base_url=self.base_url, api_key="EMPTY")
        model = self.model or client.models.list().data[0].id
        schema = schema if self.constrain else None
        text = question + (REASONING_FORMAT if reasoning and schema is None else "")
        sampling = WITH_REASONING if reasoning else WITHOUT_REASONING
        frames = {"fps": self.fps, "do_sample_frames": True}
        chunks = client.chat.completions.create(
            model=model,
            messages=[message(text, image=image, video=video, file_urls=self.file_urls)],
            max_tokens=self.max_tokens,
            seed=self.seed,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={
                **(GREEDY if self.greedy else sampling),
                **({"mm_processor_kwargs": frames} if video is not None and self.fps else {}),
                **({"structured_outputs": {"json": schema}} if schema is not None else {}),
            },
        )
        return _collect(chunks, show)


def message(
    text: str, *, image: Media | None = None, video: Media | None = None, file_urls: bool = False
) -> Json:
    """A user message in the order that Qwen3-VL was trained on: media first, then the text."""
    parts: list[Json] = []
    kinds: list[tuple[Kind, Media | None]] = [("image", image), ("video", video)]
    for kind, source in kinds:
        if source is not None:
            url = media_url(source, kind, file_urls=file_urls)
            parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def media_url(source: Media, kind: Kind, *, file_urls: bool = False) -> str:
    """A URL for the server. URLs stay as they are, paths and bytes become data: (or file://) URLs."""
    default = {"image": "image/png", "video": "video/mp4"}[kind]
    if isinstance(source, bytes):
        return f"data:{default};base64,{base64.b64encode(source).decode()}"
    if str(source).startswith(("http://", "https://", "data:", "file://")):
        return str(source)
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {str(source)!r} is neither a file nor a URL")
    if file_urls:
        return path.as_uri()
    mime = mimetypes.guess_type(path.name)[0] or default
    if not mime.startswith(f"{kind}/"):
        raise ValueError(f"{path.name} is {mime}, expected {kind} data")
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def arguments(
    description: str | None, question: str, **drawn: str
) -> tuple[argparse.Namespace, Reasoner]:
    """The command line of an example. ``drawn`` names the default media: ``image="table.png"``.

    ``args.image`` and ``args.video`` are what the user passed; where nothing was passed, they are
    the paths of the drawn defaults.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server lists")
    for kind, name in drawn.items():
        parser.add_argument(f"--{kind}", help=f"path or URL (default: {name}, drawn for you)")
    parser.add_argument("--question", default=question, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("cosmos3-examples"), help="for pictures")
    parser.add_argument("--constrain", action="store_true", help="hold JSON answers to a schema")
    parser.add_argument("--file-urls", action="store_true", help="send paths instead of the bytes")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not any(getattr(args, kind) for kind in drawn):
        for kind, name in drawn.items():
            setattr(args, kind, media(name, args.out))
    reasoner = Reasoner(
        base_url=args.base_url,
        model=args.model,
        constrain=args.constrain,
        file_urls=args.file_urls,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    return args, reasoner


def typewriter(piece: str) -> None:
    """Shows streamed text in the terminal."""
    print(piece, end="", flush=True)


def run(main: Callable[[], None]) -> None:
    """Run an example. What the user can mend becomes one line and exit status 1."""
    try:
        main()
    except (AnswerError, OSError, ValueError) as error:
        sys.exit(f"\n{error}")
    except openai.APIConnectionError as error:
        sys.exit(f"No server answers at {error.request.url}; start one or pass --base-url.")
    except openai.APIStatusError as error:
        sys.exit(f"The server refused: {error.message}")


def _collect(chunks: openai.Stream, show: Callable[[str], object]) -> Answer:  # type: ignore[type-arg]
    content, thought, usage, reason = "", "", None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            # a server with a reasoning parser sends the thoughts in a field of their own
            extra = str((choice.delta.model_extra or {}).get("reasoning") or "")
            piece = choice.delta.content or ""
            show(extra + piece)
            content, thought = content + piece, thought + extra
    literal, text = split_reasoning(content)
    return Answer(
        text=text,
        reasoning=thought or literal,
        cut_off=reason == "length",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )
