"""A small folder of every format, from scratch, with the values that its tensors represent.

Each has a quantized layer ``up`` of 64 outputs and 128 inputs, a dense ``head.weight`` and a
``norm.weight``. Values are computed here by the formula of the format's document.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.checkpoints import write_checkpoint
from tests.support.layers import packers
from tests.support.layers.compressed_tensors import pack
from tests.support.number_formats import BF16, E2M1, E4M3, E8M0, e4m3, nibbles

OUT, IN, GROUP = 64, 128, 32
Tensors = dict[str, np.ndarray]


@dataclass
class Source:
    """A folder to be.

    Attributes:
        tensors: By name.
        values: Layer path -> what its tensors represent, float32.
        config: What config.json says next to the model type.
        metadata: Of the weight file.
        optional: A part that a layer may lack -> what the others represent without it.
    """

    tensors: Tensors
    values: dict[str, np.ndarray]
    config: dict[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    optional: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The tensors of the quantized layer."""
        return [name for name in self.tensors if name not in ("head.weight", "norm.weight")]

    def write(self, folder: Path) -> Path:
        config = {"model_type": "some_model", "dtype": "bfloat16"} | self.config
        return write_checkpoint(folder, self.tensors, config, metadata=self.metadata)


def _random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _bytes(*shape: int) -> np.ndarray:
    return _random().integers(0, 256, shape, np.uint8)


def _scales(groups: int, dtype: Any = np.float16) -> np.ndarray:
    return (_random(1).integers(1, 9, (OUT, groups)) / 64).astype(dtype)


def _source(
    parts: Mapping[str, np.ndarray], values: np.ndarray, path: str = "up", **config: Any
) -> Source:
    dense = (_random(2).standard_normal((OUT, IN)) / 32).astype(BF16)
    norm = np.ones(IN, BF16)
    tensors = dict(parts) | {"head.weight": dense, "norm.weight": norm}
    known = {path: values, "head": dense.astype(np.float32), "norm": norm.astype(np.float32)}
    return Source(tensors, known, config)


def _integers() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    codes = _random().integers(0, 16, (OUT, IN))
    zeros = _random(3).integers(1, 15, (OUT, IN // GROUP))
    scales = _scales(IN // GROUP)
    values = (codes - zeros.repeat(GROUP, 1)) * scales.astype(np.float32).repeat(GROUP, 1)
    return codes, zeros, scales, values.astype(np.float32)


def _named(parts: Mapping[str, np.ndarray], path: str = "up") -> Tensors:
    return {f"{path}.{role}": array for role, array in parts.items()}


def awq() -> Source:
    codes, zeros, scales, values = _integers()
    block = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    parts = _named(packers.gemm(codes, zeros, scales))
    return _source(parts, values, quantization_config=block)


def paroquant() -> Source:
    """With a rotation by no angle, which changes nothing."""
    source = awq()
    turns = np.tile(np.arange(GROUP, dtype=np.int16), IN // GROUP)
    source.tensors |= {
        "up.theta": np.zeros((2, IN // 2), np.float16),
        "up.pairs": np.stack([turns, turns]),
        "up.channel_scales": np.ones((1, IN), np.float16),
    }
    block = {"quant_method": "paroquant", "bits": 4, "group_size": GROUP, "krot": 2}
    source.config["quantization_config"] = block
    return source


def gptq(method: str = "gptq", **more: Any) -> Source:
    codes, zeros, scales, values = _integers()
    parts = packers.gptq(codes, zeros, scales, 4, stored_minus=1)
    parts["g_idx"] = (np.arange(IN) // GROUP).astype(np.int32)
    block = {"quant_method": method, "bits": 4, "group_size": GROUP, "sym": False} | more
    return _source(_named(parts), values, quantization_config=block)


def auto_round() -> Source:
    return gptq("auto-round", packing_format="auto_round:auto_gptq")


def _ct(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["head"],
    }


def ct_int4() -> Source:
    codes, zeros, scales, values = _integers()
    packed_zeros = np.swapaxes(pack(np.swapaxes(zeros, 0, 1).copy(), 4), 0, 1)
    parts = {
        "weight_packed": pack(codes, 4),
        "weight_scale": scales,
        "weight_shape": np.array([OUT, IN], np.int64),
        "weight_zero_point": np.ascontiguousarray(packed_zeros),
    }
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    block = _ct("pack-quantized", **weights, group_size=GROUP)
    return _source(_named(parts), values, quantization_config=block)


def _float8(scale: np.ndarray, role: str, block: Mapping[str, Any]) -> Source:
    codes = e4m3(OUT, IN)
    values = codes.astype(np.float32) * scale.astype(np.float32)
    parts = _named({"weight": codes, role: scale})
    return _source(parts, values, quantization_config=dict(block))


def ct_fp8() -> Source:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return _float8(_scales(1, BF16), "weight_scale", _ct("float-quantized", **weights))


def fp8() -> Source:
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return _float8(np.full((1, 1), 0.375, np.float32), "weight_scale_inv", block)


def modelopt_fp8() -> Source:
    block = {"quant_method": "modelopt", "quant_algo": "FP8"}
    source = _float8(np.array(0.375, np.float32), "weight_scale", block)
    source.tensors["up.input_scale"] = np.array(0.5, np.float32)
    return source


def _nvfp4(codes_role: str, factor_role: str, factor: float, block: Mapping[str, Any]) -> Source:
    """``factor`` is what the values are multiplied by; compressed-tensors stores what divides."""
    packed = _bytes(OUT, IN // 2)
    scales = (_random(4).integers(1, 9, (OUT, IN // 16)) / 4).astype(E4M3)
    values = E2M1[nibbles(packed)] * scales.astype(np.float32).repeat(16, 1)
    stored = np.array([1 / factor if codes_role == "weight_packed" else factor], np.float32)
    parts = _named({codes_role: packed, "weight_scale": scales, factor_role: stored})
    source = _source(parts, values * np.float32(factor), quantization_config=dict(block))
    source.optional[f"up.{factor_role}"] = values
    return source


def ct_nvfp4() -> Source:
    block = _ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group")
    return _nvfp4("weight_packed", "weight_global_scale", 0.125, block)


def modelopt_nvfp4() -> Source:
    block = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    return _nvfp4("weight", "weight_scale_2", 0.375, block)


def mxfp4() -> Source:
    packed = _bytes(2, OUT, IN // GROUP, GROUP // 2)
    exponents = _random(5).integers(120, 126, (2, OUT, IN // GROUP)).astype(np.uint8)
    factors = np.exp2(exponents.astype(np.float32) - 127)
    values = E2M1[nibbles(packed)].reshape(2, OUT, IN) * factors.repeat(GROUP, -1)
    path = "experts.down_proj"
    parts = {f"{path}_blocks": packed, f"{path}_scales": exponents}
    return _source(parts, values, path, quantization_config={"quant_method": "mxfp4"})


def hqq() -> Source:
    codes = _random().integers(0, 16, (OUT * IN // GROUP, GROUP), np.uint8)
    half = len(codes) // 2
    scale = (_random(6).integers(1, 9, (len(codes), 1)) / 64).astype(np.float16)
    zero = _random(7).integers(1, 15, (len(codes), 1)).astype(np.float16)
    parts = {
        "W_q": codes[:half] << 4 | codes[half:],
        "scale": scale,
        "zero": zero,
        "shape": np.array([OUT, IN], np.int64),
        "axis": np.array(1, np.int32),
        "nbits": np.array(4, np.int32),
        "packing": np.frombuffer(b"4bit_u8", np.uint8),
    }
    values = (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
    block = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}
    return _source(_named(parts), values.reshape(OUT, IN), quantization_config=block)


def bnb_nf4() -> Source:
    codes = _random().integers(0, 16, OUT * IN, np.uint8)
    table = np.linspace(-1, 1, 16).astype(np.float32)
    absmax = _random(8).uniform(0.5, 2, OUT * IN // 64).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [OUT, IN], "dtype": "bfloat16"}
    parts = {
        "weight": (codes[::2] << 4 | codes[1::2]).reshape(-1, 1),
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    values = (table[codes] * absmax.repeat(64)).reshape(OUT, IN)
    block = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return _source(_named(parts), values, quantization_config=block)


def bnb_int8() -> Source:
    codes = _random().integers(-127, 128, (OUT, IN)).astype(np.int8)
    absmax = (127 * _scales(1)[:, 0]).astype(np.float32)
    values = codes * (absmax / np.float32(127))[:, None]
    parts = _named({"weight": codes, "SCB": absmax, "weight_format": np.array(0, np.uint8)})
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return _source(parts, values, quantization_config=block)


def bitnet() -> Source:
    ternary = _random().integers(0, 3, (OUT, IN)).astype(np.uint8)
    first, second, third, last = ternary.reshape(4, OUT // 4, IN)
    packed = first | second << 2 | third << 4 | last << 6
    parts = _named({"weight": packed, "weight_scale": np.array([0.25], BF16)})
    values = (ternary.astype(np.float32) - 1) / 4
    block = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    return _source(parts, values, quantization_config=block)


def _affine(offset: str) -> Source:
    codes, _, scales, _ = _integers()
    scales, offsets = scales.astype(BF16), (-_scales(IN // GROUP) * 8).astype(BF16)
    spread = [x.astype(np.float32).repeat(GROUP, 1) for x in (scales, offsets)]
    words = packers.streams(codes, 4).view(np.uint32)
    parts = _named({"weight": words, "scales": scales, offset: offsets})
    return _source(parts, codes * spread[0] + spread[1])


def mlx() -> Source:
    source = _affine("biases")
    source.config["quantization"] = {"group_size": GROUP, "bits": 4}
    return source


def metal() -> Source:
    source = _affine("qbiases")
    block = {"quant_method": "metal", "bits": 4, "group_size": GROUP}
    source.config["quantization_config"] = block
    return source


def fp_quant() -> Source:
    packed = _bytes(OUT, IN // 2)
    exponents = _random(5).integers(120, 126, (OUT, IN // GROUP)).astype(np.uint8)
    factors = np.exp2(exponents.astype(np.float32) - 127)
    values = E2M1[nibbles(packed)] * factors.repeat(GROUP, 1)
    values = values / 4
    factor = np.full(1, 4, BF16)
    parts = {"qweight": packed, "scales": exponents, "weight_global_scale": factor}
    block = {"quant_method": "fp_quant", "forward_dtype": "mxfp4", "transform_init": "identity"}
    return _source(_named(parts), values, quantization_config=block)


def _int8() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = _random().integers(-128, 128, (OUT, IN)).astype(np.int8)
    scales = _scales(1, BF16)[:, 0]
    return codes, scales, codes * scales.astype(np.float32)[:, None]


def quark() -> Source:
    codes, scales, values = _int8()
    weight = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True}
    block = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    block["export"] = {"pack_method": "order"}
    parts = _named({"weight": codes, "weight_scale": scales})
    return _source(parts, values, quantization_config=block)


def torchao() -> Source:
    codes, scales, values = _int8()
    parts = _named({"_weight_qdata": codes, "_weight_scale": scales[:, None]})
    source = _source(parts, values, quantization_config={"quant_method": "torchao"})
    declared = {"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}
    source.metadata = {"up.weight": json.dumps(declared), "tensor_names": '["up.weight"]'}
    return source


def mx_exponents() -> Source:
    """ModelOpt's MXFP8: scales are exponents."""
    codes = e4m3(OUT, IN)
    exponents = _random(5).integers(120, 126, (OUT, IN // GROUP)).astype(np.uint8).view(E8M0)
    values = codes.astype(np.float32) * exponents.astype(np.float32).repeat(GROUP, 1)
    parts = _named({"weight": codes, "weight_scale": exponents})
    block = {"quant_method": "modelopt", "quant_algo": "MXFP8"}
    return _source(parts, values, quantization_config=block)


SOURCES: dict[str, Callable[[], Source]] = {
    **{"awq": awq, "gptq": gptq, "auto-round": auto_round, "paroquant": paroquant},
    **{"ct-int4": ct_int4, "ct-fp8": ct_fp8, "ct-nvfp4": ct_nvfp4, "fp8": fp8},
    **{"modelopt-fp8": modelopt_fp8, "modelopt-nvfp4": modelopt_nvfp4},
    **{"modelopt-mxfp8": mx_exponents, "mxfp4": mxfp4, "hqq": hqq, "bnb-nf4": bnb_nf4},
    **{"bnb-int8": bnb_int8, "bitnet": bitnet, "mlx": mlx, "metal": metal, "fp-quant": fp_quant},
    **{"quark": quark, "torchao": torchao},
}
