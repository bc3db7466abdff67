"""An AutoAWQ folder into your own model: no files are written, and mlx-lm is not needed.

    python examples/awq_in_memory.py micro-llama-awq

``transform_awq_weights`` gives each quantized layer MLX's three tensors, under the names that the
checkpoint has. Your own loader passes them to ``mx.quantized_matmul``.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx

import requant


class Linear:
    """A minimal quantized linear layer."""

    def __init__(self, weights: dict, layer: str, quantization: requant.Quantization) -> None:
        self.parts = [weights[f"{layer}.{part}"] for part in ("weight", "scales", "biases")]
        self.options = {"group_size": quantization.group_size, "bits": quantization.bits}

    def __call__(self, x: mx.array) -> mx.array:
        """Compute ``x @ W.T`` from the codes."""
        return mx.quantized_matmul(x, *self.parts, transpose=True, **self.options)


def load(folder: Path) -> tuple[dict, requant.PerLayerQuantization]:
    """Load the weights in MLX's layout; lazy, so only used tensors are ever computed."""
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= mx.load(str(shard))
    return requant.transform_awq_weights(weights, requant.AwqLoadConfig.from_dict(block))


def main(folder: Path) -> None:
    """Run the first block's MLP on its codes, and compare with its dense values."""
    weights, config = load(folder)
    mlp = "model.layers.0.mlp"
    gate, up, down = (
        Linear(weights, f"{mlp}.{name}", config.quantization_for(f"{mlp}.{name}"))
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    x = mx.random.normal((1, 128), key=mx.random.key(0)).astype(mx.float16)
    y = down(gate(x) * mx.sigmoid(gate(x)) * up(x))

    dense = requant.dequantize_weights(weights, config)
    g, u, d = (dense[f"{mlp}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    expected = ((x @ g.T) * mx.sigmoid(x @ g.T) * (x @ u.T)) @ d.T
    error = mx.abs(y - expected).max().item()
    print(f"{len(weights)} tensors; block 0: {y.shape}, largest error {error:.1e}")
    assert error < 0.01 * mx.abs(expected).max().item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
