"""The part of a model that reads text, in the library that has a class for the model.

That is mlx-lm, else mlx-vlm, of whose model the ``language_model`` is run, without its towers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from requant.checkpoints.checkpoint import Checkpoint
from requant.checkpoints.folder_files import CONFIG
from requant.core.types import Source
from requant.errors import CheckpointError, Problem
from requant.libraries import LIBRARIES, MLX_LM, Library
from requant.libraries.generation_step import read_prompt
from requant.libraries.loading import Module, build_empty, load_from_memory
from requant.mlx_lm import load as load_in_mlx_lm
from requant.mlx_lm import load_tokenizer
from requant.mlx_lm.loading import convert_in_memory
from requant.nn.blas_products import on_cpu
from requant.planning.plan import Plan, Treatment
from requant.planning.planner import Planned, make_plan, plan_with_source
from requant.quantization.options import ConvertOptions
from requant.sources.hub_repository import find_repository, open_source, read_source
from requant.sources.open import as_checkpoint

if TYPE_CHECKING:
    import mlx.core as mx

_LIBRARIES = (MLX_LM, LIBRARIES["mlx-vlm"])


@dataclass(frozen=True, slots=True)
class TextModel:
    """A module that takes token ids and gives logits.

    Attributes:
        module: The module.
        path: Its path in the library's model; "" if it is the whole model.
        whole: The library's model, with its towers.
    """

    module: Module
    path: str = ""
    whole: Module = None

    def __call__(self, ids: mx.array, inputs: Mapping[str, Any] | None = None) -> mx.array:
        """Logits ``(batch, tokens, vocabulary)`` of token ids ``(batch, tokens)``.

        Args:
            ids: The tokens; with ``inputs`` one prompt.
            inputs: What a processor of mlx-vlm gives next to the ids of a prompt about images.
        """
        output = self.module(ids) if inputs is None else read_prompt(self.whole, ids, inputs)
        logits: mx.array = getattr(output, "logits", output)  # mlx-vlm's have other fields too
        return logits

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with in the library's model."""
        return f"{self.path}." if self.path else ""

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Its modules, by their paths in the library's model."""
        for path, module in self.module.named_modules():
            yield self.prefix + path if path else self.path, module


def text_part(source: Source, library: str, model: Module) -> TextModel:
    """The part of a library's model that reads text.

    Raises:
        CheckpointError: It has none: an encoder.
    """
    if library == MLX_LM.name:
        return TextModel(model, whole=model)
    if "language_model" not in model:
        raise CheckpointError(str(source), [Problem(CONFIG, _encoder(library))])
    return TextModel(model.language_model, "language_model", model)


def plan_text_model(
    source: Source,
    revision: str | None = None,
    config_from: Source | None = None,
    *,
    with_images: bool = False,
) -> Planned:
    """Plan a model dense, in the layout of the library whose class reads text.

    In float32 on a CPU, else in the dtypes of the source. ``with_images`` takes mlx-vlm, and the
    vision part of a GGUF pair.

    Raises:
        HubError: A repository cannot be reached or denies access.
        CheckpointError: It cannot be read, or no library takes it.
    """
    options = ConvertOptions.from_arguments(
        dequantize=True, dtype="float32" if on_cpu() else None, config_from=config_from
    )
    part = None if with_images else "none"
    opened = open_source(source, find_repository(source, revision, part), options.config_from)
    checkpoint = as_checkpoint(opened, options.config_from, mmproj=part)
    errors = []
    for library in _libraries(checkpoint, _LIBRARIES[-1:] if with_images else _LIBRARIES):
        try:
            return plan_with_source(checkpoint, replace(options, layout=library))
        except CheckpointError as error:
            errors.append(error)
    raise errors[0]


def _libraries(checkpoint: Checkpoint, libraries: Sequence[Library]) -> list[str]:
    """Those of the libraries that may have a class that reads text.

    Raises:
        CheckpointError: There is none.
    """
    missing = {x.name: x.missing_class_reason(checkpoint.config) for x in libraries}
    found = [name for name, why in missing.items() if not why]
    if found:
        return found
    encoders = LIBRARIES["mlx-embeddings"]
    why = "; ".join(dict.fromkeys(missing.values()))
    if not encoders.missing_class_reason(checkpoint.config):
        why = _encoder(encoders.name)
    raise CheckpointError(str(checkpoint.source), [Problem(CONFIG, why)])


def _encoder(library: str) -> str:
    return (
        f"{library}'s class for this model is an encoder, which predicts no tokens: a text is run "
        "through language models only"
    )


def build_empty_text_model(plan: Plan) -> TextModel:
    """The text model of a dense plan, whose weights are never evaluated."""
    tensors = {t.name: t.info for shard in plan.shards for t in shard.tensors}
    model = build_empty(plan.source, plan.layout, plan.config, tensors)
    return text_part(plan.source, plan.layout, model)


def load_text_model(source: Source, library: str, **arguments: Any) -> tuple[TextModel, Any]:
    """Load a text model, and the tokenizer.

    Args:
        source: Whatever ``requant.mlx_lm.load`` takes.
        library: "mlx-lm" or "mlx-vlm".
        **arguments: Options of ``requant.mlx_lm.load``.
    """
    if library == MLX_LM.name:
        model, tokenizer = load_in_mlx_lm(source, **arguments)
        return TextModel(model), tokenizer
    weights, report, planned = convert_in_memory(source, None, library, **arguments)
    model, config = load_from_memory(source, library, report.plan.config, weights)
    tokenizer = load_tokenizer(source, planned, eos_token_ids=config.get("eos_token_id"))
    return text_part(source, library, model), tokenizer


def load_as_stored(
    source: Source, *, with_images: bool = False, **options: Any
) -> tuple[TextModel, Any]:
    """A model for evaluation, with the weights that ``source`` stores, and its tokenizer.

    Dense float32 on a CPU; on a GPU in the source's own quantization and dtype.

    Args:
        source: Whatever ``requant.mlx_lm.load`` takes.
        with_images: Take mlx-vlm, whose model takes images.
        **options: ``revision``, ``config_from``, ``threads``, ``max_memory`` and ``progress``.
    """
    revision, config_from = options.get("revision"), options.get("config_from")
    library = plan_text_model(source, revision, config_from, with_images=with_images).plan.layout
    if on_cpu():
        return load_text_model(source, library, dequantize=True, dtype="float32", **options)
    remote = find_repository(source, revision)
    plan = make_plan(read_source(source, remote, config_from), ConvertOptions(layout="keep"))
    is_kept = any(layer.treatment is Treatment.KEPT for layer in plan.layers)
    return load_text_model(source, library, dequantize=not is_kept, **options)
