"""What no layer took: codes are rejected, floats next to a scale need a config, tables stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.checkpoints.checkpoint import Checkpoint
from requant.formats import FORMATS
from requant.formats.base import SourceLayout, dense_layer
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, rejection
from tests.support.number_formats import BF16, E4M3, e4m3
from tests.support.plan_texts import note_texts
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(5)

CT: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
}
UP = np.linspace(-1, 1, 64 * 128).reshape(64, 128).astype(BF16)


def floats(**siblings: np.ndarray) -> dict[str, np.ndarray]:
    tensors = {"up.weight": UP, "norm.weight": np.ones(128, BF16)}
    return tensors | {f"up.{role}": array for role, array in siblings.items()}


def scales() -> np.ndarray:
    return np.full((64, 4), 0.01, BF16)


# -- floats next to a scale ---------------------------------------------------------------------
@pytest.mark.parametrize("status", ["frozen", "initialized", "calibration"])
@pytest.mark.parametrize("options", [{"bits": 8}, {"dequantize": True}])
def test_weights_that_were_never_compressed(status: str, options: Any, tmp_path: Path) -> None:
    """As a dense source: the scales are left out with a note, the values as they are."""
    tensors = floats(
        weight_scale=scales(),
        weight_zero_point=np.zeros((64, 4), np.int8),
        weight_g_idx=np.zeros(128, np.int32),
        input_scale=np.ones(1, BF16),
    )
    del tensors["up.input_scale"]
    source = write_quantized(tmp_path / "source", tensors, CT | {"quantization_status": status})
    report = requant.convert(source, tmp_path / "out", layout="keep", **options)
    plain = write_quantized(tmp_path / "plain", floats(), None)
    requant.convert(plain, tmp_path / "expected", layout="keep", **options)
    made, expected = read_folder(tmp_path / "out"), read_folder(tmp_path / "expected")
    assert made.keys() == expected.keys()
    assert all(array.tobytes() == expected[name].tobytes() for name, array in made.items())
    assert "compressed-tensors" not in (tmp_path / "out" / "config.json").read_text()
    assert any(
        "up.weight_scale" in note and f"quantization_status is '{status}'" in note
        for note in note_texts(report.plan.notes)
    )
    assert {name for name, _ in report.plan.dropped} == {
        "up.weight_scale",
        "up.weight_zero_point",
        "up.weight_g_idx",
    }


def test_the_dense_format_of_compressed_tensors(tmp_path: Path) -> None:
    block = CT | {"format": "dense", "quantization_status": "compressed"}
    source = write_quantized(tmp_path / "source", floats(weight_scale=scales()), block)
    requant.convert(source, tmp_path / "out", layout="keep", dequantize=True)
    assert read_folder(tmp_path / "out")["up.weight"].tobytes() == UP.tobytes()


BLOCKS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "fp8": {"quant_method": "fp8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "quark": {"quant_method": "quark", "global_quant_config": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "hqq": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "bitnet": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": CT | {"quantization_status": "compressed"},
    "fp-quant": {"quant_method": "fp_quant", "transform_init": "identity"},
    "metal": {"quant_method": "metal", "bits": 4, "group_size": 32},
}


@pytest.mark.parametrize("name", list(BLOCKS))
@pytest.mark.parametrize(
    "role",
    [
        "weight_scale",
        "weight_scale_inv",
        "scale",
        "SCB",
        "weight.absmax",
        "qzeros",
        "_weight_scale",
        "weight_global_scale",
    ],
)
def test_floats_next_to_a_scale_are_rejected_and_the_advice_works(
    name: str, role: str, tmp_path: Path
) -> None:
    """Where nothing says that they are the values. Both ways out lead to success."""
    tensors = floats(**{role: scales()})
    text = rejection(
        write_quantized(tmp_path / "source", tensors, BLOCKS[name]), tmp_path / "out", bits=8
    )
    assert f"up.weight: BF16 [64, 128] is next to up.{role}: its numbers are" in text or (
        f"up.{role}" in text or "up: has no up." in text
    )
    if "quantization_status" not in text:
        return
    declared = {"quant_method": "compressed-tensors", "quantization_status": "frozen"}
    requant.convert(write_quantized(tmp_path / "said", tensors, declared), tmp_path / "one", bits=8)
    removed = write_quantized(tmp_path / "removed", floats(), None)
    requant.convert(removed, tmp_path / "two", bits=8)
    one, two = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(array.tobytes() == two[key].tobytes() for key, array in one.items())


# -- codes -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [x for x in BLOCKS if x != "none"])
def test_only_a_folder_without_codes_is_advised_to_drop_the_block(name: str, tmp_path: Path):
    """Stacks under names that no format has: the advice would let the codes out."""
    codes = {
        "experts.w13": np.full((4, 64, 64), 0x5A, np.uint8),
        "experts.w13_factors": np.full((4, 64, 3), 120, np.uint8),
    }
    source = write_quantized(tmp_path / "source", floats() | codes, BLOCKS[name])
    text = rejection(source, tmp_path / "out", bits=8)
    assert "experts.w13: U8 [4, 64, 64] holds codes" in text
    assert "remove the block" not in text
    bare = write_quantized(tmp_path / "bare", floats() | codes, None)
    assert "experts.w13: U8 [4, 64, 64] holds codes" in rejection(bare, tmp_path / "out", bits=8)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("norm.weight", np.ones(128, E4M3)),
        ("bias", np.ones(128, E4M3)),
        ("scalar", np.ones((), E4M3)),
        ("up.weight", e4m3(64, 128)),
        ("experts.up", e4m3(2, 64, 128)),
        ("up.weight", np.ones((64, 1), np.uint8)),
        ("up.codes", np.ones((64, 128), np.int8)),
        ("up.weight", np.ones((64, 16), np.uint32)),
        ("up.trellis", np.ones((4, 8, 16), np.int16)),
        ("up.indices", np.ones((1, 64, 16), np.uint16)),
        ("up.weight", np.ones((64, 16), np.int64)),
        ("h.0.attn.bias", np.ones((64, 64), np.uint8)),
        ("position_ids.weight", np.ones((64, 64), np.int32)),
    ],
)
def test_codes_without_a_scale(name: str, array: np.ndarray, tmp_path: Path) -> None:
    """Nothing in a dense model has these dtypes; FP8 of no axis even."""
    source = write_quantized(tmp_path / "source", {"head.weight": UP, name: array}, None)
    assert f"{name}: " in rejection(source, tmp_path / "out", bits=8)


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        ("up.weight", "up.weight.absmax"),
        ("up.weight", "up.SCB"),
        ("up", "up_scale"),
        ("experts.w13_weight", "experts.w13_weight_scale"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64])
def test_a_vector_of_codes_is_detected_by_its_scale(
    codes: str, scale: str, dtype: Any, tmp_path: Path
) -> None:
    tensors = {"head.weight": UP, codes: np.ones(4096, dtype), scale: np.ones(64, np.float32)}
    text = rejection(write_quantized(tmp_path / "source", tensors, None), tmp_path / "out", bits=8)
    assert f"{codes}: " in text
    assert scale in text


TABLES = {
    "embeddings.position_ids": np.arange(77).reshape(1, 77),
    "text.position_ids": np.arange(77, dtype=np.int32).reshape(1, 77),
    "embeddings.token_type_ids": np.zeros((1, 512), np.int64),
    "attn.relative_position_index": np.zeros((49, 49), np.int64),
    "swin.relative_position_index": np.zeros((49, 49), np.int32),
    "h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
    "h.0.attention.bias": np.ones((1, 1, 8, 8), np.bool_),
    "audio.local_causal_valid_mask": np.ones((12, 24), np.bool_),
    "gate.tid2eid": np.zeros((96, 6), np.int32),
    "bn.num_batches_tracked": np.array(3, np.int64),
    "d2t": np.arange(32),
    "rotary_emb.inv_freq": np.ones(16, np.float32),
    "norm.scale": np.ones(128, BF16),
    "logit_scale": np.ones((), np.float32),
    "attn.logit_scale": np.ones((4, 1, 1), np.float32),
    "router.per_expert_scale": np.ones(4, BF16),
    "network.7.0.layer_scale_2": np.ones((1, 1, 128), BF16),
    "mlp.global_scale": np.ones(1, BF16),
    "head.global_scale": np.ones(1, BF16),  # next to a matrix, as Inkling's router
    "layer_scale_parameter": np.ones((128, 1, 1), BF16),
}


@pytest.mark.parametrize("quantized", [False, True])
def test_tables_of_the_model_s_own_stay(quantized: bool, tmp_path: Path) -> None:
    tensors, block = {"head.weight": UP, **TABLES}, None
    if quantized:
        block = {"quant_method": "fp8"}
        tensors |= {"up.weight": e4m3(64, 128), "up.weight_scale": np.ones(1, np.float32)}
    source = write_quantized(tmp_path / "source", tensors, block)
    made, _ = convert(source, tmp_path / "out", bits=8)
    for name, array in TABLES.items():
        assert made[name].tobytes() == array.tobytes(), name


# -- every way in ------------------------------------------------------------------------------
class Careless:
    """A format of another package that calls everything dense."""

    name = "careless"
    layer_parts = "PATH.codes with PATH.steps"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        return "up.codes" if "up.codes" in checkpoint.tensors else None

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        return SourceLayout(tuple(map(dense_layer, checkpoint.tensors.values())))


def test_formats_of_other_packages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requant.formats.FORMATS", (Careless(), *FORMATS))
    tensors = {"head.weight": UP, "up.codes": np.ones((64, 128), np.int8)}
    source = write_quantized(tmp_path / "source", tensors, None)
    message = "up.codes: I8 [64, 128] holds codes, but has no scale next to it; a layer of careless"
    assert message in rejection(source, tmp_path / "out", bits=8)
    assert any(message in str(problem) for problem in requant.inspect(source).problems)
    with pytest.raises(requant.RequantError, match="holds codes"):
        requant.transform_weights(tensors, {})
