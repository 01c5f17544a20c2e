"""The nodes: a video, an image, and an answer about pictures."""

from __future__ import annotations

import base64
import json
from typing import Any

import torch

from .client import call, decoded_picture, decoded_video, made_video, model_of, png_url

SERVER = ("STRING", {"default": "http://127.0.0.1:8000"})
PROMPT = ("STRING", {"multiline": True, "default": ""})
SEED = ("INT", {"default": 0, "min": 0, "max": 2**32 - 1, "control_after_generate": True})
MORE = ("STRING", {"default": "{}", "tooltip": "more fields of the request, as JSON"})


def _side(default: int) -> tuple[str, dict[str, Any]]:
    return ("INT", {"default": default, "min": 64, "max": 2048, "step": 16})


class Cosmos3Video:
    """A video from text, or from a picture and text, with or without sound."""

    CATEGORY = "Cosmos 3"
    FUNCTION = "make"
    RETURN_TYPES = ("IMAGE", "AUDIO", "FLOAT")
    RETURN_NAMES = ("frames", "sound", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "server": SERVER,
                "prompt": PROMPT,
                "width": _side(832),
                "height": _side(480),
                "num_frames": ("INT", {"default": 93, "min": 5, "max": 401, "step": 4}),
                "fps": ("FLOAT", {"default": 24.0, "min": 1.0, "max": 60.0}),
                "steps": ("INT", {"default": 35, "min": 1, "max": 200}),
                "guidance": ("FLOAT", {"default": 6.0, "min": 0.0, "max": 20.0}),
                "seed": SEED,
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "first frame of the video"}),
                "negative_prompt": PROMPT,
                "sound": ("BOOLEAN", {"default": False}),
                "more": MORE,
            },
        }

    def make(
        self,
        server: str,
        prompt: str,
        width: int,
        height: int,
        num_frames: int,
        fps: float,
        steps: int,
        guidance: float,
        seed: int,
        image: torch.Tensor | None = None,
        negative_prompt: str = "",
        sound: bool = False,
        more: str = "{}",
    ) -> tuple[torch.Tensor, dict[str, Any], float]:
        fields = {
            "prompt": prompt,
            "size": f"{width}x{height}",
            "num_frames": num_frames,
            "fps": fps,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "seed": seed,
            "generate_sound": sound,
            **({"negative_prompt": negative_prompt} if negative_prompt else {}),
            **({} if image is None else {"input_reference": png_url(image[0])}),
            **json.loads(more or "{}"),
        }
        return decoded_video(made_video(server, fields, *_of_comfyui()))


class Cosmos3Image:
    """An image from text."""

    CATEGORY = "Cosmos 3"
    FUNCTION = "make"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sides = {"width": _side(1280), "height": _side(720)}
        steps = ("INT", {"default": 35, "min": 1, "max": 200})
        return {
            "required": {
                "server": SERVER, "prompt": PROMPT, **sides, "steps": steps, "seed": SEED,
            },
            "optional": {"more": MORE},
        }  # fmt: skip

    def make(
        self, server: str, prompt: str, width: int, height: int, steps: int, seed: int, more: str = "{}"
    ) -> tuple[torch.Tensor]:  # fmt: skip
        fields = {
            "prompt": prompt,
            "size": f"{width}x{height}",
            "num_inference_steps": steps,
            "seed": seed,
            "response_format": "b64_json",
            **json.loads(more or "{}"),
        }
        answer = json.loads(call(server, "/v1/images/generations", fields))
        pictures = [decoded_picture(base64.b64decode(item["b64_json"])) for item in answer["data"]]
        return (torch.cat(pictures),)


class Cosmos3Ask:
    """An answer of the reasoner about one picture or several."""

    CATEGORY = "Cosmos 3"
    FUNCTION = "ask"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "server": SERVER,
                "question": PROMPT,
                "max_tokens": ("INT", {"default": 512, "min": 1, "max": 20_000}),
            },
            "optional": {"image": ("IMAGE",)},
        }

    def ask(
        self, server: str, question: str, max_tokens: int, image: torch.Tensor | None = None
    ) -> tuple[str]:
        pictures = [] if image is None else [png_url(one) for one in image]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
        content = [*parts, {"type": "text", "text": question}]
        body = {
            "model": model_of(server),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
        }
        answer = json.loads(call(server, "/v1/chat/completions", body))
        return (answer["choices"][0]["message"]["content"] or "",)


def _of_comfyui() -> tuple[Any, Any]:
    """ComfyUI's progress bar, and whether its user has pressed cancel; neither outside of it."""
    try:
        from comfy.model_management import processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return (lambda percent: None), (lambda: False)
    bar = ProgressBar(100)
    return bar.update_absolute, processing_interrupted


NODE_CLASS_MAPPINGS = {
    "Cosmos3Video": Cosmos3Video,
    "Cosmos3Image": Cosmos3Image,
    "Cosmos3Ask": Cosmos3Ask,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Cosmos3Video": "Cosmos 3 Video",
    "Cosmos3Image": "Cosmos 3 Image",
    "Cosmos3Ask": "Cosmos 3 Ask",
}
