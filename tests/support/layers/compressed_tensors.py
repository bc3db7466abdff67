"""compressed-tensors layers by hand: a block, codes packed apart from the code under test."""

from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def block(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """A quantization_config with one group for all Linear layers."""
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"} | weights
    group = {"targets": ["Linear"], "weights": settings, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def pack(codes: np.ndarray, bits: int, padded: bool = False) -> np.ndarray:
    """Unsigned codes along the last axis as compressed-tensors packs them; written apart."""
    *leading, count = codes.shape
    if padded:
        per = 32 // bits
        room = np.zeros((*leading, -(-count // per) * per), np.uint64)
        room[..., :count] = codes
        fields = room.reshape(*leading, -1, per) << (
            np.arange(per, dtype=np.uint64) * np.uint64(bits)
        )
        return fields.sum(-1, dtype=np.uint64).astype(np.uint32).view(np.int32)
    one_by_one = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    stream = one_by_one.reshape(*leading, -1)
    room = np.zeros((*leading, -(-stream.shape[-1] // 32) * 32), np.uint8)
    room[..., : stream.shape[-1]] = stream
    return np.packbits(room, axis=-1, bitorder="little").view(np.int32)


def packed(
    signed: np.ndarray, bits: int, scale: np.ndarray, zeros: np.ndarray | None = None, **how: bool
) -> Tensors:
    """The tensors of one pack-quantized layer ``up``."""
    middle = 1 << (bits - 1)
    tensors = {
        "up.weight_packed": pack(signed + middle, bits, **how),
        "up.weight_scale": scale,
        "up.weight_shape": np.array(signed.shape[-2:], np.int64),
    }
    if zeros is not None:
        along = np.swapaxes(zeros + middle, -1, -2)
        tensors["up.weight_zero_point"] = np.ascontiguousarray(
            np.swapaxes(pack(along, bits, **how), -1, -2)
        )
    return tensors
