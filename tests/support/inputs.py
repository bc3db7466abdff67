"""Weights on which a quantizer can go wrong, and comparison by bits."""

import numpy as np

from tests.support.reference import BF16, F16, F32

DTYPES = (F32, F16, BF16)
COLS = 512
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def bits(array):
    return array.view(BITS[array.dtype.itemsize])


def assert_same_bits(actual, expected):
    """Same dtype, shape and bits; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    differ = bits(actual) != bits(expected)
    if actual.dtype.kind != "u":
        differ &= ~(np.isnan(actual.astype(np.float32)) & np.isnan(expected.astype(np.float32)))
    where = np.argwhere(differ)
    assert not len(where), (
        f"{len(where)} of {differ.size} differ, first at {where[0]}: "
        f"{actual[tuple(where[0])]!r}, expected {expected[tuple(where[0])]!r}"
    )


def finite_inputs(dtype, seed=7):
    """Name -> (rows, COLS) of finite values."""
    rng = np.random.default_rng(seed)
    largest = float(np.finfo(np.float16).max) if dtype == F16 else 3.38e38
    uint = BITS[dtype.itemsize]

    def build(values):
        with np.errstate(all="ignore"):
            return np.clip(np.asarray(values, np.float64), -largest, largest).astype(dtype)

    def normal(*shape):
        return rng.standard_normal(shape)

    patterns = rng.integers(0, np.iinfo(uint).max, (16, COLS), dtype=uint, endpoint=True)
    patterns = patterns.view(dtype)
    patterns = np.where(np.isfinite(patterns.astype(np.float32)), patterns, dtype.type(0))
    powers = np.exp2(rng.integers(-150, 126, (32, COLS // 16))).repeat(16, axis=1)
    outlier = normal(8, COLS) * 0.01
    outlier[:, ::32] = normal(8, COLS // 32) * 100
    tiny = np.frombuffer(rng.integers(0, 50, (8, COLS), dtype=uint).tobytes(), dtype=dtype).reshape(
        8, COLS
    )
    constants = (
        np.array([0.0, -0.0, 1.0, -2.0, 5e-8, -5e-8, 1e-7, 1e-5, largest, -largest])
        .repeat(COLS)
        .reshape(-1, COLS)
    )
    zeros = np.where(rng.random((8, COLS)) < 0.5, 0.0, -0.0)
    one_sided = np.abs(normal(8, COLS))
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 1.0625, 1.1875, 17, 19])
    ties = rng.choice(midpoints, (32, COLS)) * np.exp2(rng.integers(-8, 8, (32, 1)))
    ties *= rng.choice([-1.0, 1.0], ties.shape)
    ties = build(ties)
    siblings = (bits(ties) + rng.integers(-1, 2, ties.shape).astype(uint)).astype(uint).view(dtype)
    edge = rng.choice([6.0, 448.0], (16, COLS // 16)) * np.exp2(
        rng.integers(-12, 4, (16, COLS // 16))
    )
    near = build(normal(16, COLS) * 1e-3)
    bits(near)[:, ::16] = bits(build(edge)) + rng.integers(-3, 4, edge.shape).astype(uint)
    return {
        "normal": build(normal(32, COLS)),
        "small": build(normal(16, COLS) * 0.02),
        "patterns": patterns,
        "powers": build(normal(32, COLS) * powers),
        "lattice": build(rng.integers(-30, 31, (16, COLS)) / 8),
        "half steps": build((rng.integers(0, 31, (16, COLS)) - 15) * 0.5),
        "constants": build(constants),
        "zeros": build(zeros),
        "relu": build(np.where(one_sided > 0.7, one_sided, zeros)),
        "one outlier": build(outlier),
        "subnormal": tiny,
        "negative": build(-one_sided - 3),
        "positive": build(one_sided + 3),
        "near the top": build(rng.choice([-1.0, 0.5, 0.99, 1.0], (8, COLS)) * largest),
        "below eps": build(normal(8, COLS) * 1e-8),
        "ties": ties,
        "next to ties": siblings,
        "pinned maxima": near,
    }


def nonfinite_inputs(dtype, seed=8):
    rng = np.random.default_rng(seed)
    values = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-7, 3e38, -3e38, 1e-40, 6.0, 448.0]
    with np.errstate(all="ignore"):
        soup = rng.choice(np.array(values), (16, COLS)).astype(dtype)
        few = rng.standard_normal((16, COLS))
        few[:, ::48] = rng.choice([np.inf, -np.inf, np.nan], few[:, ::48].shape)
        holes = np.where(rng.random((8, COLS)) < 0.9, rng.standard_normal((8, COLS)), np.nan)
        return {
            "soup": soup,
            "few": few.astype(dtype),
            "holes": holes.astype(dtype),
            "all NaN": np.full((2, COLS), np.nan).astype(dtype),
        }
