"""How each MLX library runs a model, for model cards and for the line after a conversion."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from requant.libraries.modalities import modalities
from requant.planning.plan import Plan

# Tasks as the hub spells them.
TEXT = "text-generation"
IMAGE_TEXT = "image-text-to-text"
AUDIO_TEXT = "audio-text-to-text"
ANY = "any-to-any"
TRANSCRIPTION = "automatic-speech-recognition"
SPEECH = "text-to-speech"
EMBEDDING = "feature-extraction"
SENTENCES = "sentence-similarity"

_TASK_OF_SUFFIX = (
    ("ForCausalLM", TEXT),
    ("LMHeadModel", TEXT),
    ("ForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("Model", EMBEDDING),
    ("Encoder", EMBEDDING),
)
_TRANSCRIBES = ("ForCTC", "ForTDT", "ForRNNT", "ForSpeechSeq2Seq")
_TRANSCRIBING_TYPES = ("whisper", "moonshine", "qwen3_asr")
# Tasks of models with towers: not those of an output without them.
_OF_TOWERS = (IMAGE_TEXT, AUDIO_TEXT, ANY, "video-text-to-text", "visual-question-answering")

# Architectures without a head that predicts tokens: encoders, embedding and reward models.
_HEADLESS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMaskedLM",
    "Encoder",
)
_GENERATES = ("LMHeadModel",)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
)


@dataclass(frozen=True, slots=True)
class LibraryUsage:
    """What differs between the libraries.

    Attributes:
        package: Its name for pip; "" where no library is known to load the output.
        library_name: ``library_name`` of the card.
        tags: Tags of the card, next to those of the source.
        commands: Task -> commands that run the model, one a line; "" for any other task.
            ``{model}`` is a repository or folder.
        python: The same in Python, which a card shows instead where there is some.
    """

    package: str
    library_name: str = "mlx"
    tags: tuple[str, ...] = ("mlx", "requant")
    commands: Mapping[str, str] = field(default_factory=dict)
    python: Mapping[str, str] = field(default_factory=dict)

    def section(self, task: str, model: str) -> str:
        """Markdown of how to run a model."""
        by_task = {**self.commands, **self.python}
        task = task if task in by_task else ""
        commands = self.commands.get(task, "").format(model=model)
        if task not in self.python:
            return f"```sh\n{commands}\n```\n"
        text = f"```python\n{self.python[task].format(model=model)}```\n"
        return f"{text}\nor `{commands}`.\n" if commands else text


_SEE = 'mlx_vlm.generate --model {model} --prompt "Describe this image." --image image.png'
_HEAR = 'mlx_vlm.generate --model {model} --prompt "What is said?" --audio audio.wav'
_BY_TOWERS = {IMAGE_TEXT: _SEE, AUDIO_TEXT: _HEAR, ANY: f"{_SEE}\n{_HEAR}"}
_TRANSCRIBE = "mlx_audio.stt.generate --model {model} --audio audio.wav --output-path transcript"

# By the name of the layout (``--layout``).
LIBRARIES: Mapping[str, LibraryUsage] = {
    "mlx-lm": LibraryUsage(
        "mlx-lm",
        commands={"": 'mlx_lm.generate --model {model} --prompt "Hello"'},
        python={
            "": """from mlx_lm import generate, load

model, tokenizer = load("{model}")
prompt = "What is a file?"
if tokenizer.chat_template is not None:
    messages = [{{"role": "user", "content": prompt}}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
print(generate(model, tokenizer, prompt=prompt, max_tokens=256))
"""
        },
    ),
    "mlx-vlm": LibraryUsage(
        "mlx-vlm",
        commands={
            "": _SEE,
            **_BY_TOWERS,
            TEXT: 'mlx_vlm.generate --model {model} --prompt "Hello"',
        },
    ),
    "mlx-audio": LibraryUsage(
        "mlx-audio",
        library_name="mlx-audio",
        tags=("mlx", "mlx-audio", "requant"),
        commands={
            TRANSCRIPTION: _TRANSCRIBE,
            AUDIO_TEXT: _TRANSCRIBE,
            SPEECH: 'mlx_audio.tts.generate --model {model} --text "What is a file?"',
            "audio-to-audio": "mlx_audio.sts.generate --model {model} --audio audio.wav",
        },
        python={
            "": """from mlx_audio.utils import load_model

model = load_model("{model}")
"""
        },
    ),
    "mlx-embeddings": LibraryUsage(
        "mlx-embeddings",
        python={
            "": """from mlx_embeddings import generate, load

model, tokenizer = load("{model}")
texts = ["A file has a name.", "Folders hold files."]
embeddings = generate(model, tokenizer, texts=texts).text_embeds
print(embeddings @ embeddings.T)
""",
            IMAGE_TEXT: """from mlx_embeddings import load

model, processor = load("{model}")
""",
        },
    ),
    "keep": LibraryUsage("", commands=_BY_TOWERS),
}


def generates_text(config: Mapping[str, Any], files: Iterable[str]) -> bool:
    """Return whether a model predicts tokens and has a tokenizer among its ``files``."""
    files = {*files}
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    if names and all(x.endswith(_HEADLESS) and not x.endswith(_GENERATES) for x in names):
        return False
    return "modules.json" not in files and not files.isdisjoint(_TOKENIZERS)


def _task_of_towers(config: Mapping[str, Any]) -> str:
    """The task of a model by its towers; "" if its config describes none."""
    sees, hears = modalities(config)
    if sees:
        return ANY if hears else IMAGE_TEXT
    return AUDIO_TEXT if hears else ""


def task_of(
    layout: str, config: Mapping[str, Any], files: Iterable[str], source: str = ""
) -> str | None:
    """The ``pipeline_tag`` of a card.

    Args:
        layout: A key of ``LIBRARIES``.
        config: The output's ``config.json``.
        files: Names of the files in the output.
        source: The task in the card of the source, which counts unless it is about a tower that
            the output lacks.

    Returns:
        A task of the hub; None if nothing says which it is.
    """
    files, towers = {*files}, _task_of_towers(config)
    if source and (layout != "mlx-lm" or towers or source not in _OF_TOWERS):
        return source
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    generates = generates_text(config, files)
    model_type = str(config.get("model_type"))
    if model_type in _TRANSCRIBING_TYPES or any(x.endswith(_TRANSCRIBES) for x in names):
        return TRANSCRIPTION
    if layout == "mlx-vlm":  # its converter writes an empty section for a model of text
        return towers or (TEXT if config.get("vision_config") == {} else IMAGE_TEXT)
    if layout == "mlx-embeddings" or "modules.json" in files:
        return SENTENCES if "modules.json" in files else EMBEDDING
    if towers:
        return towers if generates else None
    if layout == "mlx-audio":
        return None
    for suffix, task in _TASK_OF_SUFFIX:
        if names and all(name.endswith(suffix) for name in names):
            return task
    return TEXT if layout == "mlx-lm" and generates else None


def usage(layout: str, task: str | None, config: Mapping[str, Any], model: str) -> str:
    """The section of a card about running the model, in Markdown without its heading.

    Args:
        layout: A key of ``LIBRARIES``.
        task: The card's.
        config: The output's ``config.json``.
        model: The repository.
    """
    library, towers = LIBRARIES[layout], _task_of_towers(config)
    if layout == "keep":
        kept = "Tensors have the source's names"
        if towers:
            return (
                f"{kept}, which mlx-vlm renames when it loads a model of a class that it has. "
                "Whether it loads this one was not checked:\n\n"
                f"```sh\npip install mlx-vlm\n```\n\n{library.section(towers, model)}"
            )
        return (
            f"{kept}: for custom loaders. For mlx-lm, convert with `--layout mlx-lm`, if it has a "
            "class for the model.\n"
        )
    if layout == "mlx-embeddings" and towers:
        task = IMAGE_TEXT
    return f"```sh\npip install {library.package}\n```\n\n{library.section(task or '', model)}"


def command_of(plan: Plan, output: str) -> str:
    """The command that runs the model in the folder ``output``; "" if there is none."""
    place = shlex.quote(f"./{output}" if output.startswith("-") else output)
    layout, task = plan.layout, ""
    if layout in ("mlx-lm", "keep"):
        if not generates_text(plan.config, plan.side_files):
            return ""
        if plan.rotated and not plan.loads and layout == "mlx-lm" and not plan.load_error:
            return f'requant generate {place} --prompt "Hello"'
        layout = "mlx-lm"
    else:
        task = task_of(layout, plan.config, plan.side_files) or ""
    commands = LIBRARIES[layout].commands
    command = commands.get(task, commands.get("", "")).partition("\n")[0]
    return command.format(model=place) if plan.loads else ""
