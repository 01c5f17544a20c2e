"""`ReasonerServer`: a reasoner that is served already, to answer questions beside the generator."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_cosmos3 import media
from vllm_cosmos3.closing import Closing
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.reasoner.offline import Answer
from vllm_cosmos3.request.questions import Question

AT_ONCE = 16  # questions on their way
SECONDS = 600.0  # for an answer


class ReasonerServer(Closing):
    """The reasoner behind a URL, such as that of ``vllm-cosmos3 serve``.

    Its key is in ``OPENAI_API_KEY``, if it wants one.

    Raises:
        Cosmos3Error: there is no server of chats.
    """

    def __init__(self, url: str) -> None:
        from openai import OpenAI  # vLLM brings it

        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=SECONDS)
        with self._answering():
            self._model = next(iter(self._client.models.list())).id

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in the order of the questions.

        Raises:
            Cosmos3Error: the server refuses a question, or does not answer.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._answer, questions))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _answer(self, question: Question) -> Answer:
        messages: Any = [{"role": "user", "content": _content(question)}]
        with self._answering():
            made = self._client.chat.completions.create(
                model=self._model, messages=messages, **_sampling(question)
            )
        (choice,) = made.choices
        return Answer(
            text=choice.message.content or "",
            tokens=made.usage.completion_tokens if made.usage else 0,
            complete=choice.finish_reason == "stop",
        )

    @contextmanager
    def _answering(self) -> Iterator[None]:
        from openai import APIStatusError, OpenAIError

        try:
            yield
        except APIStatusError as error:
            said = " ".join(error.message.split())[:300]
            raise Cosmos3Error(f"the reasoner at {self.url} refuses: {said}") from None
        except OpenAIError as error:
            raise Cosmos3Error(f"the reasoner at {self.url} does not answer ({error})") from None


def _content(question: Question) -> list[dict[str, Any]]:
    """The question as the content of a chat; a picture or clip stands before the text."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
    if question.image is not None:
        picture = media.encode_image(media.read_image(question.image), "png")
        content.insert(0, {"type": "image_url", "image_url": {"url": _data("image/png", picture)}})
    if question.video is not None:
        clip = _data("video/mp4", Path(question.video).read_bytes())
        content.insert(0, {"type": "video_url", "video_url": {"url": clip}})
    return content


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _sampling(question: Question) -> dict[str, Any]:
    """How the answer is drawn, as the chat takes it; greedy without ``do_sample``."""
    more: dict[str, Any] = {"repetition_penalty": question.repetition_penalty}
    drawn: dict[str, Any] = {"temperature": 0.0}
    if question.do_sample:
        drawn = {"temperature": question.temperature, "top_p": question.top_p}
        drawn |= {} if question.seed is None else {"seed": question.seed}
        more["top_k"] = question.top_k
    if question.video_fps is not None:
        more["mm_processor_kwargs"] = {"fps": question.video_fps, "do_sample_frames": True}
    if question.schema is not None:
        schema = {"name": "answer", "schema": dict(question.schema)}
        drawn["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {
        **drawn,
        "max_tokens": question.max_new_tokens,
        "presence_penalty": question.presence_penalty or 0.0,
        "extra_body": more,
    }
