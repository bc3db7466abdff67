"""The ``quantization`` block of an MLX ``config.json`` as frozen data.

    "quantization": {
        "group_size": 64, "bits": 4, "mode": "affine",       <- the default
        "model.embed_tokens": {"group_size": 32, "bits": 8},  <- one layer, other parameters
        "lm_head": false                                      <- one layer, not quantized
    }

Numbers are read as strictly as a 32-bit integer field demands: ``4.0``, ``"4"`` and ``true``
are rejected.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from requant.core.strict_json import read_int, reject_constant
from requant.errors import InvariantError, KeyCollisionError, ParseError, UnknownValueError
from requant.text import format_value

_GLOBAL_KEYS = ("group_size", "bits", "mode")
# Keys of the block that never name a layer: those of the default, and tags of other tools.
RESERVED_KEYS: Final = frozenset(
    (*_GLOBAL_KEYS, "quant_method", "linear_class", "quantization_mode")
)


class QuantMode(enum.StrEnum):
    """The quantization modes of MLX; the values are MLX's own tags."""

    AFFINE = "affine"  # scale and bias per group: the only mode with biases
    MXFP4 = "mxfp4"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"

    @property
    def has_biases(self) -> bool:
        """Whether a layer of this mode stores ``.biases`` next to ``.scales``."""
        return self is QuantMode.AFFINE


class Skip(enum.Enum):
    """Type of :data:`SKIP`. It copies and pickles to itself, and is false."""

    SKIP = False

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "SKIP"

    __str__ = __repr__


SKIP: Final = Skip.SKIP
"""Per-layer value for "do not quantize this layer"; ``false`` in JSON."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Parameters of one quantized layer, or of all.

    Args:
        group_size: Weights along the last axis that share a scale.
        bits: Bits per code.
        mode: A :class:`QuantMode` or its tag.

    Raises:
        UnknownValueError: ``mode`` is not one of MLX's tags.

    Example:
        >>> Quantization(32, 4, "mxfp4").to_dict()
        {'group_size': 32, 'bits': 4, 'mode': 'mxfp4'}
        >>> Quantization.affine(64, 4) == Quantization.from_dict({"group_size": 64, "bits": 4})
        True
    """

    group_size: int
    bits: int
    mode: QuantMode = QuantMode.AFFINE

    def __post_init__(self) -> None:
        try:
            mode = QuantMode(self.mode)
        except ValueError:
            raise UnknownValueError(
                "quantization mode", str(self.mode), [mode.value for mode in QuantMode]
            ) from None
        object.__setattr__(self, "mode", mode)

    @classmethod
    def affine(cls, group_size: int, bits: int) -> Quantization:
        """Shorthand for the affine mode."""
        return cls(group_size, bits)

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> Quantization:
        """Read ``{"group_size": ..., "bits": ..., "mode": ...}``.

        ``mode`` may be absent (affine), other keys are ignored.

        Raises:
            ParseError: ``block`` is not a mapping, a number is missing or not a 32-bit integer,
                or the mode is not one of MLX's tags.
        """
        if not isinstance(block, Mapping):
            raise ParseError(f"a quantization must be an object, got {format_value(block)}")
        group_size = read_int(block, "group_size")
        bits = read_int(block, "bits")
        mode = block.get("mode", QuantMode.AFFINE.value)
        tags = [known.value for known in QuantMode]
        if not isinstance(mode, str) or mode not in tags:
            raise ParseError(f"'mode' must be one of {', '.join(tags)}, got {format_value(mode)}")
        return cls(group_size, bits, QuantMode(mode))

    def holds(self, codes: Quantization) -> bool:
        """Return whether layers with quantization ``codes`` can be stored in this one exactly.

        Affine codes stay integers in more bits, and smaller groups repeat their scale and bias.
        The values of mxfp4 (E2M1) are values of mxfp8 (E4M3) under the same scale.

        Example:
            >>> Quantization.affine(32, 8).holds(Quantization.affine(64, 4))
            True
            >>> Quantization.affine(64, 8).holds(Quantization.affine(32, 4))
            False
        """
        if self.mode is codes.mode is QuantMode.AFFINE:
            return self.bits >= codes.bits and codes.group_size % self.group_size == 0
        return self == codes or (
            self.mode is QuantMode.MXFP8
            and codes.mode is QuantMode.MXFP4
            and self.group_size == codes.group_size
        )

    def to_dict(self) -> dict[str, Any]:
        """The form that MLX writes to ``config.json``; the mode is always there."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode.value}


@dataclass(frozen=True, slots=True)
class PerLayerQuantization:
    """A default quantization and the layers that differ from it.

    Args:
        quantization: For every layer not named in ``per_layer``; None means that only the
            named ones are quantized.
        per_layer: Layer path to a :class:`Quantization` or :data:`SKIP`. It is copied; the
            attribute is a read-only view of the copy.

    Raises:
        InvariantError: A value of ``per_layer`` is neither.

    Example:
        >>> config = PerLayerQuantization(Quantization.affine(64, 4), {"lm_head": SKIP})
        >>> config.quantization_for("model.layers.0.mlp.up_proj").bits
        4
        >>> config.quantization_for("lm_head") is None
        True
        >>> config.to_dict()
        {'group_size': 64, 'bits': 4, 'mode': 'affine', 'lm_head': False}
    """

    quantization: Quantization | None = None
    per_layer: Mapping[str, Quantization | Skip] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = dict(self.per_layer)
        for layer, value in own.items():
            if not isinstance(value, Quantization | Skip):
                message = f"per-layer value must be a Quantization or SKIP, got {value!r}"
                raise InvariantError(message, layer=layer)
        object.__setattr__(self, "per_layer", MappingProxyType(own))

    def __hash__(self) -> int:
        return hash((self.quantization, frozenset(self.per_layer.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view does not pickle; the constructor makes a new one.
        return PerLayerQuantization, (self.quantization, dict(self.per_layer))

    @classmethod
    def from_global(cls, quantization: Quantization) -> PerLayerQuantization:
        """The same quantization for every layer."""
        return cls(quantization)

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[str, Quantization],
        default: Quantization | None = None,
        skipped: Iterable[str] = (),
    ) -> PerLayerQuantization:
        """A default, and the layers that differ from it.

        Args:
            layers: Layer path -> its quantization.
            default: The default; if no layer has it, the most common one is taken.
            skipped: Layers to name as not quantized.
        """
        if default not in layers.values():
            common = Counter(layers.values()).most_common(1)
            default = common[0][0] if common else None
        per_layer: dict[str, Quantization | Skip] = {
            path: quantization for path, quantization in layers.items() if quantization != default
        }
        return cls(default, per_layer | dict.fromkeys(skipped, SKIP))

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> PerLayerQuantization:
        """Read a ``quantization`` block, where the default and the layers share one object.

        ``group_size`` and ``bits`` of the default are required. Keys in ``RESERVED_KEYS``
        never name a layer. Of the others, ``false`` becomes :data:`SKIP`, an object a
        :class:`Quantization`, and ``true`` is ignored: the layer follows the default.

        Raises:
            ParseError: The block does not have this form; ``.layer`` names the layer whose
                value is at fault, if it is one layer's.
        """
        if not isinstance(block, Mapping):
            raise ParseError(f"the quantization block must be an object, got {format_value(block)}")
        default = Quantization.from_dict({key: block[key] for key in _GLOBAL_KEYS if key in block})
        per_layer: dict[str, Quantization | Skip] = {}
        for layer, value in block.items():
            if layer in RESERVED_KEYS or value is True:
                continue
            per_layer[layer] = _parse_layer(layer, value)
        return cls(default, per_layer)

    def to_dict(self) -> dict[str, Any]:
        """The block that :meth:`from_dict` reads; without a default, the layers alone.

        Raises:
            KeyCollisionError: A layer bears a reserved name, and would be read as a parameter.
        """
        block: dict[str, Any] = {} if self.quantization is None else self.quantization.to_dict()
        for layer, value in self.per_layer.items():
            if layer in RESERVED_KEYS:
                raise KeyCollisionError(
                    "this layer path means a parameter in a quantization block", layer, layer=layer
                )
            block[layer] = value.to_dict() if isinstance(value, Quantization) else False
        return block

    def quantization_for(self, layer: str) -> Quantization | None:
        """The quantization of ``layer``: its own entry, else the default; None means dense."""
        own = self.per_layer.get(layer, self.quantization)
        return own if isinstance(own, Quantization) else None


def parse_quantization(config_json: str) -> PerLayerQuantization | None:
    """Read the ``quantization`` block of a ``config.json``.

    Args:
        config_json: The text of the file.

    Returns:
        The block, or None where the config has none (or is not an object).

    Raises:
        ParseError: The text is not JSON, or the block is invalid (also ``null``).

    Example:
        >>> parse_quantization('{"quantization": {"group_size": 64, "bits": 4}}').quantization
        Quantization(group_size=64, bits=4, mode=<QuantMode.AFFINE: 'affine'>)
        >>> parse_quantization('{"hidden_size": 64}') is None
        True
    """
    try:
        config = json.loads(config_json, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(";")[0]  # of long numbers: how Python's limit is raised
        raise ParseError(f"the config is not JSON: {reason}") from error
    if not isinstance(config, dict) or "quantization" not in config:
        return None
    return PerLayerQuantization.from_dict(config["quantization"])


def _parse_layer(layer: str, value: object) -> Quantization | Skip:
    if value is False:
        return SKIP
    if not isinstance(value, Mapping):
        raise ParseError(
            f"must be false or a quantization object, got {format_value(value)}", layer=layer
        )
    try:
        return Quantization.from_dict(value)
    except ParseError as error:
        error.layer = layer
        raise
