"""Tensors without values, as an ungathered save of sharded weights leaves them."""

import json
from pathlib import Path

import numpy as np
import pytest

import requant
from requant.errors import CheckpointError
from tests.support.checkpoints import write_quantized
from tests.support.gguf_files import ONE_BLOCK, write_gguf
from tests.support.number_formats import bf16
from tests.support.small_layers import FOLDERS

pytestmark = pytest.mark.sweep(8)

# Tensors of which a single number or text says how the others lie, and what is left out.
_SETTINGS = ("g_idx", "shape", "nbits", "axis", "group_size", "quant_map", "quant_state", "packing")
_SETTINGS += (
    "compute_dtype",
    "view_as_float",
    "channel_wise",
    "act_global_scale",
    "stores",
    "quant",
)
NAMES = [
    (name, tensor)
    for name, make in FOLDERS.items()
    for tensor in make()[0]
    if not any(word in tensor for word in _SETTINGS)
]


def emptied(array: np.ndarray) -> list[np.ndarray]:
    shapes = [(0,), (0, *array.shape[1:]), (*array.shape[:-1], 0)]
    return [np.zeros(shape, array.dtype) for shape in dict.fromkeys(shapes)]


@pytest.mark.parametrize(("name", "tensor"), NAMES, ids=lambda x: x)
def test_each_empty_tensor_of_a_layer_is_named(name: str, tensor: str, tmp_path: Path) -> None:
    tensors, config = FOLDERS[name]()
    for number, empty in enumerate(emptied(tensors[tensor])):
        source = write_quantized(
            tmp_path / f"source{number}", tensors | {tensor: empty}, None, **config
        )
        for layout in ("keep", "auto"):
            with pytest.raises(CheckpointError) as raised:
                requant.convert(source, tmp_path / "out", bits=8, layout=layout)
            assert f"{tensor}: " in str(raised.value)
            assert "holds no values" in str(raised.value)
            assert "zero_to_fp32.py" in str(raised.value)
            assert not (tmp_path / "out").exists()


def test_all_but_one_tensor_of_a_model(tmp_path: Path) -> None:
    """FSDP and DeepSpeed ZeRO-3 leave ``[0]`` for what other processes hold, norms too."""
    names = [f"model.layers.{n}.{x}.weight" for n in range(9) for x in ("up", "down", "q", "norm")]
    tensors = dict.fromkeys(names, bf16(0)) | {"model.embed_tokens.weight": bf16(96, 128)}
    source = write_quantized(tmp_path / "source", tensors, None)
    with pytest.raises(CheckpointError) as raised:
        requant.plan(source, bits=4)
    assert "36 tensors are empty, of 37" in str(raised.value)
    assert all(f"{name}: BF16 [0] holds no values" in str(raised.value) for name in names)
    assert "not gathered" in str(raised.value)
    assert {p.where for p in requant.inspect(source).problems} == {"weights", *names}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", ["norm.weight", "q_proj.bias", "experts.gate_up_proj", "sinks"])
def test_any_float_tensor_counts(name: str, dtype: type, tmp_path: Path) -> None:
    tensors = {"up.weight": bf16(64, 128), name: np.zeros((0,), dtype)}
    with pytest.raises(CheckpointError, match=f"{name}: F.. .0. holds no values"):
        requant.plan(write_quantized(tmp_path / "source", tensors, None), dequantize=True)


def test_buffers_of_integers_may_be_empty(tmp_path: Path) -> None:
    tensors = {"up.weight": bf16(64, 128), "order": np.zeros((0,), np.int64)}
    requant.plan(write_quantized(tmp_path / "source", tensors, None), bits=4)
    tensors, config = FOLDERS["gptq"]()
    tensors["up.g_idx_sort_indices"] = np.zeros((0,), np.int32)
    tensors["up.g_idx"] = np.zeros((0,), np.int32)
    try:  # a format may ask for the order of inputs; it says so itself then
        requant.plan(write_quantized(tmp_path / "gptq", tensors, None, **config), layout="keep")
    except CheckpointError as error:
        assert "not gathered" not in str(error) or "g_idx" in str(error)


def test_in_memory(tmp_path: Path) -> None:
    tensors, config = FOLDERS["awq"]()
    tensors["up.scales"] = tensors["up.scales"][:0]
    with pytest.raises(CheckpointError, match=r"up\.scales: F16 \[0, 64\] holds no values"):
        requant.transform_weights(tensors, config["quantization_config"])


def test_a_gguf_file(tmp_path: Path) -> None:
    weights = {
        "model.embed_tokens.weight": np.ones((64, 64), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.ones((96, 64), np.float32),
        "model.norm.weight": np.ones((0,), np.float32),
    }
    write_gguf(tmp_path / "model.gguf", weights, ONE_BLOCK, "F32")
    with pytest.raises(CheckpointError) as raised:
        requant.plan(tmp_path / "model.gguf", bits=4)
    assert "norm" in str(raised.value)
    assert json.dumps(str(raised.value)).isascii()
