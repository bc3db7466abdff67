"""AutoAWQ "gemm" checkpoints: 4-bit codes, eight output rows to a stored word.

A layer ``P`` of in inputs and out outputs is stored as

* ``P.qweight``, int32 (or uint32), ``(in, out / 8)``: one input, eight outputs a word;
* ``P.qzeros``, likewise, ``(in / group_size, out / 8)``; absent where every zero is 8;
* ``P.scales``, ``(in / group_size, out)``.

Output ``8 * k + r`` is in bits ``SHIFTS[r] .. SHIFTS[r] + 3`` of word ``k``.

Value: ``w = (code - zero) * scale``; in MLX's terms ``bias = -zero * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from requant.core.strict_json import read_int
from requant.errors import (
    DivisibilityError,
    InvariantError,
    KeyCollisionError,
    MissingKeyError,
    OutOfRangeError,
    ParseError,
    RankMismatchError,
    ShapeMismatchError,
    UnknownValueError,
    UnsupportedDtypeError,
)
from requant.kernels.backend import Array, Backend, Weights, backend_for
from requant.quantization.config import PerLayerQuantization, Quantization
from requant.text import format_value
from requant.weights.layer_tensors import BIASES, SCALES, WEIGHT, attach_layer, layer_of

QWEIGHT: Final = ".qweight"
QZEROS: Final = ".qzeros"

BITS: Final = 4
CODES_PER_WORD: Final = 32 // BITS
MASK: Final = 2**BITS - 1
SYMMETRIC_ZERO: Final = 2 ** (BITS - 1)

# Output r of a stored word sits in its nibble number NIBBLES[r]; MLX has nibble r there.
NIBBLES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
SHIFTS: Final = tuple(BITS * nibble for nibble in NIBBLES)
MLX_SHIFTS: Final = tuple(BITS * nibble for nibble in range(CODES_PER_WORD))

WORD_DTYPES: Final = ("uint32", "int32")
SCALE_DTYPES: Final = ("float16", "float32", "float64", "bfloat16")
VERSIONS: Final = ("gemm", "")

# Widest first; bfloat16 and float16 do not hold each other, see _common_dtype.
_BY_WIDTH = ("float64", "float32", "bfloat16", "float16")
_INT32_MAX = 2**31 - 1
_UINT32_MAX = 2**32 - 1


@dataclass(frozen=True, slots=True)
class AwqLoadConfig:
    """The layout of an AutoAWQ checkpoint, as its ``quantization_config`` gives it.

    Args:
        bits: Bits per code; only 4 can be converted.
        group_size: Inputs that share a scale and a zero.
        zero_point: Whether zeros are stored; if not, or where a layer has none, each is 8.
        version: The packing: "gemm", or empty in older files, which means the same.

    Example:
        >>> AwqLoadConfig.from_dict({"quant_method": "awq", "group_size": 64})
        AwqLoadConfig(bits=4, group_size=64, zero_point=True, version='')
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = ""

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> AwqLoadConfig:
        """Read a ``quantization_config`` block; absent keys take the defaults, others are ignored.

        Raises:
            ParseError: ``block`` is not a mapping, a number is not an unsigned 32-bit integer,
                ``zero_point`` no boolean or ``version`` no string. ``null`` is none of these.
        """
        if not isinstance(block, Mapping):
            raise ParseError(f"a quantization config must be an object, got {format_value(block)}")
        zero_point, version = block.get("zero_point", True), block.get("version", "")
        if not isinstance(zero_point, bool):
            raise ParseError(f"'zero_point' must be a boolean, got {format_value(zero_point)}")
        if not isinstance(version, str):
            raise ParseError(f"'version' must be a string, got {format_value(version)}")
        return cls(
            bits=read_int(block, "bits", 4, low=0, high=_UINT32_MAX),
            group_size=read_int(block, "group_size", 128, low=0, high=_UINT32_MAX),
            zero_point=zero_point,
            version=version,
        )

    def to_dict(self) -> dict[str, Any]:
        """The four fields, as :meth:`from_dict` reads them."""
        return asdict(self)


def unpack_awq_weights(qweight: Array) -> Array:
    """Unpack AutoAWQ words into codes in natural order.

    Args:
        qweight: ``(rows, n)``, uint32 or int32. Signed words are read bit by bit, never
            converted by value: a negative word has a code above 7 in its highest bits.

    Returns:
        ``(rows, 8 * n)``, uint32, each 0 to 15; lazy for an MLX array.

    Raises:
        RankMismatchError: ``qweight`` has not two axes.
        UnsupportedDtypeError: Its dtype is another, or it is not an array of MLX or NumPy.
        BackendError: MLX cannot hold the result.

    Example:
        >>> import numpy as np
        >>> unpack_awq_weights(np.array([[0x75316420]], np.int32)).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    try:
        backend = backend_for({"qweight": qweight})
    except UnsupportedDtypeError as error:
        error.layer = None  # one array has no name
        raise
    _check_rank(backend, qweight, "(rows, words)", None)
    _check_dtype(backend, qweight, WORD_DTYPES, None)
    return _unpack(backend, qweight)


def transform_awq_weights(
    weights: Weights, config: AwqLoadConfig
) -> tuple[dict[str, Array], PerLayerQuantization]:
    """Turn AutoAWQ layers into MLX affine layers: the same codes, in MLX's packing.

    Each layer with a ``.qweight`` loses it, its ``.qzeros`` and its ``.scales``, and gets

    * ``{layer}.weight``, uint32, ``(out, in / 8)``: the codes, packed along the input axis;
    * ``{layer}.scales``, ``(out, in / group_size)``: the stored values;
    * ``{layer}.biases``, likewise: ``-zero * scale``, computed in float32 and rounded to the
      dtype of the layer's scales. The zero is 8 if the layer has no ``.qzeros`` or the config
      no ``zero_point``.

    Scales and biases of all layers then get one dtype, the widest among the scales; float16
    and bfloat16 together make float32, which alone holds both. Every other entry passes through
    as the same array, dtype included. ``weights`` is not modified, and MLX arrays stay lazy:
    nothing is evaluated. All layers are checked before the first is converted.

    Args:
        weights: The weight map of the checkpoint.
        config: Its layout.

    Returns:
        A new weight map, of the library that came in, and its quantization: affine, 4 bits,
        the config's group size, for all layers.

    Raises:
        UnknownValueError: ``config.version`` is neither "gemm" nor empty.
        OutOfRangeError: ``config.bits`` is not 4, or ``config.group_size`` is not a positive
            32-bit integer.
        InvariantError: There is a ``.g_idx`` (GPTQ's order of groups), or the map mixes array
            libraries.
        UnsupportedDtypeError: Words that are not 32-bit integers, scales that are not floats.
        MissingKeyError: A layer has no ``.scales``.
        KeyCollisionError: A layer has ``.weight`` or ``.biases`` already.
        RankMismatchError, ShapeMismatchError: A tensor has not the shape given above.
        DivisibilityError: ``in`` is not a multiple of ``group_size``, or of the 8 codes in a word.

    Example:
        >>> import numpy as np
        >>> weights = {
        ...     "up.qweight": np.full((32, 1), 0x75316420, np.int32),  # codes 0 to 7
        ...     "up.qzeros": np.full((1, 1), 0x44444444, np.int32),  # every zero is 4
        ...     "up.scales": np.full((1, 8), 0.5, np.float16),
        ... }
        >>> converted, quantization = transform_awq_weights(weights, AwqLoadConfig(group_size=32))
        >>> quantization.quantization
        Quantization(group_size=32, bits=4, mode=<QuantMode.AFFINE: 'affine'>)
        >>> converted["up.biases"].ravel().tolist()
        [-2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0]
        >>> [hex(word) for word in converted["up.weight"][:, 0]][:3]
        ['0x0', '0x11111111', '0x22222222']
    """
    weights = dict(weights)
    backend = backend_for(weights)
    _check_config(config)
    _reject_group_order(weights)
    layers = sorted(layer for name in weights if (layer := layer_of(name, QWEIGHT)) is not None)
    _check_layers(backend, weights, layers, config.group_size)
    target = _common_dtype(backend, weights, layers)

    result: dict[str, Array] = {}
    for layer in layers:
        with attach_layer(layer):
            result |= _convert_layer(backend, weights, layer, config, target)
    consumed = {layer + suffix for layer in layers for suffix in (QWEIGHT, QZEROS, SCALES)}
    result |= {name: array for name, array in weights.items() if name not in consumed}
    quantization = Quantization.affine(config.group_size, config.bits)
    return result, PerLayerQuantization.from_global(quantization)


def _check_config(config: AwqLoadConfig) -> None:
    if config.version not in VERSIONS:
        raise UnknownValueError(
            "AWQ version: others pack the codes in another order", config.version, VERSIONS
        )
    if config.bits != BITS:
        raise OutOfRangeError(f"only {BITS}-bit AWQ can be converted", "bits", config.bits)
    if not 0 <= config.group_size <= _INT32_MAX:
        raise OutOfRangeError(
            f"must lie between 1 and {_INT32_MAX}", "group_size", config.group_size
        )


def _reject_group_order(weights: Weights) -> None:
    for name in weights:
        if name.endswith(".g_idx"):
            raise InvariantError(
                "groups in the order of a .g_idx (GPTQ) cannot be laid out for MLX", layer=name
            )


def _check_layers(
    backend: Backend, weights: Weights, layers: Sequence[str], group_size: int
) -> None:
    """Reject what cannot be converted: the scales of all layers first, then layer by layer."""
    for layer in layers:
        # converting to a dtype that is not a float would ruin the rest
        if layer + SCALES in weights:
            _check_dtype(backend, weights[layer + SCALES], SCALE_DTYPES, layer + SCALES)
    for layer in layers:
        if layer + SCALES not in weights:
            raise MissingKeyError("an AWQ layer has no scales", layer + SCALES, layer=layer)
    for layer in layers:
        _check_layer(backend, weights, layer, group_size)
    for layer in layers:
        n_in, _ = backend.shape(weights[layer + QWEIGHT])
        if n_in % CODES_PER_WORD:
            what = "MLX packs whole words along the inputs"
            raise _ragged(what, n_in, CODES_PER_WORD, layer)


def _check_layer(backend: Backend, weights: Weights, layer: str, group_size: int) -> None:
    for suffix in (WEIGHT, BIASES):
        if layer + suffix in weights:
            raise KeyCollisionError(
                f"an AWQ layer has a {suffix} already", layer + suffix, layer=layer
            )
    qweight, scales = weights[layer + QWEIGHT], weights[layer + SCALES]
    _check_dtype(backend, qweight, WORD_DTYPES, layer + QWEIGHT)
    _check_rank(backend, qweight, "(in, out / 8)", layer + QWEIGHT)
    _check_rank(backend, scales, "(in / group_size, out)", layer + SCALES)
    n_in, words = backend.shape(qweight)
    if group_size == 0:
        raise OutOfRangeError("must be positive", "group_size", group_size, layer=layer)
    if n_in % group_size:
        raise _ragged("inputs do not fill their groups", n_in, group_size, layer)
    groups = n_in // group_size
    expected, actual = (groups, words * CODES_PER_WORD), backend.shape(scales)
    if actual != expected:
        raise ShapeMismatchError("scales are (in / group_size, out)", expected, actual, layer=layer)
    if layer + QZEROS in weights:
        qzeros = weights[layer + QZEROS]
        _check_dtype(backend, qzeros, WORD_DTYPES, layer + QZEROS)
        expected, actual = (groups, words), backend.shape(qzeros)
        if actual != expected:
            raise ShapeMismatchError(
                "zeros are (in / group_size, out / 8)", expected, actual, layer=layer + QZEROS
            )


def _ragged(what: str, n_in: int, divisor: int, layer: str) -> DivisibilityError:
    return DivisibilityError(what, "in_features", n_in, divisor, layer=layer + QWEIGHT)


def _common_dtype(backend: Backend, weights: Weights, layers: Sequence[str]) -> str:
    """One dtype that holds the scales of all layers."""
    dtypes = {backend.dtype(weights[layer + SCALES]) for layer in layers}
    if dtypes == {"float16", "bfloat16"}:
        return "float32"  # neither holds the other: precision here, range there
    return next((dtype for dtype in _BY_WIDTH if dtype in dtypes), _BY_WIDTH[0])


def _convert_layer(
    backend: Backend, weights: Weights, layer: str, config: AwqLoadConfig, target: str
) -> dict[str, Array]:
    qweight, stored = weights[layer + QWEIGHT], weights[layer + SCALES]
    scales = backend.transpose(stored)
    qzeros = weights.get(layer + QZEROS) if config.zero_point else None
    if qzeros is None:
        biases = backend.scale(scales, -SYMMETRIC_ZERO)
    else:
        biases = _biases(backend, qzeros, scales)
    return {
        layer + WEIGHT: backend.pack(backend.transpose(_unpack(backend, qweight)), MLX_SHIFTS),
        layer + SCALES: backend.astype(scales, target),
        layer + BIASES: backend.astype(biases, target),
    }


def _biases(backend: Backend, qzeros: Array, scales: Array) -> Array:
    """``-zero * scale`` in float32, rounded once to the dtype of the scales."""
    zeros = backend.astype(backend.transpose(_unpack(backend, qzeros)), "float32")
    product = backend.multiply(zeros, backend.astype(scales, "float32"))
    return backend.astype(backend.negative(product), backend.dtype(scales))


def _unpack(backend: Backend, words: Array) -> Array:
    if backend.dtype(words) == "int32":
        words = backend.view_uint32(words)
    return backend.unpack(words, SHIFTS, MASK)


def _check_dtype(
    backend: Backend, array: Array, supported: Sequence[str], name: str | None
) -> None:
    dtype = backend.dtype(array)
    if dtype not in supported:
        raise UnsupportedDtypeError("AWQ tensor", dtype, supported, layer=name)


def _check_rank(backend: Backend, array: Array, expected: str, name: str | None) -> None:
    shape = backend.shape(array)
    if len(shape) != 2:
        raise RankMismatchError(f"an AWQ tensor is {expected}", len(shape), shape, layer=name)
