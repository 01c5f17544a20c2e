"""Guardrails in three honest states: active, disabled by the operator, or unavailable.

A checker is a class that this server did not write; the adapter for the ``cosmos-guardrail``
package is one. What a checker cannot decide counts as refused. Checked is every text that the model
follows, `texts` has them. Not checked: a negative prompt that the model moves away from, reference
media, sound.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.media import Pixels
from vllm_cosmos3.request.prompts import Tokenizer, json_object
from vllm_cosmos3.request.request import SPECS
from vllm_cosmos3.server.frame_check import CHECKER, Checker, load
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.options import Options

logger = logging.getLogger(__name__)

PACKAGE = "cosmos_guardrail"


class CosmosGuardrail:
    """The ``cosmos-guardrail`` package (0.3.2) with its models.

    Its own text check takes an error of a model for a pass, so each model is asked here, and errors
    leave. That version pixelates faces and, by its own choice, does not judge what frames show.
    """

    def __init__(self) -> None:
        module = importlib.import_module(PACKAGE)
        checker = module.CosmosSafetyChecker()
        self._text, self._video = checker.text_guardrail, checker.video_guardrail
        if not self._text.safety_models or not self._video.postprocessors:
            raise RuntimeError("this version of cosmos-guardrail checks no text or no faces")
        self._placed = False

    def check_text(self, prompt: str) -> str | None:
        for model in self._text.safety_models:
            # is_safe of a language model turns exceptions into "safe"; this is what it wraps.
            judge = getattr(model, "extract_label_and_categories", model.is_safe)
            safe, _ = judge(prompt)
            if not safe:
                return type(model).__name__
        return None

    def check_frames(self, frames: Pixels) -> tuple[Pixels | None, dict[str, Any]]:
        self._place()
        clip = (frames if frames.ndim == 4 else frames[None]).copy()  # pixelated in place
        judged = bool(self._video.safety_models)
        if judged and not self._video.run_safety_check(clip)[0]:
            return None, {}
        checked = self._video.postprocess(clip)
        facts = {"video": "pass" if judged else "faces pixelated, content not judged"}
        return (checked if frames.ndim == 4 else checked[0]), facts

    def _place(self) -> None:
        """Move what looks at frames to the device of this worker."""
        import torch

        if not self._placed and torch.accelerator.is_available():
            for model in self._video.models:
                model.to(torch.accelerator.current_accelerator())
        self._placed = True


class Guardrails:
    """The checks of this server and the state they are in."""

    def __init__(self, options: Options) -> None:
        os.environ.pop(CHECKER, None)
        self._checker: Checker | None = None
        self.reason = "the operator chose --guardrails off"
        if options.guardrails == "off":
            self.state = "disabled"
            return
        try:
            self._checker = load(options.guardrail_checker)
        except Exception as error:  # noqa: BLE001 - another package's, and told to the operator
            self.state = "unavailable"
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            self.reason = f"{options.guardrail_checker} cannot be used ({cause})"
            if isinstance(error, ModuleNotFoundError) and error.name == PACKAGE:
                self.reason = (
                    "package cosmos-guardrail is not installed (pip install 'cosmos-guardrail>=0.3.2,<0.4', "
                    "accept the terms on https://huggingface.co/nvidia/Cosmos-1.0-Guardrail, restart)"
                )
            if options.guardrails == "required":
                raise Cosmos3Error(
                    f"--guardrails required, but {self.reason}; install cosmos-guardrail with its "
                    "models, or start with --guardrails auto or off"
                ) from None
            return
        self.state, self.reason = "active", ""
        os.environ[CHECKER] = options.guardrail_checker

    def check(
        self, fields: Mapping[str, Any], tokenizer: Tokenizer, *, requested: bool | None
    ) -> dict[str, Any]:
        """Judge the texts of a request's fields; what the job records.

        Raises:
            InvalidRequest: one of them is of tokens without a text.
            ApiError: blocked, unavailable though requested, locked by the operator, or broken.
        """
        record = {"requested": requested, "effective": self.state}
        if self._checker is None:
            if requested:
                message = f"guardrails are {self.state} on this server: {self.reason}"
                raise ApiError("guardrails_unavailable", message, param="guardrails")
            return record
        if requested is False:
            message = "guardrails cannot be switched off on this server"
            raise ApiError("permission_denied", message, param="guardrails")
        for name, text in texts(fields, tokenizer):
            category = self._category(self._checker, text)
            if category is not None:
                message = f"the {name} was blocked by the guardrails ({category})"
                raise ApiError("guardrail_blocked", message, param=name)
        return {**record, "text": "pass"}

    def _category(self, checker: Checker, text: str) -> str | None:
        try:
            return checker.check_text(text)
        except Exception as error:  # noqa: BLE001 - another package's; without a verdict nothing runs
            logger.error("the text guardrail failed: %s", error)
            raise ApiError(
                "guardrail_error", "the text guardrail failed, so nothing was made"
            ) from None


def texts(fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Every text of a request that the model follows, with the field that it came in.

    A JSON caption is read as the model reads it too, without the escapes it was written with; token
    ids are decoded. With ``guidance_scale`` below 1 the model moves towards the negative prompt.

    Raises:
        InvalidRequest: a token has no text.
    """
    names = ["prompt", "view_description"]
    ids = ["prompt_token_ids"]
    scale = fields.get("guidance_scale")
    if scale is not None and scale < 1:
        names.append("negative_prompt")
        ids.append("negative_prompt_token_ids")
    found = []
    for name in names:
        text = fields.get(name) or ""
        caption = json_object(text)
        found += [(name, text)] if text else []
        if caption is not None:
            found.append((name, json.dumps(caption, ensure_ascii=False)))
    return found + [
        (name, _decoded(name, fields[name], tokenizer))
        for name in ids
        if fields.get(name) is not None
    ]


def _decoded(name: str, value: Any, tokenizer: Tokenizer) -> str:
    """The text of token ids. Tokens of the chat frame have none, and hide nothing between others."""
    ids = SPECS[name].checked(name, value)
    if max(ids) >= len(tokenizer):
        possible = f"ids below {len(tokenizer)}, as the guardrails can read no others"
        raise InvalidRequest(name, max(ids), possible, "unsupported")
    return tokenizer.decode(list(ids), skip_special_tokens=True)
