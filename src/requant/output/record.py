"""``requant.json``: what an output was made from, and the hash of every tensor in it.

It holds no time, no path and no name of a machine: equal conversions give equal records.
"""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from requant.checkpoints.folder_files import RECORD, check_folder
from requant.checkpoints.safetensors_folder import read_json
from requant.errors import CheckpointError, Problem
from requant.gguf.file_selection import is_mmproj_name
from requant.planning.plan import Plan
from requant.text import format_percent, format_value

FORMAT_VERSION = 3


def version() -> str:
    """The version of requant that is installed."""
    return installed_version("requant")


def read_record(folder: Path, instead: str = "") -> dict[str, Any]:
    """The record in a folder that ``convert`` wrote.

    ``instead`` is what to say where there is no record, if the caller knows better.

    Raises:
        CheckpointError: There is no folder, no record in it, or one of another version.
    """
    if missing := check_folder(folder):
        raise CheckpointError(str(folder), [Problem(str(folder), missing)])
    if not os.path.lexists(folder / RECORD):
        message = "is missing: requant did not write this folder, or an older version did"
        raise CheckpointError(str(folder), [Problem(RECORD, instead or message)])
    record = read_json(folder, RECORD)
    if record.get("record") != FORMAT_VERSION:
        message = (
            f"record is {format_value(record.get('record'))}, this version reads {FORMAT_VERSION}: "
            f"take the requant that wrote it, {format_value(record.get('requant'))}, or convert "
            f"again: requant convert SOURCE {shlex.quote(str(folder))} --force"
        )
        raise CheckpointError(str(folder), [Problem(RECORD, message)])
    return record


def build_record(
    plan: Plan,
    plan_hash: str,
    options: Mapping[str, Any],
    hashes: Mapping[str, str],
    files: Mapping[str, str],
    errors: Mapping[str, tuple[float, float]] | None = None,
    rounding: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The record of a finished output.

    ``options`` are those of ``ConvertOptions.to_dict``; ``hashes`` and ``files`` have the SHA-256
    of each tensor and of each file without weights; ``errors``, for layers with new codes, the
    relative RMS error and the largest error in steps; ``rounding``, for layers with rounded
    scales, the relative RMS error.
    """
    bytes_in = Counter[str]()
    for step in plan.steps:
        bytes_in[step.layer] += step.bytes_in
    record: dict[str, Any] = {
        "record": FORMAT_VERSION,
        "requant": version(),
        "plan": plan_hash,
        # A path says nothing elsewhere: what verifies against a GGUF source names it again.
        "options": dict(options)
        | {"layout": plan.layout, "config_from": None, "statistics": _file_name(options)}
        | {"mmproj": _vision_part(plan, options), "calibrate": _text_names(options)},
        "source": {
            "format": plan.format,
            "files": [asdict(file) for file in plan.files],
            "repository": plan.repository and list(plan.repository),
        },
        "layers": {
            layer.layer: {
                "treatment": layer.treatment,
                "exactness": layer.exactness,
                "source": layer.source,
                "target": layer.target,
                "shape": list(layer.shape),
                "bytes_in": bytes_in[layer.layer],
                "bytes_out": layer.nbytes,
                "reason": layer.reason.text if layer.reason else "",
                "bound": _bound(layer.bound, (rounding or {}).get(layer.layer)),
                "error": _round_errors((errors or {}).get(layer.layer)),
            }
            for layer in plan.layers
        },
        "headers": {shard.name: sha256(shard.header()).hexdigest() for shard in plan.shards},
        "tensors": {t.name: hashes[t.name] for shard in plan.shards for t in shard.tensors},
        "files": dict(files),
    }
    return record | {"sha256": record_hash(record)}


def _file_name(options: Mapping[str, Any]) -> str | None:
    """The statistics file's name; its SHA-256 is in the plan's hash.

    None for the file of a calibration that is a part of the conversion, which is deleted.
    """
    path = options.get("statistics")
    return None if path is None or options.get("calibrate") is not None else Path(path).name


def _text_names(options: Mapping[str, Any]) -> list[str] | None:
    """The names of the texts of a calibration."""
    texts = options.get("calibrate")
    return None if texts is None else [Path(text).name for text in texts]


def _vision_part(plan: Plan, options: Mapping[str, Any]) -> str | None:
    """``mmproj``: the name of the file, also where it was found next to the model."""
    given: str | None = options.get("mmproj")
    found = plan.files[-1].name if plan.files else ""
    return Path(given).name if given else found if is_mmproj_name(found) else None


def _bound(bound: str, measured: float | None) -> str:
    """The bound in words, with the measured error."""
    if measured is None:
        return bound
    found = f"measured {format_percent(measured)} (rms)"
    return f"{bound}; {found}" if bound else found


def _round_errors(error: tuple[float, float] | None) -> list[float] | None:
    """Errors in four digits: the last ones of a sum depend on how rows were cut into chunks."""
    return error and [float(f"{figure:.4g}") for figure in error]


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its own ``sha256``."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), default=str)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def encode_json(value: object) -> bytes:
    """A JSON file as an output holds it."""
    return (json.dumps(value, indent=4, ensure_ascii=False) + "\n").encode()
