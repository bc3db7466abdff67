"""A custom source format: int8 codes with one scale for each row.

``w = code * scale``: ``X.weight`` is I8 ``[out, in]``, ``X.scale`` F16 or BF16 ``[out]``.
MLX's codes are unsigned, so each becomes ``code + 128`` with ``bias = -128 * scale``: exact.
"""

import numpy as np

from requant.formats.integer_layers import integer_layer
from requant.formats.tensor_sorter import LayerError, TensorSorter
from requant.packings.base import IntegerPacking, Rect


class Int8Packing(IntegerPacking):
    """Reads rows of the two tensors as codes and scales."""

    def required_rects(self, start, stop):
        rows = (start, stop)
        return {"weight": Rect(rows, (0, self.columns)), "scale": Rect((0, 1), rows)}

    def codes(self, parts, start, stop, scratch):
        return parts["weight"].view(np.uint8) ^ 0x80  # two's complement, plus 128

    def scales(self, parts, start, stop):
        return parts["scale"].reshape(-1, 1)


class Int8Rows:
    """The class that the entry point names: detects checkpoints and reads their layers."""

    name = "int8-rows"

    def claims(self, checkpoint):
        block = checkpoint.config.get("quantization_config")
        claimed = isinstance(block, dict) and block.get("quant_method") == self.name
        return "config.json: quant_method int8-rows" if claimed else None

    def read(self, checkpoint):
        sorter = TensorSorter(checkpoint)
        for name, weight in checkpoint.tensors.items():
            path = name.removesuffix(".weight")
            if path != name and weight.info.dtype == "I8":
                scale = checkpoint.tensors.get(f"{path}.scale")
                parts = {"weight": weight} | ({"scale": scale} if scale else {})
                sorter.make(path, parts, lambda path, parts: layer(sorter, path, parts))
        return sorter.layout()


def layer(sorter, path, parts):
    """Return one layer, or raise: where, what was found and expected, and what to do."""
    if "scale" not in parts:
        message = f"has no {path}.scale; take both from one export"
        raise LayerError(f"{path}.weight", message)
    weight, scale = parts["weight"].info, parts["scale"].info
    n_out, n_in = weight.shape if len(weight.shape) == 2 else (0, 0)
    if not n_out or scale.dtype not in ("F16", "BF16") or scale.shape != (n_out,):
        message = f"{weight} with scale {scale}, expected I8 [out, in] and F16 or BF16 [out]"
        raise LayerError(f"{path}.weight", f"{message}; export the model again")
    packing = Int8Packing(n_out, n_in, 8, n_in, symmetric=True, scale_dtype=scale.dtype)
    return integer_layer(sorter, path, parts, (n_out, n_in), packing, "int8-rows")
