"""The reasoning parser: whole answers, and the same answers cut anywhere into deltas."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.reasoner.reasoning_parser import Cosmos3ReasoningParser

VOCABULARY = {"<think>": 1, "</think>": 2, "<|im_start|>": 3, "word": 4}


class Tokenizer:
    """Knows the ids of the tags; the text is all that is parsed."""

    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY


def parser() -> Cosmos3ReasoningParser:
    return Cosmos3ReasoningParser(Tokenizer())


def streamed(text: str, cuts: list[int]) -> tuple[str, str]:
    """Reasoning and content when ``text`` arrives in the pieces between ``cuts``."""
    subject = parser()
    reasoning, content = "", ""
    ended = False
    for start, end in pairwise([0, *cuts, len(text)]):
        if ended:  # vLLM passes the rest of the stream through
            content += text[start:end]
            continue
        delta: Any = subject.extract_reasoning_streaming(
            text[:start], text[:end], text[start:end], [], [], []
        )
        if delta is not None:
            reasoning += delta.reasoning or ""
            content += delta.content or ""
        ended = subject.is_reasoning_end_streaming([], [])
    if not ended:
        content += subject.get_streaming_fallback_content(text, None)
    return reasoning, content


def test_tags_split_the_answer() -> None:
    assert parser().extract_reasoning("<think>a</think>b", None) == ("a", "b")


def test_text_without_tags_is_content() -> None:
    assert parser().extract_reasoning("I </think> so <think>", None) == (
        None,
        "I </think> so <think>",
    )


def test_answer_that_never_stops_thinking_has_empty_content() -> None:
    assert parser().extract_reasoning("<think>still", None) == ("still", "")


pieces = st.sampled_from(["<think>", "</think>", "<th", "</", "a", " ", "\n", "b<", ">"])


@given(st.lists(pieces, max_size=8).map("".join), st.data())
def test_streaming_says_the_same(text: str, data: st.DataObject) -> None:
    positions = st.integers(min_value=0, max_value=len(text))
    cuts = sorted(data.draw(st.lists(positions, max_size=6)))
    reasoning, content = parser().extract_reasoning(text, None)
    got_reasoning, got_content = streamed(text, cuts)
    assert got_content == content
    # A tag that the token limit cut in two is not shown as reasoning.
    assert (reasoning or "").startswith(got_reasoning)
    assert "</think>".startswith((reasoning or "")[len(got_reasoning) :])


def test_only_the_current_turn_counts() -> None:
    subject = parser()
    assert not subject.is_reasoning_end([3, 1, 4, 2, 4, 3, 4])  # the question quotes the format
    assert subject.is_reasoning_end([3, 4, 3, 1, 4, 2])
    assert not subject.is_reasoning_end([3, 1, 4])


def test_tokens_of_the_reasoning_are_counted() -> None:
    assert parser().count_reasoning_tokens([1, 4, 4, 2, 4]) == 2
    assert parser().count_reasoning_tokens([1, 4, 4]) == 2
    assert parser().count_reasoning_tokens([4, 1, 4, 2]) == 0


def test_content_ids_follow_the_end_tag() -> None:
    assert parser().extract_content_ids([1, 4, 2, 4, 4]) == [4, 4]
    assert parser().extract_content_ids([4, 4]) == [4, 4]
    assert parser().extract_content_ids([1, 4]) == []
