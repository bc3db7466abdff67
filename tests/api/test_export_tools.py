"""What ``export`` writes, read by the formats' own tools; ``scripts/test-export`` installs them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.planning.export import SAME_NAMES
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


@pytest.mark.parametrize("kind", sorted(SAME_NAMES))
def test_names_of_mlx_lm(kind: str) -> None:
    """The models whose names ``export`` keeps: mlx-lm's class changes nothing of transformers'.

    It has the same names and shapes, and its ``sanitize`` gives back the arrays that it takes.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    transformers: Any = pytest.importorskip("transformers")
    utils: Any = pytest.importorskip("mlx_lm.utils")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")

    data = json.loads(config.to_json_string(use_diff=False))
    data |= {"rope_theta": 10000.0, "rope_scaling": None} | (data.get("rope_parameters") or {})
    model_class, args_class = utils._get_classes(data)
    theirs = model_class(args_class.from_dict(data))
    if hasattr(theirs, "sanitize"):  # it may remove a head that is tied, too
        arrays = {name: mx.random.normal(shape) for name, shape in shapes.items()}
        kept = theirs.sanitize(dict(arrays))
        assert kept.keys() == arrays.keys()
        assert all(mx.array_equal(kept[name], x) for name, x in arrays.items())
    assert {name: tuple(x.shape) for name, x in tree_flatten(theirs.parameters())} == shapes
