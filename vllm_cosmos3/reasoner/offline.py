"""`Reasoner`: the checkpoint's own reasoner, offline, to answer questions about text and pictures.

vLLM's `LLM` does the work, in a process of its own: closing it gives the memory back, for the
generator to take.
"""

from __future__ import annotations

import base64
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.checkpoint.hub import full_name, resolve
from vllm_cosmos3.closing import Closing
from vllm_cosmos3.compat import end_engine
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.imports import uncollected
from vllm_cosmos3.reasoner.root_config import ARCHITECTURE
from vllm_cosmos3.request.questions import Question

if TYPE_CHECKING:
    from vllm import SamplingParams

CLOSE_SECONDS = 30.0
LENGTH = 32_768  # tokens of question and answer; the model's own limit would need a larger cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the reasoner wrote. ``complete`` is false where it was cut at its longest length."""

    text: str
    tokens: int
    complete: bool


class Reasoner(Closing):
    """The reasoner of a checkpoint.

        with Reasoner("nvidia/Cosmos3-Nano") as reasoner:
            (answer,) = reasoner.ask([Question(prompt="What is in the picture?", image="a.png")])

    Args:
        model: a checkpoint folder, a Hugging Face repository, or a short name such as ``demo``.
        revision: branch, tag or commit of the repository.
        dtype: that of weights and activations, as vLLM's.
        tensor_parallel_size: GPUs that share each layer, as vLLM's.
        load_format: dummy makes random weights, as vLLM's.
        enforce_eager: no CUDA graphs: faster start, slower answers.
        max_model_len: longest question with its answer, in tokens.
        gpu_memory_utilization: share of a GPU's memory for weights and cache, above 0 to 1, as
            vLLM's, which is also the default. Less where a generator has the same GPU.

    Raises:
        CheckpointError: the checkpoint is missing or incomplete.
        Cosmos3Error: vLLM does not start, of which its own messages tell more.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "bfloat16",
        tensor_parallel_size: int = 1,
        load_format: str = "auto",
        enforce_eager: bool = False,
        max_model_len: int = LENGTH,
        gpu_memory_utilization: float | None = None,
    ) -> None:
        with uncollected():
            from vllm import LLM

        folder = resolve(model, revision, weights=False)
        settings = _settings(folder, max_model_len)
        if gpu_memory_utilization is not None:
            settings["gpu_memory_utilization"] = gpu_memory_utilization
        try:
            self._llm: Any = LLM(
                model=full_name(model),
                revision=revision,
                dtype=dtype,  # type: ignore[arg-type, unused-ignore]
                tensor_parallel_size=tensor_parallel_size,
                load_format=load_format,
                enforce_eager=enforce_eager,
                allowed_local_media_path="/",  # files that this user names to this process
                **settings,
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise Cosmos3Error(f"vLLM does not start the reasoner: {reason}") from error

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in the order of the questions. Many at once take less time than one by one.

        Raises:
            InvalidRequest: a picture cannot be read.
        """
        if self._llm is None:
            raise Cosmos3Error("this Reasoner is closed; make a new one")
        answers: list[Answer | None] = [None] * len(questions)
        for video, indexes in _by_video(questions).items():
            outputs = self._llm.chat(
                [_conversation(questions[index]) for index in indexes],
                [sampling_params(questions[index]) for index in indexes],
                use_tqdm=False,
                mm_processor_kwargs=dict(video) or None,
            )
            for index, output in zip(indexes, outputs, strict=True):
                answers[index] = answer_of(output)
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """End vLLM's process and free its memory."""
        llm, self._llm = self._llm, None
        if llm is not None:
            end_engine(llm.llm_engine.engine_core, CLOSE_SECONDS)


def sampling_params(question: Question) -> SamplingParams:
    """How vLLM draws the answer; greedy without ``do_sample``."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    drawn: dict[str, Any] = {"temperature": 0.0}
    if question.do_sample:
        drawn = {
            "temperature": question.temperature,
            "top_p": question.top_p,
            "top_k": question.top_k,
            "seed": question.seed,
        }
    schema = question.schema
    return SamplingParams(
        max_tokens=question.max_new_tokens,
        repetition_penalty=question.repetition_penalty,
        presence_penalty=question.presence_penalty or 0.0,
        structured_outputs=None if schema is None else StructuredOutputsParams(json=dict(schema)),
        **drawn,
    )


def answer_of(output: Any) -> Answer:
    """The answer in what vLLM gives back of a request."""
    (completion,) = output.outputs
    return Answer(
        text=completion.text,
        tokens=len(completion.token_ids),
        complete=completion.finish_reason == "stop",
    )


def _settings(folder: Path, length: int) -> dict[str, Any]:
    """What ``vllm-cosmos3 serve`` tells vLLM too, and a grammar that allows no endless blanks."""
    settings: dict[str, Any] = {
        "hf_overrides": {"architectures": [ARCHITECTURE]},
        "mm_encoder_tp_mode": "data",
        "media_io_kwargs": {"video": {"num_frames": -1}},
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if (folder / "config.json").is_file():
        config: Mapping[str, Any] = read_json(folder / "config.json")
    else:
        from vllm_cosmos3.reasoner.root_config import assemble

        config = assemble(folder)
        settings["config_format"] = "cosmos3"
        if not (folder / "tokenizer_config.json").is_file():
            settings["tokenizer"] = str(folder / "text_tokenizer")
    own = config.get("text_config", {}).get("max_position_embeddings", length)
    return {**settings, "max_model_len": min(length, own)}


def _by_video(questions: Sequence[Question]) -> dict[tuple[tuple[str, Hashable], ...], list[int]]:
    """Indexes of the questions that look at their clips alike."""
    groups: dict[tuple[tuple[str, Hashable], ...], list[int]] = {}
    for index, question in enumerate(questions):
        sampled = question.video is not None and question.video_fps is not None
        key = (("fps", question.video_fps), ("do_sample_frames", True)) if sampled else ()
        groups.setdefault(key, []).append(index)
    return groups


def _conversation(question: Question) -> list[dict[str, Any]]:
    """The question as a chat; a picture or clip stands before the text."""
    content: list[dict[str, Any]] = []
    if question.image is not None:
        picture = media.encode_image(media.read_image(question.image), "png")
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    if question.video is not None:
        url = Path(question.video).absolute().as_uri()
        content.append({"type": "video_url", "video_url": {"url": url}})
    content.append({"type": "text", "text": question.prompt})
    return [{"role": "user", "content": content}]
