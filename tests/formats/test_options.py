"""ConvertOptions on a quantized source: decode and encode in one pass is the same as in two."""

from pathlib import Path
from typing import Any

import pytest

import requant
from tests.support.fixture_folders import fixture
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

SOURCES = ["awq-gemm-g64-skip", "gptq-b4-g32-actorder-asym-v2", "auto-round-native-w2g32-asym"]


# No codes of these sources fit into any of them; where all fit, test_widening looks at it.
OPTIONS: dict[str, dict[str, Any]] = {
    "3:64": {"bits": 3, "group_size": 64},
    "8:64": {"bits": 8, "group_size": 64},
    "mxfp4": {"mode": "mxfp4"},
    "4:32": {"bits": 4, "group_size": 32},
}
CASES = [(name, OPTIONS[option]) for name in SOURCES for option in ("3:64", "mxfp4")]
CASES += [(name, OPTIONS["8:64"]) for name in SOURCES[1:]]
CASES.append((SOURCES[1], OPTIONS["4:32"]))


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_one_pass_is_two_passes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The values in between are those that --dequantize writes, in the dtype of the source."""
    source = fixture(name) / "checkpoint"
    layers = requant.plan(source, layout="keep").layers
    quantized = [x.layer for x in layers if x.treatment != "dense"]
    report = requant.convert(source, tmp_path / "one", layout="keep", **options)
    by_layer = {x.layer: x for x in report.plan.layers}
    requant.convert(source, tmp_path / "dense", layout="keep", dequantize=True)
    only = [f"^{path}$".replace(".", r"\.") for path in quantized]
    requant.convert(tmp_path / "dense", tmp_path / "two", layout="keep", only=only, **options)
    one, two = (_tensors(tmp_path / folder) for folder in ("one", "two"))
    again = [path for path in quantized if by_layer[path].treatment == "requantized"]
    # A requested target that the codes already have lets down_proj keep them: its order then moves.
    if any("was moved into" in note for note in note_texts(report.plan.notes)):
        again = [path for path in again if not path.endswith(("gate_proj", "up_proj"))]
    assert again
    for path in again:
        for role in ("weight", "scales", "biases"):
            assert one.get(f"{path}.{role}") == two.get(f"{path}.{role}"), f"{path}.{role}"
        assert by_layer[path].exactness == "re-encoded"
        assert report.errors[path].relative_rms > 0


def _tensors(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in read_folder(folder).items()}


def test_an_override_of_what_is_there_keeps_the_codes(tmp_path: Path) -> None:
    source = fixture("awq-gemm-g64-skip") / "checkpoint"
    plan = requant.plan(source, layout="keep", overrides=["down_proj=4:64", "up_proj=skip"])
    assert {x.treatment for x in plan.layers if "_proj" in x.layer} >= {"kept"}
    kept = {x.layer.rpartition(".")[2] for x in plan.layers if x.treatment == "kept"}
    assert {"down_proj", "up_proj"} <= kept


def test_a_skipped_layer_that_must_be_requantized_becomes_dense() -> None:
    """SKIP means no new codes: what MLX cannot hold is then dense."""
    source = fixture("gptq-b4-g32-actorder-asym-v2") / "checkpoint"
    plan = requant.plan(source, layout="keep", overrides=["q_proj=skip"])
    found = {x.treatment for x in plan.layers if x.layer.endswith("q_proj")}
    assert found == {"dequantized"}
