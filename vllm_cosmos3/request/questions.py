"""A question to the reasoner: text, perhaps a picture or a clip, and how the answer is drawn.

The numbers are those that the model's documentation recommends for answers without a chain of
thought.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import MAX_SEED

if TYPE_CHECKING:
    from vllm_cosmos3.media import ImageSource


def _field(default: Any, kind: str, help: str, /, **spec: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec(kind=kind, help=help, **spec)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and how the answer is drawn.

    Without ``do_sample`` the likeliest token is taken each time, and temperature, top_k, top_p and
    seed mean nothing. ``schema`` is a JSON schema that the answer has to follow.

    Raises:
        InvalidRequest: a value has the wrong type or range.
    """

    prompt: str = _field("", "text", "what is asked", high=2**20)
    image: ImageSource | None = _field(None, "image", "a picture that it is about")  # noqa: RUF009
    video: str | None = _field(None, "video", "a clip that it is about")
    video_fps: float | None = _field(
        None, "float", "frames of the clip that are looked at, per second", low=0, above=True, high=60
    )  # fmt: skip
    max_new_tokens: int = _field(1024, "int", "longest answer", low=1, high=10**6, unit="tokens")
    do_sample: bool = _field(False, "bool", "sample the answer, else decode greedily")  # noqa: FBT003 - a default
    temperature: float = _field(0.7, "float", "sampling temperature (0: greedy)", low=0, high=100)
    top_k: int = _field(20, "int", "most likely tokens to sample from (0: all)", low=0, high=2**20)
    top_p: float = _field(
        0.8, "float", "probability mass to sample from", low=0, above=True, high=1
    )
    repetition_penalty: float = _field(
        1.0, "float", "penalty on earlier tokens (1: none)", low=0, above=True, high=100
    )
    presence_penalty: float | None = _field(
        None, "float", "penalty on repeated tokens (0: none)", low=-2, high=2
    )
    seed: int | None = _field(None, "int", "seed of the sampling", low=0, high=MAX_SEED)
    schema: Mapping[str, Any] | None = _field(None, "arrays", "JSON schema of the answer")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None:
                normal = item.metadata["spec"].checked(item.name, value)
                object.__setattr__(self, item.name, normal)
        if not self.prompt.strip():
            raise InvalidRequest("prompt", self.prompt or None, "a text that is not empty")
        if self.image is not None and self.video is not None:
            raise InvalidRequest("video", self.video, "left out, as image is given", "conflict")
        if self.presence_penalty is None:
            object.__setattr__(self, "presence_penalty", 1.5 if self.do_sample else 0.0)


QUESTION: dict[str, Spec] = {
    item.name: item.metadata["spec"] for item in dataclasses.fields(Question)
}
# How an answer is drawn.
SAMPLING = {
    name: spec
    for name, spec in QUESTION.items()
    if name not in ("prompt", "image", "video", "seed", "schema")
}


def question_of(fields: Mapping[str, Any]) -> Question:
    """A question from field names and values; an unknown name is refused with the nearest one."""
    for name in fields:
        if name not in QUESTION:
            hint = did_you_mean(name, QUESTION)
            raise InvalidRequest(name, fields[name], hint, "unknown_parameter")
    return Question(**fields)
