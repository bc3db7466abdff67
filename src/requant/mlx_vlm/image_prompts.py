"""Conversations about images, from files, as a processor prepares them for a model of mlx-vlm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from requant.errors import BackendError, ParseError, UsageError
from requant.mlx_lm.documents import read_image_rows
from requant.mlx_lm.evaluation import Prompt
from requant.text import format_value, one_line, os_error_text

DEFAULT_QUESTION = "Describe this image."
_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Settings that hold the ids of tokens in whose place a model puts an image.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A conversation about images.

    Attributes:
        images: Their files.
        messages: Its turns, each with ``role`` and ``content``.
        where: The place that names it: an image, or a line of a file.
    """

    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    where: str

    @staticmethod
    def of(
        images: Sequence[Path], where: str, question: str = DEFAULT_QUESTION, answer: str = ""
    ) -> ImagePrompt:
        """A question about images and, if it is not empty, its answer."""
        turns = [{"role": "user", "content": question}]
        if answer:
            turns.append({"role": "assistant", "content": answer})
        return ImagePrompt(tuple(images), tuple(turns), where)


def image_prompts(images: Iterable[Path], texts: Iterable[Path]) -> list[ImagePrompt]:
    """The prompts of image files and folders, and of the rows of texts that name images.

    Args:
        images: Files, or folders whose images are taken by name; each gets ``DEFAULT_QUESTION``.
        texts: Text files, of which ``.jsonl`` may have rows with ``image`` or ``images``.

    Raises:
        UsageError: A folder holds no images, or a file is not an image.
        ParseError: A row is not one of the forms.
    """
    found = [ImagePrompt.of([image], str(image)) for image in _files(images)]
    for path in texts:
        try:
            rows = list(read_image_rows(path))
        except OSError as error:
            raise UsageError(f"--text {path}: {os_error_text(error)}") from error
        found += [_of_row(path, number, row) for number, row in rows]
    check_images([image for prompt in found for image in prompt.images])
    return found


def _files(images: Iterable[Path]) -> Iterator[Path]:
    """Files as they are given, and the images of folders in the order of their names."""
    for path in images:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(x for x in path.iterdir() if x.suffix.lower() in _SUFFIXES)
        if not inside:
            raise UsageError(
                f"--image {path}: the folder holds no image ({', '.join(sorted(_SUFFIXES))})"
            )
        yield from inside


def _of_row(path: Path, number: int, row: Mapping[str, Any]) -> ImagePrompt:
    """The prompt of a row: ``messages``, ``question`` and ``answer``, or ``text`` as the answer."""
    where = f"{path}: line {number}"
    named = row.get("images") or row.get("image")
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
        raise ParseError(
            f'{where} has "image": {format_value(named)}, expected the path of an image or a '
            "list of paths"
        )
    images = [path.parent / name for name in names]
    messages = row.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ParseError(
                f'{where} has "messages": {format_value(messages)}, expected a list of objects '
                'with strings "role" and "content"'
            )
        return ImagePrompt(tuple(images), tuple(messages), where)
    question, answer = row.get("question", DEFAULT_QUESTION), row.get("answer", row.get("text"))
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ParseError(
            f'{where} is {format_value(row)}, expected "image" with a string "text", with '
            '"question" and "answer", or with "messages"'
        )
    return ImagePrompt.of(images, where, question, answer)


def _is_message(x: Any) -> bool:
    return isinstance(x, Mapping) and all(isinstance(x.get(k), str) for k in ("role", "content"))


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


def chat_prompt(
    processor: Any,
    config: Mapping[str, Any],
    prompt: str | Sequence[Message],
    images: int,
    *,
    continued: bool = True,
) -> str:
    """A prompt in the processor's chat template, with a place for each image.

    Args:
        processor: As ``mlx_vlm.load`` gives it.
        config: ``config.json``.
        prompt: The user's text, or the turns of a conversation.
        images: How many there are.
        continued: Whether the model's turn is opened at the end.

    Raises:
        BackendError: The template fails.
    """
    mlx_vlm: Any = import_module("mlx_vlm")  # its types are not complete
    given: Any = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    try:
        text = mlx_vlm.apply_chat_template(
            processor, dict(config), given, add_generation_prompt=continued, num_images=images
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"the chat template fails: {one_line(error)}") from error
    return str(text)


def prepare(
    processor: Any, model_config: Any, config: Mapping[str, Any], prompt: ImagePrompt
) -> Prompt:
    """Prepare a conversation about images as ``mlx_vlm.generate`` prepares its prompt.

    Args:
        processor: As ``mlx_vlm.load`` gives it.
        model_config: The config of the model's class.
        config: ``config.json``.
        prompt: The conversation.

    Raises:
        BackendError: The template fails, or the processor rejects the prompt or an image.
    """
    import mlx.core as mx

    utils: Any = import_module("mlx_vlm.utils")
    text = _conversation(processor, config, prompt)
    try:
        inputs = utils.prepare_inputs(
            processor,
            images=[str(image) for image in prompt.images],
            prompts=text,
            image_token_index=getattr(model_config, "image_token_index", None),
            add_special_tokens=utils.should_add_special_tokens(config["model_type"], processor),
        )
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise BackendError(
            f"{prompt.where}: the processor {type(processor).__name__} rejects it: {one_line(e)}"
        ) from e
    ids = np.array(mx.array(inputs.pop("input_ids")).reshape(-1), np.int64)
    named = (getattr(model_config, name, config.get(name)) for name in _PLACEHOLDERS)
    places = [x for x in named if isinstance(x, int)]
    is_text = ~np.isin(ids, places) & (ids >= 0)
    if places and is_text.all():
        raise BackendError(
            f"{prompt.where}: the prompt has no place for an image: the chat template of "
            f"{type(processor).__name__} takes none"
        )
    return Prompt(ids, {k: x for k, x in inputs.items() if x is not None}, is_text)


def _conversation(processor: Any, config: Mapping[str, Any], prompt: ImagePrompt) -> str:
    """A conversation in the chat template, else in one turn if the class takes one message."""
    images = len(prompt.images)
    is_answered = prompt.messages[-1]["role"] == "assistant"
    text = chat_prompt(processor, config, prompt.messages, images, continued=not is_answered)
    if all(turn["content"] in text for turn in prompt.messages):
        return text
    whole = "\n".join(turn["content"] for turn in prompt.messages)
    return chat_prompt(processor, config, whole, images)
