"""Where the checkpoints of other tools lie: full next to the repository, cut in tests/fixtures.

``scripts/cut-fixtures`` makes the cuts. A cut holds the tool's own bytes of some quantized
layers, and the values that the tool decodes, packed; it is unpacked here, and filled with random
dense matrices where it lacks those of a whole model. Every test of a fixture runs on the full
one where that is there and on the cut elsewhere, or with ``REQUANT_CUT_FIXTURES=1``. The source
distribution holds neither.
"""

import atexit
import functools
import json
import lzma
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import ROOT, SHARED
from tests.support.safetensors_files import DTYPES, read_file, read_metadata, write_file

FULL = SHARED / "fixtures"
CUT = ROOT / "tests" / "fixtures"
NAMES = sorted(path.name for path in CUT.iterdir()) if CUT.is_dir() else []


def fixture(name: str) -> Path:
    """The folder of a fixture: ``checkpoint`` and ``expected.safetensors``, not to be changed."""
    if os.environ.get("REQUANT_CUT_FIXTURES") == "1":
        return cut_fixture(name)
    if (FULL / name).is_dir():
        return FULL / name
    assert os.environ.get("REQUANT_REQUIRE_SHARED") != "1", f"{FULL / name} is missing"
    return cut_fixture(name)


@functools.cache
def cut_fixture(name: str) -> Path:
    """The cut of a fixture, unpacked and whole."""
    if not CUT.is_dir():
        pytest.skip("the source distribution holds no fixtures")
    folder = _scratch() / name
    shutil.copytree(CUT / name, folder)
    packed = folder / "expected.safetensors.xz"
    if packed.exists():
        (folder / "expected.safetensors").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
        filled = json.loads((folder / "meta.json").read_text())["filled"]
        _fill(folder / "checkpoint" / "model.safetensors", filled)
    else:
        _decode(folder / "checkpoint" / "model.gguf", folder / "expected.safetensors")
    return folder


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="requant-fixtures-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _fill(file: Path, filled: dict[str, tuple[str, list[int]]]) -> None:
    """Append dense matrices; the same in every run, and outputs of a layer as large as inputs."""
    tensors, metadata = read_file(file), read_metadata(file)
    for name, (dtype, shape) in filled.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        tensors[name] = (values / np.sqrt(shape[-1])).astype(DTYPES[dtype])
    write_file(file, tensors, metadata)


def _decode(file: Path, output: Path) -> None:
    """The values of every matrix of a GGUF file, decoded by the package that wrote it."""
    import gguf

    tensors: dict[str, np.ndarray] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4")
            tensors[tensor.name] = values.reshape([int(length) for length in tensor.shape[::-1]])
    write_file(output, tensors)
