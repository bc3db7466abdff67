"""GPTQ's ``g_idx``: missing, empty or never filled, held against ``desc_act``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.conversions import rejection
from tests.support.format_folders import IN, SOURCES, Source
from tests.support.safetensors_files import read_folder

NAME = "up.g_idx"
INDICES: dict[str, np.ndarray | None] = {
    "missing": None,
    "empty": np.zeros(0, np.int32),
    "zeros": np.zeros(IN, np.int32),
}
METHODS = ("gptq", "auto-round")


def source_with(method: str, index: str, **declared: Any) -> Source:
    source = SOURCES[method]()
    found = INDICES[index]
    if found is None:
        del source.tensors[NAME]
    else:
        source.tensors[NAME] = found
    source.config["quantization_config"] |= declared
    return source


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("declared", [{}, {"desc_act": False}])
def test_in_order_where_nothing_says_otherwise(
    method: str, index: str, declared: dict[str, Any], tmp_path: Path
) -> None:
    source = source_with(method, index, **declared)
    options: dict[str, Any] = {"layout": "keep", "dequantize": True, "dtype": "float32"}
    requant.convert(source.write(tmp_path / "source"), tmp_path / "out", **options)
    made = read_folder(tmp_path / "out")
    assert NAME not in made
    assert np.array_equal(made["up.weight"], source.values["up"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index", INDICES)
def test_an_order_that_is_said_and_not_there(method: str, index: str, tmp_path: Path) -> None:
    """Codes read in another order than theirs are other values, and nothing shows it."""
    folder = source_with(method, index, desc_act=True).write(tmp_path / "source")
    message = rejection(folder, tmp_path / "out")
    assert (
        "up.g_idx: puts every input into group 0 of 4" in message or "up: has no g_idx" in message
    )


@pytest.mark.parametrize("desc_act", [True, False])
def test_a_layers_own_rule_decides(desc_act: bool, tmp_path: Path) -> None:
    rules = {"dynamic": {"+:up": {"desc_act": desc_act}}}
    source = source_with("gptq", "missing", desc_act=not desc_act, **rules)
    folder = source.write(tmp_path / "source")
    if desc_act:
        assert "desc_act" in rejection(folder, tmp_path / "out")
    else:
        requant.convert(folder, tmp_path / "out", layout="keep")


def test_the_advice_of_the_error_works(tmp_path: Path) -> None:
    rejected = source_with("gptq", "missing", desc_act=True).write(tmp_path / "rejected")
    assert "say false there" in rejection(rejected, tmp_path / "out")
    mended = source_with("gptq", "missing", desc_act=False).write(tmp_path / "mended")
    requant.convert(mended, tmp_path / "out", layout="keep")


def test_one_group_has_no_order(tmp_path: Path) -> None:
    source = source_with("gptq", "missing", desc_act=True, group_size=-1)
    for role in ("scales", "qzeros"):
        source.tensors[f"up.{role}"] = source.tensors[f"up.{role}"][:1].copy()
    requant.convert(source.write(tmp_path / "source"), tmp_path / "out", layout="keep")
    assert NAME not in read_folder(tmp_path / "out")
