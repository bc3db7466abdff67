"""Dense checkpoints: every tensor is stored as its values, float32, float16 or bfloat16."""

from __future__ import annotations

from requant.checkpoint import Checkpoint
from requant.errors import Problem, shown
from requant.formats.base import SourceLayout, dense_layer


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
        method = block.get("quant_method") if isinstance(block, dict) else None
        if block:
            problems.append(
                Problem(
                    "config.json: quantization_config",
                    f"quant_method {shown(method)} is none that is read; docs/formats lists those "
                    "that are",
                )
            )
        layers = tuple(dense_layer(tensor) for tensor in checkpoint.tensors.values())
        return SourceLayout(layers, None, tuple(problems))
