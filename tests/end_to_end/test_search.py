"""--search in the pipeline: same sizes, less error, same bytes for any chunks, loads in MLX."""

from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import requant
from requant.errors import InvariantError, UnknownValueError
from requant.kernels import quantize as native
from requant.kernels.input_power import estimated_power
from requant.quantization.config import PerLayerQuantization, Quantization
from tests.support.plan_texts import note_texts

pytestmark = pytest.mark.slow

OPTIONS = [{"bits": bits} for bits in (2, 3, 4, 8)] + [{"mode": "mxfp4"}, {"mode": "nvfp4"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        "model.up.weight": rng.normal(0, 0.02, (96, 256)).astype(ml_dtypes.bfloat16),
        "model.experts.weight": rng.normal(0, 0.02, (3, 32, 128)).astype(ml_dtypes.bfloat16),
        "model.norm.weight": np.ones(256, ml_dtypes.bfloat16),
    }
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    arrays = {
        name: mx.array(w.astype(np.float32)).astype(mx.bfloat16) for name, w in tensors.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    return folder


def rms(report: requant.Report) -> float:
    return sum(error.relative_rms for error in report.errors.values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_less_error_at_the_same_size(source: Path, tmp_path: Path, options: dict) -> None:
    found = {
        level: requant.convert(source, tmp_path / level, **options, search=level, layout="keep")
        for level in ("off", "fast", "best")
    }
    weighted = [
        sum(x.weighted_rms or 0 for x in found[y].errors.values()) for y in ("best", "fast")
    ]
    assert 0 < weighted[0] <= weighted[1]
    assert max(rms(found["best"]), rms(found["fast"])) < rms(found["off"])
    assert all(error.weighted_rms is None for error in found["off"].errors.values())
    assert len({report.plan.bytes_out for report in found.values()}) == 1
    assert len({report.plan.hash for report in found.values()}) == 3
    assert any("searched" in note for note in note_texts(found["best"].plan.notes))
    assert not any("searched" in note for note in note_texts(found["off"].plan.notes))


def test_bytes_do_not_depend_on_chunks_and_threads(source: Path, tmp_path: Path) -> None:
    written = []
    for number, options in enumerate(({}, {"threads": 1, "chunk_bytes": 4000}, {"threads": 5})):
        output = tmp_path / str(number)
        requant.convert(source, output, bits=3, search="best", layout="keep", **options)
        written.append((output / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


def test_mlx_reads_the_values_that_the_search_meant(source: Path, tmp_path: Path) -> None:
    requant.convert(source, tmp_path / "out", bits=4, search="best", layout="keep")
    dense = mx.load(str(source / "model.safetensors"))
    coded = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for layer in ("model.up", "model.experts"):
        parts = [coded[f"{layer}.{role}"] for role in ("weight", "scales", "biases")]
        values = mx.dequantize(*parts, group_size=64, bits=4)
        w = dense[f"{layer}.weight"]
        rule = mx.dequantize(*mx.quantize(w, group_size=64, bits=4), group_size=64, bits=4)
        errors = [float(((v - w).astype(mx.float32) ** 2).sum()) for v in (values, rule)]
        assert errors[0] < 0.85 * errors[1]


def test_mlx_lm_loads_it_and_it_stays_nearer_to_the_dense_model(tmp_path: Path) -> None:
    """Mean KL divergence of the next-token distributions over some prose."""
    utils = pytest.importorskip("mlx_lm.utils")
    source = Path(__file__).parents[2] / "examples" / "micro-llama"
    text = (source.parent.parent / "docs" / "architecture.md").read_text()[:3000]
    folders = {"dense": source}
    for level in ("off", "best"):
        folders[level] = tmp_path / level
        requant.convert(source, folders[level], bits=3, search=level)
    logs = {}
    tokens = mx.array([utils.load_tokenizer(source).encode(text)[:512]])
    for name, folder in folders.items():
        model, _ = utils.load_model(folder)
        logits = model(tokens).astype(mx.float32)
        logs[name] = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def divergence(name: str) -> float:
        dense = logs["dense"]
        return float((np.exp(dense) * (dense - logs[name])).sum(-1).mean())

    assert 0 < divergence("best") < 0.9 * divergence("off")


def test_a_quantized_source_is_coded_again_with_a_search(source: Path, tmp_path: Path) -> None:
    requant.convert(source, tmp_path / "8", bits=8, layout="keep")
    reports = [
        requant.convert(tmp_path / "8", tmp_path / level, bits=3, search=level, layout="keep")
        for level in ("off", "best")
    ]
    assert rms(reports[1]) < 0.95 * rms(reports[0])


def test_kept_codes_are_not_touched(source: Path, tmp_path: Path) -> None:
    requant.convert(source, tmp_path / "4", bits=4, layout="keep")
    plan = requant.plan(tmp_path / "4", search="best", layout="keep")
    assert {step.search for step in plan.steps} == {"off"}


def test_unknown_search(source: Path) -> None:
    with pytest.raises(UnknownValueError, match=r"no such search.*off.*fast.*best"):
        requant.plan(source, search="deep")


def test_weight_maps_in_numpy() -> None:
    w = np.random.default_rng(1).normal(0, 0.02, (32, 128)).astype(np.float32)
    config = PerLayerQuantization.from_global(Quantization.affine(64, 3))
    errors = []
    for level in ("off", "fast", "best"):
        made = requant.quantize_weights({"up.weight": w}, config, search=level)
        back = requant.dequantize_weights(made, config)["up.weight"]
        errors.append(float(((back - w) ** 2).sum()))
    assert errors[0] > errors[1] > errors[2]
    power = estimated_power(w)
    chosen = {"search": "best", "weights": power, "by_magnitude": True}
    words = native.quantize(w, Quantization.affine(64, 3), **chosen)[0]
    assert np.array_equal(made["up.weight"], words)


def test_weight_maps_of_mlx_have_no_search() -> None:
    config = PerLayerQuantization.from_global(Quantization.affine(64, 3))
    with pytest.raises(InvariantError, match="computes on NumPy arrays"):
        requant.quantize_weights({"up.weight": mx.ones((8, 64))}, config, search="best")


def written(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)
        for name, x in mx.load(str(folder / "model.safetensors")).items()
    }


def heavy(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights whose columns have tails of different weight, as real layers have."""
    w = rng.standard_normal(shape)
    return (w * np.abs(w) ** rng.uniform(0, 2, shape[-1]) * 0.02).astype(np.float32)


def test_inputs_are_estimated_from_the_columns_of_each_matrix(tmp_path: Path) -> None:
    """Dense and quantized sources, stacks of experts, an embedding: as for the values in memory."""
    rng = np.random.default_rng(5)
    arrays = {
        "model.embed_tokens.weight": heavy(rng, 320, 128),
        "model.layers.0.up.weight": heavy(rng, 96, 256),
        "model.layers.0.experts.weight": heavy(rng, 3, 64, 128),
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    stored = {name: mx.array(x) for name, x in arrays.items()}
    mx.save_safetensors(str(source / "model.safetensors"), stored, {"format": "mlx"})
    keep = {"layout": "keep"}
    requant.convert(source, tmp_path / "8", bits=8, **keep)
    requant.convert(tmp_path / "8", tmp_path / "values", dequantize=True, **keep)
    config = PerLayerQuantization.from_global(Quantization.affine(64, 3))
    for number, folder in enumerate(("source", "8")):
        values = arrays if folder == "source" else written(tmp_path / "values")
        expected = requant.quantize_weights(values, config, search="fast")
        plain = {
            name: native.quantize(w, Quantization.affine(64, 3), search="fast", by_magnitude=True)
            for name, w in values.items()
        }
        for options in ({}, {"chunk_bytes": 3000, "threads": 3}):
            output = tmp_path / f"{number}{len(options)}"
            report = requant.convert(
                tmp_path / folder, output, bits=3, search="fast", **keep, **options
            )
            for name, x in written(output).items():
                assert np.array_equal(x, expected[name]), name
            for name, parts in plain.items():
                assert not np.array_equal(expected[name], parts.words), name
            for error in report.errors.values():
                assert error.weighted_rms is not None and error.weighted_rms != error.relative_rms
