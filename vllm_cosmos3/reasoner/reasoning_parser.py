"""The reasoning parser ``cosmos3``: what stands between the tags is reasoning, all else is content.

The model thinks only when the prompt asks it to, so text is reasoning only if it starts with
``<think>``, and the content is never null. A schema applies from the first token (see startup.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.reasoning import ReasoningParser

from vllm_cosmos3.compat import DeltaMessage

START, END = "<think>", "</think>"


class Cosmos3ReasoningParser(ReasoningParser):
    """Splits by the text, so it does not matter how the tags were tokenized or cut into deltas."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._start_id = self.vocab.get(START)
        self._end_id = self.vocab.get(END)
        self._turn_id = self.vocab.get("<|im_start|>")
        self._in_content = False  # whether the stream has come to its content

    @property
    def reasoning_start_str(self) -> str:
        return START

    @property
    def reasoning_end_str(self) -> str:
        return END

    def extract_reasoning(self, model_output: str, request: object) -> tuple[str | None, str]:
        """Reasoning (None without tags) and content of a whole answer."""
        if not model_output.lstrip().startswith(START):
            return None, model_output
        reasoning, _, content = model_output.lstrip().removeprefix(START).partition(END)
        return reasoning, content

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> Any:
        """What the new text adds to reasoning and content, or None while that is open."""
        before, now = _split(previous_text), _split(current_text)
        self._in_content = self._in_content or bool(now[1]) or END in current_text
        reasoning, content = (new[len(old) :] for old, new in zip(before, now, strict=True))
        if not reasoning and not content:
            return None
        return DeltaMessage(reasoning=reasoning or None, content=content or None)

    def get_streaming_fallback_content(self, text: str, request: object) -> str:
        """Called at the end of a stream: text held back because it could have become a tag."""
        return text if _split(text) == ("", "") and not text.lstrip().startswith(START) else ""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the current turn has closed its reasoning; earlier turns do not count."""
        for token in reversed(input_ids):
            if token == self._end_id:
                return True
            if token in (self._start_id, self._turn_id):
                return False
        return False

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        """Whether the stream has come to its content."""
        return self._in_content or self._end_id in delta_ids

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Tokens after the reasoning."""
        if self._end_id in input_ids:
            return input_ids[input_ids.index(self._end_id) + 1 :]
        return [] if self._start_id in input_ids[:1] else input_ids

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens between the tags of an answer that starts with one."""
        if not token_ids or token_ids[0] != self._start_id:
            return 0
        ids = list(token_ids)
        return (ids.index(self._end_id) if self._end_id in ids else len(ids)) - 1


def _split(text: str) -> tuple[str, str]:
    """Reasoning and content of a partial answer, without what could still become a tag."""
    body = text.lstrip()
    if START.startswith(body):  # also the empty text
        return "", ""
    if not body.startswith(START):
        return "", text
    reasoning, end, content = body.removeprefix(START).partition(END)
    if not end:
        held = next(n for n in range(len(END) - 1, -1, -1) if reasoning.endswith(END[:n]))
        reasoning = reasoning[: len(reasoning) - held]
    return reasoning, content
