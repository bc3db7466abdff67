"""Dense checkpoints: every tensor is stored as its values, float32, float16 or bfloat16."""

from __future__ import annotations

from requant.checkpoint import Checkpoint
from requant.errors import Problem, shown
from requant.formats.base import SourceLayout, dense_layer, foreign_part


class Dense:
    """Plain values; the fallback once no other format claims the checkpoint."""

    name = "dense"

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """Every checkpoint could be dense; ``read`` names what contradicts it."""
        return "no quantization found"

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """One layer per tensor; a tensor that only a quantized layer has is a problem."""
        problems = []
        block = checkpoint.config.get("quantization_config")
        method = block.get("quant_method") if isinstance(block, dict) else None
        if block:
            problems.append(
                Problem(
                    "config.json: quantization_config",
                    f"quant_method {shown(method)} is none that is read; docs/formats lists those "
                    "that are",
                )
            )
        layers = []
        for tensor in checkpoint.tensors.values():
            layers.append(dense_layer(tensor))
            foreign = foreign_part(tensor.name)
            if foreign is not None and not block:
                problems.append(
                    Problem(
                        tensor.name,
                        f"is a part of a quantized layer ({foreign}), but "
                        "config.json has no quantization_config that says how to read it",
                    )
                )
            elif tensor.info.dtype.startswith("F8_") and not block:
                problems.append(
                    Problem(
                        tensor.name,
                        f"{tensor.info} has no scale beside it, and config.json does not say "
                        "what its values are multiplied by",
                    )
                )
            elif tensor.info.dtype == "U32" and tensor.name.endswith(".weight") and not block:
                problems.append(
                    Problem(
                        tensor.name,
                        f"{tensor.info} looks like MLX's packed codes, but config.json has no "
                        '"quantization" block that gives group_size and bits',
                    )
                )
        return SourceLayout(tuple(layers), None, tuple(problems))
