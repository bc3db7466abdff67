"""Generate text about images with a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from requant.mlx_lm.generation import Generation, collect_text
from requant.mlx_vlm.image_prompts import chat_prompt
from requant.mlx_vlm.loading import Loaded


def generate(
    loaded: Loaded,
    prompt: str,
    images: Sequence[Path],
    *,
    max_tokens: int = 100,
    raw: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt about images with the most likely token at each step.

    Args:
        loaded: The model.
        prompt: The prompt, put into the processor's chat template with a place for each image.
        images: Image files.
        max_tokens: Most tokens to generate.
        raw: Do not use the chat template; the prompt holds the places for the images.
        on_text: Called with each piece of text when it is generated.

    Raises:
        BackendError: MLX cannot run the model on this machine, or the processor rejects the
            prompt or an image.
    """
    mlx_vlm: Any = import_module("mlx_vlm")  # its types are not complete
    text = prompt
    if not raw:
        text = chat_prompt(loaded.processor, loaded.config, prompt, len(images))
    responses = mlx_vlm.stream_generate(
        loaded.model,
        loaded.processor,
        text,
        image=[str(image) for image in images],
        max_tokens=max_tokens,
        temperature=0.0,
    )
    return collect_text(responses, loaded, on_text)
