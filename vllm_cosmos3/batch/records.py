"""One record of a batch file, as the Cosmos Framework writes it, under our names.

Renames and reads the files that stand for text; what a value may be is the business of `request`
and `questions`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_cosmos3.batch.locations import file_system, is_url, joined, parent_of, reaching, shown
from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.embodiments import spelled
from vllm_cosmos3.request.fields import FRAMEWORK_NAMES, Spec
from vllm_cosmos3.request.questions import SAMPLING
from vllm_cosmos3.request.request import SPECS
from vllm_cosmos3.request.sizes import ASPECT_RATIOS, TRAINED_SIZES
from vllm_cosmos3.request.upsample import SAMPLING_SPECS

NAME_BYTES = 200  # of a folder; file systems take 255
GENERATOR, REASONER = "generator", "reasoner"  # who serves a record

ALIASES = FRAMEWORK_NAMES | {"num_outputs": "n", "image_save_quality": "quality"}
# What a mode says of a record: which vision_path it needs, and what follows from it.
MODEL_MODES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "text2image": (None, {"num_frames": 1}),
    "image2image": ("image", {"num_frames": 1}),
    "text2video": (None, {}),
    "image2video": ("image", {}),
    "video2video": ("video", {}),
    "audio_image2video": ("image", {}),
    "forward_dynamics": ("image", {"action_mode": "forward_dynamics"}),
    "inverse_dynamics": ("video", {"action_mode": "inverse_dynamics"}),
    "policy": ("image", {"action_mode": "policy"}),
    "wam": ("image", {"action_mode": "policy"}),
    "reasoner": (None, {}),
}
ACTION = ("forward_dynamics", "inverse_dynamics", "policy", "wam")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
FILES = (  # fields that name a file, seen from that of the record
    "prompt_path", "negative_prompt_file", "vision_path", "image", "video", "sound_path", "action_path",
    "action_stats_path",
)  # fmt: skip
UNSUPPORTED = {
    "tensors_file": "left out: give the fields themselves",
    "pickle_file": "left out: give the fields themselves",
    "output_dir": "left out: --out has the results",
}
IGNORED = {
    "autoregressive": "a long video is made with num_chunks",
    "sigma_max": "it belongs to another solver",
    "model": "the checkpoint is that of the command line",
}
OURS = {  # of a record, beside the fields of a request
    "name": Spec(kind="text", high=200, help="folder of the results"),
    "upsample_prompt": Spec(kind="bool", help="let the reasoner write the structured prompt"),
    "continue_from": Spec(kind="text", high=200, help="record whose last frame is the first"),
    "caption": Spec(
        kind="bool", help="let the reasoner describe the video or picture that was made"
    ),
    "quality": Spec(kind="int", low=0, high=100, help="of a JPEG"),
    "crf": Spec(kind="int", low=0, high=51, help="quality of H.264, 0 is lossless"),
}
UPSAMPLER = "prompt_upsampler_"  # before the names of the upsampler's sampling
UPSAMPLING = {f"{UPSAMPLER}{name}": spec for name, spec in SAMPLING_SPECS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record as it stands in its file; ``name`` is what it is called unless it says so.

    ``folder`` is that of its file, from which its paths are seen: a path or a URL.
    """

    where: str
    folder: Path | str
    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record under our names.

    ``fields`` are those of a request, or of a question if ``kind`` is "reasoner"; files in them are
    absolute paths or URLs. ``upsample`` has the sampling of the prompt upsampler, None where the
    prompt stays as it is. ``names`` says how the record spells a field.
    """

    name: str
    where: str
    kind: str
    fields: Mapping[str, Any]
    names: Mapping[str, str]
    upsample: Mapping[str, Any] | None
    continue_from: str | None
    caption: bool
    crf: int | None
    quality: int | None
    warnings: tuple[str, ...]

    def placed(self, error: InvalidRequest) -> InvalidRequest:
        """The same error with file, record and the field as the record spells it."""
        return placed(self.where, error, self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A record, or a file of them, that cannot be served, and why.

    ``name`` is that of the folder for its results, None where it has none of its own.
    """

    name: str | None
    values: Mapping[str, Any]
    error: InvalidRequest


# What an item of a record means in our fields: from the entry, its value and the whole record.
Reader = Callable[[Entry, Any, Mapping[str, Any]], dict[str, Any]]


def placed(
    where: str, error: InvalidRequest, names: Mapping[str, str] | None = None
) -> InvalidRequest:
    """The same error, with the place where the mistake is."""
    field = (names or {}).get(error.field, error.field)
    return InvalidRequest(f"{where}: {field}", error.value, error.possible, error.code)


def make_record(
    entry: Entry, overrides: Mapping[str, Any], said: Mapping[str, Any] | None = None
) -> Record:
    """The record of an entry, with ``overrides`` (our fields) and ``said`` (of a record, files seen
    from here) instead of its own.

    Raises:
        InvalidRequest: a field that nobody knows, two that contradict, or a file that is not there.
    """
    values, warnings = _with_defaults(_with_said(entry, said or {}))
    mode = values.get("model_mode")
    if mode is not None and (not isinstance(mode, str) or mode not in MODEL_MODES):
        raise InvalidRequest("model_mode", mode, f"one of {', '.join(MODEL_MODES)}")
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in values.items():
        if name in UNSUPPORTED:
            raise InvalidRequest(name, value, UNSUPPORTED[name], "unsupported")
        if name in IGNORED and value != "":
            warnings.append(f"{name} has no effect: {IGNORED[name]}")
        for field, normal in _renamed(entry, name, value, values).items():
            _put(fields, names, field, normal, name)
    _follow_mode(mode, fields, names)
    if mode != "reasoner":
        fields = _overridden(fields, overrides)
    return _sorted(entry, mode, fields, names, warnings)


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, with the reason.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text, or what is wrong as a sentence: callers want objects."""
    try:
        return read_json(text)
    except ValueError as error:  # also of a number with thousands of digits
        return f"not JSON: {error}"


def folder_of(entry: Entry) -> str | None:
    """The folder for the results of an entry, None where its name cannot be one."""
    name = entry.values.get("name") or entry.name
    try:
        check_name(OURS["name"].checked("name", name))
    except InvalidRequest:
        return None
    return str(name)


def check_name(name: str) -> None:
    """Refuse the name of a record that cannot be the name of its folder.

    Raises:
        InvalidRequest: it has separators or what cannot be printed, or is too long.
    """
    one = name not in ("", ".", "..") and Path(name).name == name
    if not (one and name.isprintable() and len(name.encode()) <= NAME_BYTES):
        possible = f"one folder name without separators, printable, of at most {NAME_BYTES} bytes"
        raise InvalidRequest("name", name, possible)


# From the framework's names to ours.


def _with_defaults(entry: Entry) -> tuple[dict[str, Any], list[str]]:
    """The record over its defaults file, nulls left out; names that the defaults lose."""
    given = {str(name): value for name, value in entry.values.items() if value is not None}
    for name, value in given.items():
        if name not in KNOWN:
            hint = did_you_mean(name, KNOWN)
            shown = name if name.isprintable() else repr(name)
            raise InvalidRequest(shown, value, hint, "unknown_parameter")
    if "defaults_file" not in given:
        return given, []
    defaults = parse_json(_text_of(entry, "defaults_file", given["defaults_file"]))
    if not isinstance(defaults, dict):
        raise InvalidRequest("defaults_file", given["defaults_file"], "a file with a JSON object")
    place = _file(entry, "defaults_file", given["defaults_file"])
    folder = parent_of(place if is_url(place) else Path(place))
    defaults = {  # files are seen from where they were written
        name: joined(folder, value)
        if name in FILES and isinstance(value, str) and not is_url(value)
        else value
        for name, value in defaults.items()
    }
    kept = {name: x for name, x in defaults.items() if name in KNOWN and x is not None}
    for name in _others(given) & kept.keys():
        del kept[name]
    lost = [f"{name} in {given['defaults_file']} is no field" for name in defaults.keys() - KNOWN]
    return _merged(kept, given), sorted(lost)


def _with_said(entry: Entry, said: Mapping[str, Any]) -> Entry:
    """The entry with fields from outside, which replace what says the same in other words."""
    if not said:
        return entry
    here = {
        name: str(Path(value).absolute()) if name in FILES and not is_url(value) else value
        for name, value in said.items()
    }
    lost = _others(here)
    kept = {name: value for name, value in entry.values.items() if name not in lost}
    return replace(entry, values={**kept, **here})


def _others(names: Iterable[str]) -> set[str]:
    """The other ways to say what these names say."""
    said = set(names)
    return {
        name
        for ways in _WAYS
        for way in ways
        if said & set().union(*ways) - way
        for name in way - said
    }


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        nested = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(under, value) if nested else value  # type: ignore[arg-type]
    return merged


def _renamed(entry: Entry, name: str, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What one item of a record means in our fields."""
    if name in READERS:
        return READERS[name](entry, value, values)
    field = ALIASES.get(name, name)
    if field in SPECS or field in OURS or field in SAMPLING or field in UPSAMPLING:
        return {field: value}
    return {}


def _put(fields: dict[str, Any], names: dict[str, str], field: str, value: Any, name: str) -> None:
    if field in fields and fields[field] != value:
        possible = f"left out, as {names[field]} is given"
        raise InvalidRequest(name, value, possible, "conflict")
    fields[field] = value
    names[field] = name


def _follow_mode(mode: str | None, fields: dict[str, Any], names: dict[str, str]) -> None:
    """Check a record's mode against its inputs, and add what the mode implies."""
    if mode is None or mode == "reasoner":
        return
    wanted, implied = MODEL_MODES[mode]
    given = next((kind for kind in ("image", "video", "continue_from") if kind in fields), None)
    if wanted is not None and given is None and not _follows(fields):
        raise InvalidRequest("vision_path", None, f"the {wanted} of {mode}", "missing_required")
    fits = {wanted, "continue_from"} if wanted == "image" else {wanted}
    first_frame = implied.get("action_mode") in ("forward_dynamics", "policy")  # of a clip, too
    if given is not None and given not in fits and not first_frame:
        possible = f"left out for {mode}" if wanted is None else f"the {wanted} of {mode}"
        raise InvalidRequest(names[str(given)], fields[str(given)], possible, "conflict")
    if mode == "audio_image2video" and "sound_path" not in fields:
        raise InvalidRequest("sound_path", None, f"the sound of {mode}", "missing_required")
    for field, value in implied.items():
        if fields.setdefault(field, value) != value:
            raise InvalidRequest(names[field], fields[field], f"{value!r} for {mode}", "conflict")
        names.setdefault(field, "model_mode")


def _follows(values: Mapping[str, Any]) -> bool:
    """Whether a record has a control; false is none."""
    return any(values.get(name, False) is not False for name in CONTROLS)


# Names that say the same in different ways: a record that uses one drops the others' defaults.
_WAYS: tuple[tuple[set[str], ...], ...] = (
    ({"size"}, {"width", "height"}, {"resolution", "aspect_ratio"}, {"image_size"}),
    ({"num_frames"}, {"seconds"}),
    ({"image"}, {"video"}, {"vision_path"}, {"continue_from"}),
    ({"prompt"}, {"prompt_path"}, {"prompt_token_ids"}),
    ({"negative_prompt"}, {"negative_prompt_file"}, {"negative_prompt_token_ids"}),
    ({"action"}, {"action_path"}),
    ({"duration_template"}, {"use_duration_template"}),
    ({"resolution_template"}, {"use_resolution_template"}),
    ({"video_save_quality"}, {"crf"}),
    *(({alias}, {field}) for alias, field in ALIASES.items()),
)
# One of these from outside replaces all of them in a record.
_GROUPS = (
    {"size", "width", "height", "image_size"},
    {"num_frames", "seconds"},
    {"image", "video", "continue_from"},
    {"prompt", "prompt_token_ids"},
    {"negative_prompt", "negative_prompt_token_ids"},
)


def _overridden(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    replaced = set(overrides)
    for group in _GROUPS:
        if group & overrides.keys():
            replaced |= group
    return {k: v for k, v in fields.items() if k not in replaced} | dict(overrides)


def _sorted(
    entry: Entry, mode: str | None, fields: dict[str, Any], names: Mapping[str, str],
    warnings: list[str],
) -> Record:  # fmt: skip
    """The record, with what is not of the request taken out of its fields."""
    ours: dict[str, Any] = {}
    for field, spec in (OURS | UPSAMPLING).items():
        if field in fields:
            ours[field] = spec.checked(names.get(field, field), fields.pop(field))
    before = ours.get("continue_from")
    for source in ("image", "video", *CONTROLS):
        if before is not None and fields.get(source) not in (None, False):
            possible = f"left out, as {names.get(source, source)} is given"
            raise InvalidRequest("continue_from", before, possible, "conflict")
    name = ours.get("name", entry.name)
    check_name(name)
    if mode == "reasoner":
        if ours.get("caption"):
            possible = "left out: a record of the reasoner makes nothing to describe"
            raise InvalidRequest("caption", "true", possible, "conflict")
        if before is not None:
            possible = "left out: a record of the reasoner makes no video"
            raise InvalidRequest("continue_from", before, possible, "conflict")
        fields = _question(fields)
    elif drawn := next((field for field in SAMPLING if field in fields), None):
        possible = "left out: it is of model_mode reasoner"
        raise InvalidRequest(drawn, fields[drawn], possible, "conflict")
    sampling = {k.removeprefix(UPSAMPLER): v for k, v in ours.items() if k.startswith(UPSAMPLER)}
    return Record(
        name=name,
        where=entry.where if name == entry.name else f"{entry.where} ({name})",
        kind=REASONER if mode == "reasoner" else GENERATOR,
        fields=fields,
        names=dict(names),
        upsample=sampling if ours.get("upsample_prompt") else None,
        continue_from=ours.get("continue_from"),
        caption=ours.get("caption", False),
        crf=ours.get("crf"),
        quality=ours.get("quality"),
        warnings=tuple(warnings),
    )


def _question(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What means something to the reasoner; its records carry inert fields of the generator."""
    if sound := fields.get("generate_sound"):
        raise InvalidRequest("enable_sound", sound, "false: the reasoner writes text", "conflict")
    return {k: v for k, v in fields.items() if k in ("prompt", "image", "video", "seed", *SAMPLING)}


# Items that mean more than another name.


def _file(entry: Entry, name: str, value: Any) -> str:
    """A URL as it is, and a file relative to that of the record."""
    if not isinstance(value, str) or not value:
        raise InvalidRequest(name, value, "a file or a URL", "invalid_type")
    path = joined(entry.folder, value)
    if not is_url(path) and not Path(path).is_file():
        possible = f"a file that exists, seen from {shown(entry.folder)}, or a URL"
        raise InvalidRequest(name, value, possible)
    return path


def _text_of(entry: Entry, name: str, value: Any) -> str:
    """The text of a file that a record names; a JSON file as one line."""
    path = _file(entry, name, value)
    try:
        text = _bytes_of(name, path).decode("utf-8-sig").strip()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidRequest(name, value, f"a file that can be read ({reason})") from None
    except UnicodeDecodeError:
        raise InvalidRequest(name, shown(value), "a text file in UTF-8") from None
    if not path.lower().endswith(".json"):
        return text
    parsed = parse_json(text)
    if isinstance(parsed, str):
        raise InvalidRequest(name, shown(value), f"a JSON file; it is {parsed}", "invalid_json")
    return json.dumps(parsed, separators=(",", ":"))


def _bytes_of(name: str, path: str) -> bytes:
    if not is_url(path):
        return Path(path).read_bytes()
    with reaching(name, path, "a URL that can be fetched"):
        system, place = file_system(path)
        return bytes(system.cat_file(place))


def _text(field: str) -> Reader:
    """A prompt, which may stand as an object: the model reads its compact JSON."""

    def read(_: Entry, value: Any, __: Mapping[str, Any]) -> dict[str, Any]:
        return {field: prompts.as_text(value)}

    return read


def _text_file(field: str, name: str) -> Reader:
    def read(entry: Entry, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        if field in values:
            raise InvalidRequest(name, value, f"left out, as {field} is given", "conflict")
        return {field: _text_of(entry, name, value)}

    return read


def _source(field: str) -> Reader:
    def read(entry: Entry, value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        return {field: _file(entry, field, value)}

    return read


def _action_path(entry: Entry, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The actions of forward dynamics; records of other modes name what to compare with."""
    if values.get("model_mode", "forward_dynamics") != "forward_dynamics":
        return {}
    return {"action_path": _file(entry, "action_path", value)}


def _vision(entry: Entry, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A picture or a clip, by the end of its name, or else by the mode."""
    path = _file(entry, "vision_path", value)
    suffix = Path(path.split("?")[0]).suffix.lower()
    kind = "image" if suffix in IMAGES else "video" if suffix in VIDEOS else None
    kind = kind or MODEL_MODES.get(values.get("model_mode", ""), (None, {}))[0]
    if kind is None:
        possible = f"a name that ends in {', '.join((*IMAGES, *VIDEOS))}"
        raise InvalidRequest("vision_path", value, possible)
    return {kind: path}


def _resolution(_: Entry, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The size of a tier at an aspect ratio. Actions and transfer take the tier itself."""
    tiers = {str(tier): tier for tier in TRAINED_SIZES}
    if str(value) not in tiers:
        raise InvalidRequest("resolution", value, f"one of {', '.join(tiers)}")
    tier = tiers[str(value)]
    mode = values.get("model_mode")
    if mode == "reasoner":
        return {}
    if mode in ACTION or _follows(values):
        return {} if "image_size" in values else {"image_size": tier}
    if mode == "image2image" and "aspect_ratio" not in values:
        return {}  # as large as the picture
    image = mode in ("text2image", "image2image") or values.get("num_frames") == 1
    shape = str(values.get("aspect_ratio", "1,1" if image else "16,9")).replace(":", ",")
    if shape not in ASPECT_RATIOS:
        possible = f"one of {', '.join(map(repr, ASPECT_RATIOS))}"
        raise InvalidRequest("aspect_ratio", values["aspect_ratio"], possible)
    width, height = TRAINED_SIZES[tier][ASPECT_RATIOS.index(shape)]
    return {"size": f"{width}x{height}"}


def _spelled(name: str) -> Reader:
    def read(_: Entry, value: Any, __: Mapping[str, Any]) -> dict[str, Any]:
        return spelled(name, value)

    return read


def _aspect_ratio(entry: Entry, _: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if values.keys() & {"resolution", "size", "width", "height"}:
        return {}  # read with the resolution, or fixed
    mode_sizes = values.get("model_mode") in (*ACTION, "image2image") or _follows(values)
    return {} if mode_sizes else _resolution(entry, 720, values)


def _template(field: str, sentences: tuple[str, ...]) -> Reader:
    """A sentence that ends the prompt: the trained one, or none if it is empty."""

    def read(_: Entry, value: Any, __: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(value, bool) or value == "":
            return {field: bool(value)}
        if " ".join(str(value).split()) not in sentences:
            possible = f'"" for none, or {sentences[0]!r}, which the model was trained with'
            raise InvalidRequest(field, value, possible, "unsupported")
        return {field: True}

    return read


def _inverse(name: str) -> Reader:
    def read(_: Entry, value: Any, __: Mapping[str, Any]) -> dict[str, Any]:
        if value != "" and " ".join(str(value).split()) not in _SENTENCES[name]:
            possible = f"left out, or {_SENTENCES[name][0]!r}"
            raise InvalidRequest(name, value, possible, "unsupported")
        return {}

    return read


def _metadata_mode(_: Entry, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    kept = value == "none" and values.get("negative_prompt_keep_metadata") is True
    return {"negative_metadata_mode": "same" if kept else value}


def _keep_metadata(_: Entry, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """An older name for the mode above: true means "same"."""
    alone = "negative_metadata_mode" not in values
    return {"negative_metadata_mode": "same"} if alone and value is True else {}


def _sampler(_: Entry, value: Any, __: Mapping[str, Any]) -> dict[str, Any]:
    if value not in ("", "unipc"):
        raise InvalidRequest("sampler", value, "unipc: there is no other solver", "unsupported")
    return {}


def _normalize(_: Entry, value: Any, __: Mapping[str, Any]) -> dict[str, Any]:
    if value is not False:
        possible = "false or left out: guidance is not rescaled"
        raise InvalidRequest("normalize_cfg", value, possible, "unsupported")
    return {}


def _video_quality(_: Entry, value: Any, __: Mapping[str, Any]) -> dict[str, Any]:
    """From 0, the worst, to 10, lossless, as the framework's encoder counts."""
    quality = Spec(kind="int", low=0, high=10, help="").checked("video_save_quality", value)
    return {"crf": int(51 * (1 - quality / 10))}


def _control(name: str) -> Reader:
    """A control of transfer: true, a clip, or an object with its clip and its weight."""

    def read(entry: Entry, value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(value, str):
            return {name: _file(entry, name, value)}
        if not isinstance(value, Mapping):
            return {name: value}
        control = {
            {"weight": "control_weight"}.get(key, key): item
            for key, item in value.items()
            if item is not None
        }
        for key in ("control", "control_path"):
            if key in control:
                control[key] = _file(entry, f"{name}.{key}", control[key])
        return {name: control}

    return read


_SENTENCES = {
    "duration": (prompts.DURATION, prompts.DURATION.replace(":.1f", "").replace(":.0f", "")),
    "resolution": tuple(prompts.RESOLUTION.format(kind=kind, height="{height}", width="{width}") for kind in ("video", "image")),
    "inverse_duration_template": (prompts.DURATION_INVERSE,),
    "inverse_resolution_template": tuple(prompts.RESOLUTION_INVERSE.format(kind=kind, height="{height}", width="{width}") for kind in ("video", "image")),
}  # fmt: skip
READERS: dict[str, Reader] = {
    "prompt": _text("prompt"),
    "prompt_path": _text_file("prompt", "prompt_path"),
    "negative_prompt": _text("negative_prompt"),
    "negative_prompt_file": _text_file("negative_prompt", "negative_prompt_file"),
    "vision_path": _vision,
    "image": _source("image"),
    "video": _source("video"),
    "sound_path": _source("sound_path"),
    "action_path": _action_path,
    "action_stats_path": _source("action_stats_path"),
    "resolution": _resolution,
    "image_size": _spelled("image_size"),
    "view_point": _spelled("view_point"),
    "aspect_ratio": _aspect_ratio,
    "duration_template": _template("use_duration_template", _SENTENCES["duration"]),
    "resolution_template": _template("use_resolution_template", _SENTENCES["resolution"]),
    "inverse_duration_template": _inverse("inverse_duration_template"),
    "inverse_resolution_template": _inverse("inverse_resolution_template"),
    "negative_metadata_mode": _metadata_mode,
    "negative_prompt_keep_metadata": _keep_metadata,
    "normalize_cfg": _normalize,
    "sampler": _sampler,
    "video_save_quality": _video_quality,
    **{name: _control(name) for name in CONTROLS},
}
# Latents are arrays, which these files do not hold, and what comes back is a file.
KNOWN = {
    *SPECS, *OURS, *UPSAMPLING, *SAMPLING, *ALIASES, *READERS, *UNSUPPORTED, *IGNORED,
    "model_mode", "defaults_file", "extra",
} - {"latents", "output_type"}  # fmt: skip
