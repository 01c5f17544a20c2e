"""Prompt upsampling: the reasoner writes the structured prompt that the generator was trained on.

Here are the question, the shape of the answer as a JSON schema, and the reading of it; whoever has
a reasoner asks. The numbers of the sampling are the documented ones, the texts are this project's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_cosmos3 import media
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.prompts import Facts, json_object, stated
from vllm_cosmos3.request.questions import QUESTION, Question
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.request.sizes import aspect_ratio

if TYPE_CHECKING:
    from vllm_cosmos3.media import ImageSource

SAMPLING = {
    "max_tokens": 20_000,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.0,
    "presence_penalty": 1.5,
    "seed": 3407,
}
SAMPLING_SPECS = {
    name: QUESTION[{"max_tokens": "max_new_tokens"}.get(name, name)] for name in SAMPLING
}

_INSTRUCTIONS = """\
You prepare work for a {maker}. Below is a short request. Write one JSON object that describes \
the finished {kind} so fully that somebody who has never read the request could paint it.

Say what can be seen, in plain and concrete words: materials, colours, places in the frame, who does what \
with which hand. Keep everything that the request asks for. Where it is silent, decide for it, and decide \
for what is likely in such a scene: nothing may contradict the request, the rest of your description, or \
the way the world works. Fill every key. Where one does not apply write "" or 0 or an empty list; for \
people fill also the keys on clothing, face and skin.
{more}
The {kind} is {size}.

Request: {prompt}"""
_OF_VIDEO = """
Begin with "scene_imagination": six to twelve short notes to yourself, each after a verb and a colon (focus:, \
define:, refine:, visualize:, analyze:), at most 250 words, that settle what is seen, the camera and the timing. \
"temporal_caption" {caption}, "audio_description" says what is heard and when. Everything after \
that agrees with these three. Times are minutes and seconds, as in 0:03, spans as in 0:00-0:03, and none is later than \
{end}: "actions" and "segments" follow one another from 0:00 to {end}. Keep one shot unless the request asks for cuts.
"""
_TIMELINE = (
    "then walks through the clip from 0:00 to its end, with a time for each thing that happens"
)
_ARC = "then says in one sentence what happens from the first frame to the last"
_OF_IMAGE = """
Begin with "scene_imagination": six to twelve short notes to yourself, each after a verb and a colon (focus:, \
define:, refine:, visualize:, analyze:), at most 250 words, that settle what is seen. "comprehensive_t2i_caption" then tells \
the whole picture as one paragraph of 80 to 200 words. It is a single moment, without anything before or after. \
"subject_details" has two to five further properties of the main subject, under names of your choice, \
"quadrant_scan" says what is in each corner and in the middle. A person has 2 hands and 10 fingers, everything else 0.
"""
_OF_FRAME = """
The picture above is the first frame of the clip. Describe what it shows as it is, then what happens.
"""


def question_about(
    request: GenerateRequest, plan: Plan, sampling: Mapping[str, Any]
) -> Question | None:
    """What to ask for the structured prompt of a request; None if its prompt is structured.

    ``plan`` is that of the request, ``sampling`` replaces some of `SAMPLING`.

    Raises:
        InvalidRequest: the request has no prompt to upsample, or one whose form is fixed.
    """
    if request.prompt is None:
        possible = "left out: prompt_token_ids cannot be rewritten"
        raise InvalidRequest("upsample_prompt", "true", possible, "conflict")
    if request.action_mode is not None:
        possible = "left out: prompts of actions have a form of their own"
        raise InvalidRequest("upsample_prompt", "true", possible, "unsupported_combination")
    if request.mode == "image2image":
        possible = "left out: the prompt of an edit is an instruction"
        raise InvalidRequest("upsample_prompt", "true", possible, "unsupported_combination")
    if json_object(request.prompt) is not None:
        return None
    effective: Mapping[str, Any] = plan.effective
    facts = Facts(  # the prompt is that of a chunk
        num_frames=effective["num_video_frames_per_chunk"] or effective["num_frames"],
        fps=effective["fps"],
        height=effective["height"],
        width=effective["width"],
        aspect_ratio=aspect_ratio(effective["width"], effective["height"]),
    )
    return upsampling_question(
        request.prompt, facts, image=_first_frame(request, plan), sampling=sampling
    )


def _first_frame(request: GenerateRequest, plan: Plan) -> ImageSource | None:
    """The first frame where it is given: a control says where things are, not what they look like."""
    given = plan.streams[-1].source if request.controls else plan.streams[0].source
    if request.video is None or given is None:
        return request.image
    keep = request.condition_video_keep
    return next(media.frames_of(request.video, limit=len(given), keep=keep))


def upsampling_question(
    prompt: str,
    facts: Facts,
    *,
    image: ImageSource | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> Question:
    """What to ask the reasoner for the structured prompt of an output with these facts.

    ``image`` is the first frame of a clip, where there is one. ``sampling`` replaces some of
    `SAMPLING`.

    Raises:
        InvalidRequest: a value of ``sampling`` is out of range.
    """
    kind = "image" if facts.is_image else "video"
    drawn = {**SAMPLING, **(sampling or {})}
    seconds = facts.num_frames / facts.fps
    more = _OF_IMAGE
    if not facts.is_image:
        caption, whole = _TIMELINE if image is None else _ARC, round(seconds)
        end = f"{whole // 60}:{whole % 60:02d}"
        more = _OF_VIDEO.format(caption=caption, end=end) + (_OF_FRAME if image is not None else "")
    length = (
        "" if facts.is_image else f", {seconds:.1f} seconds long at {facts.fps:g} frames a second"
    )
    text = _INSTRUCTIONS.format(
        maker="painter" if facts.is_image else "film maker",
        kind=kind,
        more=more,
        size=f"{facts.width} pixels wide and {facts.height} high{length}",
        prompt=prompt,
    )
    return Question(
        prompt=text,
        image=image,
        max_new_tokens=drawn.pop("max_tokens"),
        do_sample=drawn["temperature"] > 0,
        schema=schema_of(facts),
        **drawn,
    )


def caption_of(text: str, *, complete: bool) -> str:
    """The structured prompt in an answer, as compact JSON.

    Raises:
        UpsamplingFailed: the answer was cut before it was whole.
    """
    # The grammar of strings lets pass what JSON does not: control characters, lone surrogates.
    legible = "".join(character for character in text if " " <= character != "\ufffd")
    caption = json_object(legible)
    if caption is None:
        why = "is not JSON" if complete else "was cut at its longest length"
        raise UpsamplingFailed(
            f"the reasoner's structured prompt {why}; send the prompt without upsampling, or with a "
            "larger max_tokens or another seed of the upsampler"
        )
    return json.dumps(caption, separators=(",", ":"))


class UpsamplingFailed(Cosmos3Error):
    """The reasoner wrote no structured prompt."""

    code = "upsampling_failed"


# The schema. Lengths are bounds for an answer that runs wild, far beyond what is usual.


def schema_of(facts: Facts) -> dict[str, Any]:
    """JSON schema of the structured prompt of an output with these facts; keys in trained order.

    The facts are the last keys, each with the one value that it can have.
    """
    video = not facts.is_image
    camera = ("framing", "camera_angle", "depth_of_field", "focus", "lens_focal_length")
    place = "spatial_temporal" if video else "spatial"
    told = {"temporal_caption": _CAPTION, "audio_description": _LONG}
    keys: dict[str, Any] = {
        "scene_imagination": _NOTES,
        **(told if video else {"comprehensive_t2i_caption": _CAPTION}),
        "subjects": _list(_subject(moves=video), least=1),
        **({} if video else {"subject_details": _OWN_NAMES}),
        "background_setting": _LONG,
        "lighting": _texts("conditions", "direction", "shadows", "illumination_effect"),
        "aesthetics": _texts("composition", "color_scheme", "mood_atmosphere", "patterns"),
        "cinematography": _texts(*(("camera_motion",) if video else ()), *camera),
        "style_medium": _SHORT,
        "artistic_style": _SHORT,
        "context": _SHORT,
    }
    written = _list(_texts("text", "category", "appearance", place, "context"))
    if not video:
        corners = ("top_left", "top_right", "bottom_left", "bottom_right", "absolute_center")
        keys |= {"text_and_signage_elements": written, "quadrant_scan": _texts(*corners)}
        return _object(keys | _known(facts))
    segment = _object(
        {
            "segment_index": _COUNT,
            "time_range": _SPAN,
            "description": _LONG,
            "key_changes": _SHORT,
            "camera": _SHORT,
        }
    )
    keys |= {
        "actions": _list(_object({"time": _SPAN, "description": _LONG}), least=1),
        "text_and_signage_elements": written,
        "segments": _list(segment, least=1),
        "transitions": _list(_SHORT),
    }
    return _object(keys | _known(facts))


def _known(facts: Facts) -> dict[str, Any]:
    """The keys of the facts that a caption states."""
    kinds = {int: "integer", float: "number", str: "string"}

    def only(value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return _object({name: only(part) for name, part in value.items()})
        return {"type": kinds[type(value)], "enum": [value]}

    told = stated(facts)
    order = ("resolution", "aspect_ratio", "duration", "fps")
    return {name: only(told[name]) for name in order if name in told}


def _subject(*, moves: bool) -> dict[str, Any]:
    seen = ["appearance_details", "relationship", "location", "relative_size", "orientation"]
    seen += ["pose", "action", "state_changes"] if moves else ["pose"]
    person = ("clothing", "expression", "gender", "age", "skin_tone_and_texture", "facial_features")
    counts = ["number_of_subjects", "number_of_arms", "number_of_legs"]
    counts += [] if moves else ["number_of_hands", "number_of_fingers"]
    return _object(
        {
            "description": _LONG,
            **dict.fromkeys((*seen, *person), _SHORT),
            **dict.fromkeys(counts, _COUNT),
        }
    )


def _texts(*names: str) -> dict[str, Any]:
    return _object(dict.fromkeys(names, _SHORT))


def _object(keys: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": keys,
        "required": list(keys),
        "additionalProperties": False,
    }


def _list(item: dict[str, Any], *, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "maxItems": 8}


_SHORT = {"type": "string", "maxLength": 300}
_LONG = {"type": "string", "maxLength": 1000}
_CAPTION = {"type": "string", "maxLength": 3000}
_SPAN = {"type": "string", "maxLength": 16}  # such as 0:00-0:05
_NOTES = {"type": "string", "maxLength": 2500}
_OWN_NAMES = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 300}}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 99}
