"""Every model type of the installed mlx-lm: our layout, executed, is what mlx-lm converts to."""

from pathlib import Path

import mlx.core as mx
import pytest

from requant.layouts.outputs import ComputedByRule
from requant.libraries import LayoutError
from requant.quantization.config import Quantization
from tests.support.families import model_types, small_config
from tests.support.hub_forms import COMPUTED, FORMS
from tests.support.mlx_lm_conversion import (
    NEW_FORMS,
    class_checkpoint,
    compare,
    convert_with_mlx_lm,
    write_mlx_checkpoint,
)

pytestmark = pytest.mark.sweep(2)

# Families that cannot be built here, or that mlx-lm 0.32.2 itself does not quantize.
NOT_BUILT = {
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "needs a packed checkpoint",
}
MLX_LM_FAILS = {"afm7": "its fused layer takes no mode"}

AFFINE = Quantization.affine(32, 4)
MODES = [AFFINE, Quantization(32, 4, "mxfp4"), Quantization(32, 8, "mxfp8")]
MODES += [Quantization(16, 4, "nvfp4"), Quantization.affine(64, 8), None]


@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in NOT_BUILT])
def test_class_checkpoint(model_type: str, tmp_path: Path):
    """float32 values, cast to bfloat16 by the config: what is exempt from it shows."""
    folder = tmp_path / "model"
    config = small_config(model_type) | {"torch_dtype": "bfloat16", "_name_or_path": "x"}
    class_checkpoint(folder, config, mx.float32)
    if model_type in MLX_LM_FAILS:
        with pytest.raises(TypeError):
            convert_with_mlx_lm(folder, AFFINE)
        with pytest.raises(LayoutError):
            compare(folder, AFFINE)
        assert compare(folder)[1] == []
        return
    layout, different = compare(folder, AFFINE)
    assert different == []
    assert layout.targets or layout.dense_reasons
    assert layout.dropped == ()


@pytest.mark.parametrize("mode", MODES, ids=lambda q: f"{q.mode}-{q.bits}" if q else "dense")
@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "rwkv7", "deepseek_v3"])
def test_modes(model_type: str, mode: Quantization | None, tmp_path: Path):
    folder = tmp_path / "model"
    class_checkpoint(folder, small_config(model_type))
    try:
        convert_with_mlx_lm(folder, mode)
    except Exception:
        with pytest.raises(LayoutError):
            compare(folder, mode)
        return
    layout, different = compare(folder, mode)
    assert different == []
    assert bool(layout.targets) == (mode is not None)


@pytest.mark.parametrize("model_type", [t for t in FORMS if t in model_types()])
def test_published_form(model_type: str, tmp_path: Path):
    folder = tmp_path / "model"
    config = small_config(model_type)
    class_checkpoint(folder, config)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    write_mlx_checkpoint(folder, config, FORMS[model_type](weights))
    if model_type in NEW_FORMS:
        with pytest.raises((ValueError, KeyError)):
            convert_with_mlx_lm(folder, AFFINE)
        with pytest.raises(LayoutError):
            compare(folder, AFFINE)
        return
    layout, different = compare(folder, AFFINE, dtype="float16")
    assert different == []
    computed = any(isinstance(x, ComputedByRule) for x in layout.tensors.values())
    assert computed == (model_type in COMPUTED)
