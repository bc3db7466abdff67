"""What ``export`` writes, read by the formats' own tools; ``scripts/test-export`` installs them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from tests.support.checkpoints import MICRO_LLAMA
from tests.support.safetensors_files import read_folder

CT = "compressed-tensors"
pytestmark = pytest.mark.slow

torch: Any = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")


def exported(tmp_path: Path, bits: int, group: int) -> tuple[Path, Path]:
    """micro-llama as an MLX folder, and that as compressed-tensors."""
    mlx, ct = tmp_path / "mlx", tmp_path / "ct"
    requant.convert(MICRO_LLAMA, mlx, bits=bits, group_size=group)
    requant.export(mlx, ct, to=CT)
    return mlx, ct


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64)])
def test_values_of_compressed_tensors(bits: int, group: int, tmp_path: Path) -> None:
    """Its decompressor, in float32: the values that ``convert --dequantize`` gives, bit for bit."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    _, ct = exported(tmp_path, bits, group)
    block = json.loads((ct / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(block).config_groups["group_0"]
    requant.convert(ct, tmp_path / "dense", dequantize=True, dtype="float32", layout="keep")
    expected, tensors = read_folder(tmp_path / "dense"), load_file(ct / "model.safetensors")
    layers = [x.removesuffix(".weight_packed") for x in tensors if x.endswith(".weight_packed")]
    assert len(layers) == 28
    for layer in layers:
        parts = {
            role.removeprefix(f"{layer}."): x
            for role, x in tensors.items()
            if role.startswith(f"{layer}.")
        }
        parts["weight_scale"] = parts["weight_scale"].float()
        values = PackedQuantizationCompressor.decompress(parts, scheme)["weight"].numpy()
        assert values.dtype == np.float32
        assert np.array_equal(values, expected[f"{layer}.weight"]), layer


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("bits", [4, 8])
def test_logits_of_transformers(bits: int, tmp_path: Path) -> None:
    """transformers loads the folder, and predicts what the dequantized MLX folder predicts.

    With ``dequantize``: compressed-tensors 0.20.1 does not load packed zero points otherwise, those
    that it wrote itself included.
    """
    transformers: Any = pytest.importorskip("transformers")
    mlx, ct = exported(tmp_path, bits, 64)
    dense = tmp_path / "dense"
    requant.convert(mlx, dense, dequantize=True, dtype="float32", layout="keep")
    tokens = torch.arange(3, 131)[None]
    settings = transformers.CompressedTensorsConfig(dequantize=True)

    def logits(folder: Path, **options: Any) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        )
        with torch.no_grad():
            return model(tokens).logits.double()

    expected, found = logits(dense), logits(ct, quantization_config=settings)
    original = logits(MICRO_LLAMA)
    difference, quantized = (
        float((x - expected).norm() / expected.norm()) for x in (found, original)
    )
    print(
        f"{bits} bits: logits differ by {difference:.3g}, those of the original by {quantized:.3g}"
    )
    # At 8 bits a bias in bfloat16 is only within half a step of a multiple of its scale.
    assert difference < quantized * {4: 0.1, 8: 1.0}[bits]
