"""Prompt upsampling by the reasoner that runs beside the generator, in the engine of the server."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_cosmos3 import media
from vllm_cosmos3.errors import DeadlineExceeded
from vllm_cosmos3.reasoner.offline import answer_of, sampling_params
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.questions import Question
from vllm_cosmos3.request.upsample import caption_of


class EngineReasoner:
    """Asks vLLM's engine, as a chat request of its own would."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine = engine
        self._tokenizer = prompts.load_tokenizer(folder)

    async def caption(self, question: Question, seconds: float) -> str:
        """The structured prompt that the engine writes in at most ``seconds``.

        Raises:
            UpsamplingFailed: the answer was cut before it was whole.
            DeadlineExceeded: it took too long.
        """
        prompt = await asyncio.to_thread(self._prompt, question)
        try:
            output = await asyncio.wait_for(self._answer(prompt, question), seconds)
        except TimeoutError:
            message = "the deadline passed while the reasoner wrote the prompt"
            raise DeadlineExceeded(message) from None
        answer = answer_of(output)
        return caption_of(answer.text, complete=answer.complete)

    async def _answer(self, prompt: dict[str, Any], question: Question) -> Any:
        """The engine's last word. It stops when this is cancelled."""
        from vllm.sampling_params import RequestOutputKind

        params = sampling_params(question)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        last = None
        async for output in self._engine.generate(prompt, params, f"upsample-{uuid.uuid4().hex}"):
            last = output
        return last

    def _prompt(self, question: Question) -> dict[str, Any]:
        """The chat as tokens, with the picture where its place is."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
        prompt: dict[str, Any] = {}
        if question.image is not None:
            content.insert(0, {"type": "image"})
            picture = Image.fromarray(media.read_image(question.image))
            prompt["multi_modal_data"] = {"image": picture}
        messages: list[Any] = [{"role": "user", "content": content}]
        encoded = self._tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return {"prompt_token_ids": list(encoded["input_ids"]), **prompt}
