"""The checkpoint as others read it: transformers, upstream vLLM and diffusers, all unchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos3AVAEAudioTokenizer,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
)
from diffusers.modular_pipelines.cosmos import Cosmos3DistilledModularPipeline
from limits import HANG
from PIL import Image
from safetensors.torch import save_file
from servers import forking
from transformers import AutoProcessor, Cosmos3OmniForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from vllm_cosmos3.checkpoint.config import read_config, read_json, read_vision_config
from vllm_cosmos3.checkpoint.derived import write_derived
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.checkpoint.tensors import (
    Tensors,
    sound_tensors,
    transformer_tensors,
    vae_tensors,
    vision_tensors,
)

pytestmark = pytest.mark.parity


def shapes(module: torch.nn.Module) -> Tensors:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("size", "kind"), [("nano", "base"), ("super", "base"), ("super", "distilled-i2v")]
)
def test_inventory_equals_the_reference_modules(tmp_path: Path, size: str, kind: str) -> None:
    write_checkpoint(tmp_path / "real", size=size, kind=kind, weights=False)
    folder = tmp_path / "real"
    config = read_config(folder)
    with torch.device("meta"):
        transformer = Cosmos3OmniTransformer.from_config(
            read_json(folder / "transformer/config.json")
        )
        vae = AutoencoderKLWan.from_config(read_json(folder / "vae/config.json"))
        vision = Qwen3VLVisionModel(
            Qwen3VLVisionConfig(**read_json(folder / "vision_encoder/config.json"))
        )
    assert transformer_tensors(config.transformer) == shapes(transformer)
    assert vae_tensors(config.vae) == shapes(vae)
    assert vision_tensors(read_vision_config(folder)) == shapes(vision)


@pytest.mark.parametrize("size", ["tiny", "nano"])
@pytest.mark.parametrize("encoder", [True, False])
def test_sound_inventory_equals_the_reference_module(
    tmp_path: Path, size: str, *, encoder: bool
) -> None:
    folder = tmp_path / "real"
    write_checkpoint(folder, size=size, weights=False)
    file = folder / "sound_tokenizer" / "config.json"
    file.write_text(json.dumps({**read_json(file), "encoder_enabled": encoder}))
    config = read_config(folder).sound
    assert config is not None
    with torch.device("meta"):
        sound = Cosmos3AVAEAudioTokenizer.from_config(read_json(file))
    assert sound_tensors(config) == shapes(sound)


def test_transformers_loads_and_sees(tiny_checkpoint: Path) -> None:
    model, report = Cosmos3OmniForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    def logits(image: Image.Image) -> torch.Tensor:
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        with torch.inference_mode():
            return model(**inputs).logits[0, -1]

    red, blue = (logits(Image.new("RGB", (64, 48), colour)) for colour in ("red", "blue"))
    assert red.isfinite().all()
    assert (red - blue).abs().max() > 0.05


VLLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, max_num_seqs=2)
    image = {"type": "image_pil", "image_pil": Image.new("RGB", (64, 48), "red")}
    content = [image, {"type": "text", "text": "What is this?"}]
    chats = [[{"role": "user", "content": c}] for c in ("What is this?", content)]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = [llm.chat(chat, sampling, use_tqdm=False)[0] for chat in chats]
    report = {
        "class": llm.llm_engine.model_config.architecture,
        "texts": [answer.outputs[0].text for answer in answers],
        "prompts": [len(answer.prompt_token_ids) for answer in answers],
    }
    print("REPORT", json.dumps(report))
"""


def test_upstream_vllm_loads_and_answers(
    tiny_checkpoint: Path, tmp_path: Path, vllm_cache: Path
) -> None:
    (tmp_path / "answer.py").write_text(VLLM)
    environment = forking(vllm_cache)
    environment["VLLM_PLUGINS"] = "forking_platform"  # upstream's own class, whatever is installed
    done = subprocess.run(
        [sys.executable, str(tmp_path / "answer.py"), str(tiny_checkpoint)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))
    report = json.loads(line.removeprefix("REPORT "))
    assert report["class"] == "Cosmos3ForConditionalGeneration"
    assert all(len(text.split()) > 3 for text in report["texts"])
    # 64x48 pixels become 2x2 to 3x2 merged patches, between a start and an end mark.
    assert report["prompts"][1] > report["prompts"][0] + 2


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint_fp32: Path) -> Cosmos3OmniPipeline:
    pipe = Cosmos3OmniPipeline.from_pretrained(tiny_checkpoint_fp32, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Cosmos3OmniPipeline, **changed: Any) -> Any:
    request = {
        "prompt": "A robot arm picks up the red cube.",
        "num_frames": 9,
        "height": 96,
        "width": 160,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "enable_sound": True,
        "output_type": "np",
    }
    return pipe(**(request | changed))


def test_diffusers_generates(pipeline: Cosmos3OmniPipeline) -> None:
    output = generate(pipeline)
    frames = np.asarray(output.video).reshape(9, 96, 160, 3)
    assert 0.05 < frames.std() < 0.3
    assert ((frames <= 0) | (frames >= 1)).mean() < 0.01
    assert np.abs(np.diff(frames, axis=0)).mean() > 0.01
    sound = output.sound
    assert sound.shape == (2, 19200)
    assert 0.02 < sound.std() < 0.5
    assert (sound.abs() >= 1).float().mean() < 0.01


def test_a_full_run_is_finite_and_well_conditioned(pipeline: Cosmos3OmniPipeline) -> None:
    """Rounding must not grow into differences that a comparison of two programs would see."""
    noise = torch.randn(1, 48, 3, 6, 10, generator=torch.Generator().manual_seed(1))

    def final(latents: torch.Tensor, prompt: str = "Waves break on a rocky shore.") -> torch.Tensor:
        output = generate(
            pipeline,
            prompt=prompt,
            latents=latents,
            num_inference_steps=35,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
        return output.video

    first = final(noise)
    assert first.isfinite().all()
    assert 0.5 < first.std() < 3
    nudge = 1e-4 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    assert (final(noise + nudge) - first).abs().max() < 100 * 1e-4
    assert (final(noise, prompt="A car drives at night.") - first).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["distilled-i2v", "policy-droid"])
def test_diffusers_loads_a_derived_checkpoint(
    kind: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Its own pipelines, of the kind's class, with the changed tensor and no tensor too few or too many."""
    changed = {"proj_in.bias": torch.arange(64, dtype=torch.bfloat16)}
    save_file(changed, tmp_path / "changed.safetensors")
    write_derived(tmp_path / "made", tiny_checkpoint, tmp_path / "changed.safetensors", kind)
    if kind == "policy-droid":
        transformer = Cosmos3OmniPipeline.from_pretrained(tmp_path / "made").transformer
    else:
        pipe = Cosmos3DistilledModularPipeline.from_pretrained(tmp_path / "made")
        pipe.load_components()
        transformer = pipe.transformer
    assert torch.equal(transformer.state_dict()["proj_in.bias"], changed["proj_in.bias"].float())
    tensors = transformer_tensors(read_config(tmp_path / "made").transformer)
    assert shapes(transformer) == tensors
    assert not any(value.is_meta for value in transformer.state_dict().values())
