"""The model card of an output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.checkpoints.folder_files import CONFIG
from requant.checkpoints.safetensors_folder import read_json
from requant.planning.plan import Treatment
from requant.reports.record_summary import Figures
from requant.reports.run_command import generates_text
from requant.sources.hub_repository import CARD, Repository

# Metadata that a card inherits from the source's; the rest would describe another model.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def _source_card(folder: Path, figures: Figures) -> dict[str, Any]:
    """License, language and task in the card of the source.

    The card is in the output or, for a GGUF file from the hub, in its download folder.
    """
    import huggingface_hub

    place = folder / CARD
    if figures.repository is not None and not place.exists():
        name, commit = figures.repository
        place = Repository(name.partition(":")[0], commit, {}).card
    try:
        text = place.read_text("utf-8")
        card = huggingface_hub.ModelCard(text, ignore_metadata_errors=True)
        data: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except (OSError, ValueError):  # no card, or an invalid one
        return {}
    return {key: data[key] for key in _INHERITED if key in data}


def model_card(
    figures: Figures, repository: str, base_model: str | None, inherited: Mapping[str, Any]
) -> str:
    """The card as Markdown: origin, command, quantization error, how to run and to check it."""
    from huggingface_hub import ModelCardData

    known = figures.repository[0].partition(":")[0] if figures.repository else None
    base = base_model or known
    data: dict[str, Any] = {**inherited, "library_name": "mlx", "tags": ["mlx", "requant"]}
    if "pipeline_tag" not in data and _generates_text(figures):
        data["pipeline_tag"] = "text-generation"
    if base is not None:
        relation = {} if _is_dense(figures) else {"base_model_relation": "quantized"}
        data |= {"base_model": base, **relation}
    front = ModelCardData(**data).to_yaml()
    name = repository.partition("/")[2]
    origin = f"[{base}](https://huggingface.co/{base})" if base else figures.source_format
    return f"""---
{front}
---

# {name}

{origin} ({figures.source_format}) in MLX's format, converted from the stored weights by requant
{figures.requant}: {figures.bits_per_weight:.2f} bits per weight, {figures.bytes_out:,} bytes.

## How it was made

```sh
{figures.command("" if known else base or "")}
```

{_statistics(figures)}{_table(figures)}
{_errors(figures)}
## How to run it

{_running(figures, repository)}
## How to check it

`requant.json` holds the SHA-256 of every tensor. `requant verify` compares them, and with the
source at hand repeats the conversion and compares every byte:

```sh
{figures.verify_command(figures.repository[0] if figures.repository else base or "SOURCE", name)}
```
"""


def _generates_text(figures: Figures) -> bool:
    """Return whether the output is a model that generates text in mlx-lm."""
    config = read_json(Path(figures.output), CONFIG)
    named = config.get("architectures")
    causal = isinstance(named, list) and any(str(x).endswith("ForCausalLM") for x in named)
    return causal or (figures.options.layout == "mlx-lm" and _generates(figures, config))


def _generates(figures: Figures, config: Mapping[str, Any]) -> bool:
    """Return whether the output has a head that predicts tokens, and a tokenizer."""
    return generates_text(config, (x.name for x in Path(figures.output).iterdir()))


def _is_dense(figures: Figures) -> bool:
    return all(
        layer.treatment in (Treatment.DENSE, Treatment.DEQUANTIZED) for layer in figures.layers
    )


def _table(figures: Figures) -> str:
    rows = [
        f"| {g.treatment} | {g.source} | {g.target} | {g.exactness} | {g.layers:,} "
        f"| {g.parameters:,} | {g.nbytes:,} |\n"
        for g in figures.groups
    ]
    return (
        "| treatment | from | to | exactness | layers | parameters | bytes |\n"
        "|---|---|---|---|---:|---:|---:|\n" + "".join(rows)
    )


def _statistics(figures: Figures) -> str:
    name = figures.options.statistics
    if name is None:
        return ""
    weighted_by = "Errors count by how large the inputs of each layer are on a text"
    if figures.options.gptq:
        weighted_by += ", and those of a column are compensated in the columns after it (GPTQ)"
    return (
        f"{weighted_by}: `{name}` holds these statistics. It is not in this repository; making and "
        "checking the model again takes the same file.\n\n"
    )


def _errors(figures: Figures) -> str:
    measured = figures.measured
    if not measured:
        return "No layer was requantized.\n"
    middle, worst = measured[len(measured) // 2], measured[0]
    median, most = (f"{100 * (x.relative_rms or 0):.2g} %" for x in (middle, worst))
    return (
        f"New codes have a relative error (rms) of {median} in the median layer and {most} in the "
        f"worst (`{worst.layer}`).\n"
    )


def _running(figures: Figures, repository: str) -> str:
    config = read_json(Path(figures.output), CONFIG)
    if figures.options.layout != "mlx-lm":
        return (
            "Tensors have the source's names: for custom loaders. For mlx-lm, convert with "
            "`--layout mlx-lm`, if it has a class for the model.\n"
        )
    if not _generates(figures, config):
        return "Tensors have the names of mlx-lm's class; it is not a model that generates text.\n"
    if config.get("rotation"):
        return "Its layers are rotated: `requant.mlx_lm.load` of the requant package runs them.\n"
    return (
        f'```sh\npip install mlx-lm\nmlx_lm.generate --model {repository} --prompt "Hello"\n```\n'
    )
