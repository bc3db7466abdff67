"""Every file under examples/ runs in an empty folder and prints what it should."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import requant

pytestmark = pytest.mark.sweep(1, tests=("test_no_example_is_forgotten",))

EXAMPLES = Path(__file__).parents[2] / "examples"
MICRO = EXAMPLES / "micro-llama"
FORMAT = EXAMPLES / "new-format"


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    """Run a command and return its output; ``path`` is added to Python's module path."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(path or ""),
    }
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "awq"
    run(sys.executable, EXAMPLES / "make_awq_folder.py", MICRO, folder, cwd=folder.parent)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    return folder


def test_no_example_is_forgotten() -> None:
    text = Path(__file__).read_text()
    files = [x for x in EXAMPLES.iterdir() if x.is_file() and x.name != "README.md"]
    assert [x.name for x in files if f'"{x.name}"' not in text] == []


def test_awq_in_memory(awq: Path, tmp_path: Path) -> None:
    printed = run(sys.executable, EXAMPLES / "awq_in_memory.py", awq, cwd=tmp_path)
    assert "block 0: (1, 128)" in printed


def test_the_awq_folder_holds_the_model(awq: Path, tmp_path: Path) -> None:
    """Its dense values are the model's, within half a step and a scale's rounding."""
    requant.convert(awq, tmp_path / "out", dequantize=True, dtype="float32", layout="keep")
    ours, dense = load_file(tmp_path / "out" / "model.safetensors"), {}
    for name, array in load_file(MICRO / "model.safetensors").items():
        dense[name] = np.asarray(array, np.float32)
    assert ours.keys() == dense.keys()
    for name in (name for name in dense if name.endswith("_proj.weight")):
        step = np.ptp(dense[name].reshape(-1, 64), axis=1) / 15
        off = np.abs(ours[name] - dense[name]).reshape(-1, 64).max(1)
        assert (off <= 1.02 * step + 1e-4).all(), name


def test_mixed_precision(tmp_path: Path) -> None:
    printed = run(sys.executable, EXAMPLES / "mixed_precision.py", MICRO, "out", cwd=tmp_path)
    assert [line.split(":")[0] for line in printed.splitlines()] == ["flat", "mixed"]
    plan = requant.plan(MICRO, recipe=EXAMPLES / "mixed.toml")
    assert {x.target for x in plan.layers if x.treatment == "quantized"} == {
        "affine 3-bit g64",
        "affine 5-bit g32",
        "affine 6-bit g64",
    }


def test_back_to_dense(awq: Path, tmp_path: Path) -> None:
    run(sys.executable, EXAMPLES / "back_to_dense.py", awq, "out", "bfloat16", cwd=tmp_path)
    found = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {array.dtype for array in found} == {np.dtype(ml_dtypes.bfloat16)}


def test_converting_in_ci(tmp_path: Path) -> None:
    printed = run(EXAMPLES / "convert_in_ci.sh", MICRO, "out", "--bits", "6", cwd=tmp_path)
    assert printed.splitlines()[-1].startswith("6.5")
    assert (tmp_path / "out" / "requant.json").is_file()


def test_the_workflow_runs_the_script() -> None:
    assert "examples/convert_in_ci.sh source" in (EXAMPLES / "convert-workflow.yml").read_text()


# -- a custom format ---------------------------------------------------------------
def install(site: Path, points: dict[str, str], name: str = "requant-int8-rows") -> Path:
    """Write the metadata of an installed package with these entry points."""
    about = site / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}\n" for key, value in points.items()]
    (about / "entry_points.txt").write_text("[requant.formats]\n" + "".join(lines))
    return site


@pytest.fixture
def int8_rows(tmp_path: Path) -> Path:
    """The example's package, installed as pyproject.toml describes it."""
    site = tmp_path / "site"
    project = tomllib.loads((FORMAT / "pyproject.toml").read_text())["project"]
    install(site, project["entry-points"]["requant.formats"], project["name"])
    (site / "requant_int8_rows.py").symlink_to(FORMAT / "requant_int8_rows.py")
    return site


def int8_folder(folder: Path, **changed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A folder of the format; codes take every value, scales are powers of two and others."""
    codes = np.arange(4 * 128, dtype=np.int64).reshape(4, 128).astype(np.int8)
    scales = np.array([0.5, 0.3, 2.0, 1e-3], np.float16)
    tensors = {"up.weight": codes, "up.scale": scales, "norm.weight": np.ones(8, np.float16)}
    folder.mkdir()
    save_file(tensors | changed, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "int8-rows"}}')
    return codes, scales


def test_custom_format(int8_rows: Path, tmp_path: Path) -> None:
    codes, scales = int8_folder(tmp_path / "source")
    printed = run("requant", "convert", "source", "out", cwd=tmp_path, path=int8_rows)
    assert "int8-rows" in printed and "exact" in printed
    found = load_file(tmp_path / "out" / "model.safetensors")
    stored = found["up.weight"].view(np.uint8)  # eight bits: one code a byte
    values = stored * found["up.scales"].repeat(128, 1).astype(np.float64)[:, :128]
    values += found["up.biases"][:, :1].astype(np.float64)
    assert (values == codes * scales.astype(np.float64)[:, None]).all()
    run("requant", "verify", "source", "out", cwd=tmp_path, path=int8_rows)
    assert len((FORMAT / "requant_int8_rows.py").read_text().splitlines()) <= 60


def inspect_folder(folder: Path, site: Path) -> tuple[int, str]:
    """Exit code and output of ``requant inspect``."""
    env = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "requant", "inspect", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_problems_of_a_custom_format_are_named(int8_rows: Path, tmp_path: Path) -> None:
    """A scale of the wrong shape and a missing one: both are reported, each with what to do."""
    lone = {"up.scale": np.ones(3, np.float16), "down.weight": np.ones((4, 128), np.int8)}
    int8_folder(tmp_path / "source", **lone)
    code, printed = inspect_folder(tmp_path / "source", int8_rows)
    assert code == 1
    assert "up.weight: I8 [4, 128] with scale F16 [3], expected I8 [out, in]" in printed
    assert "F16 or BF16 [out]; export the model again" in printed
    assert "down.weight: has no down.scale; take both from one export" in printed


def test_broken_plug_ins_are_all_named(tmp_path: Path) -> None:
    points = {"absent": "no_such_module_here:Format", "wrong": "collections:OrderedDict"}
    site = install(tmp_path / "site", points, "broken-formats")
    int8_folder(tmp_path / "source")
    code, printed = inspect_folder(tmp_path / "source", site)
    assert code == 1 and "Traceback" not in printed
    absent, wrong = printed.splitlines()[-2:]
    assert "'absent' (no_such_module_here:Format of broken-formats 1.0)" in absent
    assert "ModuleNotFoundError" in absent and "repair or uninstall it" in absent
    assert "is OrderedDict without name (a str), claims(), read()" in wrong


def test_built_in_formats_do_not_load_plug_ins(awq: Path, tmp_path: Path) -> None:
    """A broken plug-in does not stop what requant reads by itself."""
    site = install(tmp_path / "site", {"absent": "no_such_module_here:Format"}, "broken-formats")
    assert inspect_folder(awq, site)[0] == 0
