"""The upload command, and the upload that ends a conversion."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.cli.error_handling import handle_errors, print_json, print_stderr
from requant.cli.options import (
    BaseModel,
    Branch,
    Json,
    Preview,
    Private,
    PullRequest,
    Quiet,
    ReplaceCard,
    Repository,
    ScoresFile,
    Written,
)
from requant.errors import HubError
from requant.text import join_first


def upload(
    output: Written,
    repository: Repository,
    base_model: BaseModel = None,
    private: Private = False,
    branch: Branch = None,
    pull_request: PullRequest = False,
    force: ReplaceCard = False,
    preview: Preview = False,
    scores: ScoresFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an OUTPUT of convert to the hub, with a model card.

    The card keeps the metadata of the source's (license, tags, languages, terms of access) and
    has the origin of the model, the exact command, the figures, and how to run and check it;
    --dry-run prints it. If REPO has another README.md, the difference is printed and nothing is
    uploaded without --force. Stopped, the same command resumes: weight files that are on the hub
    already are not sent again.

    \b
    Examples:
      requant upload Llama-3.2-1B-4bit me/Llama-3.2-1B-4bit --dry-run
      requant upload Llama-3.2-1B-4bit me/Llama-3.2-1B-4bit --base-model meta-llama/Llama-3.2-1B
      requant upload Llama-3.2-1B-4bit mlx-community/
      requant upload out mlx-community/Llama-3.2-1B-4bit --pull-request
      requant upload out me/Llama-3.2-1B --branch 4bit
    """  # noqa: D301
    settings: dict[str, Any] = {"private": private, "branch": branch, "force": force}
    settings |= {"pull_request": pull_request, "scores": scores}
    if not preview:
        send(output, repository, settings, base_model=base_model, quiet=quiet, json=json)
        return
    from requant.api import upload as publishing
    from requant.cli import tables

    with handle_errors():
        shown = publishing.upload(
            output, repository, base_model=base_model, preview=True, scores=scores
        )
        if json:
            print_json(shown.to_dict())
        else:
            tables.show_upload(shown)
            for note in shown.notes:
                print_stderr(f"warning: {note}")


def send(
    output: Path,
    repository: str,
    settings: Mapping[str, Any],
    *,
    base_model: str | None = None,
    quiet: bool,
    json: bool = False,
    resumes: bool = True,
) -> None:
    """Upload with huggingface_hub's bars on a terminal, or a line in a log.

    Args:
        output: The folder.
        repository: As in ``requant.upload``.
        settings: Its options private, branch, pull_request and force.
        base_model: As in ``requant.upload``.
        quiet: Whether only errors and warnings are printed.
        json: Whether the result is printed as JSON.
        resumes: Whether the command that runs resumes it; if not, an error names one that does.
    """
    from requant.api import upload as publishing

    with handle_errors():
        bars = not quiet and sys.stderr.isatty()
        if not quiet and not bars:
            print_stderr(f"uploading {output} to {repository}")
        try:
            done = publishing.upload(
                output, repository, base_model=base_model, show_progress=bars, **settings
            )
        except HubError as error:
            if not resumes:
                command = shlex.join(["requant", "upload", str(output), repository])
                error.add_note(f"{output} is complete; upload it with: {command}")
            raise
        for note in done.notes:
            print_stderr(f"warning: {note}")
        if json:
            print_json(done.to_dict())
        elif not quiet:
            if done.difference:
                print_stderr(done.difference)
            if done.removed:
                print_stderr(f"removed there, of an earlier upload: {join_first(done.removed)}")
            print_stderr(f"uploaded: {done.url}")
