"""A source file and an output file, open as a run has them."""

import os
from pathlib import Path

import numpy as np

from requant.checkpoints.checkpoint import OpenedSource, SourceFile, StoredTensor
from requant.core.dtypes import HEADER_NAME, TensorInfo
from requant.errors import OutputError
from requant.execution.source_reader import SourceReader

GAP = 24  # bytes before each tensor of the source


class Shards:
    """One open file."""

    def __init__(self, fd: int) -> None:
        self.only = fd

    def fd(self, file: str) -> int:
        return self.only

    def write_error(self, error: OSError) -> OutputError:
        return OutputError(f"out: {error.strerror}")


class Files:
    """A source with tensors, and a shard for outputs."""

    def __init__(self, folder: Path, tensors: dict[str, np.ndarray]) -> None:
        data, self.inputs = bytearray(), {}
        for role, array in tensors.items():
            data += b"?" * GAP
            info = TensorInfo(HEADER_NAME[array.dtype], array.shape)
            self.inputs[role] = StoredTensor(f"w.{role}", info, "in", len(data))
            data += array.tobytes()
        (folder / "in").write_bytes(data)
        self.path = folder / "out"
        self.shard = os.open(self.path, os.O_RDWR | os.O_CREAT)
        file = SourceFile("in", len(data), "")
        self.reader = SourceReader([file], OpenedSource(folder), (), ("in",))
        self.reader.__enter__()

    def close(self) -> None:
        self.reader.__exit__()
        os.close(self.shard)
