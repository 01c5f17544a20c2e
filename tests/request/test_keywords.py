"""Keyword arguments of `generate`: editors, `help` and the fields agree, and other libraries' names."""

from __future__ import annotations

import inspect
from typing import Any, Unpack, get_args, get_type_hints

import pytest

import keywords
from vllm_cosmos3 import Cosmos3, GenerateRequest
from vllm_cosmos3.engine_options import OPTIONS
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.foreign_names import OTHERS, SAME, own_names
from vllm_cosmos3.request.keywords import Keywords
from vllm_cosmos3.request.request import SPECS


def test_the_module_is_what_the_tool_makes() -> None:
    assert keywords.PLACE.read_text() == keywords.keywords(), "run python tools/keywords.py"


def test_editors_are_told_every_field() -> None:
    assert list(Keywords.__annotations__) == list(SPECS)
    names = vars(inspect.getmodule(Cosmos3))
    hints = get_type_hints(Cosmos3.agenerate, names, {"Unpack": Unpack}, include_extras=True)
    assert get_args(hints["fields"]) == (Keywords,)


@pytest.mark.parametrize("shown", [Cosmos3.generate, Cosmos3.agenerate, GenerateRequest])
def test_help_has_a_sentence_for_every_field(shown: Any) -> None:
    text = inspect.getdoc(shown) or ""
    for name, spec in SPECS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"    {name}: ")]
        assert spec.help[1:] in line


def test_help_of_the_class_has_a_sentence_for_every_option() -> None:
    text = inspect.getdoc(Cosmos3.__init__) or ""
    for name, option in OPTIONS.items():
        assert f"    {name}: {option.spec.help[0].upper()}{option.spec.help[1:]}" in text


def test_names_of_the_same_meaning() -> None:
    assert set(SAME.values()) <= SPECS.keys()
    assert not SAME.keys() & SPECS.keys()
    assert own_names({"num_steps": 3, "prompt": "a"}) == {"num_inference_steps": 3, "prompt": "a"}
    with pytest.raises(InvalidRequest, match="num_inference_steps is given"):
        own_names({"num_inference_steps": 3, "num_steps": 3})


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_another_meaning_say_what_to_write(name: str) -> None:
    assert name not in SPECS
    with pytest.raises(InvalidRequest, match=f"^{name} is ") as caught:
        own_names({name: "x"})
    assert OTHERS[name] in str(caught.value)


@pytest.mark.parametrize("form", ["np", "pil", "pt"])
def test_output_types_of_diffusers_are_methods(form: str) -> None:
    with pytest.raises(InvalidRequest, match=r"output_type is .* output\."):
        own_names({"output_type": form})
    assert own_names({"output_type": "latent"}) == {"output_type": "latent"}
