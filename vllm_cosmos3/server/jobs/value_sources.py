"""Where each field of ``effective`` comes from: the request, the checkpoint, the reasoner, a default."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.defaults import defaults_of
from vllm_cosmos3.request.request import SPECS

# Fields that say the same in other words.
SPELLINGS = (
    ({"size"}, {"width", "height"}),
    ({"num_frames"}, {"seconds"}),
    ({"prompt"}, {"prompt_token_ids"}),
    ({"negative_prompt"}, {"negative_prompt_token_ids"}),
    ({"domain_name"}, {"domain_id"}),
    ({"action"}, {"action_path"}),
)


def in_other_words(given: Collection[str]) -> set[str]:
    """These names, and those that say the same."""
    said = set(given)
    for one, other in SPELLINGS:
        said |= (other if said & one else set()) | (one if said & other else set())
    return said


def sources(
    given: Collection[str], effective: Mapping[str, object], model: ModelConfig, *, upsampled: bool
) -> dict[str, str]:
    """The source of every field that has a value.

    ``given`` are the names in the request. "checkpoint" is what its files say, "default" that of the
    mode or of the field, or what follows from other fields and from the input.
    """
    asked = in_other_words(given)
    mode = str(effective["mode"])
    defaults = defaults_of(model.kind)
    negative = defaults[mode].negative_prompts if mode in defaults else ()
    checkpoint = {"negative_prompt"} if prompts.negative_file(model.path, negative) else set()
    if model.distilled:  # to these
        checkpoint |= {"num_inference_steps", "guidance_scale"}
    found = {
        name: "request" if name in asked else "checkpoint" if name in checkpoint else "default"
        for name, value in effective.items()
        if value is not None and name in SPECS
    }
    return found | ({"prompt": "reasoner"} if upsampled else {})
