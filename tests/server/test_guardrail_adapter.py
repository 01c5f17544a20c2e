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

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.server.errors import ApiError
from vllm_cosmos3.server.guardrails import CHECKER, Blocked, Guardrails, frame_check
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


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package of that name where it is found."""

    def put(text: str) -> None:
        (tmp_path / "cosmos_guardrail.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "cosmos_guardrail", raising=False)
        monkeypatch.setattr("vllm_cosmos3.server.guardrails._loaded", {})
        monkeypatch.setenv(CHECKER, "")

    return put


def judged(guardrails: Guardrails, prompt: str) -> dict[str, Any]:
    return guardrails.check(prompt, requested=None)


def test_prompts_are_judged_by_every_model(install: Install) -> None:
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


def test_a_model_that_fails_lets_nothing_through(install: Install) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    with pytest.raises(ApiError) as caught:
        judged(Guardrails(Options()), "an odd boat")
    assert caught.value.code == "guardrail_error"


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
    text: str, cause: str, install: Install
) -> None:
    install(text)
    guardrails = Guardrails(Options())
    assert guardrails.state == "unavailable"
    assert cause in guardrails.reason
    assert judged(guardrails, "a gun") == {"requested": None, "effective": "unavailable"}
    with pytest.raises(ApiError, match=r"guardrails are unavailable on this server: .*:Cosmos"):
        guardrails.check("a boat", requested=True)
    with pytest.raises(Cosmos3Error, match="--guardrails required, but") as caught:
        Guardrails(Options(guardrails="required"))
    assert "\n" not in str(caught.value)
    assert frame_check() is None


def test_off_is_off_even_where_they_are_installed(install: Install) -> None:
    install(PACKAGE.replace("MODELS", "[]"))
    guardrails = Guardrails(Options(guardrails="off"))
    assert (guardrails.state, guardrails.reason) == (
        "disabled",
        "the operator chose --guardrails off",
    )
    assert judged(guardrails, "a gun") == {"requested": None, "effective": "disabled"}
    assert guardrails.check("a gun", requested=False)["effective"] == "disabled"
    with pytest.raises(ApiError, match="guardrails are disabled on this server: the operator"):
        guardrails.check("a boat", requested=True)
    assert frame_check() is None
