"""The writer: the published layout, the same bytes for the same seed, and no folder lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer

from vllm_cosmos3.checkpoint.config import read_config, read_vision_config
from vllm_cosmos3.checkpoint.synthetic.tokenizer import PLAIN, SPECIAL
from vllm_cosmos3.checkpoint.tensors import (
    Tensors,
    sound_tensors,
    transformer_tensors,
    vae_tensors,
    vision_tensors,
)
from vllm_cosmos3.cli import main

LAYOUT = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "model_index.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "scheduler/scheduler_config.json",
    "sound_tokenizer/config.json",
    "sound_tokenizer/diffusion_pytorch_model.safetensors",
    "text_tokenizer/added_tokens.json",
    "text_tokenizer/chat_template.jinja",
    "text_tokenizer/merges.txt",
    "text_tokenizer/special_tokens_map.json",
    "text_tokenizer/tokenizer.json",
    "text_tokenizer/tokenizer_config.json",
    "text_tokenizer/vocab.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vision_encoder/config.json",
    "vision_encoder/model.safetensors",
]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_layout(tiny_checkpoint: Path) -> None:
    assert sorted(digests(tiny_checkpoint)) == sorted(LAYOUT)
    assert sum(path.stat().st_size for path in tiny_checkpoint.rglob("*")) < 8_000_000


def test_shards_hold_the_inventory(tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    assert config.sound is not None
    expected: dict[str, tuple[Tensors, torch.dtype]] = {
        "transformer": (transformer_tensors(config.transformer), torch.bfloat16),
        "vision_encoder": (vision_tensors(read_vision_config(tiny_checkpoint)), torch.bfloat16),
        "vae": (vae_tensors(config.vae), torch.bfloat16),
        "sound_tokenizer": (sound_tensors(config.sound), torch.float32),
    }
    for folder, (shapes, dtype) in expected.items():
        found = tensors(tiny_checkpoint / folder)
        assert {name: tuple(value.shape) for name, value in found.items()} == shapes
        assert {value.dtype for value in found.values()} == {dtype}
        assert all(value.isfinite().all() for value in found.values())


def test_indices_point_at_the_shards(tiny_checkpoint: Path) -> None:
    root = json.loads((tiny_checkpoint / "model.safetensors.index.json").read_text())
    inner = tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    generator = json.loads(inner.read_text())["weight_map"]
    assert {f"transformer/{file}" for file in generator.values()} == {
        file for file in root["weight_map"].values() if file.startswith("transformer/")
    }
    assert root["weight_map"]["blocks.0.attn.qkv.weight"] == "vision_encoder/model.safetensors"
    size = 0
    for name, file in root["weight_map"].items():
        with safe_open(tiny_checkpoint / file, framework="pt") as shard:
            size += shard.get_tensor(name).nbytes
    assert root["metadata"]["total_size"] == size


def test_float32_has_the_same_numbers(tiny_checkpoint: Path, tiny_checkpoint_fp32: Path) -> None:
    for folder in ("transformer", "vision_encoder", "vae"):
        narrow, wide = tensors(tiny_checkpoint / folder), tensors(tiny_checkpoint_fp32 / folder)
        assert all(value.dtype == torch.float32 for value in wide.values())
        assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in narrow)


def test_a_seed_determines_every_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert main(["make-checkpoint", str(tmp_path / "same")]) == 0
    assert digests(tmp_path / "same") == digests(tiny_checkpoint)
    assert main(["make-checkpoint", str(tmp_path / "other"), "--seed", "1"]) == 0
    changed = digests(tmp_path / "other").items() - digests(tiny_checkpoint).items()
    assert {Path(name).suffix for name, _ in changed} == {".safetensors"}


def test_tokenizer_round_trip(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "text_tokenizer")
    for text in ("A robot arm picks up the red cube.", 'Zürich {"fps": 24.0}\n\t日本 🤖'):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config["text_config"]["vocab_size"] >= len(tokenizer)
    for token in (*SPECIAL, *PLAIN):
        ids = tokenizer(token).input_ids
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == (
            "" if token in SPECIAL else token
        )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_chat_template(tiny_checkpoint: Path) -> None:
    media = "<|vision_start|><|{}_pad|><|vision_end|>"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "video", "video": "b.mp4"},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": "That."},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{media.format('image')}{media.format('video')}What?<|im_end|>\n"
        "<|im_start|>assistant\nThat.<|im_end|>\n"
    )
    for reader in (AutoTokenizer, AutoProcessor):
        template = reader.from_pretrained(tiny_checkpoint).apply_chat_template
        assert template(messages, tokenize=False) == expected
        assert template(messages, tokenize=False, add_generation_prompt=True) == (
            f"{expected}<|im_start|>assistant\n"
        )
        numbered = template(messages, tokenize=False, add_vision_id=True)
        assert "Picture 1: <|vision_start|>" in numbered
        assert "Video 1: <|vision_start|>" in numbered


@pytest.mark.parametrize(
    ("size", "layers", "heads"), [("nano", 36, (32, 8)), ("super", 64, (64, 8))]
)
def test_real_sizes_without_weights(
    tmp_path: Path, size: str, layers: int, heads: tuple[int, int]
) -> None:
    folder = tmp_path / size
    assert main(["make-checkpoint", str(folder), "--size", size, "--no-weights"]) == 0
    assert not list(folder.rglob("*.safetensors*"))
    config = read_config(folder).transformer
    assert (config.num_hidden_layers, config.vocab_size) == (layers, 151936)
    assert (config.num_attention_heads, config.num_key_value_heads) == heads


def test_real_sizes_have_no_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make-checkpoint", str(tmp_path / "nano"), "--size", "nano"]) == 2
    assert "--no-weights" in capsys.readouterr().err
    assert not (tmp_path / "nano").exists()


def test_edge_has_the_published_layout(tiny_edge_fp32: Path) -> None:
    files = digests(tiny_edge_fp32)
    assert "processor_config.json" in files
    assert not [name for name in files if "sound" in name or name == "vision_encoder/config.json"]
    generator = tensors(tiny_edge_fp32 / "transformer")
    found = {name: tuple(value.shape) for name, value in generator.items()}
    assert found == transformer_tensors(read_config(tiny_edge_fp32).transformer)
    root = json.loads((tiny_edge_fp32 / "model.safetensors.index.json").read_text())["weight_map"]
    assert "layers.0.self_attn.k_norm_und_for_gen.weight" in root
    assert not [name for name in root if "moe_gen" in name or "add_q_proj" in name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_edge_fp32)
    marks = ("<unk>", "<s>", "<|im_end|>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")  # fmt: skip
    assert tokenizer.convert_tokens_to_ids(list(marks)) == [0, 1, 11, 18, 19, 20, 21]
    asked = [{"role": "user", "content": "Why?"}]
    for thinking, opening in ((True, "<think>\n"), (False, "<think></think>")):
        text = tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert text == f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{opening}"


@pytest.mark.parametrize(("size", "kind"), [("nano", "edge"), ("edge", "base")])
def test_a_size_of_another_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, kind: str
) -> None:
    command = ["make-checkpoint", str(tmp_path / "no"), "--size", size, "--kind", kind]
    assert main([*command, "--no-weights"]) == 2
    assert f"for the size {size}" in capsys.readouterr().err


def test_the_size_edge_is_of_the_kind_edge(tmp_path: Path) -> None:
    command = ["make-checkpoint", str(tmp_path / "edge"), "--size", "edge", "--no-weights"]
    assert main(command) == 0
    assert read_config(tmp_path / "edge").kind == "edge"


@pytest.mark.parametrize(("kind", "fps"), [("distilled-t2i", 24), ("distilled-i2v", 16)])
def test_distilled_checkpoints(tmp_path: Path, kind: str, fps: int) -> None:
    folder = tmp_path / kind
    assert main(["make-checkpoint", str(folder), "--kind", kind]) == 0
    config = read_config(folder)
    assert config.scheduler.t_list == (1.0, 0.9375, 0.8333333333333334, 0.625)
    assert (config.transformer.base_fps, config.sound) == (fps, None)
    assert not (folder / "sound_tokenizer").exists()
    names = tensors(folder / "transformer").keys()
    assert names == transformer_tensors(config.transformer).keys()
    assert not [name for name in names if name.startswith(("action", "audio"))]


def test_only_checkpoints_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("keep me")
    command = ["make-checkpoint", str(tmp_path), "--no-weights"]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert notes.read_text() == "keep me"
    assert main([*command, "--force"]) == 0
    assert not notes.exists()
    assert main(command) == 0


def test_a_file_is_not_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["make-checkpoint", str(tmp_path / "file"), "--force"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["make-checkpoint", str(tmp_path / "file" / "inside")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("inside cannot be made: Not a directory")
