"""Malformed requests: each row is answered before anything is queued, with its slug and field.

The numbers are those of the catalogue of bad input that the API was designed against; rows about
the policy WebSocket are in test_openpi.py, and those about other checkpoints and lost memory or
workers are in test_guarded_server.py and test_faults_of_server.py.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from generators import LONG, PICTURE, create, finished
from jsonschema import Draft202012Validator
from limits import HANG
from media_files import animation, clip, data_url, picture, png
from PIL import Image
from servers import Server

from vllm_cosmos3.media import read_video
from vllm_cosmos3.server.http.request_fields import ALIASES, IGNORED, UNSUPPORTED

pytestmark = pytest.mark.serve
VIDEOS, IMAGES = "/v1/videos", "/v1/images/generations"
SMALL = {"prompt": "a boat", "size": "64x64", "num_frames": 5, "num_inference_steps": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A request as arguments of httpx, and the answer: status, slug and field."""

    number: int
    status: int
    code: str = ""
    param: str | None = None
    method: str = "POST"
    path: str = VIDEOS
    send: dict[str, Any] = field(default_factory=dict)
    says: str = ""  # in the message
    warns: str = ""  # in a warning of the job

    def __str__(self) -> str:
        return f"{self.number}-{self.code or self.status}"


def body(**changes: Any) -> dict[str, Any]:
    """A small video as JSON, with changes; what is None is left out."""
    return {"json": {k: v for k, v in (SMALL | changes).items() if v is not None}}


def raw(text: str) -> dict[str, Any]:
    return {"content": text.encode(), "headers": {"content-type": "application/json"}}


def form(**changes: Any) -> dict[str, Any]:
    fields = {k: str(v) for k, v in (SMALL | changes).items() if v is not None}
    return {"data": fields}


def file(data: bytes, name: str = "input_reference", **changes: Any) -> dict[str, Any]:
    return form(**changes) | {"files": {name: ("file", data)}}


def image(**changes: Any) -> dict[str, Any]:
    return {"path": IMAGES, "send": {"json": {"prompt": "a boat", **PICTURE, **changes}}}


def action(**changes: Any) -> dict[str, Any]:
    """A short forward-dynamics request, with changes; extra_params as where other servers take it."""
    extra = {
        "action_mode": "forward_dynamics",
        "domain_name": "av",
        "action_chunk_size": 4,
        "action": [[0.1] * 9] * 4,
    }
    top = {"num_frames": None, "input_reference": PICTURE_URL}
    for name, value in changes.items():
        (top if name in (*SMALL, "input_reference", "generate_sound", "fps") else extra)[name] = (
            value
        )
    given = {name: value for name, value in extra.items() if value is not None}
    return body(**top, extra_params=given)


def hints(**fields: Any) -> dict[str, Any]:
    """A small request with controls among the extra parameters."""
    return body(extra_params=fields)


def predicted(mode: str, **changes: Any) -> dict[str, Any]:
    """The same for a mode that predicts the actions."""
    return action(action_mode=mode, action=None, **changes)


def nan_action() -> dict[str, Any]:
    """JSON with a NaN, which Python's writer would refuse to httpx."""
    return raw(json.dumps(action(action=[[float("nan")] * 9] * 4)["json"]))


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(2501) * 100))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


PICTURE_URL = data_url(png(picture(64, 64)), "image/png")
CONTROL = animation([picture(64, 64, seed) for seed in range(5)])
CONTROL_URL = data_url(CONTROL, "image/gif")
ROWS = [
    Row(number=1, status=400, code="missing_required", param="prompt", send=body(prompt=None)),
    Row(number=1, status=400, code="missing_required", param="prompt", send=form(prompt=None)),
    Row(number=2, status=400, code="invalid_value", param="prompt", send=body(prompt="")),
    Row(number=2, status=400, code="invalid_value", param="prompt", send=form(prompt="  \n")),
    Row(number=3, status=200, send=body()),
    Row(number=3, status=200, send=form()),
    Row(number=4, status=400, code="invalid_value", param="prompt", send=body(prompt="a\0b")),
    Row(number=5, status=413, code="field_too_large", param="prompt", send=body(prompt="a " * 2**20), says="1,048,576"),
    Row(number=6, status=200, send=body(prompt="word " * 200, max_sequence_length=64), warns="is cut from"),
    Row(number=6, status=400, code="invalid_value", param="prompt", send=body(prompt="word " * 200, max_sequence_length=64, truncate_prompt=False)),
    Row(number=7, status=400, code="invalid_type", param="size", send=body(size="1280*720"), says="1280x720"),
    Row(number=8, status=400, code="invalid_value", param="size", send=body(size="0x0")),
    Row(number=9, status=400, code="invalid_value", param="size", send=body(size="1281x719"), says="1280x720"),
    Row(number=10, status=400, code="too_large", param="size", send=body(size="16000000x16000000")),
    Row(number=11, status=400, code="conflict", param="size", send=body(width=128, height=64)),
    Row(number=12, status=400, code="missing_required", param="height", send=body(size=None, width=64)),
    Row(number=13, status=400, code="too_large", param="size", send=body(size="3840x2160")),
    Row(number=14, status=400, code="invalid_value", param="num_frames", send=body(num_frames=0)),
    Row(number=14, status=400, code="invalid_value", param="num_frames", send=form(num_frames=-1)),
    Row(number=15, status=400, code="invalid_type", param="num_frames", send=form(num_frames="abc")),
    Row(number=15, status=400, code="invalid_type", param="num_frames", send=body(num_frames="5")),
    Row(number=16, status=400, code="invalid_value", param="num_frames", send=body(num_frames=10**9)),
    Row(number=16, status=400, code="too_large", param="num_frames", send=body(num_frames=1001), says="400"),
    Row(number=18, status=200, send=body(num_frames=6), warns="rounded up to 9"),
    Row(number=19, status=400, code="invalid_value", param="num_frames", send=body(num_frames=1), says="/v1/images/generations"),
    Row(number=20, status=400, code="invalid_value", param="fps", send=body(fps=0)),
    Row(number=20, status=400, code="invalid_value", param="fps", send=form(fps="nan")),
    Row(number=20, status=400, code="invalid_value", param="fps", send=body(fps=1e9)),
    Row(number=20, status=200, send=body(fps=60), warns="trained range"),
    Row(number=21, status=200, send=form(num_frames=None, seconds="0.3")),
    Row(number=21, status=200, send=body(num_frames=None, seconds="0.3")),
    Row(number=22, status=400, code="conflict", param="seconds", send=body(seconds=4)),
    Row(number=23, status=400, code="invalid_value", param="num_inference_steps", send=body(num_inference_steps=0)),
    Row(number=23, status=400, code="invalid_value", param="num_inference_steps", send=form(num_inference_steps=201)),
    *(Row(number=25, status=400, code="invalid_value", param="guidance_scale", send=form(guidance_scale=x)) for x in ("nan", "inf", "21", "-1")),
    *(Row(number=26, status=400, code="invalid_value", param="flow_shift", send=form(flow_shift=x)) for x in ("-5", "0", "nan")),
    Row(number=27, status=400, code="invalid_value", param="seed", send=body(seed=-1)),
    Row(number=28, status=400, code="invalid_value", param="seed", send=form(seed=2**70)),
    Row(number=29, status=400, code="invalid_json", param="extra_params", send=form(extra_params="{bad"), says="character 1"),
    *(Row(number=30, status=400, code="invalid_value", param=head, send=form(**{f"{head}{rest}": 1}), says="sent as JSON text") for head, rest in (("extra_params", "[action][][]"), ("extra_params", "[a][][b]"), ("extra_params", "[][seed]"), ("extra_params", "[[seed]]"))),
    *(Row(number=30, status=400, code="invalid_type", param="seed", send=form(seed=x)) for x in ("1_000", "\u0661")),
    Row(number=30, status=400, code="invalid_type", param="fps", send=form(fps="1_6")),
    Row(number=30, status=400, code="conflict", param="seed", send=raw('{"prompt": "a", "seed": 1, "seed": 2}'), says="given twice"),
    Row(number=30, status=400, code="conflict", param="extra_params.seed", send=raw('{"extra_params": {"seed": 1, "seed": 1}}')),
    Row(number=30, status=400, code="conflict", param="extra_params.seed", send=form(extra_params='{"seed": 1, "seed": 2}')),
    Row(number=30, status=400, code="invalid_type", param="extra_params", send=form(extra_params="[1]")),
    Row(number=31, status=400, code="unknown_parameter", param="extra_params.gaurdrails", send=body(extra_params={"gaurdrails": False}), says="guardrails"),
    Row(number=32, status=200, send=form(**{"extra_params[guardrails]": "false"})),
    Row(number=33, status=400, code="invalid_type", param="guardrails", send=body(guardrails="false")),
    Row(number=33, status=400, code="invalid_type", param="extra_params.guardrails", send=body(extra_params={"guardrails": 1})),
    Row(number=34, status=400, code="conflict", param="extra_params.num_frames", send=body(extra_params={"num_frames": 9})),
    Row(number=34, status=200, send=body(extra_params={"num_frames": 5})),
    Row(number=35, status=200, send=body(max_sequence_length=512)),
    Row(number=36, status=400, code="invalid_value", param="extra_args.seed", **image(seed=None, extra_args={"seed": -1})),
    Row(number=37, status=400, code="unknown_parameter", param="foo", send=form(foo=1)),
    Row(number=37, status=200, send=body(user="me"), warns="user has no effect"),
    Row(number=38, status=400, code="invalid_value", param="extra_params.action_mode", send=action(action_mode="fly"), says="forward_dynamics, inverse_dynamics, policy"),
    Row(number=39, status=400, code="missing_required", param="domain_name", send=action(domain_name=None), says="umi"),
    Row(number=40, status=400, code="invalid_value", param="extra_params.domain_name", send=action(domain_name="droid_robot"), says="did you mean droid"),
    Row(number=41, status=400, code="invalid_value", param="extra_params.domain_id", send=action(domain_name=None, domain_id=999)),
    Row(number=41, status=400, code="conflict", param="extra_params.domain_id", send=action(domain_id=6), says="1 or left out"),
    Row(number=42, status=200, send=predicted("policy")),
    Row(number=42, status=400, code="missing_required", param="raw_action_dim", send=predicted("policy", domain_name="libero"), says="7 or 10 or 13"),
    Row(number=43, status=400, code="conflict", param="extra_params.raw_action_dim", send=predicted("policy", domain_name="umi", raw_action_dim=9), says="10 or left out"),
    Row(number=44, status=400, code="missing_required", param="action", send=action(action=None)),
    Row(number=45, status=400, code="invalid_value", param="extra_params.action", send=action(action=[[0.1] * 9, [0.1] * 8]), says="row 1 has 8"),
    Row(number=45, status=400, code="invalid_type", param="extra_params.action", send=action(action=[[0.1] * 9, ["a"] * 9]), says="row 1"),
    Row(number=45, status=400, code="invalid_type", param="extra_params.action", send=nan_action(), says="row 0"),
    Row(number=45, status=400, code="invalid_type", param="extra_params.action", send=action(action=[[[0.1] * 9]])),
    Row(number=46, status=400, code="conflict", param="extra_params.action", send=action(action=[[0.1] * 65] * 4), says="9 numbers wide"),
    Row(number=47, status=200, send=action(action=[[0.1] * 9] * 3), warns="repeated 1 times"),
    Row(number=48, status=400, code="invalid_value", param="extra_params.action_chunk_size", send=action(action_chunk_size=0)),
    Row(number=48, status=400, code="conflict", param="num_frames", send=action(num_frames=9), says="5 or left out"),
    Row(number=49, status=403, code="path_not_allowed", param="extra_params.action_path", send=action(action=None, action_path="/etc/hostname")),
    Row(number=49, status=403, code="path_not_allowed", param="extra_params.action_path", send=action(action=None, action_path="../rows.json")),
    Row(number=49, status=403, code="path_not_allowed", param="extra_params.action_stats_path", send=action(action_stats_path="file:///etc/hostname")),
    Row(number=49, status=400, code="invalid_type", param="extra_params.action_path", send=action(action=None, action_path=5)),
    Row(number=49, status=400, code="invalid_media", param="extra_params.action_path", send=action(action=None, action_path="absent.json")),
    Row(number=50, status=400, code="invalid_type", param="extra_params.image_size", send=action(image_size=[320]), says="256, 480, 704, 720"),
    Row(number=50, status=400, code="invalid_value", param="extra_params.image_size", send=action(image_size=512)),
    Row(number=51, status=400, code="invalid_type", param="extra_params.view_point", send=action(view_point=6), says="ego_view"),
    Row(number=52, status=400, code="conflict", param="input_reference", send=predicted("inverse_dynamics"), says="give a video"),
    *(Row(number=52, status=400, code="missing_required", param="input_reference", send=predicted(mode, input_reference=None)) for mode in ("policy", "inverse_dynamics")),
    Row(number=52, status=400, code="conflict", param="extra_params.action", send=action(action_mode="policy"), says="predicts it"),
    Row(number=53, status=400, code="unsupported_combination", param="generate_sound", send=action(generate_sound=True)),
    *(Row(number=53, status=400, code="unsupported", param="extra_params.action_mode", path="/v1/videos/sync", send=predicted(mode), says="POST /v1/videos") for mode in ("policy", "inverse_dynamics")),
    Row(number=53, status=400, code="unsupported_combination", param="action_mode", **image(action_mode="policy", domain_name="av")),
    Row(number=53, status=400, code="conflict", param="extra_params.domain_name", send=body(extra_params={"domain_name": "av"}), says="action_mode"),
    Row(number=55, status=400, code="conflict", param="sound_duration", send=body(sound_duration=1)),
    Row(number=56, status=400, code="invalid_type", param="generate_sound", send=form(generate_sound="maybe")),
    Row(number=57, status=400, code="invalid_media", param="input_reference", send=file(b"garbage" * 99, num_frames=13)),
    Row(number=57, status=400, code="invalid_media", param="input_reference", send=file(b"")),
    Row(number=57, status=400, code="invalid_media", param="input_reference", send=file(b"garbage" * 99)),
    Row(number=57, status=400, code="invalid_media", param="extra_params.input_reference", send=body(extra_params={"input_reference": "data:image/png;base64,AAAA"})),
    Row(number=58, status=200, send=form(input_reference=PICTURE_URL)),
    Row(number=58, status=200, send=form(**{"input_reference[image_url]": PICTURE_URL})),
    Row(number=58, status=200, send=body(image_reference={"image_url": PICTURE_URL})),
    Row(number=58, status=400, code="invalid_value", param="input_reference", send=form(input_reference="hello")),
    Row(number=58, status=400, code="invalid_value", param="extra_params.input_reference", send=body(extra_params={"input_reference": "hello"})),
    Row(number=58, status=400, code="invalid_json", param="image_reference", send=form(image_reference="{bad"), says="image_reference is"),
    Row(number=59, status=413, code="payload_too_large", param="input_reference", send=file(bomb())),
    Row(number=63, status=400, code="invalid_value", param="condition_frame_indexes_vision", send=form(condition_frame_indexes_vision="[-1]")),
    *(Row(number=63, status=400, code="invalid_type", param="condition_frame_indexes_vision", send=body(condition_frame_indexes_vision=x)) for x in ({"a": 1}, "x")),
    Row(number=64, status=400, code="invalid_value", param="condition_video_keep", send=body(condition_video_keep="middle")),
    Row(number=66, status=400, code="unsupported", param="image_reference.file_id", send=body(image_reference={"file_id": "x"})),
    Row(number=66, status=403, code="path_not_allowed", param="image_reference", send=body(image_reference={"image_url": "file:///etc/hostname"})),
    *(Row(number=67, status=400, code="url_not_allowed", param="input_reference", send=body(input_reference=f"http://{host}/x.png"), says="public") for host in ("127.0.0.1:80", "localhost", "169.254.169.254", "10.0.0.1", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[::127.0.0.1]")),
    Row(number=69, status=400, code="missing_required", param="control_type", send=file(CONTROL, "control_reference")),
    Row(number=69, status=400, code="invalid_value", param="control_type", send=file(CONTROL, "control_reference", control_type="lines"), says="edge, blur, depth, seg, wsm"),
    Row(number=69, status=400, code="missing_required", param="control_reference", send=form(control_type="edge")),
    Row(number=69, status=200, send=file(CONTROL, "control_reference", control_type="depth")),
    Row(number=69, status=200, send=file(CONTROL, "seg", num_frames=None)),
    Row(number=70, status=400, code="missing_required", param="extra_params.depth.control", send=hints(depth=True), says="only edge and blur"),
    Row(number=70, status=400, code="missing_required", param="extra_params.edge.control", send=hints(edge=True), says="video given"),
    Row(number=71, status=400, code="invalid_value", param="extra_params.seg.control_weight", send=hints(seg={"control": CONTROL_URL, "control_weight": 0}), says="above 0"),
    Row(number=71, status=400, code="invalid_value", param="extra_params.seg.control_weight", send=hints(seg={"control": CONTROL_URL, "control_weight": -1})),
    Row(number=71, status=400, code="invalid_value", param="extra_params.seg.control_weight", send=raw(json.dumps(hints(seg={"control": CONTROL_URL, "control_weight": float("nan")})["json"]))),
    Row(number=71, status=400, code="unknown_parameter", param="extra_params.seg.weight", send=hints(seg={"control": CONTROL_URL, "weight": 1}), says="control_weight"),
    Row(number=71, status=400, code="invalid_value", param="edge.control_weight", send=form(**{"edge[control]": CONTROL_URL, "edge[control_weight]": "-2"})),
    Row(number=71, status=400, code="invalid_type", param="extra_params.edge", send=hints(edge=5)),
    Row(number=71, status=400, code="invalid_json", param="edge", send=form(edge="{control")),
    *(Row(number=72, status=400, code="conflict", param=f"extra_params.{name}", send=hints(**{name: value}), says="edge, blur, depth") for name, value in (("control_guidance", 2.0), ("num_conditional_frames", 1), ("emphasize_control_in_prompt", False))),
    Row(number=73, status=403, code="path_not_allowed", param="extra_params.depth.control_path", send=hints(depth={"control_path": "/etc/hostname"})),
    Row(number=73, status=403, code="path_not_allowed", param="extra_params.depth", send=hints(depth="/etc/hostname")),
    Row(number=74, status=200, send=hints(seg=CONTROL_URL), warns="64x64 is not a trained one"),
    Row(number=75, status=400, code="unsupported_combination", param="generate_sound", send=body(seg=CONTROL_URL, generate_sound=True), says="without sound"),
    Row(number=75, status=400, code="unsupported_combination", param="action_mode", send=body(seg=CONTROL_URL, action_mode="policy")),
    Row(number=75, status=400, code="unsupported_combination", param="input_reference", send=body(seg=CONTROL_URL, input_reference=PICTURE_URL)),
    Row(number=75, status=400, code="unsupported", param="seg", **image(seg=CONTROL_URL)),
    Row(number=75, status=400, code="unsupported", param="edge", **image(edge=True), says="from text"),
    Row(number=75, status=400, code="invalid_value", param="num_frames", **image(num_frames=True)),
    Row(number=76, status=400, code="unsupported", param="num_outputs_per_prompt", send=form(num_outputs_per_prompt=2)),
    Row(number=77, status=400, code="invalid_value", param="n", **image(n=11)),
    Row(number=77, status=400, code="invalid_value", param="n", **image(n=0)),
    Row(number=79, status=200, **image(response_format="url")),
    Row(number=80, status=400, code="invalid_value", param="output_format", **image(output_format="gif")),
    Row(number=81, status=400, code="unsupported", param="stream", **image(stream=True)),
    Row(number=82, status=415, code="unsupported_media_type", path=IMAGES, send=form()),
    Row(number=83, status=400, code="invalid_json", send=raw('{"prompt": "a"'), says="byte 14"),
    Row(number=83, status=400, code="invalid_json", send=raw('{"prompt": \xff')),
    Row(number=83, status=400, code="invalid_type", send=raw("[1]")),
    Row(number=84, status=404, code="model_not_found", param="model", send=body(model="sora-2"), says="tiny"),
    Row(number=84, status=404, code="model_not_found", param="extra_params.model", send=body(extra_params={"model": "sora-2"})),
    Row(number=84, status=404, code="not_found", param="extra_params.continue_from", send=body(extra_params={"continue_from": "nope"})),
    *(Row(number=85, status=400, code="invalid_value", param="limit", method="GET", path=f"{VIDEOS}?limit={x}") for x in (-1, 0, 101, "x")),
    Row(number=86, status=400, code="invalid_value", param="order", method="GET", path=f"{VIDEOS}?order=x"),
    Row(number=87, status=404, code="cursor_not_found", param="after", method="GET", path=f"{VIDEOS}?after=nope"),
    Row(number=88, status=404, code="not_found", param="id", method="GET", path=f"{VIDEOS}/nope"),
    Row(number=88, status=404, code="not_found", param="id", method="DELETE", path=f"{VIDEOS}/nope"),
    Row(number=95, status=404, code="not_found", method="GET", path=f"{VIDEOS}/%2e%2e%2fjobs.sqlite/content"),
    Row(number=95, status=404, code="not_found", param="id", method="GET", path=f"{VIDEOS}/%2e%2e/content"),
    Row(number=96, status=404, code="not_found", param="id", path=f"{VIDEOS}/nope/remix", send={"json": {"prompt": "a"}}),
    Row(number=96, status=501, code="unsupported", path=f"{VIDEOS}/edits", send=form()),
    Row(number=96, status=501, code="unsupported", path="/v1/images/variations", send=form()),
    Row(number=97, status=400, code="missing_required", param="image", path="/v1/images/edits", send=body(num_frames=None)),
    Row(number=97, status=400, code="unsupported", param="mask", path="/v1/images/edits", send=body(num_frames=None, mask="x", image="data:,x")),
    Row(number=97, status=400, code="unsupported", param="audio_reference", path="/v1/images/edits", send=body(num_frames=None, audio_reference="data:,x")),
    Row(number=97, status=400, code="invalid_media", param="image", path="/v1/images/edits", send=body(num_frames=None, image="data:,x")),
    Row(number=98, status=400, code="invalid_media", param="source_audio", send=body(source_audio="data:,x"), says="a complete WAV"),
    Row(number=98, status=400, code="invalid_media", param="sound_path", send=body(sound_path="data:,x")),
    Row(number=98, status=400, code="conflict", param="keep_sound", send=body(keep_sound=True)),
    Row(number=101, status=409, code="guardrails_unavailable", param="guardrails", send=body(guardrails=True)),
    Row(number=101, status=409, code="guardrails_unavailable", param="extra_params.guardrails", send=body(extra_params={"guardrails": True})),
    Row(number=107, status=405, code="method_not_allowed", method="PUT", path=VIDEOS),
    Row(number=107, status=404, code="not_found", method="GET", path="/v1/nothing"),
    Row(number=140, status=400, code="invalid_value", param="preset", send=body(preset="turbo"), says="exact, high, fast"),
    Row(number=140, status=400, code="invalid_type", param="extra_params.preset", send=body(extra_params={"preset": 1})),
    Row(number=141, status=400, code="invalid_value", param="step_cache", send=body(step_cache="tea"), says="none, sea"),
    Row(number=141, status=400, code="invalid_value", param="step_cache_threshold", send=body(step_cache="sea", step_cache_threshold=-1)),
    Row(number=141, status=400, code="invalid_value", param="step_cache_max_reused", send=body(step_cache="sea", step_cache_max_reused=0)),
    Row(number=141, status=400, code="invalid_value", param="step_cache_order", send=form(step_cache="sea", step_cache_order="2")),
    Row(number=141, status=200, send=body(step_cache="none", step_cache_threshold=0.5), warns="step_cache_threshold"),
    Row(number=142, status=400, code="invalid_value", param="guidance_interval", send=body(guidance_interval=[900, 100])),
    Row(number=142, status=400, code="invalid_type", param="extra_params.guidance_interval", send=body(extra_params={"guidance_interval": 5})),
    Row(number=142, status=400, code="conflict", param="control_guidance_interval", send=body(control_guidance_interval=[100, 900])),
    Row(number=143, status=400, code="invalid_type", param="preview", send=body(preview="maybe")),
    Row(number=150, status=400, code="unsupported", param="lora", send=body(lora={"name": "snow"}), says="--lora"),
    Row(number=151, status=400, code="invalid_value", param="timeout", path="/v1/cosmos3/sleep?timeout=-1"),
    Row(number=151, status=400, code="invalid_value", param="timeout", path="/v1/cosmos3/sleep?timeout=long"),
    Row(number=151, status=405, code="method_not_allowed", method="GET", path="/v1/cosmos3/sleep"),
    Row(number=152, status=403, code="permission_denied", path="/v1/cosmos3/start_weight_update", says="--weight-transfer"),
    Row(number=152, status=403, code="permission_denied", path="/v1/cosmos3/update_weights", send={"json": {"update_info": {"path": "/x"}}}),
    Row(number=152, status=403, code="permission_denied", path="/v1/cosmos3/update_weights", send={"content": b"[" * 2**20, "headers": {"Content-Type": "application/json"}}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, generator_server: Server) -> None:
    with httpx.Client(base_url=generator_server.url, timeout=HANG) as client:
        answer = client.request(row.method, row.path, **row.send)
        while answer.status_code == 429:  # accepted rows before this one fill the small queue
            answer = client.request(row.method, row.path, **row.send)
        assert answer.status_code == row.status, answer.text
        assert answer.headers["x-request-id"]
        if row.status == 200:
            warnings = answer.json()["cosmos3"]["warnings"]
            assert any(row.warns in warning for warning in warnings) or not row.warns
            return
    check(answer, row.code, row.param)
    assert row.says in answer.json()["error"]["message"]
    if row.status == 405:
        assert "POST" in answer.headers["allow"]


def check(answer: httpx.Response, code: str, param: str | None) -> None:
    """The one envelope, and no more than it."""
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"].endswith("_error")
    assert "\n" not in error["message"]
    assert "pydantic" not in error["message"]


DIGITS = "9" * 5000
DEEP = '{"a":' * 100_000
ODD = {
    "digits": (f'{{"prompt": "a", "seed": {DIGITS}}}', "invalid_json"),
    "lists in lists": ('{"prompt": ' + "[" * 600 + "]" * 600 + "}", "invalid_value"),
    "digits in text": ({"extra_params": f'{{"seed": {DIGITS}}}'}, "invalid_json"),
    "depth in text": ({"extra_params": DEEP}, "invalid_json"),
    "depth of a control": ({"edge": DEEP}, "invalid_json"),
    "half an address": ({"input_reference": "http://[::1"}, "fetch_failed"),
    "half an address of a control": ({"edge": "http://[::1"}, "fetch_failed"),
    "half a path": ({"input_reference": "file://[x/a"}, "invalid_media"),
    "half a character as a name": ('{"prompt": "a", "\\ud800": 1}', "invalid_value"),
    "half a character inside": ('{"prompt": "a", "extra_params": {"\\ud800": 1}}', "invalid_value"),
    "half a character of a control": ('{"prompt": "a", "edge": {"\\ud800": 1}}', "invalid_value"),
    "half a character of an id": ('{"prompt": "a", "continue_from": "\\ud800"}', "invalid_value"),
    "half a character in text": ({"extra_params": '{"prompt": "\\ud800"}'}, "invalid_value"),
    "a long name": ({"x" * 10**6: 1}, "unknown_parameter"),
    "a long name inside": ({"extra_params": {"x" * 10**6: 1}}, "unknown_parameter"),
    "a long model": ({"model": "x" * 10**6}, "model_not_found"),
    "a long list": ({"seed": [1] * 10**5}, "invalid_type"),
    "long lists": ({"seed": [[[1] * 1000] * 100]}, "invalid_type"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_bodies_are_refused(name: str, generator_server: Server) -> None:
    body, code = ODD[name]
    text = body if isinstance(body, str) else json.dumps({"prompt": "a", **body})
    headers = {"content-type": "application/json"}
    url = f"{generator_server.url}{VIDEOS}"
    answer = httpx.post(url, content=text, headers=headers, timeout=HANG)
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert answer.json()["error"]["code"] in (code, "invalid_type"), answer.text[:300]
    assert len(answer.json()["error"]["message"]) < 1000
    assert len(answer.json()["error"]["param"] or "") <= 80


def test_odd_forms_queries_and_headers(generator_server: Server) -> None:
    url = f"{generator_server.url}{VIDEOS}"
    deep = {"prompt": "a", "extra_params" + "[a]" * 3000: "1"}
    answer = httpx.post(url, data=deep, timeout=HANG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    answer = httpx.post(url, data={"prompt": "a", "action": "[" * 100_000}, timeout=HANG)
    assert answer.status_code == 400
    answer = httpx.get(url, params={"limit": DIGITS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")
    headers = {"Prefer": b"wait=\xb2", "Idempotency-Key": ""}  # a superscript two
    made = [httpx.post(url, **body(seed=s), headers=headers, timeout=HANG).json() for s in (1, 2)]
    assert made[0]["id"] != made[1]["id"]
    for job in made:
        httpx.delete(f"{url}/{job['id']}")


def test_row_17_defaults_of_a_video(generator_server: Server) -> None:
    job = create(generator_server, num_inference_steps=1, size="256x256")
    httpx.delete(f"{generator_server.url}{VIDEOS}/{job['id']}")
    assert (job["num_frames"], job["fps"], job["seconds"]) == (189, 24, "7.875")
    sources = job["cosmos3"]["sources"]
    assert {name for name, source in sources.items() if source == "request"} == {
        "prompt", "num_inference_steps", "size", "width", "height"
    }  # fmt: skip
    assert {sources[name] for name in ("num_frames", "fps", "guidance_scale", "seed")} == {
        "default"
    }
    assert sources["negative_prompt"] == "default"  # of this package: a tiny checkpoint has none
    assert "sound_duration" not in sources  # nor any other that has no value


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_row_61_a_truncated_clip(cut: float, generator_server: Server, tmp_path: Path) -> None:
    whole = clip(tmp_path / "clip.mp4", frames=24).read_bytes()
    send = file(whole[: int(len(whole) * cut)], num_frames=13)
    answer = httpx.post(f"{generator_server.url}{VIDEOS}", **send, timeout=HANG)
    assert answer.status_code == 400
    check(answer, "invalid_media", "input_reference")


def test_row_62_a_short_clip(generator_server: Server, tmp_path: Path) -> None:
    send = file(clip(tmp_path / "clip.mp4", frames=3).read_bytes(), num_frames=13)
    answer = httpx.post(f"{generator_server.url}{VIDEOS}", **send, timeout=HANG)
    assert answer.status_code == 400
    check(answer, "invalid_value", "input_reference")
    assert "at least 5 frames" in answer.json()["error"]["message"]


def test_messages_and_records_name_the_users_files(
    generator_server: Server, media_folder: Path
) -> None:
    """And not where the server keeps them."""
    url = f"{generator_server.url}{VIDEOS}"
    bad = data_url(b"no picture" * 50, "image/png")
    uploads = dict.fromkeys(("input_reference", "depth", "control_reference"), ("my.mp4", b"no clip" * 50))  # fmt: skip
    (media_folder / "broken.json").write_text("[")
    path = {
        "action_mode": "forward_dynamics", "domain_name": "av", "action_path": "broken.json",
        "input_reference": data_url(png(picture(64, 64)), "image/png"),
    }  # fmt: skip
    clips = {"input_reference": ("my.mp4", clip(media_folder / "my.mp4", frames=9).read_bytes())}
    clips["image_reference"] = ("my.png", png(picture(64, 64)))
    requests: list[tuple[str, dict[str, Any]]] = [
        (bad[:20], body(num_frames=13, input_reference=bad)),
        (bad[:20], body(num_frames=13, video_reference={"video_url": {"url": bad}})),
        (bad[:20], body(seg={"control": bad})),
        ("'broken.json'", body(num_frames=None, **path)),
        ("'my.mp4'", form(num_frames=13) | {"files": clips}),
    ]
    for name, upload in uploads.items():
        fields = {"control_type": "depth"} if name == "control_reference" else {}
        requests.append(("'my.mp4'", form(num_frames=13, **fields) | {"files": {name: upload}}))
    for name, request in requests:
        answer = httpx.post(url, **request, timeout=HANG)
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400, message
        assert name in message
        assert "cosmos3-input" not in message
        assert str(media_folder) not in message
    send = form(num_inference_steps=1) | {"files": {"input_reference": ("my.png", png(picture(64, 64)))}}  # fmt: skip
    job = httpx.post(url, **send, timeout=HANG).json()
    assert job["cosmos3"]["effective"]["image"] == "my.png"
    assert "cosmos3-input" not in json.dumps(job)


def test_row_65_a_picture_and_a_clip(generator_server: Server, tmp_path: Path) -> None:
    files = [
        ("image_reference", ("a.png", png(picture(64, 64)))),
        ("video_reference", ("b.mp4", clip(tmp_path / "clip.mp4", frames=9).read_bytes())),
    ]
    answer = httpx.post(f"{generator_server.url}{VIDEOS}", **form(), files=files, timeout=HANG)
    assert answer.status_code == 400
    check(answer, "conflict", "video_reference")


def test_row_78_size_auto(generator_server: Server) -> None:
    send = {"prompt": "a boat", "size": "auto", "num_inference_steps": 1, "seed": 1}
    answer = httpx.post(f"{generator_server.url}{IMAGES}", json=send, timeout=HANG)
    assert answer.json()["size"] == "960x960"


def test_rows_90_93_94_97_a_running_job(generator_server: Server) -> None:
    long = create(generator_server, **LONG)
    url = f"{generator_server.url}{VIDEOS}/{long['id']}"
    answer = httpx.get(f"{url}/content")
    check(answer, "not_ready", None)
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    answer = httpx.get(f"{url}/content?variant=foo")
    check(answer, "invalid_value", "variant")
    assert httpx.delete(url).status_code == 200
    assert httpx.delete(url).status_code == 404


def test_row_98_idempotency(generator_server: Server) -> None:
    url = f"{generator_server.url}{VIDEOS}"
    headers = {"Idempotency-Key": "row-98"}
    first = httpx.post(url, **body(seed=1), headers=headers).json()
    assert httpx.post(url, **body(seed=1), headers=headers).json()["id"] == first["id"]
    answer = httpx.post(url, **body(seed=2), headers=headers)
    assert answer.status_code == 409
    check(answer, "idempotency_conflict", "Idempotency-Key")


def test_afterwards_the_server_serves(generator_server: Server) -> None:
    job = finished(generator_server, create(generator_server, **SMALL))
    assert job["status"] == "completed"
    assert httpx.get(f"{generator_server.url}/health").status_code == 200


def test_form_fields_and_json_make_the_same_pixels(generator_server: Server) -> None:
    url = f"{generator_server.url}/v1/videos/sync"
    sent = [form(seed=7), body(seed=7), body(seed=8)]
    answers = [httpx.post(url, **request, timeout=HANG).content for request in sent]
    # The first frame: x264 does not always make the same ones of equal frames between others.
    firsts = [read_video(answer, frames=1) for answer in answers]
    assert (firsts[0] == firsts[1]).all()
    assert np.abs(firsts[0].astype(float) - firsts[2]).mean() > 2


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_pictures_at_urls(form: str, generator_server: Server) -> None:
    """They stay, and are deleted, as videos are."""
    send = image(n=2, response_format="url", output_format=form)["send"]
    answer = httpx.post(f"{generator_server.url}{IMAGES}", **send, timeout=HANG).json()
    urls = [each["url"] for each in answer["data"]]
    assert len(set(urls)) == 2
    for url in urls:
        got = httpx.get(url)
        assert (got.status_code, got.headers["content-type"]) == (200, f"image/{form}")
        assert np.asarray(Image.open(io.BytesIO(got.content))).shape == (64, 64, 3)
        assert httpx.head(url).status_code == 200
    folder, _, _ = urls[0].rpartition("/")
    for name in ("9.png", "record.json", "..%2Frecord.json", "0.gif"):
        assert httpx.get(f"{folder}/{name}").status_code in (404, 410)
    job = folder.rpartition("/")[2]
    assert httpx.delete(f"{generator_server.url}{VIDEOS}/{job}").status_code == 200
    assert httpx.get(urls[0]).status_code == 404


def test_compressed_pictures(generator_server: Server) -> None:
    sizes = []
    for quality in (10, 95):
        send = image(output_format="jpeg", output_compression=quality, response_format="file")
        answer = httpx.post(f"{generator_server.url}{IMAGES}", **send["send"], timeout=HANG)
        assert np.asarray(Image.open(io.BytesIO(answer.content))).shape == (64, 64, 3)
        sizes.append(len(answer.content))
    assert sizes[0] < sizes[1]


def test_the_openapi_page_knows_every_field(generator_server: Server) -> None:
    page = httpx.get(f"{generator_server.url}/openapi.json").json()
    create_video = page["paths"][VIDEOS]["post"]
    content = create_video["requestBody"]["content"]
    fields = content["application/json"]["schema"]["properties"]
    assert fields["fps"]["minimum"] == 1
    assert "frames per second" in fields["fps"]["description"]
    assert [*fields][:4] == ["prompt", "input_reference", "size", "seconds"]
    assert next(iter(content)) == "application/json"
    assert fields.keys().isdisjoint(ALIASES.keys() | IGNORED | UNSUPPORTED.keys())
    assert all(field["description"] for field in fields.values())
    file = content["multipart/form-data"]["schema"]["properties"]["input_reference"]
    assert (file["type"], file["format"]) == ("string", "binary")
    for kind in content.values():
        Draft202012Validator(kind["schema"]).validate(kind["example"])
    assert {each["name"] for each in create_video["parameters"]} == {"Idempotency-Key", "Prefer"}
    for path, methods in page["paths"].items():
        for method in methods.values():
            assert method.get("description"), path
    (limit,) = (p for p in page["paths"][VIDEOS]["get"]["parameters"] if p["name"] == "limit")
    assert "1 to 100" in limit["description"]


def test_the_openapi_page_knows_every_answer(generator_server: Server) -> None:
    page = httpx.get(f"{generator_server.url}/openapi.json").json()

    def resolved(schema: dict[str, Any]) -> dict[str, Any]:
        """What a schema refers to, which may be null instead."""
        schema = schema.get("anyOf", [schema])[0]
        if "$ref" in schema:
            schema = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema

    def answer(path: str, method: str, status: str) -> dict[str, Any]:
        content = page["paths"][path][method]["responses"][status]["content"]
        schema: dict[str, Any] = resolved(content["application/json"]["schema"])["properties"]
        return schema

    job = finished(generator_server, create(generator_server, **SMALL))
    known = answer(f"{VIDEOS}/{{video_id}}", "get", "200")
    assert known.keys() == job.keys()
    assert resolved(known["cosmos3"])["properties"].keys() == job["cosmos3"].keys()
    assert resolved(known["usage"])["properties"].keys() == job["usage"].keys()
    assert job["status"] in known["status"]["enum"]
    listed = httpx.get(f"{generator_server.url}{VIDEOS}?limit=1").json()
    assert answer(VIDEOS, "get", "200").keys() == listed.keys()
    picture = httpx.post(f"{generator_server.url}{IMAGES}", **image()["send"], timeout=HANG).json()
    assert answer(IMAGES, "post", "200").keys() == picture.keys()
    error = httpx.get(f"{generator_server.url}{VIDEOS}/nope").json()["error"]
    described = answer(f"{VIDEOS}/{{video_id}}", "get", "default")
    described = resolved(described["error"])["properties"]
    assert described.keys() == error.keys()
    assert error["code"] in described["code"]["description"]
