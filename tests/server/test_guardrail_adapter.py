"""The adapter for ``cosmos-guardrail``: it lets nothing pass that was not judged.

The package and its models are not among the dependencies of the tests; a module of the same name
and shape (that of 0.3.2) stands for them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.request.prompts import Tokenizer, load_tokenizer
from vllm_cosmos3.server.frame_check import CHECKER, Blocked, frame_check
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.options import Options

PACKAGE = '''
from types import SimpleNamespace

class Blocklist:
    def is_safe(self, prompt):
        return "gun" not in prompt, "as the list has it"

class Qwen3Guard:
    """Takes its own errors for safety, like the original."""

    def extract_label_and_categories(self, prompt):
        if "odd" in prompt:
            raise AttributeError("'NoneType' object has no attribute 'lower'")
        return "riot" not in prompt, "Unsafe"

    def is_safe(self, prompt):
        try:
            return self.extract_label_and_categories(prompt)
        except Exception:
            return True, "Unexpected error occurred"

class Faces:
    def to(self, device):
        return self

class CosmosSafetyChecker:
    judges = MODELS

    def __init__(self):
        faces, judges = Faces(), self.judges
        self.text_guardrail = SimpleNamespace(safety_models=[Blocklist(), Qwen3Guard()])
        def pixelate(frames):
            frames[:, :8] = 0
            return frames
        self.video_guardrail = SimpleNamespace(
            safety_models=judges, postprocessors=[faces], models=[faces], postprocess=pixelate,
            run_safety_check=lambda frames: (frames.max() < 255, ""),
        )
'''
Install = Callable[..., None]
Judged = Callable[..., dict[str, Any]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package of that name where it is found."""

    def put(text: str) -> None:
        (tmp_path / "cosmos_guardrail.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "cosmos_guardrail", raising=False)
        monkeypatch.setattr("vllm_cosmos3.server.frame_check._loaded", {})
        monkeypatch.setenv(CHECKER, "")

    return put


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def judged(tokenizer: Tokenizer) -> Judged:
    """What guardrails say of a request's fields, or of a prompt."""

    def judge(
        guardrails: Guardrails, asked: str | dict[str, Any], *, requested: bool | None = None
    ) -> dict[str, Any]:
        fields = {"prompt": asked} if isinstance(asked, str) else asked
        return guardrails.check(fields, tokenizer, requested=requested)

    return judge


def test_prompts_are_judged_by_every_model(install: Install, judged: Judged) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    guardrails = Guardrails(Options())
    assert guardrails.state == "active"
    assert judged(guardrails, "a boat") == {
        "requested": None, "effective": "active", "text": "pass"
    }  # fmt: skip
    for prompt, name in (("a gun", "Blocklist"), ("a riot", "Qwen3Guard")):
        with pytest.raises(ApiError, match=name) as caught:
            judged(guardrails, prompt)
        assert caught.value.code == "guardrail_blocked"


def test_a_model_that_fails_lets_nothing_through(install: Install, judged: Judged) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    with pytest.raises(ApiError) as caught:
        judged(Guardrails(Options()), "an odd boat")
    assert caught.value.code == "guardrail_error"


def ids(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Texts in their chat frame with a token of the frame between them."""
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False).join(parts)}],
        tokenize=True, add_generation_prompt=True, return_dict=True,
    )  # fmt: skip
    return list(frame["input_ids"])


def test_every_text_that_the_model_follows_is_judged(
    install: Install, judged: Judged, tokenizer: Tokenizer
) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    guardrails = Guardrails(Options())
    gun = r"\u0067un"  # as JSON may write it
    for name, value in {
        "prompt": f'{{"subjects": ["a {gun}"]}}',
        "view_description": "there is a gun",
        "prompt_token_ids": ids(tokenizer, "a gun"),
        "negative_prompt": "a gun",
        "negative_prompt_token_ids": ids(tokenizer, "a gun"),
    }.items():
        fields = {"prompt": "a boat", "guidance_scale": 0.5, name: value}
        with pytest.raises(ApiError, match=f"the {name} was blocked") as caught:
            judged(guardrails, fields)
        assert (caught.value.code, caught.value.param) == ("guardrail_blocked", name)
    with pytest.raises(ApiError, match="prompt_token_ids was blocked"):
        judged(guardrails, {"prompt_token_ids": ids(tokenizer, "a g", "un")})
    avoided = {"prompt_token_ids": ids(tokenizer, "a boat"), "negative_prompt": "a gun"}
    assert judged(guardrails, avoided)["text"] == "pass"


def test_tokens_without_a_text_are_refused(
    install: Install, judged: Judged, tokenizer: Tokenizer
) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    with pytest.raises(InvalidRequest, match="prompt_token_ids is 901, must be ids") as caught:
        judged(Guardrails(Options()), {"prompt_token_ids": [5, len(tokenizer)]})
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("shape", [(16, 16, 3), (5, 16, 16, 3)])
def test_the_record_claims_no_judgement_of_frames(install: Install, shape: tuple[int, ...]) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    Guardrails(Options())
    frames = np.full(shape, 255, np.uint8)
    check = frame_check()
    assert check is not None
    checked, record = check(frames)
    assert record == {"video": "faces pixelated, content not judged"}
    assert checked.shape == shape
    assert frames.min() == 255  # the caller's are left alone
    assert checked.min() == 0


def test_frames_that_are_judged_can_be_refused(install: Install) -> None:
    install(PACKAGE.replace("MODELS", "['filter']"))
    Guardrails(Options())
    check = frame_check()
    assert check is not None
    assert check(np.zeros((5, 16, 16, 3), np.uint8))[1] == {"video": "pass"}
    with pytest.raises(Blocked):
        check(np.full((5, 16, 16, 3), 255, np.uint8))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise ImportError('retinaface is missing\\nand more')", "ImportError: retinaface is missing"),
        ("class CosmosSafetyChecker:\n    def __init__(self): raise OSError('no models here')", "OSError: no models here"),
        (PACKAGE.replace("MODELS", "[]").replace("postprocessors=[faces]", "postprocessors=[]"), "checks no text or no faces"),
    ],
)  # fmt: skip
def test_without_models_it_is_unavailable_and_says_why(
    text: str, cause: str, install: Install, judged: Judged
) -> None:
    install(text)
    guardrails = Guardrails(Options())
    assert guardrails.state == "unavailable"
    assert cause in guardrails.reason
    assert judged(guardrails, "a gun") == {"requested": None, "effective": "unavailable"}
    with pytest.raises(ApiError, match=r"guardrails are unavailable on this server: .*:Cosmos"):
        judged(guardrails, "a boat", requested=True)
    with pytest.raises(Cosmos3Error, match="--guardrails required, but") as caught:
        Guardrails(Options(guardrails="required"))
    assert "\n" not in str(caught.value)
    assert frame_check() is None


def test_off_is_off_even_where_they_are_installed(install: Install, judged: Judged) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    guardrails = Guardrails(Options(guardrails="off"))
    assert (guardrails.state, guardrails.reason) == (
        "disabled",
        "the operator chose --guardrails off",
    )
    assert judged(guardrails, "a gun") == {"requested": None, "effective": "disabled"}
    assert judged(guardrails, "a gun", requested=False)["effective"] == "disabled"
    with pytest.raises(ApiError, match="guardrails are disabled on this server: the operator"):
        judged(guardrails, "a boat", requested=True)
    assert frame_check() is None
