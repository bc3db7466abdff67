"""``requant upload``: an output of ours and its model card go to the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.blueprint import Treatment
from requant.conversion import Source
from requant.errors import CheckpointError, HubError, UsageError
from requant.figures import Figures, read_figures
from requant.hub import CARD, Repository
from requant.hub_client import hub_errors
from requant.running import generates_text
from requant.safetensors_folder import read_json
from requant.source_folder import CONFIG, RECORD
from requant.verification import verify

# What a card takes over from the source's; the rest would describe another model.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_ALTERED = f"uploaded, for it is not what its {RECORD} says; convert it anew"


@dataclass(frozen=True, slots=True)
class Upload:
    """What is, or would be, uploaded.

    Attributes:
        repository: ``org/name``.
        card: The model card, Markdown.
        files: Relative path -> bytes, the card included.
        url: Of the commit; "" for a preview.
        removed: Weight files of an earlier upload that the commit deletes, as the output has none
            of that name and a loader would read both; empty for a preview, which asks nobody.
    """

    repository: str
    card: str
    files: Mapping[str, int]
    url: str = ""
    removed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The upload as JSON data."""
        return {
            "repository": self.repository,
            "files": dict(self.files),
            "url": self.url,
            "removed": list(self.removed),
            "card": self.card,
        }


def upload(
    output: Source,
    repository: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    preview: bool = False,
    show_progress: bool = False,
) -> Upload:
    """Upload a folder that ``convert`` wrote, with a model card, as one commit.

    What is uploaded is what the record says: the folder is verified first. Hidden files stay.

    Weight files that reached the hub before are not sent again, so the same call goes on where
    one was stopped. Weight files of an earlier upload that the output has not are deleted in the
    same commit: a loader would read them too.

    Args:
        output: The folder; it is not changed.
        repository: ``org/name``; created if it does not exist.
        base_model: Id of the source on the hub; None takes what the record knows.
        private: Create the repository as a private one; one that is public is refused.
        preview: Only make the card and the list of files; the hub is not asked.
        show_progress: Let huggingface_hub draw its bars on standard error.

    Returns:
        The card, the files with their sizes in bytes and, unless previewed, the commit's address.

    Raises:
        CheckpointError: The folder has no record of ours, or is not what it says.
        HubError: The hub is not reached or refuses.
        UsageError: ``repository`` is no ``org/name``.
    """
    check_name(repository)
    folder = Path(output)
    figures = read_figures(folder)
    huggingface_hub = _library()
    card = model_card(figures, repository, base_model, _source_card(folder, figures))
    paths = {x.relative_to(folder).as_posix(): x for x in sorted(folder.rglob("*")) if x.is_file()}
    paths = {name: path for name, path in paths.items() if not _is_hidden(name)}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    sizes[CARD] = len(card.encode())
    if preview:
        return Upload(repository, card, sizes)
    if problems := verify(folder).problems:
        raise CheckpointError(str(folder), problems, _ALTERED)
    paths.pop(CARD, None)
    add = huggingface_hub.CommitOperationAdd
    operations = [add(name, str(path)) for name, path in paths.items()]
    operations.append(add(CARD, card.encode()))
    api = huggingface_hub.HfApi()
    with hub_errors(repository, "main", sending=True), _bars(show_progress):
        api.create_repo(repository, private=private, exist_ok=True)
        known = api.model_info(repository)
        if private and known.private is False:
            raise HubError(
                f"{repository}: is public already, and --private is for a new repository; nothing "
                "was uploaded. Make it private in its settings, or leave out --private"
            )
        there = [x.rfilename for x in known.siblings or ()]
        removed = tuple(name for name in there if _is_weights(name) and name not in paths)
        operations += [huggingface_hub.CommitOperationDelete(name) for name in removed]
        message = f"Converted by requant {figures.requant}"
        made = api.create_commit(repository, operations, commit_message=message)
    return Upload(repository, card, sizes, str(made.commit_url), removed)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_weights(name: str) -> bool:
    """Whether a file of a repository is one that a loader of MLX checkpoints takes for weights."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def check_name(repository: str) -> None:
    """Refuse what is no ``org/name``.

    Raises:
        UsageError: It is none.
    """
    organization, slash, name = repository.partition("/")
    if not (organization and slash and name) or "/" in name:
        raise UsageError(f"{repository!r} is no repository; write it as org/name")


def check_ready(repository: str) -> None:
    """Say before a long conversion why its upload could not even begin; the hub is not asked.

    Raises:
        HubError: huggingface_hub or a token is missing.
        UsageError: ``repository`` is no ``org/name``.
    """
    check_name(repository)
    huggingface_hub = _library()
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"{repository}: uploading needs a token: log in with `hf auth login` or set HF_TOKEN"
        )


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise HubError("uploading needs huggingface_hub: pip install 'requant[hub]'") from None
    return huggingface_hub


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """huggingface_hub's bars, only where they are wanted."""
    from huggingface_hub import utils as known

    utils: Any = known  # not all of its names are exported by the letter
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _source_card(folder: Path, figures: Figures) -> dict[str, Any]:
    """What the source's own card says about license, language and task.

    It is in the output or, of a GGUF file from the hub, where it was downloaded to.
    """
    import huggingface_hub

    place = folder / CARD
    if figures.repository is not None and not place.exists():
        name, commit = figures.repository
        place = Repository(name.partition(":")[0], commit, {}).card
    try:
        text = place.read_text("utf-8")
        card = huggingface_hub.ModelCard(text, ignore_metadata_errors=True)
        found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    except (OSError, ValueError):  # no card, or one that cannot be read: there is nothing to take
        return {}
    return {key: found[key] for key in _INHERITED if key in found}


def model_card(
    figures: Figures, repository: str, base_model: str | None, inherited: Mapping[str, Any]
) -> str:
    """The card: where it comes from, what it lost, how to run and how to check it."""
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
    """Whether the output is a model that mlx-lm lets generate text."""
    config = read_json(Path(figures.output), CONFIG)
    named = config.get("architectures")
    causal = isinstance(named, list) and any(str(x).endswith("ForCausalLM") for x in named)
    return causal or (figures.options.layout == "mlx-lm" and _generates(figures, config))


def _generates(figures: Figures, config: Mapping[str, Any]) -> bool:
    """Whether mlx_lm.generate has a head and a tokenizer to work with."""
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
        weighted_by += ", and those of a column are made good in the columns after it (GPTQ)"
    return (
        f"{weighted_by}: `{name}` holds these statistics. It is not in this repository; making and "
        "checking the model anew takes the same file.\n\n"
    )


def _errors(figures: Figures) -> str:
    measured = figures.measured
    if not measured:
        return "No layer was encoded anew.\n"
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
            "Tensors have the source's names: for loaders of one's own. For mlx-lm, convert with "
            "`--layout mlx-lm`, if it has a class for the model.\n"
        )
    if not _generates(figures, config):
        return "Tensors have the names of mlx-lm's class; it is no model that generates text.\n"
    if config.get("rotation"):
        return "Its layers are rotated: `requant.mlx_lm.load` of the requant package runs them.\n"
    return (
        f'```sh\npip install mlx-lm\nmlx_lm.generate --model {repository} --prompt "Hello"\n```\n'
    )
