"""Generate text about images with a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from requant.errors import BackendError, UsageError
from requant.mlx_lm.generation import Generation, collect_text
from requant.mlx_vlm.loading import Loaded
from requant.text import one_line


def check_images(images: Sequence[Path]) -> None:
    """Check that images can be read, before a model is converted for them.

    Raises:
        UsageError: One is not a file, or not an image that Pillow reads.
    """
    from PIL import Image

    for image in images:
        try:
            with Image.open(image) as opened:
                opened.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise UsageError(f"{image} cannot be read as an image: {one_line(error)}") from error


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
        try:
            text = mlx_vlm.apply_chat_template(
                loaded.processor, loaded.config, prompt, num_images=len(images)
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise BackendError(f"the chat template fails: {one_line(error)}") from error
    responses = mlx_vlm.stream_generate(
        loaded.model,
        loaded.processor,
        text,
        image=[str(image) for image in images],
        max_tokens=max_tokens,
        temperature=0.0,
    )
    return collect_text(responses, loaded, on_text)
