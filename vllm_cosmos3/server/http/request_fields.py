"""Fields of an HTTP body, translated to those of a request. Nothing is validated twice.

JSON, urlencoded and multipart bodies mean the same; ``extra_params`` and ``extra_args`` are more
fields; names of other servers are aliases. Text of a form becomes a value of the field's kind, and
what does not is left as it is for the validator to refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl

from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, brief, did_you_mean
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.embodiments import spelled
from vllm_cosmos3.request.fields import FRAMEWORK_NAMES, Spec
from vllm_cosmos3.request.prompts import as_text
from vllm_cosmos3.request.request import SPECS
from vllm_cosmos3.server.http import control_fields, json_text
from vllm_cosmos3.server.http.api_errors import ApiError

VIDEO, IMAGE = "video", "image"  # what is wanted

# Of a request from another process: no arrays, no choice of what comes back.
HIDDEN = {"latents", "output_type", "image", "video", "sound_path"}
ALIASES = FRAMEWORK_NAMES | {
    "num_outputs_per_prompt": "n",
    "sound_gen": "generate_sound",
    "audio_duration": "sound_duration",
    "frame_rate": "fps",
    "resolved_frame_rate": "fps",
    "resolution": "image_size",
    "audio_reference": "sound_path",
    "source_audio": "sound_path",
}
SOUND = "sound_path"
NESTED = ("extra_params", "extra_args")
DEEPEST = 8  # objects in objects that the name of a form field makes
REFERENCES = (
    "input_reference",
    "input_references",
    "image_reference",
    "video_reference",
    "image",
    "video",
    SOUND,
)
_SOUNDS = {name for name, ours in ALIASES.items() if ours == SOUND}
MEDIA_FIELDS = {*REFERENCES, *_SOUNDS, *CONTROLS, control_fields.PAIR[0]}
STRUCTURED = ("prompt", "negative_prompt")  # may be an object in JSON, as in batch files
# What is about the answer and not about the picture.
SERVER_FIELDS: dict[str, Spec] = {
    "model": Spec(kind="text", help="name of the served model"),
    "guardrails": Spec(kind="bool", help="false skips the guardrails, if the operator allows it"),
    "deadline_seconds": Spec(
        kind="float", low=0, above=True, high=1e6, unit="seconds", help="time limit of the request, queueing included"
    ),
    "continue_from": Spec(
        kind="text", high=200, help="id of a finished video to continue from its last frame"
    ),
    "preview": Spec(
        kind="bool", help="send small preview pictures with the events"
    ),
    "upsample_prompt": Spec(
        kind="bool", help="let the reasoner expand the prompt first"
    ),
    "truncate_prompt": Spec(kind="bool", help="false: refuse prompts that are too long instead of truncating them"),
    "response_format": Spec(
        kind="choice", choices=("b64_json", "file", "url"), help="form of images in the answer: base64, the file itself, or a URL"
    ),
    "output_format": Spec(
        kind="choice", choices=("png", "jpeg", "jpg", "webp"), help="file type of images"
    ),
    "output_compression": Spec(
        kind="int", low=0, high=100, help="quality of JPEG and WebP images"
    ),
}  # fmt: skip
VIDEO_ONLY = {"continue_from", "preview"}
IMAGE_ONLY = {"response_format", "output_format", "output_compression"}
IGNORED = {
    "user", "quality", "style", "moderation", "background", "metadata", "safety_identifier",
    "return_stage_metrics", "bot_task", "generator_device", "vae_use_slicing", "vae_use_tiling",
    "true_cfg_scale", "guidance_scale_2", "boundary_ratio", "input_fidelity",
}  # fmt: skip
NOTHING: tuple[Any, ...] = (
    False,
    0,
    "",
    "false",
    "0",
    [],
    {},
)  # what OpenAI's defaults say, written out
UNSUPPORTED = {
    "stream": "left out: GET /v1/videos/{id}/events streams the progress of a video",
    "partial_images": "left out: GET /v1/videos/{id}/events streams the progress of a video",
    "lora": "left out: the server is started with --lora",
    "enable_frame_interpolation": "left out: ask for a higher fps",
    "frame_interpolation_exp": "left out: ask for a higher fps",
    "frame_interpolation_scale": "left out: ask for a higher fps",
    "frame_interpolation_model_path": "left out: ask for a higher fps",
    "source_video": "left out: use input_reference",
    "mask": "left out: the model changes the picture where the prompt says so",
}


_ITEMS = {"ints": "int", "pair": "float", "numbers": "float", "rows": "numbers"}


def is_media(name: str) -> bool:
    """Whether a form field of this name, which may have brackets, is a picture or a clip."""
    return not MEDIA_FIELDS.isdisjoint(re.split(r"[\[\]]+", name))


class FormText(str):
    """Text of a form field, which may stand for a number, a truth value or a list."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest:
    """A translated body: fields of the validator, fields of the server, media, warnings.

    ``paths`` says where a field stood in the body, such as extra_params.seed.
    """

    fields: dict[str, Any]
    server_fields: dict[str, Any]
    references: dict[str, Any]
    warnings: tuple[str, ...]
    paths: Mapping[str, str] = field(default_factory=dict)

    def placed(self, error: Cosmos3Error) -> Cosmos3Error:
        """The same error, of the field as the user wrote it."""
        if isinstance(error, ApiError) and error.param is not None:
            error.param = self.paths.get(error.param, error.param)
        if not isinstance(error, InvalidRequest):
            return error
        head, dot, part = error.field.partition(".")
        path = self.paths.get(error.field, self.paths.get(head, head) + dot + part)
        return InvalidRequest(path, error.value, error.possible, error.code)


def parse_json(data: bytes) -> dict[str, Any]:
    """The object of a JSON body.

    Raises:
        ApiError: it is not JSON, with the offset, or not an object, or says something twice.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError("invalid_json", f"the body is not UTF-8 at byte {error.start}") from None
    try:
        value = json_text.read(text)
    except json_text.Misread as error:
        raise ApiError(error.code, str(error), param=error.path or None) from None
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        raise ApiError("invalid_json", f"the body is not JSON at byte {at}: {error.msg}") from None
    except RecursionError:
        raise ApiError("invalid_json", "the body is nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ApiError("invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(
            "invalid_type", f"the body is a JSON {type(value).__name__}, must be an object"
        )
    return value


def parse_urlencoded(data: bytes) -> dict[str, Any]:
    """The fields of an urlencoded body."""
    try:
        text = data.decode()
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=1000, errors="strict")
    except ValueError as error:
        raise ApiError("invalid_value", f"the form cannot be read: {error}") from None
    return nested([(name, FormText(value)) for name, value in pairs])


def nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Form fields with bracket names as nested objects and lists: ``a[b]=1``, ``a[]=1``.

    Raises:
        ApiError: a list in a list or an object in a list, which such names cannot keep apart; a
            field that is given twice or contradicts another one.
    """
    out: dict[str, Any] = {}
    for full, value in pairs:
        head, _, rest = full.partition("[")
        name = json_text.shown(full)
        keys = [head, *(key.removesuffix("]") for key in rest.split("["))] if rest else [head]
        if len(keys) > DEEPEST:
            raise ApiError("invalid_value", f"{name} is nested too deeply", param=head)
        if "" in keys[1:-1]:
            problem = f"{name} is a list with more inside than values, must be sent as JSON text"
            raise ApiError("invalid_value", f"{problem} in {json_text.shown(head)}", param=head)
        target: Any = out
        for key, following in pairwise(keys):
            target = target.setdefault(key, [] if following == "" else {})
            if not isinstance(target, list if following == "" else dict):
                raise ApiError("conflict", f"{name} contradicts another field", param=head)
        if isinstance(target, list):
            target.append(value)
        elif keys[-1] in target:
            raise ApiError("conflict", f"{name} is given twice", param=head)
        else:
            target[keys[-1]] = value
    return out


def translate(body: Mapping[str, Any], wanted: str) -> ClientRequest:
    """Sort the names of a body into what the validator, the server and nobody knows.

    Raises:
        InvalidRequest: an unknown name with the nearest one, a contradiction, something unsupported.
    """
    found = _Translation(wanted)
    for path, given, value in _flat(body):
        name = ALIASES.get(given, given)
        handle = HANDLERS.get(name)
        if handle is None:
            raise InvalidRequest(path, value, _hint(name), "unknown_parameter")
        handle(found, path, name, value)
    return found.request()


class _Translation:
    """A body on its way to a `ClientRequest`: a method for each kind of field."""

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self._fields: dict[str, Any] = {}
        self._server_fields: dict[str, Any] = {}
        self._references: dict[str, Any] = {}
        self._warnings: list[str] = []
        self._paths: dict[str, str] = {}
        self._control_pair: dict[str, tuple[str, Any]] = {}

    def request(self) -> ClientRequest:
        """The whole, when every field was handled."""
        self._join_control_pair()
        self._check_count()
        return ClientRequest(
            fields=self._fields,
            server_fields=self._server_fields,
            references=self._references,
            warnings=tuple(self._warnings),
            paths={name: path for name, path in self._paths.items() if name != path},
        )

    def reference(self, path: str, name: str, value: Any) -> None:
        """A picture, clip or sound: a file, a URL, or an object, which forms carry as JSON."""
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = control_fields.json_object(path, value)
        self._put(self._references, name, value, path)

    def control(self, path: str, name: str, value: Any) -> None:
        """A control of a transfer, with or without its clip."""
        parts, place, clip = control_fields.split(path, value)
        if self._wanted == IMAGE and parts is not False:
            possible = "left out: pictures are made from text; POST /v1/videos follows controls"
            raise InvalidRequest(path, "given", possible, "unsupported")
        self._put(self._fields, name, parts, path)
        if clip is not None:
            self._references[name], self._paths[f"{name}.control"] = clip, place

    def half_of_control(self, path: str, name: str, value: Any) -> None:
        """A clip without its control, or the name of that control."""
        self._control_pair[name] = path, value

    def unsupported(self, path: str, name: str, value: Any) -> None:
        """What other servers do; to ask for none of it is fine."""
        if value not in NOTHING:
            raise InvalidRequest(path, value, UNSUPPORTED[name], "unsupported")

    def of_server(self, path: str, name: str, value: Any) -> None:
        """What is about the answer and not about the picture."""
        for wanted, others, possible in (
            (VIDEO, IMAGE_ONLY, "it is for images only"),
            (IMAGE, VIDEO_ONLY, "it is for videos only"),
        ):
            if self._wanted == wanted and name in others:
                raise InvalidRequest(path, value, possible, "unknown_parameter")
        spec = SERVER_FIELDS[name]
        checked = spec.checked(path, _typed(value, spec.kind))
        self._put(self._server_fields, name, checked, path)

    def ignored(self, path: str, name: str, value: Any) -> None:
        """What has no effect on this model."""
        self._warnings.append(f"{path} has no effect on this model")

    def of_validator(self, path: str, name: str, value: Any) -> None:
        """A field of the request itself."""
        if name == "size" and value == "auto":
            return
        if name in STRUCTURED:
            value = as_text(value)
        # OpenAI's clients write seconds as text in JSON too.
        text = FormText(value) if name == "seconds" and isinstance(value, str) else value
        for ours, said in spelled(name, text).items():
            self._put(self._fields, ours, _typed(said, SPECS[ours].kind), path)

    def _put(self, out: dict[str, Any], name: str, value: Any, path: str) -> None:
        if name in out and out[name] != value:
            possible = f"left out, or the same as {self._paths[name]}={brief(out[name])}"
            raise InvalidRequest(path, value, possible, "conflict")
        out[name] = value
        self._paths.setdefault(name, path)

    def _join_control_pair(self) -> None:
        """A control that came as a file and its type is the control of that name."""
        found = control_fields.paired(self._control_pair)
        if found is None:
            return
        name, path, clip = found
        if name in self._references:
            possible = f"left out, as {self._paths[f'{name}.control']} is given"
            raise InvalidRequest(path, "given", possible, "conflict")
        if not isinstance(self._fields.get(name), Mapping):
            self._fields[name] = {}
        self._references[name], self._paths[f"{name}.control"] = clip, path

    def _check_count(self) -> None:
        """One frame makes an image, several a video; one video per request."""
        fields, paths = self._fields, self._paths
        frames = fields.get("num_frames")
        if self._wanted == IMAGE:
            if frames is not None and (
                frames != 1 or not isinstance(frames, int) or frames is True
            ):
                possible = "1 or left out; POST /v1/videos makes videos"
                raise InvalidRequest(paths["num_frames"], frames, possible)
            fields["num_frames"] = 1
            return
        if frames == 1 and not isinstance(frames, bool):
            possible = "at least 5; POST /v1/images/generations makes images"
            raise InvalidRequest(paths["num_frames"], frames, possible)
        if fields.get("n", 1) != 1 and isinstance(fields["n"], int):
            possible = "1: send one request for each video"
            code = "unsupported" if 1 < fields["n"] <= 10 else "invalid_value"
            raise InvalidRequest(paths["n"], fields["n"], possible, code)


# Of every field that is read, by its name without aliases.
HANDLERS: dict[str, Callable[[_Translation, str, str, Any], None]] = {
    **dict.fromkeys(SPECS.keys() - HIDDEN, _Translation.of_validator),
    **dict.fromkeys(IGNORED, _Translation.ignored),
    **dict.fromkeys(SERVER_FIELDS, _Translation.of_server),
    **dict.fromkeys(UNSUPPORTED, _Translation.unsupported),
    **dict.fromkeys(control_fields.PAIR, _Translation.half_of_control),
    **dict.fromkeys(CONTROLS, _Translation.control),
    **dict.fromkeys(REFERENCES, _Translation.reference),
}


def _flat(body: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Path, name and value of every field, those of extra_params and extra_args included."""
    out = []
    for name, value in body.items():
        if name not in NESTED:
            out.append((name, name, value))
            continue
        more = control_fields.json_object(name, value) if isinstance(value, str) else value
        if not isinstance(more, Mapping | None):
            raise InvalidRequest(name, value, "a JSON object", "invalid_type")
        out += [(f"{name}.{key}", str(key), item) for key, item in (more or {}).items()]
    for path, _, value in out:
        if not path.isprintable():
            raise InvalidRequest(ascii(path), value, "", "unknown_parameter")
    return [(path, name, value) for path, name, value in out if value is not None]


def _hint(name: str) -> str:
    known = [*(HANDLERS.keys() - IGNORED - UNSUPPORTED.keys()), *ALIASES, *NESTED]
    return did_you_mean(name, known)


def _typed(value: Any, kind: str) -> Any:
    """The value that the text of a form stands for; anything else as it is."""
    if isinstance(value, list):
        return [_typed(item, _ITEMS.get(kind, kind)) for item in value]
    if not isinstance(value, FormText) or kind in ("text", "choice", "size"):
        return str(value) if isinstance(value, FormText) else value
    text = value.strip()
    try:
        if kind == "int":
            return control_fields.number(text, int)
        if kind == "float":
            return control_fields.number(text, float)
        if kind in ("ints", "pair", "numbers", "rows"):
            if text.startswith("["):
                return json.loads(text)
            one = int if kind == "ints" else float
            return [control_fields.number(part, one) for part in text.split(",")]
    except (ValueError, RecursionError):
        return str(value)
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), str(value))
    return str(value)
