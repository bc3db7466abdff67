"""gpt-oss's MXFP4 experts: transformers' own values, worked vectors, damaged folders."""

from pathlib import Path

import numpy as np
import pytest

import requant
from tests.support.checkpoints import write_quantized
from tests.support.conversions import convert, rejection
from tests.support.damage import damage, damages
from tests.support.fixture_checks import check_fixture
from tests.support.mlx_reference import float_values
from tests.support.number_formats import BF16
from tests.support.safetensors_files import read_folder

BLOCK = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
SPEC = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def test_gpt_oss(tmp_path: Path) -> None:
    checked = check_fixture("mxfp4-gpt-oss", tmp_path, "exact")
    assert checked.spec("model.layers.0.mlp.experts.gate_up_proj") == SPEC


def good() -> dict[str, np.ndarray]:
    blocks = np.random.default_rng(0).integers(0, 256, (2, 6, 3, 16), np.uint8)
    return {
        "experts.down_proj_blocks": blocks,
        "experts.down_proj_scales": np.full((2, 6, 3), 0x7F, np.uint8),
        "experts.down_proj_bias": np.ones((2, 6), BF16),
    }


@pytest.mark.parametrize("names", [("_blocks", "_scales"), (".blocks", ".scales")])
def test_worked_vector(names: tuple[str, str], tmp_path: Path) -> None:
    """Byte 0x21 under scale 0x7f is 0.5, 1.0; under 0x80 it is 1.0, 2.0."""
    tensors = {
        f"mlp1_weight{names[0]}": np.full((1, 2, 1, 16), 0x21, np.uint8),
        f"mlp1_weight{names[1]}": np.array([[[0x7F], [0x80]]], np.uint8),
    }
    for number, block in enumerate((BLOCK, None)):  # the config, or the tensors alone
        folder = write_quantized(tmp_path / f"source{number}", tensors, block)
        out, _ = convert(folder, tmp_path / f"out{number}")
        values = float_values(out, "mlp1_weight", SPEC)
        assert values.tolist() == [[[0.5, 1.0] * 16, [1.0, 2.0] * 16]]
        assert out["mlp1_weight.weight"].tolist() == [[[0x21212121] * 4] * 2]


def test_every_byte_under_every_scale(tmp_path: Path) -> None:
    """All 16 elements under all scales but NaN's 255: MLX's values are float64's."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (255, 2))
    tensors = {
        "w_blocks": (codes[:, ::2] | codes[:, 1::2] << 4).reshape(255, 1, 16),
        "w_scales": np.arange(255, dtype=np.uint8).reshape(255, 1),
    }
    folder = write_quantized(tmp_path / "source", tensors, BLOCK)
    requant.convert(folder, tmp_path / "out", layout="keep")
    elements = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    elements = np.concatenate([elements, -elements])[codes]
    with np.errstate(over="ignore"):
        expected = np.ldexp(elements, np.arange(255)[:, None] - 127).astype(np.float32)
    assert np.array_equal(float_values(read_folder(tmp_path / "out"), "w", SPEC), expected)


DAMAGED = """
- experts.down_proj_scales -> experts.down_proj_blocks: has no scales
- experts.down_proj_blocks
    experts.down_proj_scales: U8 [2, 6, 3] has no codes next to it
experts.down_proj_scales = U8 [2, 6, 2] 1
    experts.down_proj_scales: U8 [2, 6, 2], expected U8 [2, 6, 3]
experts.down_proj_scales = F32 [2, 6, 3] 1
    experts.down_proj_scales: F32 [2, 6, 3], expected U8
experts.down_proj_blocks = U8 [2, 6, 3, 8] 1
    experts.down_proj_blocks: U8 [2, 6, 3, 8], expected U8 [..., out, in / 32, 16]
experts.down_proj_blocks = I8 [2, 6, 3, 16] 1
    experts.down_proj_blocks: I8 [2, 6, 3, 16], expected U8
experts.down_proj_scales = U8 [2, 6, 3] 255
    experts.down_proj: 18 scale bytes are 255, which is NaN
"""


@pytest.mark.parametrize(("changes", "words"), damages(DAMAGED))
def test_corrupted_folders_are_rejected(changes: str, words: list[str], tmp_path: Path) -> None:
    tensors = good()
    damage(changes, tensors)
    text = rejection(write_quantized(tmp_path / "source", tensors, BLOCK), tmp_path / "out")
    assert all(word in text for word in words), text
