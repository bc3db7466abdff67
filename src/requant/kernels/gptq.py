"""GPTQ: codes column by column, the error of each column propagated to the later columns; refined.

A layer's Hessian is the mean of ``x x^T`` over its inputs, ``(in_features, in_features)``. With
``inverse(H) = U^T U``, U upper triangular, rounding input j by ``e`` is repaired best by taking
``e * U[j, k] / U[j, j]`` from each later input k: these shares are ``propagation``. Groups keep
their places, and the scale and bias of each are searched for on the repaired weights, so the
result is plain affine.

Then ``e H e^T``, the error of an output whose row of weights has the errors ``e``, is lowered
group by group, all other groups as they are: scale and bias by least squares over the codes, and
each code by itself, the others as they are. With ``g = e H`` a code that changes an error by
``-s`` changes ``e H e^T`` by ``s^2 H[j, j] - 2 s g[j]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from requant.core.dtypes import HEADER_NAME
from requant.errors import InvariantError, ShapeMismatchError
from requant.kernels import _native
from requant.kernels import quantize as native
from requant.kernels.float_views import as_unsigned
from requant.kernels.quantize import QuantizedTensors
from requant.quantization.config import Quantization

Array = np.ndarray

DAMPING = 0.01  # of the mean of the diagonal, added to it
# The least for the refinement: with less it fits the calibration's text too closely.
_REFINEMENT_DAMPING = 0.05
_GROWTH = 10.0
_MOST_DAMPING = 10.0
_SMALL_TRIANGLE = 64
_SWEEPS = 3  # over all groups, to refine them


@dataclass(frozen=True, slots=True)
class Compensation:
    """How errors are propagated, computed from a layer's Hessian."""

    # float32 ``(in_features, in_features)``, upper triangular, the diagonal 1: row j is the share
    # of input j's error that each later input takes.
    propagation: Array
    # float32 ``(in_features, in_features)``, symmetric: the Hessian with the damping of the
    # refinement added, zeros for dead inputs.
    hessian: Array
    # float64 ``(in_features,)``: the Hessian's diagonal, which weights the search.
    importance: Array
    damping: float  # share of the mean of the diagonal that was added for the propagation
    dead: int  # inputs that were zero for every token; they are rounded alone


def compensation_of(hessian: Array, in_features: int, damping: float = DAMPING) -> Compensation:
    """Factor a Hessian; LAPACK's Cholesky in float64, with more damping where it fails.

    Args:
        hessian: float32 or float64 ``(in_features, in_features)``, symmetric; only the upper
            triangle is read.
        in_features: Columns of the layer.
        damping: To begin with.

    Raises:
        ShapeMismatchError: The Hessian has another shape.
        InvariantError: It holds NaN, infinity or a negative diagonal, or is not a Hessian: even
            ten times the mean of its diagonal does not make it positive definite.
    """
    if hessian.shape != (in_features, in_features):
        expected = (in_features, in_features)
        raise ShapeMismatchError("[gptq] hessian", expected, hessian.shape)
    importance = np.diagonal(hessian).astype(np.float64)
    if not np.isfinite(hessian).all() or importance.min(initial=0.0) < 0.0:
        raise InvariantError("[gptq] hessian must be finite, its diagonal not negative")
    dead = importance == 0.0
    if dead.all():
        alone = np.eye(in_features, dtype=np.float32)
        return Compensation(alone, np.zeros_like(alone), importance, 0.0, in_features)
    mean = float(importance[~dead].mean())
    while damping <= _MOST_DAMPING:
        propagation = _propagation(hessian, dead, damping * mean)
        if propagation is not None:
            added = max(damping, _REFINEMENT_DAMPING) * mean
            symmetric = _symmetric(hessian, dead, added)
            return Compensation(propagation, symmetric, importance, damping, int(dead.sum()))
        damping *= _GROWTH
    raise InvariantError("[gptq] hessian is not positive semidefinite: no mean of x x^T")


def _propagation(hessian: Array, dead: Array, added: float) -> Array | None:
    """The shares, or None where the damped Hessian is not positive definite."""
    damped = hessian.astype(np.float64)
    damped[dead] = 0.0
    damped[:, dead] = 0.0
    damped.flat[:: len(damped) + 1] += np.where(dead, 1.0, added)
    try:
        # Reversed, L L^T becomes R R^T with R upper triangular; then U = inverse(R).
        lower = np.linalg.cholesky(damped[::-1, ::-1])
    except np.linalg.LinAlgError:
        return None
    upper = damped  # its memory is used again
    upper[:] = 0.0
    _invert_upper(lower[::-1, ::-1], upper)
    upper /= np.diagonal(upper)[:, None].copy()
    shares = upper.astype(np.float32)
    return shares if np.isfinite(shares).all() else None


def _symmetric(hessian: Array, dead: Array, added: float) -> Array:
    """The damped Hessian by its upper triangle."""
    full = np.triu(hessian).astype(np.float32, copy=False)
    full[dead] = 0.0
    full[:, dead] = 0.0
    full += np.triu(full, 1).T
    full.flat[:: len(full) + 1] += np.where(dead, 0.0, added).astype(np.float32)
    return full


def _invert_upper(triangle: Array, into: Array) -> None:
    """Invert an upper triangular matrix by halves: a quarter of a general inverse's products.

    With ``triangle = [[A, B], [0, C]]`` it is ``[[A^-1, -A^-1 B C^-1], [0, C^-1]]``. ``into`` is
    zero.
    """
    half = len(triangle) // 2
    if half < _SMALL_TRIANGLE:
        into[:] = np.triu(np.linalg.inv(triangle))
        return
    first, last = slice(half), slice(half, None)
    for part in (first, last):
        _invert_upper(triangle[part, part], into[part, part])
    np.matmul(into[first, first] @ triangle[first, last], into[last, last], out=into[first, last])
    np.negative(into[first, last], out=into[first, last])


def quantize(
    w: Array, compensation: Compensation, quantization: Quantization, search: str = "best"
) -> QuantizedTensors:
    """Quantize rows with their errors propagated, and refine scales, biases and codes.

    Rows are independent: any ranges of them give the same bytes as all at once.

    ``w`` is float32, float16 or bfloat16, ``(rows, in_features)``, and finite; the quantization is
    affine. ``search`` finds each group's scale and bias on the repaired weights.

    Raises:
        ShapeMismatchError: The Hessian was another layer's.
    """
    rows, n_in = w.shape
    group_size, bits = quantization.group_size, quantization.bits
    if compensation.propagation.shape != (n_in, n_in):
        raise ShapeMismatchError("[gptq] propagation", (n_in, n_in), compensation.propagation.shape)
    repaired = w.astype(np.float32)
    codes = np.empty((rows, n_in), np.uint8)
    scales = np.empty((rows, n_in // group_size), w.dtype)
    biases = np.empty_like(scales)
    group_codes = np.empty((rows, group_size), np.uint8)
    errors = np.empty((rows, group_size), np.uint32)
    for group in range(n_in // group_size):
        start, stop = group * group_size, (group + 1) * group_size
        _, scale, bias = native.quantize(
            _stored(repaired[:, start:stop], w.dtype),
            quantization,
            search=search,
            weights=compensation.importance[start:stop],
        )
        assert bias is not None
        steps, offsets = (x.astype(np.float32).view(np.uint32) for x in (scale, bias))
        values, shares = repaired.view(np.uint32), compensation.propagation.view(np.uint32)
        args = values, start, group_size, bits, steps, offsets, shares
        _native.gptq_group(*args, group_codes, errors)
        codes[:, start:stop] = group_codes
        scales[:, group], biases[:, group] = scale[:, 0], bias[:, 0]
    _native.gptq_refine(
        w.astype(np.float32).view(np.uint32),
        group_size,
        bits,
        _SWEEPS,
        compensation.hessian.view(np.uint32),
        codes,
        HEADER_NAME[w.dtype],
        as_unsigned(scales),
        as_unsigned(biases),
        repaired.view(np.uint32),  # no longer needed
        errors,
    )
    words = np.empty((rows, n_in * bits // 32), np.uint32)
    _native.pack_words(codes, bits, words)
    return QuantizedTensors(words, scales, biases)


def _stored(values: Array, dtype: np.dtype) -> Array:
    """Repaired weights in the dtype of the layer, which float16 may not hold."""
    if dtype == np.float16:
        values = np.clip(values, -65504.0, 65504.0)
    return np.ascontiguousarray(values.astype(dtype))
