"""A forward pass in NumPy float32: Llama, Qwen 3 and its experts, Gemma 3. No mlx-lm, no GPU.

MLX multiplies float32 matrices on a CPU without BLAS, about fifty times slower than NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Weights = dict[str, np.ndarray]
_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "U8": np.uint8,
}


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of a dense folder, as it is stored."""
    for file in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        start = 8 + int.from_bytes(bytes(raw[:8]), "little")
        header = json.loads(bytes(raw[8:start]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = (start + x for x in entry["data_offsets"])
            array = np.frombuffer(raw[first:last], _DTYPES[entry["dtype"]])
            yield name, array.reshape(entry["shape"])


def read_weights(folder: Path) -> Weights:
    """Read every tensor of a dense folder as float32."""
    return {name: array.astype(np.float32) for name, array in read_tensors(folder)}


class Model:
    """The forward pass of one architecture; weights are passed with each call."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config.get("head_dim") or config["hidden_size"] // self.heads
        self.blocks, self.epsilon = config["num_hidden_layers"], config["rms_norm_eps"]
        self.active_experts = config.get("num_experts_per_tok", 0)
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.is_gemma = config["model_type"].startswith("gemma3")
        self.local_theta = config.get("rope_local_base_freq", self.theta)
        self.pattern = config.get("sliding_window_pattern", 1)
        self.sliding = config.get("sliding_window") if self.is_gemma else None
        self.scale = np.float32(config.get("query_pre_attn_scalar", self.width) ** -0.5)
        self.embedding_scale = 1.0
        if self.is_gemma:  # rounded to bfloat16, as the model was trained
            root = config["hidden_size"] ** 0.5
            self.embedding_scale = float(np.float32(root).astype(ml_dtypes.bfloat16))

    def head(self, weights: Weights) -> np.ndarray:
        """The matrix that makes logits, ``(vocabulary, hidden)``."""
        return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])

    def hidden(self, weights: Weights, windows: np.ndarray) -> np.ndarray:
        """The inputs of the head, ``(windows, tokens, hidden)``, of windows of token ids."""
        x = weights["model.embed_tokens.weight"][windows] * np.float32(self.embedding_scale)
        for number in range(self.blocks):
            path = f"model.layers.{number}"
            h = self._norm(x, weights[f"{path}.input_layernorm.weight"])
            h = self._attention(weights, f"{path}.self_attn", h, number)
            after = weights[f"{path}.post_attention_layernorm.weight"]
            if self.is_gemma:
                x = x + self._norm(h, after)
                h = self._norm(x, weights[f"{path}.pre_feedforward_layernorm.weight"])
                h = self._mlp(weights, f"{path}.mlp", h)
                x = x + self._norm(h, weights[f"{path}.post_feedforward_layernorm.weight"])
            else:
                x = x + h
                x = x + self._mlp(weights, f"{path}.mlp", self._norm(x, after))
        return self._norm(x, weights["model.norm.weight"])

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        # Gemma stores gains less one.
        gain = 1 + weight if self.is_gemma else weight
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * gain

    def _attention(self, weights: Weights, path: str, x: np.ndarray, number: int) -> np.ndarray:
        is_local = self.is_gemma and (number + 1) % self.pattern != 0
        theta = self.local_theta if is_local else self.theta
        tokens, share = x.shape[1], self.heads // self.kv_heads
        q = self._rotated(weights, f"{path}.q", x, self.heads, theta)
        k = self._rotated(weights, f"{path}.k", x, self.kv_heads, theta)
        v = (x @ weights[f"{path}.v_proj.weight"].T).reshape(*x.shape[:2], -1, self.width)
        distance = np.arange(tokens)[:, None] - np.arange(tokens)
        hidden_from = distance < 0
        if is_local and self.sliding:
            hidden_from |= distance >= self.sliding
        mask = np.where(hidden_from, np.float32(-1e9), np.float32(0))
        k, v = (y.transpose(0, 2, 1, 3).repeat(share, 1) for y in (k, v))
        scores = q.transpose(0, 2, 1, 3) @ k.transpose(0, 1, 3, 2) * self.scale + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        joined = mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return joined @ weights[f"{path}.o_proj.weight"].T

    def _rotated(
        self, weights: Weights, path: str, x: np.ndarray, count: int, theta: float
    ) -> np.ndarray:
        """Queries or keys with their positions: ``(windows, tokens, heads, width)``."""
        made = (x @ weights[f"{path}_proj.weight"].T).reshape(*x.shape[:2], count, self.width)
        if f"{path}_norm.weight" in weights:
            made = self._norm(made, weights[f"{path}_norm.weight"])
        frequencies = theta ** (-np.arange(0, self.width, 2) / self.width)
        angles = np.arange(x.shape[1])[:, None, None] * frequencies
        cos, sin = (
            np.concatenate([f(angles)] * 2, -1).astype(np.float32) for f in (np.cos, np.sin)
        )
        half = self.width // 2
        other = np.concatenate([-made[..., half:], made[..., :half]], -1)
        return made * cos + other * sin

    def _mlp(self, weights: Weights, path: str, x: np.ndarray) -> np.ndarray:
        if f"{path}.gate.weight" not in weights:
            return self._gated(weights, path, x)
        flat = x.reshape(-1, x.shape[-1])
        router = flat @ weights[f"{path}.gate.weight"].T
        chosen = np.argsort(-router, -1)[:, : self.active_experts]
        shares = np.exp(router - router.max(-1, keepdims=True))
        shares = np.take_along_axis(shares, chosen, -1)
        shares /= shares.sum(-1, keepdims=True)
        out = np.zeros_like(flat)
        for expert in range(router.shape[1]):
            token, place = np.nonzero(chosen == expert)
            made = self._gated(weights, f"{path}.experts.{expert}", flat[token])
            np.add.at(out, token, made * shares[token, place, None])
        return out.reshape(x.shape)

    def _gated(self, weights: Weights, path: str, x: np.ndarray) -> np.ndarray:
        gate, up = (x @ weights[f"{path}.{name}_proj.weight"].T for name in ("gate", "up"))
        return (self._activation(gate) * up) @ weights[f"{path}.down_proj.weight"].T

    def _activation(self, x: np.ndarray) -> np.ndarray:
        if not self.is_gemma:
            return x / (1 + np.exp(-x))
        inner = np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (1 + np.tanh(inner))
