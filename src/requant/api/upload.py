"""``upload``: send an output of requant with a model card to the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import unified_diff
from pathlib import Path
from typing import Any

from requant.api.verify import verify
from requant.checkpoints.folder_files import CONFIG, RECORD
from requant.checkpoints.safetensors_folder import read_json
from requant.core.types import Source
from requant.errors import CheckpointError, HubError, ParseError, UsageError
from requant.output.staging import header_stubs_dir
from requant.planning.plan import Plan
from requant.planning.planner import make_plan
from requant.quantization.option_signatures import read_arguments
from requant.reports.front_matter import FrontMatter, read_front_matter
from requant.reports.model_card import model_card, source_card
from requant.reports.record_summary import Figures, read_figures
from requant.reports.repository_name import repository_name, source_name
from requant.reports.scores import read_scores
from requant.sources.hub_client import hub_errors, read_range
from requant.sources.hub_repository import CARD, find_repository, read_source
from requant.sources.open import as_checkpoint

_MAX_CARD_BYTES = 1 << 20  # of a README.md that is compared
_ALTERED = f"uploaded, for it is not what its {RECORD} says; convert it again"


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload, or the preview of one.

    Attributes:
        repository: ``org/name``.
        card: The model card, Markdown.
        files: Relative path -> bytes, the card included.
        url: Address of the commit or pull request; "" for a preview.
        removed: Weight files of an earlier upload that the commit deletes, because the output
            lacks them and a loader would read them too; empty for a preview.
        difference: Unified diff from the README.md that was there to the card; "" if there was
            none, or it was the same, and for a preview.
        notes: What the user should know.
    """

    repository: str
    card: str
    files: Mapping[str, int]
    url: str = ""
    removed: tuple[str, ...] = ()
    difference: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The upload as JSON data."""
        return {
            "repository": self.repository,
            "files": dict(self.files),
            "url": self.url,
            "removed": list(self.removed),
            "difference": self.difference,
            "notes": list(self.notes),
            "card": self.card,
        }


def upload(
    output: Source,
    repository: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    branch: str | None = None,
    pull_request: bool = False,
    force: bool = False,
    preview: bool = False,
    show_progress: bool = False,
    scores: Source | None = None,
) -> Upload:
    """Upload a folder that ``convert`` wrote, with a model card, as one commit.

    The repository is read first, then the folder is compared with its record; nothing is written
    if there is a problem. Hidden files are not uploaded.

    Weight files that are on the hub already are not sent again, so the same call resumes a stopped
    one. Weight files of an earlier upload that the output lacks are deleted in the same commit,
    because a loader would read them too.

    Args:
        output: The folder; it is not changed.
        repository: ``org/name``, created if it does not exist; ``org/`` is completed to
            ``org/NAME-4bit`` and the like.
        base_model: Id of the source on the hub; None takes that of the record.
        private: Create a private repository; a public one is rejected.
        branch: Branch for the commit, created from the main branch if it does not exist; None is
            the main branch. ``refs/pr/3`` adds to a pull request.
        pull_request: Open a pull request to the main branch with the commit; the repository must
            exist.
        force: Replace a README.md that differs from the card. A pull request needs no force.
        preview: Make the card and the list of files without contacting the hub.
        show_progress: Let huggingface_hub draw its bars on standard error.
        scores: What ``requant compare DENSE OUTPUT OUTPUT --text FILE --json`` printed, for a table
            in the card.

    Returns:
        The card, the files with their sizes in bytes and, unless previewed, the commit's address.

    Raises:
        CheckpointError: The folder has no record of requant, or differs from it.
        HubError: The hub cannot be reached or rejects the request; or, with every such problem,
            the repository has another README.md, is public, or does not exist.
        UsageError: ``repository`` is not of the form ``org/name``, or both a branch and a pull
            request are requested.
    """
    folder = Path(output)
    if not repository.endswith("/"):
        check_name(repository)
    check_branch(branch, pull_request)
    figures = read_figures(folder)
    _library()
    repository = _recorded_name(repository, folder, figures, base_model)
    metadata, notes = _source_metadata(folder, figures)
    found = None if scores is None else read_scores(Path(scores))
    card = model_card(figures, repository, base_model, metadata, found)
    paths = {x.relative_to(folder).as_posix(): x for x in sorted(folder.rglob("*")) if x.is_file()}
    paths = {name: path for name, path in paths.items() if not _is_hidden(name)}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    sizes[CARD] = len(card.encode())
    result = Upload(repository, card, sizes, notes=notes)
    if preview:
        return result
    target = _read_target(repository, branch)
    result = replace(result, difference=target.difference(card))
    replaces = bool(result.difference) and not force
    target.check(private, pull_request, replaces, result.difference)
    if problems := verify(folder).problems:
        raise CheckpointError(str(folder), problems, _ALTERED)
    paths.pop(CARD, None)
    removed = tuple(name for name in target.files if _is_weights(name) and name not in paths)
    message = f"Converted by requant {figures.requant}"
    with _bars(show_progress):
        url = target.commit(
            paths, card, removed, message, private=private, pull_request=pull_request
        )
    return replace(result, url=url, removed=removed)


def _source_metadata(folder: Path, figures: Figures) -> tuple[FrontMatter, tuple[str, ...]]:
    """The metadata of the source's card, or none and a note that says why."""
    try:
        return read_front_matter(source_card(folder, figures)), ()
    except ParseError as error:
        return FrontMatter(), (f"the source's {CARD}: {error}; the card has none of them",)


# -- names -----------------------------------------------------------------------------------


def planned_name(
    repository: str, source: Source, output: Source, plan: Plan | None = None, **arguments: Any
) -> str:
    """The repository that the result of a conversion will be uploaded to.

    Args:
        repository: ``org/name``, which is returned, or ``org/``, which is completed.
        source: As in ``convert``.
        output: As in ``convert``.
        plan: The plan of the conversion; None makes one, without measuring for a budget.
        **arguments: The options of ``convert``.

    Raises:
        UsageError: There is no such name.
        CheckpointError: Every problem of the source.
    """
    if not repository.endswith("/"):
        return check_name(repository)
    options, run = read_arguments("convert", None, arguments)
    if plan is None:
        remote = find_repository(source, run.revision)
        stubs = header_stubs_dir(Path(output))
        if remote is None and stubs.is_dir():
            checkpoint = as_checkpoint(source, options.config_from, stubs)
        else:
            checkpoint = read_source(source, remote, options.config_from)
        plan = make_plan(checkpoint, replace(options, budget=None))
    recipe = None if options.recipe is None else options.recipe.name
    name = source_name(source)
    return check_name(
        repository + repository_name(name, plan.config, plan.layers, recipe, options.budget)
    )


def _recorded_name(repository: str, folder: Path, figures: Figures, base_model: str | None) -> str:
    """The repository for an output; its source's name is in the record if it was on the hub."""
    if not repository.endswith("/"):
        return repository
    options, config = figures.options, read_json(folder, CONFIG)
    recipe = None if options.recipe is None else options.recipe.name
    known = figures.repository[0].partition(":")[0] if figures.repository else None
    source = base_model or known
    name = source.rpartition("/")[2] if source else source_name(folder)
    return check_name(
        repository + repository_name(name, config, figures.layers, recipe, options.budget)
    )


def check_name(repository: str) -> str:
    """Return a repository's name if its form is valid.

    Raises:
        UsageError: It is not ``org/name``.
    """
    organization, slash, name = repository.partition("/")
    if not (organization and slash and name) or "/" in name:
        raise UsageError(
            f"{repository!r} is not a repository id; write it as org/name, or org/ for a name "
            "made from the source's, as in org/NAME-4bit"
        )
    return repository


def check_branch(branch: str | None, pull_request: bool) -> None:
    """Check that an upload has one target: a branch, or a pull request to the main one.

    Raises:
        UsageError: Both are given.
    """
    if branch is not None and pull_request:
        raise UsageError(
            "choose one: --branch or --pull-request, which is to the main branch; --branch "
            "refs/pr/N adds to pull request N"
        )


# -- the repository ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Target:
    """A repository as it is before an upload.

    Attributes:
        name: ``org/name``.
        branch: The branch to commit to; None is the main branch.
        exists: Whether the repository does.
        has_branch: Whether the branch does.
        head: The commit that the upload is made on; None if there is no repository.
        is_public: Whether everybody can read it.
        files: Paths at that commit.
        card: Its README.md; None if it has none.
    """

    name: str
    branch: str | None
    exists: bool = False
    has_branch: bool = False
    head: str | None = None
    is_public: bool = False
    files: tuple[str, ...] = ()
    card: str | None = None

    def difference(self, card: str) -> str:
        """The unified diff from the README.md that is there to ``card``."""
        if self.card is None:
            return ""
        sides = (self.card.splitlines(), card.splitlines())
        names = (f"{self.name}/{CARD}", "the card of this upload")
        return "\n".join(unified_diff(*sides, *names, lineterm=""))

    def check(
        self, private: bool, pull_request: bool, replaces: bool, difference: str = ""
    ) -> None:
        """Check that the upload can be made.

        Args:
            private: Whether a new private repository is requested.
            pull_request: Whether a pull request is to be opened.
            replaces: Whether the README.md of the branch would be replaced, and is not to be.
            difference: How it would change; "" if the card is not known yet.

        Raises:
            HubError: With every reason against it.
        """
        problems = []
        if private and self.is_public:
            problems.append(
                "is public already, and --private is for a new repository. Make it private in its "
                "settings, or leave out --private"
            )
        if pull_request and not self.exists:
            problems.append("does not exist, so it has no pull requests; leave out --pull-request")
        if replaces and not pull_request and self.has_branch:
            problems.append(
                f"has a {CARD} that the upload would change. --force replaces it, --pull-request "
                f"proposes the change, --branch NEW uploads to a branch of its own\n{difference}"
            )
        if problems:
            shown = "\n".join(f"{self.name}: {problem}" for problem in problems)
            raise HubError(f"nothing was uploaded\n{shown.rstrip()}")

    def commit(
        self,
        paths: Mapping[str, Path],
        card: str,
        removed: tuple[str, ...],
        message: str,
        private: bool,
        pull_request: bool,
    ) -> str:
        """Commit the files, and return the address of the commit or pull request.

        The hub rejects it if another commit was made since the repository was read.
        """
        huggingface_hub = _library()
        add, delete = huggingface_hub.CommitOperationAdd, huggingface_hub.CommitOperationDelete
        operations = [add(name, str(path)) for name, path in paths.items()]
        operations += [add(CARD, card.encode()), *map(delete, removed)]
        api = huggingface_hub.HfApi()
        with hub_errors(self.name, self.branch or "main", sending=True):
            if not self.exists:
                api.create_repo(self.name, private=private, exist_ok=True)
            if not self.has_branch:
                api.create_branch(self.name, branch=self.branch, revision=self.head, exist_ok=True)
            commit = api.create_commit(
                self.name,
                operations,
                commit_message=message,
                revision=self.branch,
                create_pr=pull_request,
                parent_commit=self.head,
            )
        return str(commit.pr_url if pull_request else commit.commit_url)


def _read_target(repository: str, branch: str | None) -> _Target:
    """Read what a repository holds at a branch, or at the main one if there is no such branch.

    Raises:
        HubError: huggingface_hub or a token is missing, or the hub cannot be reached.
    """
    huggingface_hub = _library()
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"{repository}: uploading needs a token: log in with `hf auth login` or set HF_TOKEN"
        )
    from huggingface_hub import errors

    api, found = huggingface_hub.HfApi(), branch
    with hub_errors(repository, branch or "main", sending=True):
        try:
            info = api.model_info(repository, revision=branch, files_metadata=True)
        except errors.RevisionNotFoundError:
            info, found = api.model_info(repository, files_metadata=True), None
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return _Target(repository, branch, has_branch=branch is None)
    sizes = {x.rfilename: x.size or 0 for x in info.siblings or ()}
    card = None
    if CARD in sizes:
        stop = min(sizes[CARD], _MAX_CARD_BYTES)
        card = read_range(repository, info.sha, CARD, 0, stop).decode("utf-8", "replace")
    return _Target(
        name=repository,
        branch=branch,
        exists=True,
        has_branch=found == branch,
        head=info.sha,
        is_public=info.private is False,
        files=tuple(sizes),
        card=card,
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_weights(name: str) -> bool:
    """Return whether a loader of MLX checkpoints reads a file of a repository as weights."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def check_ready(
    repository: str,
    *,
    private: bool = False,
    branch: str | None = None,
    pull_request: bool = False,
    force: bool = False,
) -> None:
    """Check before a long conversion that its upload can begin.

    Args:
        repository: As in ``upload``, complete.
        private: As in ``upload``.
        branch: As in ``upload``.
        pull_request: As in ``upload``.
        force: As in ``upload``. Without it any README.md is a problem, because the card is not
            known yet.

    Raises:
        HubError: huggingface_hub or a token is missing, the hub cannot be reached, or every
            reason that the repository gives against the upload.
    """
    target = _read_target(repository, branch)
    target.check(private, pull_request, replaces=bool(target.card) and not force)


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
