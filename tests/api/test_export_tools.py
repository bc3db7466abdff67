"""What ``export`` writes, read by the formats' own tools; ``scripts/test-export`` installs them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import requant
from requant.layouts.expert_names import EXPERT_NAMES
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


def dense_values(folder: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """What ``convert --dequantize`` makes of a folder, in float32."""
    requant.convert(folder, tmp_path / "dense", dequantize=True, dtype="float32", layout="keep")
    return read_folder(tmp_path / "dense")


def layers_of(folder: Path, suffix: str) -> dict[str, dict[str, Any]]:
    """Layer path -> role -> tensor of PyTorch, for each layer with a tensor ``suffix``."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    paths = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {
        path: {name.removeprefix(f"{path}."): x for name, x in tensors.items() if path in name}
        for path in paths
    }


def assert_equal(values: Any, expected: np.ndarray, layer: str) -> None:
    """The same numbers, none of which needs more than the bits of either dtype."""
    assert np.array_equal(values.float().numpy(), expected), layer


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(4, 32, ""), (4, 128, ""), (8, 64, ""), (4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")],
)
def test_values_of_compressed_tensors(bits: int, group: int, mode: str, tmp_path: Path) -> None:
    """Its decompressor: the values that ``convert --dequantize`` gives, bit for bit."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    mlx, ct = tmp_path / "mlx", tmp_path / "ct"
    requant.convert(MICRO_LLAMA, mlx, bits=bits, group_size=group, mode=mode or None)
    requant.export(mlx, ct, to=mode if mode in ("mxfp4", "nvfp4") else CT)
    block = json.loads((ct / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(block).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    expected = dense_values(ct, tmp_path)
    layers = layers_of(ct, ".weight_scale")
    assert len(layers) == 28
    for layer, parts in layers.items():
        if not mode:
            parts["weight_scale"] = parts["weight_scale"].float()
        values = compressor.decompress(parts, scheme)["weight"]
        assert_equal(values, expected[f"{layer}.weight"], layer)


def module_of(package: str, path: str) -> Any:
    """A module of an installed package, without the package's own imports."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} is not installed: run scripts/test-export"
    (folder,) = found.submodule_search_locations or [""]
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(folder) / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("group", [32, 64, 128])
def test_values_of_autoawq(group: int, tmp_path: Path) -> None:
    """``dequantize_gemm`` of AutoAWQ, with scales in float32, bit for bit."""
    awq = module_of("awq", "utils/packing_utils.py")
    requant.convert(MICRO_LLAMA, tmp_path / "mlx", bits=4, group_size=group)
    requant.export(tmp_path / "mlx", tmp_path / "awq", to="awq")
    expected, layers = (
        dense_values(tmp_path / "awq", tmp_path),
        layers_of(tmp_path / "awq", ".qweight"),
    )
    assert len(layers) == 28
    for layer, parts in layers.items():
        scales = parts["scales"].float()
        values = awq.dequantize_gemm(parts["qweight"], parts["qzeros"], scales, 4, group)
        assert_equal(values.T, expected[f"{layer}.weight"], layer)


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


@pytest.mark.parametrize("to", [CT, "gptq", "awq"])
@pytest.mark.parametrize("kind", sorted(EXPERT_NAMES))
def test_experts_of_mlx_lm(kind: str, to: str, tmp_path: Path) -> None:
    """A folder that transformers wrote, through mlx-lm's stacks: its names, its values about."""
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    counts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    more = {"num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0, "decoder_sparse_step": 1}
    more |= {"shared_expert_intermediate_size": 96}
    more |= dict.fromkeys(("attention_bias", "lm_head_bias"), kind == "phimoe")
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **counts, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    data = json.loads(path.read_text())
    data |= {"num_experts": 4, "rope_theta": 10000.0, "rope_scaling": None}  # for mlx-lm
    path.write_text(json.dumps(data))

    converted = requant.convert(tmp_path / "source", tmp_path / "mlx", bits=4, group_size=32)
    assert converted.plan.layout == "mlx-lm"
    requant.export(tmp_path / "mlx", tmp_path / "out", to=to)
    original, found = read_folder(tmp_path / "source"), dense_values(tmp_path / "out", tmp_path)
    assert found.keys() == original.keys()
    for name, expected in original.items():
        wide = expected.astype(np.float32)
        assert np.linalg.norm(found[name] - wide) <= 0.2 * np.linalg.norm(wide), name
