"""Pipeline stage 1: read SOURCE, a folder with safetensors or GGUF, as a Checkpoint.

Only headers and JSON are read, by the module of each kind of source.
"""

from __future__ import annotations

import os
from pathlib import Path

from requant.checkpoints.checkpoint import Checkpoint
from requant.checkpoints.folder_files import is_gguf
from requant.checkpoints.safetensors_folder import read_folder
from requant.errors import UsageError


def read_checkpoint(
    path: str | os.PathLike[str],
    config_from: str | os.PathLike[str] | None = None,
    stubs: Path | None = None,
    mmproj: str | None = None,
) -> Checkpoint:
    """Read a checkpoint: headers and JSON only.

    Weights are ``model.safetensors``, or the shards that ``model.safetensors.index.json``
    names, or, without either, every ``*.safetensors`` file of the folder. A file, or a folder
    without any of these, may be GGUF.

    Args:
        path: The folder, or a GGUF file.
        config_from: For GGUF: a folder whose config.json and side files are taken.
        stubs: A folder with the headers of weight files that were deleted.
        mmproj: For GGUF: the vision part, as ``read_gguf`` takes it.

    Raises:
        CheckpointError: With all problems of the source.
        UsageError: ``config_from`` or a vision part for another source than GGUF.
    """
    folder = Path(path)
    if is_gguf(folder):
        from requant.gguf.reader import read_gguf  # imported late for a fast start

        taken = None if config_from is None else Path(config_from)
        return read_gguf(folder, taken, mmproj=mmproj)
    if config_from is not None:
        raise UsageError(f"--config-from is for GGUF sources; {folder} has its own config.json")
    if mmproj not in (None, "none"):
        raise UsageError(f"--mmproj is for GGUF sources; {folder} is none")
    return read_folder(folder, stubs)


def as_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    config_from: str | os.PathLike[str] | None = None,
    stubs: Path | None = None,
    mmproj: str | None = None,
) -> Checkpoint:
    """Return the checkpoint of a source: read, or that of a repository on the hub as it is.

    Arguments and errors are those of ``read_checkpoint``.
    """
    if not isinstance(source, Checkpoint):
        return read_checkpoint(source, config_from, stubs, mmproj)
    if config_from is not None and source.gguf is None:
        raise UsageError(f"--config-from is for GGUF files; {source.source} is on the hub")
    return source
