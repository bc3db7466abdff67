"""The upload command, and the upload that ends a conversion."""

from __future__ import annotations

import sys
from pathlib import Path

from requant.cli.error_handling import handle_errors, print_json, print_stderr
from requant.cli.options import BaseModel, Json, Preview, Private, Quiet, Repository, Written
from requant.text import join_first


def upload(
    output: Written,
    repository: Repository,
    base_model: BaseModel = None,
    private: Private = False,
    preview: Preview = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an OUTPUT of convert to the hub, with a model card.

    The card has the origin of the model, the exact command, the figures, and how to run and
    check it; --dry-run prints it. Stopped, the same command resumes: weight files that
    are on the hub already are not sent again.

    \b
    Examples:
      requant upload Llama-3.2-1B-4bit me/Llama-3.2-1B-4bit --dry-run
      requant upload Llama-3.2-1B-4bit me/Llama-3.2-1B-4bit --base-model meta-llama/Llama-3.2-1B
    """  # noqa: D301
    if not preview:
        send(output, repository, base_model, private=private, quiet=quiet, json=json)
        return
    from requant.api import upload as publishing
    from requant.cli import tables

    with handle_errors():
        shown = publishing.upload(output, repository, base_model=base_model, preview=True)
        if json:
            print_json(shown.to_dict())
        else:
            tables.show_upload(shown)


def send(
    output: Path,
    repository: str,
    base_model: str | None,
    private: bool,
    quiet: bool,
    json: bool = False,
) -> None:
    """Upload with huggingface_hub's bars on a terminal, or a line in a log."""
    from requant.api import upload as publishing

    with handle_errors():
        bars = not quiet and sys.stderr.isatty()
        if not quiet and not bars:
            publishing.check_name(repository)
            print_stderr(f"uploading {output} to {repository}")
        done = publishing.upload(
            output, repository, base_model=base_model, private=private, show_progress=bars
        )
        if json:
            print_json(done.to_dict())
        elif not quiet:
            if done.removed:
                print_stderr(f"removed there, of an earlier upload: {join_first(done.removed)}")
            print_stderr(f"uploaded: {done.url}")
