"""The fixtures in the repository: values of the tools, and cuts of the full ones."""

import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import requant
from tests.support.fixture_folders import CUT, FULL, NAMES, cut_fixture
from tests.support.safetensors_files import read_file, read_folder

pytestmark = pytest.mark.sweep(3)

ROOT = Path(__file__).parents[2]
# The tool's own order of float32 operations; every other value is exact.
ORDER = {"bnb-int8": 1e-6, "paroquant-g128": 1e-6, "paroquant-g64-bias": 1e-6}
GGUF = [name for name in NAMES if name.startswith("gguf-")]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in GGUF])
def test_values_of_the_tool(name: str, tmp_path: Path) -> None:
    """Of the cut, whether the full one is there or not."""
    folder = cut_fixture(name)
    options = {"dequantize": True, "dtype": "float32", "layout": "keep"}
    requant.convert(folder / "checkpoint", tmp_path / "dense", **options)
    made = read_folder(tmp_path / "dense")
    expected = read_file(folder / "expected.safetensors")
    compared = [key for key in expected if key.endswith(".weight")]
    assert compared
    for key in compared:
        got, values = made[key], expected[key]
        assert got.shape == values.shape, key
        room = ORDER.get(name, 0.0) * float(np.abs(values).max())
        assert np.abs(got.astype(np.float64) - values).max() <= room, key


def test_the_gguf_package_decodes_the_values_that_it_wrote() -> None:
    """Values of GGUF files are decoded when they are asked for: the full fixture holds the same."""
    needs_full_fixtures()
    for name in GGUF:
        stored = read_file(FULL / name / "expected.safetensors")
        decoded = read_file(cut_fixture(name) / "expected.safetensors")
        assert decoded.keys() == stored.keys(), name
        assert all(np.array_equal(decoded[key], stored[key]) for key in stored), name


@pytest.mark.slow
def test_the_script_makes_what_is_committed(tmp_path: Path) -> None:
    needs_full_fixtures()
    script = ROOT / "scripts" / "cut-fixtures"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path / "cut")], check=True)
    made, committed = contents(tmp_path / "cut"), contents(CUT)
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


def test_what_a_cut_keeps_is_the_tool_s_own() -> None:
    """Every tensor of the model and every value is in the full fixture, with the same bytes."""
    needs_full_fixtures()
    for name in NAMES:
        if name in GGUF:
            file = "checkpoint/model.gguf"
            assert (CUT / name / file).read_bytes() == (FULL / name / file).read_bytes()
            continue
        whole = cut_fixture(name)
        for own, file in (
            (CUT / name, "checkpoint/model.safetensors"),
            (whole, "expected.safetensors"),
        ):
            full, cut = read_file(FULL / name / file), read_file(own / file)
            assert cut, name
            for key, array in cut.items():
                there = full[key]
                assert (array.dtype, array.shape) == (there.dtype, there.shape), (name, key)
                assert array.tobytes() == there.tobytes(), (name, key)


def test_the_cuts_stay_small() -> None:
    assert sum(path.stat().st_size for path in CUT.rglob("*") if path.is_file()) < 8_000_000


def needs_full_fixtures() -> None:
    if not FULL.is_dir():
        assert os.environ.get("REQUANT_REQUIRE_SHARED") != "1", f"{FULL} is missing"
        pytest.skip("the full fixtures are not here")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path; packed ones unpacked, as releases of liblzma may differ."""
    return {
        str(path.relative_to(folder)): (
            lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
