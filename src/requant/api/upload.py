"""``upload``: send an output of requant with a model card to the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.api.verify import verify
from requant.checkpoints.folder_files import RECORD
from requant.core.types import Source
from requant.errors import CheckpointError, HubError, UsageError
from requant.reports.model_card import _source_card, model_card
from requant.reports.record_summary import read_figures
from requant.sources.hub_client import hub_errors
from requant.sources.hub_repository import CARD

_ALTERED = f"uploaded, for it is not what its {RECORD} says; convert it again"


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload, or the preview of one.

    Attributes:
        repository: ``org/name``.
        card: The model card, Markdown.
        files: Relative path -> bytes, the card included.
        url: Address of the commit; "" for a preview.
        removed: Weight files of an earlier upload that the commit deletes, because the output
            lacks them and a loader would read them too; empty for a preview.
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

    The folder is compared with its record first. Hidden files are not uploaded.

    Weight files that are on the hub already are not sent again, so the same call resumes a stopped
    one. Weight files of an earlier upload that the output lacks are deleted in the same commit,
    because a loader would read them too.

    Args:
        output: The folder; it is not changed.
        repository: ``org/name``; created if it does not exist.
        base_model: Id of the source on the hub; None takes that of the record.
        private: Create a private repository; a public one is rejected.
        preview: Make the card and the list of files without contacting the hub.
        show_progress: Let huggingface_hub draw its bars on standard error.

    Returns:
        The card, the files with their sizes in bytes and, unless previewed, the commit's address.

    Raises:
        CheckpointError: The folder has no record of requant, or differs from it.
        HubError: The hub cannot be reached or rejects the request.
        UsageError: ``repository`` is not of the form ``org/name``.
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
        info = api.model_info(repository)
        if private and info.private is False:
            raise HubError(
                f"{repository}: is public already, and --private is for a new repository; nothing "
                "was uploaded. Make it private in its settings, or leave out --private"
            )
        there = [x.rfilename for x in info.siblings or ()]
        removed = tuple(name for name in there if _is_weights(name) and name not in paths)
        operations += [huggingface_hub.CommitOperationDelete(name) for name in removed]
        message = f"Converted by requant {figures.requant}"
        commit = api.create_commit(repository, operations, commit_message=message)
    return Upload(repository, card, sizes, str(commit.commit_url), removed)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_weights(name: str) -> bool:
    """Return whether a loader of MLX checkpoints reads a file of a repository as weights."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def check_name(repository: str) -> None:
    """Check the form of a repository's name.

    Raises:
        UsageError: It is not ``org/name``.
    """
    organization, slash, name = repository.partition("/")
    if not (organization and slash and name) or "/" in name:
        raise UsageError(f"{repository!r} is not a repository id; write it as org/name")


def check_ready(repository: str) -> None:
    """Check before a long conversion that its upload can begin, without contacting the hub.

    Raises:
        HubError: huggingface_hub or a token is missing.
        UsageError: ``repository`` is not of the form ``org/name``.
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
    """Disable huggingface_hub's bars unless they are to be shown."""
    from huggingface_hub import utils as hub_utils

    utils: Any = hub_utils  # not all of its names are exported for type checkers
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
