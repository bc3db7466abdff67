"""bitsandbytes layers by hand, nested or not."""

import json
from typing import Any

import numpy as np

BLOCK = {"quant_method": "bitsandbytes", "load_in_4bit": True}


STATE = "up.weight.quant_state.bitsandbytes__nf4"


_NEGATIVE = (-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0)


_POSITIVE = (0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1)


NF4 = np.array([*_NEGATIVE, *_POSITIVE], np.float32)


def table(
    shape: tuple[int, ...], block: int = 64, nested: int = 0, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A layer ``up`` and its values, by the formulas of the format's document."""
    random = np.random.default_rng(seed)
    size = int(np.prod(shape))
    blocks = -(-size // block)
    codes = random.integers(0, 16, size + size % 2, np.uint8)
    absmax = random.uniform(0.5, 2, blocks).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "shape": list(shape)}
    state |= {"dtype": "bfloat16"}
    tensors = {
        "up.weight": (codes[::2] << 4 | codes[1::2]).reshape(-1, 1),
        "up.weight.absmax": absmax,
        "up.weight.quant_map": NF4,
    }
    if nested:
        book = np.linspace(-1, 1, 256).astype(np.float32)
        stored = random.integers(0, 256, blocks, np.uint8)
        above = random.uniform(0.5, 2, -(-blocks // nested)).astype(np.float32)
        tensors |= {
            "up.weight.absmax": stored,
            "up.weight.nested_absmax": above,
            "up.weight.nested_quant_map": book,
        }
        state |= {"nested_blocksize": nested, "nested_offset": 0.25, "nested_dtype": "float32"}
        absmax = book[stored] * above.repeat(nested)[:blocks] + np.float32(0.25)
    tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    values = NF4[codes[:size]] * absmax.repeat(block)[:size]
    return tensors, values.reshape(shape)
