"""The model card of an output."""

from __future__ import annotations

from pathlib import Path

from requant.checkpoints.folder_files import CONFIG
from requant.checkpoints.safetensors_folder import read_json
from requant.planning.plan import Treatment
from requant.reports.front_matter import FrontMatter
from requant.reports.library_usage import LIBRARIES, generates_text, task_of, usage
from requant.reports.record_summary import Figures
from requant.reports.scores import Scores, markdown
from requant.sources.hub_repository import CARD, Repository
from requant.text import join_first


def source_card(folder: Path, figures: Figures) -> str:
    """The card of the source; "" if there is none.

    It is in the output or, for a GGUF file from the hub, in its download folder.
    """
    place = folder / CARD
    if figures.repository is not None and not place.exists():
        name, commit = figures.repository
        place = Repository(name.partition(":")[0], commit, {}).card
    try:
        return place.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def model_card(
    figures: Figures,
    repository: str,
    base_model: str | None,
    source: FrontMatter,
    scores: Scores | None = None,
) -> str:
    """The card as Markdown: origin, how to run, command, quantization error, how to check.

    Args:
        figures: The record of the output.
        repository: ``org/name`` that it is for.
        base_model: Id of the source on the hub; None takes that of the record.
        source: Metadata of the source's card; all of them are kept.
        scores: The output, and others, against the dense model.
    """
    known = figures.repository[0].partition(":")[0] if figures.repository else None
    base = base_model or known
    folder, layout = Path(figures.output), figures.options.layout
    config, files = read_json(folder, CONFIG), [x.name for x in folder.iterdir()]
    task = task_of(layout, config, files, "".join(source.texts("pipeline_tag")[:1]))
    metadata = _metadata(figures, base, task, source)
    name = repository.partition("/")[2]
    origin = f"[{base}](https://huggingface.co/{base})" if base else "a checkpoint"
    running = usage(layout, task, config, repository)
    if layout == "mlx-lm" and not generates_text(config, files):
        running = (
            "Tensors have the names of mlx-lm's class; it is not a model that generates text.\n"
        )
    elif layout == "mlx-lm" and config.get("rotation"):
        running = (
            "Its layers are rotated: `requant.mlx_lm.load` of the requant package runs them.\n"
        )
    return f"""---
{metadata.to_yaml()}---

# {repository}

[{repository}](https://huggingface.co/{repository}) was converted to MLX's format from
{origin} ({figures.source_format}), from the stored weights, by requant **{figures.requant}**:
{figures.bits_per_weight:.2f} bits per weight, {figures.bytes_out:,} bytes.

## Use with mlx

{running}
## How it was made

```sh
{figures.command("" if known else base or "")}
```

{_statistics(figures)}{_table(figures)}
{_errors(figures)}
{_quality(scores)}## How to check it

`requant.json` holds the SHA-256 of every tensor. `requant verify` compares them, and with the
source at hand repeats the conversion and compares every byte:

```sh
{figures.verify_command(figures.repository[0] if figures.repository else base or "SOURCE", name)}
```
"""


def _metadata(
    figures: Figures, base: str | None, task: str | None, source: FrontMatter
) -> FrontMatter:
    """The source's metadata with those of the output in place of their values."""
    library = LIBRARIES[figures.options.layout]
    tags = dict.fromkeys((*source.texts("tags"), *library.tags))
    entries: dict[str, str | list[str]] = {
        "library_name": library.library_name,
        "tags": list(tags),
    }
    if task is None:
        source = source.without("pipeline_tag")
    else:
        entries["pipeline_tag"] = task
    if base is not None:
        source = source.without("base_model_relation")
        relation = {} if _is_dense(figures) else {"base_model_relation": "quantized"}
        entries |= {"base_model": base, **relation}
    return source.replaced(entries)


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
    name, texts = figures.options.statistics, figures.options.calibrate
    if name is None and texts is None:
        return ""
    weighted_by = "Errors count by how large the inputs of each layer are on a text"
    if figures.options.gptq:
        weighted_by += ", and those of a column are compensated in the columns after it (GPTQ)"
    if texts is not None:
        text = join_first([f"`{x}`" for x in texts]) if texts else "the one that comes with requant"
        return f"{weighted_by}: {text}.\n\n"
    return (
        f"{weighted_by}: `{name}` holds these statistics. It is not in this repository; making and "
        "checking the model again takes the same file.\n\n"
    )


def _quality(scores: Scores | None) -> str:
    return "" if scores is None else f"## Quality\n\n{markdown(scores)}\n"


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
