"""Dense checkpoints: every tensor is stored as its values, float32, float16 or bfloat16."""

from __future__ import annotations

from requant.checkpoints.checkpoint import Checkpoint
from requant.core.dtypes import FLOATS
from requant.errors import Problem
from requant.formats.base import SourceLayout, dense_layer
from requant.formats.quantization_block import find_quantization_block
from requant.text import format_value


class Dense:
    """Plain values; the fallback once no other format claims the checkpoint."""

    name = "dense"

    def __init__(self, evidence: str = "no quantization found") -> None:
        self.evidence = evidence

    def claims(self, checkpoint: Checkpoint) -> str | None:
        """Every checkpoint could be dense; ``unclaimed`` names what contradicts it."""
        return self.evidence

    def read(self, checkpoint: Checkpoint) -> SourceLayout:
        """One layer per tensor; a quantization block that no format takes is a problem."""
        problems = []
        block = checkpoint.config.get("quantization_config")
        where, method = "config.json: quantization_config", None
        if isinstance(block, dict):
            method = block.get("quant_method")
        elif any(x.info.dtype not in FLOATS for x in checkpoint.tensors.values()):
            # In a section, perhaps of another part of the model.
            found = find_quantization_block(checkpoint)
            if found is not None:
                where, block, method = found.where, found.block, found.get("quant_method")
        if block:
            message = f"quant_method {format_value(method)} is none that is read; "
            problems.append(Problem(where, message + "docs/formats lists those that are"))
        layers = tuple(dense_layer(tensor) for tensor in checkpoint.tensors.values())
        return SourceLayout(layers, None, tuple(problems))
