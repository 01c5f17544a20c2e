"""The documented recipes against a real server, through the official client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from limits import HANG
from lines import CHATS
from media_files import clip, data_url, file_server, picture, png
from servers import Server

from vllm_cosmos3.compat import has_serve_flag
from vllm_cosmos3.server.engine_heartbeat import SILENT_SECONDS

pytestmark = pytest.mark.serve

Part = dict[str, Any]


def text(words: str = "what is shown?") -> Part:
    return {"type": "text", "text": words}


def image(seed: int = 0) -> Part:
    return {
        "type": "image_url",
        "image_url": {"url": data_url(png(picture(seed=seed)), "image/png")},
    }


def video(path: Path) -> Part:
    return {"type": "video_url", "video_url": {"url": path.as_uri()}}


def rate(fps: float) -> dict[str, Any]:
    return {"mm_processor_kwargs": {"fps": fps, "do_sample_frames": True}}


def ask(server: Server, *parts: Part, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0} | options
    return server.client().chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": list(parts)}],  # type: ignore[list-item]
        **settings,
    )


@pytest.fixture(scope="module")
def two_seconds(media_folder: Path) -> Path:
    return clip(media_folder / "two-seconds.mp4", frames=48, fps=24)


def test_more_frames_make_longer_prompts(reasoner_server: Server, two_seconds: Path) -> None:
    lengths = {
        fps: ask(reasoner_server, video(two_seconds), text(), extra_body=rate(fps)).usage
        for fps in (2, 4, 8)
    }
    four, eight, sixteen = (lengths[fps].prompt_tokens for fps in (2, 4, 8))
    assert sixteen - eight == 2 * (eight - four) > 0


def test_without_fps_a_video_is_sampled_at_two(reasoner_server: Server, two_seconds: Path) -> None:
    plain = ask(reasoner_server, video(two_seconds), text())
    at_two = ask(reasoner_server, video(two_seconds), text(), extra_body=rate(2))
    assert plain.usage.prompt_tokens == at_two.usage.prompt_tokens
    assert plain.choices[0].message.content == at_two.choices[0].message.content


def test_data_urls_and_files_are_the_same_video(reasoner_server: Server, two_seconds: Path) -> None:
    inline = {"url": data_url(two_seconds.read_bytes(), "video/mp4")}
    answers = [
        ask(reasoner_server, part, text(), max_tokens=16).choices[0].message.content
        for part in (video(two_seconds), {"type": "video_url", "video_url": inline})
    ]
    assert answers[0] == answers[1]


def test_every_part_of_a_message_counts(reasoner_server: Server, two_seconds: Path) -> None:
    messages = ([], [image()], [image(), image(1)], [image(), video(two_seconds)])
    lengths = [ask(reasoner_server, *m, text()).usage.prompt_tokens for m in messages]
    assert len(set(lengths)) == len(lengths)


def test_an_image_may_be_named_once_it_was_seen(reasoner_server: Server) -> None:
    """vLLM's cache of media: the second request has only the name."""
    seen = image(7) | {"uuid": "seen before"}
    named = {"type": "image_url", "image_url": None, "uuid": "seen before"}
    first, second = (ask(reasoner_server, part, text(), max_tokens=8) for part in (seen, named))
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


def test_streaming_says_the_same(reasoner_server: Server) -> None:
    whole = ask(reasoner_server, image(), text(), max_tokens=24).choices[0].message.content
    chunks = ask(reasoner_server, image(), text(), max_tokens=24, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole


@pytest.mark.parametrize(
    ("answer", "reasoning", "content"),
    [
        ("<think>ab</think>cd", "ab", "cd"),
        ("no tags at all", None, "no tags at all"),
        ("<think>cut off", "cut off", ""),
        ("<thinly sliced", None, "<thinly sliced"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_what_stands_between_the_tags(
    reasoner_server: Server, answer: str, reasoning: str | None, content: str, *, stream: bool
) -> None:
    question = text("Answer like this: <think>\nYour reasoning.\n</think> Your answer.")
    said = {"structured_outputs": {"regex": answer.replace(" ", r"\ ")}}
    reply = ask(reasoner_server, question, max_tokens=40, stream=stream, extra_body=said)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in reply if chunk.choices]
        got = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) or None
        assert "".join(delta.content or "" for delta in deltas) == content
    else:
        got = reply.choices[0].message.reasoning
        assert reply.choices[0].message.content == content
    assert got == reasoning


def test_schema_holds_with_the_reasoning_parser(reasoner_server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"label": {"enum": ["cat", "robot"]}, "moving": {"type": "boolean"}},
        "required": ["label", "moving"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    message = ask(reasoner_server, image(), text(), max_tokens=64, response_format=wanted)
    answer = json.loads(message.choices[0].message.content)
    assert answer.keys() == {"label", "moving"}


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat["cell"])
def test_every_cell_of_the_notebook_is_answered(
    chat: dict[str, Any], reasoner_server: Server, media_folder: Path, two_seconds: Path
) -> None:
    """As the notebook of the Cosmos cookbook asks, but for the files and the longest answer."""
    frame = media_folder / "frame.png"
    frame.write_bytes(png(picture()))
    part = {"type": "image_url", "image_url": {"url": frame.as_uri()}}
    shown = video(two_seconds) if chat["media"] == "video" else part
    options = chat["options"] | {"max_tokens": 4}
    answer = ask(reasoner_server, shown, text(chat["prompt"]), **options)
    assert 0 < answer.usage.completion_tokens <= 4
    words = ask(reasoner_server, text(chat["prompt"]), max_tokens=1).usage.prompt_tokens
    assert answer.usage.prompt_tokens > words + (16 if chat["media"] == "video" else 2)


def test_64_requests_at_once(reasoner_server: Server, two_seconds: Path) -> None:
    """Text, images and video, streaming and not, all at the same time."""

    async def one(client: openai.AsyncOpenAI, index: int) -> int:
        kinds: list[list[Part]] = [
            [],
            [image(index)],
            [video(two_seconds)],
            [image(), image(index)],
        ]
        parts = [*kinds[index % 4], text(f"request {index}")]
        stream = bool(index // 4 % 2)
        answer: Any = await client.chat.completions.create(
            model=reasoner_server.model,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item]
            max_tokens=16,
            stream=stream,
            stream_options={"include_usage": True} if stream else openai.omit,
            extra_body={"ignore_eos": True},
        )
        if not stream:
            return int(answer.usage.completion_tokens)
        usage = [chunk.usage async for chunk in answer][-1]
        return int(usage.completion_tokens)

    async def everybody() -> list[int]:
        async with reasoner_server.async_client() as client:
            return await asyncio.gather(*(one(client, index) for index in range(64)))

    assert asyncio.run(everybody()) == [16] * 64


def test_cosmos3_serve_prints_the_stock_command(reasoner_server_tp2: Server) -> None:
    log = reasoner_server_tp2.log.read_text()
    assert "vllm-cosmos3 serve: running VLLM_COSMOS3_ALLOW_PRIVATE_MEDIA=1 " in log
    assert " VLLM_COSMOS3_MAX_VIDEO_FPS=8 " in log
    assert f" vllm serve {reasoner_server_tp2.model} " in log
    warned = "--trust-request-mm-kwargs: lets requests choose" in log
    assert warned == has_serve_flag("trust-request-mm-kwargs")


def test_cosmos3_serve_tells_when_its_engine_last_answered(reasoner_server_tp2: Server) -> None:
    for path in ("/health", "/health/ready"):
        report = httpx.get(f"{reasoner_server_tp2.url}{path}", timeout=HANG)
        assert report.json()["surfaces"] == {"reasoner": "ready"}
        assert 0 <= report.json()["reasoner_last_sign_of_life"] < SILENT_SECONDS


def test_cosmos3_serve_bounds_the_rate(reasoner_server_tp2: Server, two_seconds: Path) -> None:
    assert ask(reasoner_server_tp2, video(two_seconds), text(), extra_body=rate(8)).choices
    with pytest.raises(openai.BadRequestError, match=r"fps is 9, must be .* at most 8"):
        ask(reasoner_server_tp2, video(two_seconds), text(), extra_body=rate(9))


@pytest.mark.parametrize("name", ["opencv", None])
def test_cosmos3_serve_reads_videos_in_one_way(
    reasoner_server_tp2: Server, two_seconds: Path, name: str | None
) -> None:
    media = {"media_io_kwargs": {"video": {"video_backend": name, "num_frames": -1}}}
    says = f"media_io_kwargs.video.video_backend is '{name or 'null'}', must be left out"
    with pytest.raises(openai.BadRequestError, match=says):
        ask(reasoner_server_tp2, video(two_seconds), text(), extra_body=media)
    assert ask(reasoner_server_tp2, video(two_seconds), text()).choices


def test_tags_stay_in_the_text_without_the_parser(reasoner_server_tp2: Server) -> None:
    said = {"structured_outputs": {"regex": "<think>ab</think>cd"}}
    reply = ask(reasoner_server_tp2, text(), max_tokens=40, extra_body=said)
    assert reply.choices[0].message.content == "<think>ab</think>cd"


@pytest.mark.parametrize("flat", ["file", "http"])
def test_cosmos3_serve_takes_flat_urls(
    flat: str, reasoner_server_tp2: Server, two_seconds: Path
) -> None:
    """As the README of Cosmos writes a message."""
    with file_server(two_seconds.parent) as files:
        place = two_seconds.as_uri() if flat == "file" else f"{files}/{two_seconds.name}"
        check_flat_url(reasoner_server_tp2, place)


def check_flat_url(server: Server, place: str) -> None:
    content = [
        {"type": "video_url", "video_url": place},
        {"type": "text", "text": "List the notable events with approximate timestamps."},
    ]
    system = [{"type": "text", "text": "You are a helpful assistant."}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    body = {"model": server.model, "messages": messages, "max_tokens": 2}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=HANG)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens"] > 50  # of the clip
