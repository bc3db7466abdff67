"""What parts of a conversion have in common: options that are not for parts, and the command.

Parts are started by the user, or by the engine of ``--engine``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from requant.core.types import Source
from requant.errors import ParseError, UsageError
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.part import MAX_PARTS
from requant.sources.hub_repository import Repository

Command = Mapping[str, Any]
"""What ``join_command`` gives: JSON data."""


def check_part(options: ConvertOptions, run: RunOptions) -> None:
    """Reject options that a part, or an engine, cannot follow, before the source is opened.

    Raises:
        UsageError: There is one.
    """
    _check_engine(run)
    if run.part is None and run.engine is None:
        return
    flag = "--part" if run.engine is None else "--engine"
    instead = {
        "--save-recipe": (
            run.save_recipe is not None and run.part is not None,
            "requant plan SOURCE --budget SIZE --save-recipe FILE.toml chooses the bits; give "
            "--recipe FILE.toml to every part",
        ),
        "--calibrate": (
            options.calibrate is not None,
            "requant calibrate SOURCE --hessian -o stats.safetensors collects the statistics once; "
            "give --gptq --imatrix stats.safetensors to every part",
        ),
        "--consume-source": (
            run.consume_source and run.part is None,
            "give it to parts that you start, with --part",
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
        "--verify-load": (
            run.verify_load and run.part is not None,
            "give it to `requant join`",
        ),
    }
    for other, (is_given, way_out) in instead.items():
        if is_given:
            raise UsageError(f"{other} and {flag} exclude each other: {way_out}")


def _check_engine(run: RunOptions) -> None:
    """Reject options of an engine without one, and those of one part with it."""
    if run.engine is None:
        for flag, value in (("--address", run.address), ("--parts", run.parts)):
            if value is not None:
                raise UsageError(f"{flag} is for a cluster: add --engine ray")
    elif run.part is not None:
        raise UsageError("--part and --engine exclude each other: the engine runs every part")
    elif run.parts is not None and not 1 <= run.parts <= MAX_PARTS:
        raise UsageError(f"--parts {run.parts}: expected 1 to {MAX_PARTS:,}")


def join_command(
    source: Source, remote: Repository | None, options: ConvertOptions, run: RunOptions
) -> dict[str, Any]:
    """What ``join`` repeats the plan from, as JSON data; paths are absolute."""
    return {
        "source": str(source) if remote is not None else str(Path(source).absolute()),
        "revision": None if remote is None else remote.commit,
        "options": with_absolute_paths(options).to_dict(),
        "force": run.force,
        "consume": run.part.count if run.part is not None and run.consume_source else None,
    }


def with_absolute_paths(options: ConvertOptions) -> ConvertOptions:
    """The options as they mean the same from another working folder."""
    return replace(
        options,
        config_from=_absolute(options.config_from),
        statistics=_absolute(options.statistics),
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


class JoinCommand(NamedTuple):
    """What ``join`` repeats the plan from."""

    source: str
    revision: str | None
    options: ConvertOptions
    force: bool
    consume: int  # how many parts delete the source; 0 if none does


def read_join_command(command: Mapping[str, Any], staging: Path) -> JoinCommand:
    """Read what ``join_command`` gives.

    Raises:
        ParseError: It is not what ``join_command`` gives.
    """
    source, revision = command.get("source"), command.get("revision")
    options = command.get("options")
    if not (
        isinstance(source, str)
        and isinstance(options, Mapping)
        and isinstance(revision, str | None)
        and isinstance(command.get("consume"), int | None)
    ):
        raise ParseError(f"{staging / 'parts' / 'command'} is not what requant wrote there")
    force, consume = bool(command.get("force")), command.get("consume") or 0
    return JoinCommand(source, revision, ConvertOptions.from_dict(options), force, consume)
