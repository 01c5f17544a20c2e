"""What diffusers, vLLM-Omni, the Cosmos Framework and phyai call arguments of `Cosmos3.generate`.

A name of the same meaning is read as ours. One of another meaning, or of none here, is refused with
what to write instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.fields import FRAMEWORK_NAMES
from vllm_cosmos3.request.request import SPECS

SAME = {name: ours for name, ours in FRAMEWORK_NAMES.items() if ours in SPECS} | {
    # diffusers
    "frame_rate": "fps",
    "num_images_per_prompt": "n",
    "num_videos_per_prompt": "n",
    # vLLM-Omni
    "num_outputs_per_prompt": "n",
    # phyai
    "steps": "num_inference_steps",
    "sound": "generate_sound",
    "condition_frames": "condition_frame_indexes_vision",
    "action_file": "action_path",
}
_PROGRESS = "progress=function, which is called with a Progress after every step"
_TOKENS = "prompt, or prompt_token_ids: texts are encoded inside the generator"
OTHERS = {
    # diffusers
    "generator": 'seed=N, with noise="torch" for the numbers of a torch.Generator',
    "callback": _PROGRESS,
    "callback_on_step_end": _PROGRESS,
    "callback_on_step_end_tensor_inputs": _PROGRESS,
    "prompt_embeds": _TOKENS,
    "negative_prompt_embeds": _TOKENS,
    "return_dict": "nothing: the result is an Output",
    "max_new_tokens": "Reasoner, which answers questions",
    # vLLM-Omni
    "prompts": "the prompts as the first argument, a list",
    "sampling_params": "its values as arguments of their own",
    "sampling_params_list": "its values as arguments of their own",
}
# Values of output_type of diffusers.
FORMS = {"np": "output.frames", "pil": "output.pil()", "pt": "output.torch()"}


def own_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments under the names of `GenerateRequest`.

    Raises:
        InvalidRequest: a name or value of another library that means something else here, or one
            argument under two names.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        ours = SAME.get(name, name)
        if name in OTHERS:
            raise InvalidRequest(name, value, f"given as {OTHERS[name]}")
        if name == "output_type" and value in FORMS:
            raise InvalidRequest(name, value, f"left out: {FORMS[value]} has them in this form")
        if ours in found:
            raise InvalidRequest(name, value, f"left out, as {ours} is given", "conflict")
        found[ours] = value
    return found
