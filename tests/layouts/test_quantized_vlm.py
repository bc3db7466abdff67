"""Quantized models that see, with mlx-vlm's layout: codes are moved, values and logits stay.

``scripts/layouts`` does the same for more models.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.libraries import MLX_VLM

if MLX_VLM.folder is None:
    pytest.skip("mlx-vlm is not installed (pip install 'requant[vlm]')", allow_module_level=True)

from tests.support.form_conversion import convert_form
from tests.support.multimodal_forms import FORMS

pytestmark = [pytest.mark.sweep(1), pytest.mark.filterwarnings("ignore")]

EXACT = {"FP8, blocks of 128, powers of two", "compressed-tensors MXFP4"}


@pytest.mark.parametrize(
    ("family", "form"),
    [("qwen3_vl", "AWQ"), ("gemma3", "compressed-tensors int4"), *(("qwen2_vl", x) for x in FORMS)],
)
def test_codes_are_moved(family: str, form: str, tmp_path: Path) -> None:
    """Nothing is re-encoded; what is rounded are scales, to the bfloat16 of the model."""
    result = convert_form(family, form, tmp_path)
    assert result.exactness == ("exact" if form in EXACT else "rounded")
    assert result.value_error <= (0 if form in EXACT else 2**-8)
    assert result.logit_error <= (1e-5 if form in EXACT else 2**-8)
