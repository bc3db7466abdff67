"""Hold what requant makes of a fixture against the values of the fixture's own tool.

A fixture is a folder ``checkpoint`` that a tool wrote and ``expected.safetensors`` with the
dense weights that the tool itself decodes: float32, exact (``fixture_folders`` says where they
lie). Values are read here with NumPy and MLX alone, never with code of requant.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import requant
from requant.quantization.config import Quantization
from requant.quantization.modes import resolve_quantization
from tests.support.fixture_folders import fixture
from tests.support.mlx_reference import affine, float_values, mlx_values
from tests.support.safetensors_files import read_file, read_folder


@dataclass
class Checked:
    """What a fixture was converted to, for further checks."""

    source: Path
    output: Path
    report: requant.Report
    weights: dict[str, np.ndarray]
    config: dict[str, Any]
    expected: dict[str, np.ndarray]

    def spec(self, path: str) -> dict[str, Any] | None:
        """The layer's entry in the config's quantization block; None for a dense layer."""
        if f"{path}.scales" not in self.weights:
            return None
        block = self.config["quantization"]
        found = block.get(path, {key: block.get(key) for key in ("group_size", "bits", "mode")})
        return {"mode": "affine"} | {k: v for k, v in found.items() if v is not None}


def check_fixture(
    name: str,
    tmp_path: Path,
    exactness: str | Mapping[str, str],
    *,
    bound: float = 0.0,
    largest_rms: float = 0.0,
    values_rtol: float = 0.0,
    stored_as: Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None] | None = None,
    **options: Any,
) -> Checked:
    """Convert a fixture and compare every quantized layer with the tool's own values.

    Args:
        name: The fixture.
        tmp_path: Where outputs go.
        exactness: The class that plan and report must state for the quantized layers; by
            layer path where they differ ("" for all others).
        bound: Of "rounded" affine layers, the most that a value may be off, in steps of its
            scale.
        largest_rms: Of "re-encoded" layers, the largest relative root mean square error.
        values_rtol: What the tool's own order of operations leaves open (relative to the
            largest value); 0 wherever the document says bit for bit.
        stored_as: Called with the source's tensors and the tool's values by layer path;
            brings the values into the order in which the output stores rows and inputs.
        **options: For ``requant.convert``.
    """
    source = fixture(name) / "checkpoint"
    expected = {
        key.removesuffix(".weight"): value
        for key, value in read_file(fixture(name) / "expected.safetensors").items()
        if key.endswith(".weight")
    }
    options = {"layout": "keep"} | options
    report = requant.convert(source, tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quant_method" not in config.get("quantization_config", {})
    weights = read_folder(tmp_path / "out")
    checked = Checked(source, tmp_path / "out", report, weights, config, expected)
    stated = {layer.layer: layer.exactness.value for layer in report.plan.layers}
    stored = dict(expected)
    if stored_as is not None:
        stored_as(read_folder(source), stored)
    for path, values in stored.items():
        wanted = exactness if isinstance(exactness, str) else exactness.get(path, exactness[""])
        assert stated[path] == wanted, f"{path}: {stated[path]}"
        check_values(checked, path, values, wanted, bound, largest_rms, values_rtol)
    if stored_as is None and "dtype" not in options:
        _check_dense_tensors(checked)
    small = {**options, "chunk_bytes": 4096, "threads": 3}
    requant.convert(source, tmp_path / "small", **small)
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    _check_dequantized(checked, tmp_path, values_rtol)
    check_in_memory(checked, options)
    return checked


def check_values(
    checked: Checked,
    path: str,
    values: np.ndarray,
    exactness: str,
    bound: float,
    largest_rms: float,
    values_rtol: float,
) -> None:
    spec = checked.spec(path)
    room = values_rtol * float(np.abs(values).max(initial=0.0))
    if spec is None:
        assert exactness != "exact" or checked.weights[f"{path}.weight"].dtype == np.float32
        got = checked.weights[f"{path}.weight"]
        assert np.abs(got.astype(np.float64) - values.astype(got.dtype)).max() <= room
        return
    if exactness == "re-encoded":
        got = mlx_values(checked.weights, path, spec)
        rms = float(np.sqrt(np.mean((got - values) ** 2) / np.mean(np.square(values, dtype=float))))
        assert rms <= largest_rms, f"{path}: {rms}"
        # The reported figure is against values rounded to the stored dtype: not bit for bit.
        reported = checked.report.errors[path].relative_rms
        assert abs(reported - rms) <= 0.05 * rms + 1e-3, f"{path}: {reported} against {rms}"
        return
    if spec["mode"] != "affine":
        assert np.array_equal(float_values(checked.weights, path, spec), values), path
        return
    layer = affine(checked.weights, path, spec["group_size"], spec["bits"])
    assert layer.values.shape == values.shape, path
    if exactness == "exact" and not room:
        assert np.array_equal(layer.values.astype(np.float32), values), path
    else:
        steps = bound * np.abs(layer.scales) + room
        assert (np.abs(layer.values - values) <= steps).all(), path
    # The codes themselves: the nearest to the tool's values on the layer's own grid.
    live = layer.scales != 0
    with np.errstate(divide="ignore", invalid="ignore"):
        nearest = np.rint((values - layer.biases) / layer.scales)
    # A bias that may be half a step off can make the neighbour the nearest.
    assert (np.abs(nearest[live] - layer.codes[live]) <= int(bound + 0.5)).all(), path


def _check_dense_tensors(checked: Checked) -> None:
    """Tensors that both folders name are the same, but for those of layers that have codes."""
    before = read_folder(checked.source)
    coded = [x.layer for x in checked.report.plan.layers if x.treatment == "quantized"]
    own = tuple(f"{path}." for path in (*checked.expected, *coded))
    for name, array in before.items():
        if name in checked.weights and (not name.startswith(own) or name.endswith(".bias")):
            after = checked.weights[name]
            assert array.dtype == after.dtype, name
            assert array.tobytes() == after.tobytes(), name
    biases = [n for n in before if n.endswith(".bias") and n.startswith(own)]
    assert all(name in checked.weights for name in biases)


def _check_dequantized(checked: Checked, tmp_path: Path, values_rtol: float) -> None:
    """``--dequantize`` to float32 gives the tool's values bit for bit."""
    requant.convert(
        checked.source, tmp_path / "dense", dequantize=True, dtype="float32", layout="keep"
    )
    dense = read_folder(tmp_path / "dense")
    for path, values in checked.expected.items():
        got = dense[f"{path}.weight"]
        if values_rtol:
            room = values_rtol * float(np.abs(values).max())
            assert np.abs(got.astype(np.float64) - values).max() <= room, path
        else:
            assert got.shape == values.shape, path
            assert np.array_equal(got, values), path
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config


def check_in_memory(checked: Checked, options: Mapping[str, Any]) -> None:
    """``transform_weights`` gives the folder's tensors for both array libraries.

    Only where the folder's options are those that it takes: none, or for layers that need one.
    """
    given = {key: options[key] for key in ("bits", "group_size", "mode") if key in options}
    if options.keys() - given.keys() != {"layout"}:
        return
    otherwise = resolve_quantization(**given) if given else None
    block = json.loads((checked.source / "config.json").read_text())["quantization_config"]
    before = read_folder(checked.source)
    if given:
        try:
            requant.transform_weights(before, block)
        except requant.InvariantError:
            pass
        else:
            return  # every layer has its own treatment
        # A conversion covers layers that are dense in the source, too; this does not.
        only = [f"^{re.escape(path)}$" for path in checked.expected]
        output = checked.output.with_name("only")
        requant.convert(checked.source, output, only=only, **options)
        same_in_memory(checked.source, output, otherwise)
        return
    same_in_memory(checked.source, checked.output, otherwise)


def same_in_memory(source: Path, output: Path, otherwise: Quantization | None = None) -> None:
    """``transform_weights`` makes the output of the tensors of SOURCE, for both array libraries."""
    block = json.loads((source / "config.json").read_text())["quantization_config"]
    weights = read_folder(output)
    made, quantization = requant.transform_weights(read_folder(source), block, otherwise=otherwise)
    assert made.keys() == weights.keys()
    for name, array in made.items():
        assert array.dtype == weights[name].dtype, name
        assert array.tobytes() == weights[name].tobytes(), name
    config = json.loads((output / "config.json").read_text())
    assert quantization.to_dict() == config["quantization"]

    lazy: dict[str, mx.array] = {}
    for file in sorted(source.glob("*.safetensors")):
        lazy |= mx.load(str(file))
    by_mlx, same = requant.transform_weights(lazy, block, otherwise=otherwise)
    assert same == quantization
    for file in sorted(output.glob("*.safetensors")):
        for name, wanted in mx.load(str(file)).items():
            got = by_mlx[name]
            assert isinstance(got, mx.array)
            assert got.dtype == wanted.dtype, name
            assert mx.array_equal(got.view(mx.uint8), wanted.view(mx.uint8)), name
