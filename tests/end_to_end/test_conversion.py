"""Whole conversions on tiny checkpoints, held against MLX bit for bit."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from pytest import MonkeyPatch

from requant.api.convert import convert
from requant.errors import CheckpointError, OutOfRangeError, OutputError
from requant.quantization.config import parse_quantization
from tests.support.checkpoints import CONFIG, tree
from tests.support.full_disks import fill_disk
from tests.support.mlx_reference import load, same, to_mx
from tests.support.number_formats import bf16
from tests.support.plan_texts import reason_text

pytestmark = pytest.mark.sweep(2)

MODES = [("affine", b, g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def expect_triple(out: dict[str, mx.array], path: str, w: mx.array, mode, bits, group) -> None:
    words, scales, *biases = mx.quantize(w, group, bits, mode)
    assert same(out[f"{path}.weight"], words)
    assert same(out[f"{path}.scales"], scales)
    assert (f"{path}.biases" in out) == bool(biases)
    for expected in biases:
        assert same(out[f"{path}.biases"], expected)


@pytest.mark.parametrize("mode, bits, group_size", MODES)
def test_dense_to_each_mode_is_what_mlx_gives(
    dense: Path, tmp_path: Path, mode: str, bits: int, group_size: int
) -> None:
    source = load(dense)
    convert(dense, tmp_path / "out", bits=bits, group_size=group_size, mode=mode)
    out = load(tmp_path / "out")
    for path in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"):
        expect_triple(out, path, source[f"{path}.weight"], mode, bits, group_size)
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert same(out[name], source[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_casts_before_quantizing(dense: Path, tmp_path: Path, dtype: str) -> None:
    source = load(dense)
    convert(dense, tmp_path / "out", bits=4, dtype=dtype)
    out = load(tmp_path / "out")
    wanted = getattr(mx, dtype)
    w = source["lm_head.weight"].astype(wanted)
    expect_triple(out, "lm_head", w, "affine", 4, 64)
    norm = "model.layers.0.input_layernorm.weight"
    assert same(out[norm], source[norm].astype(wanted))


def test_router_correction_bias_keeps_its_dtype(checkpoint: Callable[..., Path], tmp_path: Path):
    name = "mlp.gate.e_score_correction_bias"
    source = checkpoint({name: np.ones(8, np.float32), "a.weight": bf16(8, 64)})
    convert(source, tmp_path / "out", bits=4, dtype="bfloat16")
    assert load(tmp_path / "out")[name].dtype == mx.float32


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 20, 1 << 30])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_chunks_and_threads_change_no_byte(
    dense: Path, tmp_path: Path, chunk_bytes: int, threads: int
) -> None:
    convert(dense, tmp_path / "one", bits=3, threads=1)
    convert(dense, tmp_path / "two", bits=3, threads=threads, chunk_bytes=chunk_bytes)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_shards_in_and_out(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    tensors = {f"layers.{n}.weight": bf16(32, 64, seed=n) for n in range(7)}
    convert(checkpoint(tensors, shards=3), tmp_path / "out", bits=4, shard_size=2500)
    out = load(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    assert set(index["weight_map"]) == set(out)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in out.values())
    assert index["metadata"]["total_parameters"] == 7 * 32 * 64
    for name, file in index["weight_map"].items():
        assert name in mx.load(str(tmp_path / "out" / file))
    for path in tensors:
        expect_triple(out, path[:-7], to_mx(tensors[path]), "affine", 4, 64)


@pytest.mark.parametrize("stored", ["pt", "mlx", None])
def test_metadata_say_whose_names_the_tensors_have(dense: Path, tmp_path: Path, stored: str | None):
    """Swift loaders take "mlx" for tensors that need no renaming, transposing or shifting."""
    shutil.copytree(dense, tmp_path / "copy")
    path = str(tmp_path / "copy" / "model.safetensors")
    arrays = dict(mx.load(path))
    mx.eval(arrays)
    mx.save_safetensors(path, arrays, {"format": stored} if stored else {})
    convert(tmp_path / "copy", tmp_path / "out", bits=4, layout="keep")
    _, metadata = mx.load(str(tmp_path / "out/model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx" if stored == "mlx" else "pt"}


def test_safetensors_package_reads_the_output(dense: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    convert(dense, tmp_path / "out", bits=4)
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert set(file.keys()) == set(load(tmp_path / "out"))


def test_other_files_are_copied_and_stale_weights_left_out(dense: Path, tmp_path: Path) -> None:
    (dense / "tokenizer.json").write_bytes(b'{"a": "\xc3\xa9"}\r\n')
    (dense / "modeling_custom.py").write_text("raise RuntimeError\n")
    (dense / "pytorch_model.bin").write_bytes(b"stale")
    (dense / "original").mkdir()
    (dense / "original" / "consolidated.00.pth").write_bytes(b"stale")
    before = tree(dense)
    report = convert(dense, tmp_path / "out", bits=4)
    out = tree(tmp_path / "out")
    assert out["tokenizer.json"] == before["tokenizer.json"]
    assert out["modeling_custom.py"] == before["modeling_custom.py"]
    assert "pytorch_model.bin" not in out
    assert not any(name.startswith("original") for name in out)
    assert "pytorch_model.bin" in dict(report.plan.left_out)
    assert tree(dense) == before


def test_config_keeps_every_other_key(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", bits=4)
    config = json.loads((tmp_path / "out/config.json").read_text())
    # There is a head of its own, whatever the flag of this source says.
    assert {k: config[k] for k in CONFIG} == CONFIG | {"tie_word_embeddings": False}
    assert parse_quantization((tmp_path / "out/config.json").read_text()) is not None


# -- MLX sources -------------------------------------------------------------------------
@pytest.fixture
def affine8(dense: Path, tmp_path: Path) -> Path:
    convert(dense, tmp_path / "affine8", bits=8, overrides=["up_proj=mxfp4", "lm_head=skip"])
    return tmp_path / "affine8"


def test_a_quantized_source_is_kept_bit_for_bit(affine8: Path, tmp_path: Path) -> None:
    report = convert(affine8, tmp_path / "out")
    before, after = load(affine8), load(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)
    assert (tmp_path / "out/config.json").read_bytes() == (affine8 / "config.json").read_bytes()
    kept = {x.layer: x for x in report.plan.layers if x.treatment == "kept"}
    assert {"model.embed_tokens", "model.layers.0.mlp.up_proj"} <= set(kept)
    assert all(x.exactness == "exact" for x in kept.values())


def test_dequantize_is_mx_dequantize(affine8: Path, tmp_path: Path) -> None:
    source = load(affine8)
    convert(affine8, tmp_path / "out", dequantize=True)
    out = load(tmp_path / "out")
    path = "model.embed_tokens"
    triple = [source[f"{path}.{role}"] for role in ("weight", "scales", "biases")]
    assert same(out[f"{path}.weight"], mx.dequantize(*triple, group_size=64, bits=8))
    path = "model.layers.0.mlp.up_proj"
    pair = [source[f"{path}.weight"], source[f"{path}.scales"]]
    assert same(out[f"{path}.weight"], mx.dequantize(*pair, group_size=32, bits=4, mode="mxfp4"))
    assert not any(name.endswith((".scales", ".biases")) for name in out)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config


def test_requantize_is_mlx_of_mlx(affine8: Path, tmp_path: Path) -> None:
    source = load(affine8)
    report = convert(affine8, tmp_path / "out", bits=4)
    out = load(tmp_path / "out")
    path = "model.embed_tokens"
    triple = [source[f"{path}.{role}"] for role in ("weight", "scales", "biases")]
    expect_triple(out, path, mx.dequantize(*triple, group_size=64, bits=8), "affine", 4, 64)
    expect_triple(out, "lm_head", source["lm_head.weight"], "affine", 4, 64)
    outcome = {x.layer: x for x in report.plan.layers}
    assert outcome[path].treatment == "requantized"
    assert outcome[path].exactness == "re-encoded"
    assert outcome["lm_head"].treatment == "quantized"


def test_a_layer_that_already_is_what_is_requested_keeps_its_codes(affine8: Path, tmp_path: Path):
    report = convert(affine8, tmp_path / "out", bits=8)
    outcome = {x.layer: x.treatment for x in report.plan.layers}
    assert outcome["model.embed_tokens"] == "kept"
    assert outcome["model.layers.0.mlp.up_proj"] == "requantized"
    assert same(
        load(tmp_path / "out")["model.embed_tokens.weight"],
        load(affine8)["model.embed_tokens.weight"],
    )


def test_corrupt_triples_are_all_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    words = np.zeros((8, 8), np.uint32)
    source = checkpoint(
        {
            **{"a.weight": words, "a.scales": bf16(8, 1), "b.weight": words},
            **{"b.scales": bf16(8, 2), "b.biases": bf16(8, 1), "c.weight": bf16(8, 8)},
            **{"c.scales": bf16(8, 1), "c.biases": bf16(8, 1), "d.weight": words},
            **{"e.weight": words, "e.scales": bf16(8, 1), "e.biases": bf16(8, 1)},
        },
        {"quantization": {"group_size": 64, "bits": 4, "e": False}},
    )
    with pytest.raises(CheckpointError) as raised:
        convert(source, tmp_path / "out")
    where = {problem.where for problem in raised.value.problems}
    assert {"a.biases", "b.scales", "c.weight", "d.weight"} <= where
    assert any("quantization.e" in place for place in where)
    assert not (tmp_path / "out").exists()


def test_a_quantization_block_that_does_not_parse(checkpoint: Callable[..., Path], tmp_path: Path):
    triple = {"a.weight": np.zeros((8, 8), np.uint32), "a.scales": bf16(8, 1)}
    triple["a.biases"] = bf16(8, 1)
    source = checkpoint(triple, {"quantization": {"group_size": "wide", "bits": 4}})
    with pytest.raises(CheckpointError) as raised:
        convert(source, tmp_path / "out")
    assert "group_size" in str(raised.value)


# -- values that are not numbers ----------------------------------------------------------
@pytest.fixture
def nonfinite(checkpoint: Callable[..., Path]) -> Path:
    bad = bf16(64, 128, seed=1)
    bad[3, 7], bad[40, 1] = np.nan, np.inf
    return checkpoint({"a.weight": bf16(64, 128), "b.weight": bad})


def test_nan_stops_the_run_with_tensor_row_and_count(nonfinite: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        convert(nonfinite, tmp_path / "out", bits=4, chunk_bytes=1000)
    assert "b.weight: 2 values are NaN or infinite, first in row 3" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_allow_nonfinite_leaves_the_layer_dense(nonfinite: Path, tmp_path: Path) -> None:
    report = convert(nonfinite, tmp_path / "out", bits=4, allow_nonfinite=True)
    out, source = load(tmp_path / "out"), load(nonfinite)
    assert same(out["b.weight"], source["b.weight"])
    assert "b.scales" not in out
    assert "a.scales" in out
    outcome = {x.layer: reason_text(x) for x in report.plan.layers}
    assert outcome["b"] == "holds NaN or infinity"


def test_overflow_on_a_cast_is_counted_and_rejected(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    norm = np.array([1.0, 1e6, -1e6, 2.0], ml_dtypes.bfloat16)
    source = checkpoint({"norm.weight": norm, "a.weight": bf16(8, 64)})
    with pytest.raises(CheckpointError) as raised:
        convert(source, tmp_path / "out", bits=4, dtype="float16")
    assert "norm: 2 values are too large" in str(raised.value)
    report = convert(source, tmp_path / "out", bits=4, dtype="float16", allow_overflow=True)
    assert report.findings["norm"]["overflowed"] == 2


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_overflow_of_dequantized_values_is_counted_and_rejected(
    checkpoint: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    large = bf16(8, 64)
    large[2, 5], large[6, 0] = 1e6, -1e6
    convert(checkpoint({"a.weight": large}), tmp_path / "q", bits=8, mode=mode)
    options = {"dequantize": True, "dtype": "float16"}
    with pytest.raises(CheckpointError, match="a: 2 values are too large"):
        convert(tmp_path / "q", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    report = convert(tmp_path / "q", tmp_path / "out", allow_overflow=True, **options)
    assert report.findings["a"]["overflowed"] == 2


# -- outputs that must not be written ----------------------------------------------------
def test_an_existing_output_is_rejected_unless_forced(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", bits=8)
    before = tree(tmp_path / "out")
    with pytest.raises(OutputError, match="--force"):
        convert(dense, tmp_path / "out", bits=4)
    assert tree(tmp_path / "out") == before
    convert(dense, tmp_path / "out", bits=4, force=True)
    assert tree(tmp_path / "out") != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_force_does_not_replace_what_is_not_a_checkpoint(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"no config\.json"):
        convert(dense, tmp_path / "home", bits=4, force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("place", ["source", "source/out", ".", "source/../source"])
def test_source_is_never_the_output(dense: Path, tmp_path: Path, place: str) -> None:
    before = tree(dense)
    with pytest.raises(OutputError, match="must not be changed"):
        convert(dense, tmp_path / place, bits=4, force=True)
    assert tree(dense) == before


def test_a_link_to_the_source_is_the_source(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dense)
    with pytest.raises(OutputError):
        convert(dense, tmp_path / "link", bits=4, force=True)
    assert dense.is_dir()


def test_an_unwritable_parent(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="is not a folder; name another folder"):
        convert(dense, tmp_path / "file" / "out", bits=4)


def test_disk_full_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    fill_disk(monkeypatch)
    with pytest.raises(OutputError, match="No space left"):
        convert(dense, tmp_path / "out", bits=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_too_little_room_is_seen_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="too full"):
        convert(dense, tmp_path / "out", bits=4)


def test_a_source_cut_while_it_is_read(dense: Path, tmp_path: Path, monkeypatch: MonkeyPatch):
    from requant.execution import source_reader

    real = source_reader.SourceReader.__enter__

    def cut(self):
        entered = real(self)
        os.truncate(dense / "model.safetensors", 9000)
        return entered

    monkeypatch.setattr(source_reader.SourceReader, "__enter__", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte"):
        convert(dense, tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()


def test_progress_reaches_the_total(dense: Path, tmp_path: Path) -> None:
    seen = []
    report = convert(dense, tmp_path / "out", bits=4, progress=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total == report.plan.bytes_in


def test_max_memory_too_small_says_how_much(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OutOfRangeError, match="at least"):
        convert(dense, tmp_path / "out", bits=4, max_memory=1000)


def test_empty_buffers_and_scalars_pass_through(checkpoint: Callable[..., Path], tmp_path: Path):
    source = checkpoint(
        {
            "positions": np.zeros((0, 64), np.int64),
            "scalar": np.array(3.5, np.float32),
            "a.weight": bf16(8, 64),
        }
    )
    convert(source, tmp_path / "out", bits=4)
    out = load(tmp_path / "out")
    assert out["positions"].shape == (0, 64)
    assert out["scalar"].item() == 3.5


def test_a_row_wider_than_a_chunk_is_cut_at_group_borders(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    wide = bf16(1, (1 << 20) + 4096)
    convert(checkpoint({"a.weight": wide}), tmp_path / "out", bits=4, chunk_bytes=10_000)
    expect_triple(load(tmp_path / "out"), "a", to_mx(wide), "affine", 4, 64)


# -- measured error ----------------------------------------------------------------------
@pytest.mark.parametrize("mode, bits, group_size", [m for m in MODES if m[1] in (2, 4, 8)])
def test_measured_error_is_what_mlx_s_own_values_give(
    dense: Path, tmp_path: Path, mode: str, bits: int, group_size: int
) -> None:
    report = convert(dense, tmp_path / "out", bits=bits, group_size=group_size, mode=mode)
    out, source = load(tmp_path / "out"), load(dense)
    path = "model.layers.0.self_attn.q_proj"
    parts = [out[f"{path}.weight"], out[f"{path}.scales"], out.get(f"{path}.biases")]
    decoded = mx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode)
    before = np.array(source[f"{path}.weight"].astype(mx.float32), np.float64)
    error = np.abs(before - np.array(decoded.astype(mx.float32), np.float64))
    if mode == "affine":
        steps = np.abs(np.array(parts[1].astype(mx.float32), np.float64))
    else:
        kind = ml_dtypes.float8_e4m3fn if mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
        steps = np.array(parts[1]).view(kind).astype(np.float64)
    grouped = error.reshape(*steps.shape, group_size).max(-1)
    worst = (grouped[steps > 0] / steps[steps > 0]).max(initial=0)
    found = report.errors[path]
    assert found.relative_rms == pytest.approx(
        np.sqrt((error**2).sum() / (before**2).sum()), rel=1e-5
    )
    assert found.max_steps == pytest.approx(worst, rel=1e-5)


def test_measured_error_of_another_mlx_encoding(affine8: Path, tmp_path: Path) -> None:
    report = convert(affine8, tmp_path / "out", bits=2)
    assert set(report.errors) == {
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.odd",
        "lm_head",
    }
    assert all(0.1 < error.relative_rms < 1 for error in report.errors.values())
    kept = convert(affine8, tmp_path / "kept")
    assert kept.errors == {}


# -- nvfp4 with a global scale -----------------------------------------------------------
NVFP4 = {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}


def nvfp4_parts(experts: int) -> tuple[dict[str, np.ndarray], list[mx.array]]:
    """A stack of experts as MLX quantizes each with its own amax, and their values."""
    words, scales, amax, values = [], [], [], []
    for n in range(experts):
        w = to_mx(bf16(32, 64, seed=n, scale=10.0 ** (n - 2)))
        one = mx.max(mx.abs(w)).astype(mx.float32)
        q, s = mx.quantize(w, 16, 4, "nvfp4", global_scale=one)
        values.append(mx.dequantize(q, s, None, 16, 4, "nvfp4", global_scale=one))
        words.append(np.array(q))
        scales.append(np.array(s))
        amax.append(one.item())
    parts = {
        "e.weight": np.stack(words),
        "e.scales": np.stack(scales),
        "e.global_scale": np.array(amax, np.float32),
    }
    return parts, values


@pytest.mark.parametrize("experts", [1, 3])
def test_global_scales_decode_as_mlx_does(
    checkpoint: Callable[..., Path], tmp_path: Path, experts: int
) -> None:
    parts, values = nvfp4_parts(experts)
    source = checkpoint(parts, NVFP4)
    expected = mx.stack(values)
    convert(source, tmp_path / "dense", dequantize=True, chunk_bytes=3000)
    assert same(load(tmp_path / "dense")["e.weight"], expected)
    convert(source, tmp_path / "half", dequantize=True, dtype="bfloat16")
    assert same(load(tmp_path / "half")["e.weight"], expected.astype(mx.bfloat16))
    convert(source, tmp_path / "affine", bits=4, dtype="bfloat16", chunk_bytes=3000)
    expect_triple(load(tmp_path / "affine"), "e", expected.astype(mx.bfloat16), "affine", 4, 64)
    convert(source, tmp_path / "kept")
    kept, before = load(tmp_path / "kept"), load(source)
    assert all(same(kept[name], before[name]) for name in before)


def test_a_global_scale_of_another_size_is_a_problem(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    parts, _ = nvfp4_parts(3)
    source = checkpoint(parts | {"e.global_scale": np.ones(2, np.float32)}, NVFP4)
    with pytest.raises(CheckpointError, match=r"e\.global_scale: F32 \[2\], expected"):
        convert(source, tmp_path / "out", dequantize=True)
