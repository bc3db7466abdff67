"""What parts of a conversion have in common: options that are not for parts, and the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from requant.core.types import Source
from requant.errors import ParseError, UsageError
from requant.quantization.options import ConvertOptions, RunOptions
from requant.sources.hub_repository import Repository


def check_part(options: ConvertOptions, run: RunOptions) -> None:
    """Reject options that a part cannot follow, before the source is opened.

    Raises:
        UsageError: There is one.
    """
    instead = {
        "--budget": (
            options.budget is not None,
            "requant plan SOURCE --budget SIZE --save-recipe FILE.toml chooses the bits once; give "
            "--recipe FILE.toml to every part",
        ),
        "--calibrate": (
            options.calibrate is not None,
            "requant calibrate SOURCE --hessian -o stats.safetensors collects the statistics once; "
            "give --gptq --imatrix stats.safetensors to every part",
        ),
        "--consume-source": (
            run.consume_source,
            "other parts still read the source; delete it after `requant join`",
        ),
        "--allow-nonfinite": (
            run.allow_nonfinite,
            "the plan would differ from part to part; exclude the layers that a part names with "
            "--override 'LAYER=skip' in every part",
        ),
        "--no-resume": (
            not run.resume,
            "it would undo the other parts; to start over, remove the hidden folder next to OUTPUT",
        ),
        "--verify-load": (run.verify_load, "give it to `requant join`"),
    }
    for flag, (is_given, way_out) in instead.items():
        if is_given:
            raise UsageError(f"{flag} and --part exclude each other: {way_out}")


def join_command(
    source: Source, remote: Repository | None, options: ConvertOptions, run: RunOptions
) -> dict[str, Any]:
    """What ``join`` repeats the plan from, as JSON data; paths are absolute."""
    here = replace(
        options,
        config_from=_absolute(options.config_from),
        statistics=_absolute(options.statistics),
    )
    return {
        "source": str(source) if remote is not None else str(Path(source).absolute()),
        "revision": None if remote is None else remote.commit,
        "options": here.to_dict(),
        "force": run.force,
    }


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def read_join_command(
    command: Mapping[str, Any], staging: Path
) -> tuple[str, str | None, ConvertOptions, bool]:
    """Source, revision, options and whether an output is replaced, of ``join_command``.

    Raises:
        ParseError: It is not what ``join_command`` gives.
    """
    source, revision = command.get("source"), command.get("revision")
    if not isinstance(source, str) or not isinstance(revision, str | None):
        raise ParseError(f"{staging / 'parts' / 'command'} is not what requant wrote there")
    options = ConvertOptions.from_dict(command["options"])
    return source, revision, options, bool(command.get("force"))
