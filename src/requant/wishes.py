"""What the user wants: one frozen record, checked before anything is read.

The same record serves ``plan`` and ``convert``, the command line and Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from requant.arrays.native import SEARCH_LEVELS, check_quantization
from requant.errors import ParseError, UnknownValueError, UsageError, few, shown
from requant.limits import MAX_INT
from requant.recipes import Recipe, load_recipe, recipe_from_dict
from requant.schema import SKIP, Quantization, QuantMode
from requant.specs import Spec, check_regex, parse_budget, parse_spec, resolve_quantization

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

LAYOUTS = ("auto", "keep", "mlx-lm")
SEARCHES = ("off", *SEARCH_LEVELS)
ACT_ORDERS = ("requantize", "dense", "refuse")

Override = tuple[str, Spec]


def parse_override(
    text: str | tuple[str, Spec | str], base: Quantization | None = None
) -> Override:
    """Parse ``REGEX=SPEC``; the last ``=`` divides, so a regex may hold one.

    Raises:
        UsageError: No ``=``, an unknown SPEC, or a regex that does not compile.
    """
    if isinstance(text, tuple):
        pattern, spec = text
    else:
        pattern, equals, spec = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--override {text!r} is not REGEX=SPEC, as in 'lm_head=8'")
    check_regex(pattern, "--override")
    return pattern, parse_spec(spec, base) if isinstance(spec, str) else spec


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What to do with a source; every field as the option of the same name.

    Attributes:
        quantization: Target of every chosen layer. None keeps a quantized source as
            it is, and stands for MLX's default (affine, 4 bits, group 64) on a dense one.
        dequantize: Write every layer dense.
        dtype: Header name ("BF16") for floating tensors; None keeps each one's own.
        overrides: Regex on the layer path -> target; the last match wins.
        only: Regexes; a layer that none of them matches is left as it is.
        recipe: Chooses layers' targets by role, name and place; overrides win over it.
        layout: "keep" leaves tensors their names; "mlx-lm" gives them the names, shapes and
            choice of layers of mlx-lm's own converter; "auto" does so where mlx-lm can.
        fold_rotation: Make plain weights of layers whose inputs are rotated (ParoQuant).
        act_order: What becomes of GPTQ layers whose inputs are out of order, where the order
            cannot be moved into another layer: "requantize" (8 bits), "dense" or "refuse".
        keep_extra: In mlx-lm's layout, keep tensors that its class has no use for.
        search: "off" for MLX's rule; "fast" or "best" look for scales and biases with a smaller
            squared error, wherever codes are computed.
        statistics: A statistics file (ours, or an imatrix) that weighs the errors of a search.
        gptq: Hand each column's error on to the next ones, with Hessians of ``statistics``.
        budget: How large the output may be ("4.5" bits per weight, "12GB"); what was chosen for
            it is the recipe.
        config_from: For GGUF: the folder whose config.json and tokenizer files are taken; None
            makes them from the metadata.
        shard_size: Output shards are cut before they exceed this.
        own_groups: No group size was asked for: layers whose codes then stay keep their own.
        nonfinite_layers: Layers that a first pass found to hold NaN or infinity; left as they are.
    """

    quantization: Quantization | None = None
    dequantize: bool = False
    dtype: str | None = None
    overrides: tuple[Override, ...] = ()
    only: tuple[str, ...] = ()
    recipe: Recipe | None = None
    layout: str = "auto"
    shard_size: int = 5 << 30
    nonfinite_layers: frozenset[str] = frozenset()
    act_order: str = "requantize"
    fold_rotation: bool = False
    keep_extra: bool = False
    search: str = "off"
    config_from: str | None = None
    budget: str | None = None
    statistics: str | None = None
    gptq: bool = False
    own_groups: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The wishes as JSON data; ``from_dict`` reads them back equal."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return found | {
            "quantization": self.quantization and self.quantization.to_dict(),
            "overrides": [[pattern, _spec_data(spec)] for pattern, spec in self.overrides],
            "only": list(self.only),
            "recipe": self.recipe and asdict(self.recipe),
            "nonfinite_layers": sorted(self.nonfinite_layers),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ConvertOptions:
        """Read what ``to_dict`` gave.

        Raises:
            ParseError: It is not that.
        """
        try:
            found = dict(data)
            found |= {
                "quantization": _quantization(found["quantization"]),
                "overrides": tuple((str(p), _spec(spec)) for p, spec in found["overrides"]),
                "only": tuple(map(str, found["only"])),
                "recipe": None if found["recipe"] is None else _recipe(found["recipe"]),
                "nonfinite_layers": frozenset(found["nonfinite_layers"]),
            }
            for pattern in (*found["only"], *(pattern for pattern, _ in found["overrides"])):
                check_regex(pattern, "wish")
            if unknown := sorted(str(key) for key in found.keys() - _DEFAULTS.keys()):
                raise ValueError(f"{few(unknown)} is none of them")
            wishes = ConvertOptions(**found)
            if wishes.budget is not None:
                parse_budget(wishes.budget)
            for name, default in _DEFAULTS.items():
                _check_told(name, getattr(wishes, name), default)
            return wishes
        except KeyError as error:
            raise ParseError(
                f"these are no wishes of this version of requant: {error} is missing"
            ) from error
        except (TypeError, ValueError) as error:
            raise ParseError(f"these are no wishes of this version of requant: {error}") from error

    @staticmethod
    def build(
        quantization: Quantization | None = None,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        mode: str | None = None,
        dequantize: bool = False,
        dtype: str | None = None,
        overrides: Iterable[str | tuple[str, Spec | str]] = (),
        only: Sequence[str] = (),
        recipe: str | os.PathLike[str] | None = None,
        layout: str = "auto",
        shard_size: int = 5 << 30,
        act_order: str = "requantize",
        fold_rotation: bool = False,
        keep_extra: bool = False,
        search: str = "off",
        config_from: str | os.PathLike[str] | None = None,
        budget: str | float | None = None,
        statistics: str | os.PathLike[str] | None = None,
        gptq: bool = False,
    ) -> ConvertOptions:
        """Check and assemble what the command line and the Python doors take.

        Raises:
            UsageError: ConvertOptions contradict each other or cannot be parsed.
            OutOfRangeError: MLX has no such bits or group size in the mode.
            UnknownValueError: Unknown mode or dtype.
        """
        if budget is not None:
            _check_alone(quantization, bits, mode, recipe, dequantize)
        own_groups = (bits, mode) != (None, None) and group_size is None and recipe is None
        if quantization is not None:
            if (bits, group_size, mode) != (None, None, None):
                raise UsageError("give either a Quantization, or bits, group_size and mode")
            check_quantization(quantization.bits, quantization.group_size, quantization.mode.value)
        elif (bits, group_size, mode) != (None, None, None):
            quantization = resolve_quantization(bits, group_size, mode)
        if dequantize and (quantization is not None or recipe is not None):
            raise UsageError("choose one: dequantize, or bits, group size, mode and recipe")
        chooser = None if recipe is None else load_recipe(recipe)
        if chooser is not None:
            quantization = _default_of(chooser, quantization, bits, group_size, mode)
        if dtype is not None and dtype not in DTYPES:
            raise UnknownValueError("no such dtype", dtype, list(DTYPES))
        if layout not in LAYOUTS:
            raise UnknownValueError("no such layout", layout, LAYOUTS)
        if act_order not in ACT_ORDERS:
            raise UnknownValueError("no such way with act-order", act_order, ACT_ORDERS)
        if search not in SEARCHES:
            raise UnknownValueError("no such search", search, SEARCHES)
        if chooser is not None and search == "off" and not dequantize:
            search = chooser.search or search
        if gptq:
            _check_gptq(statistics, quantization, dequantize)
        if statistics is not None and search == "off":
            search = "best"
        if shard_size < 1:
            raise UsageError(f"a shard of {shard_size} bytes holds nothing")
        only = (only,) if isinstance(only, str) else tuple(only)
        for pattern in only:
            check_regex(pattern, "--only")
        return ConvertOptions(
            quantization,
            dequantize,
            None if dtype is None else DTYPES[dtype],
            tuple(parse_override(text, quantization) for text in overrides),
            only,
            chooser,
            layout,
            shard_size,
            act_order=act_order,
            fold_rotation=fold_rotation,
            keep_extra=keep_extra,
            search=search,
            config_from=None if config_from is None else os.fspath(config_from),
            budget=None if budget is None else parse_budget(budget).text,
            statistics=None if statistics is None else os.fspath(statistics),
            gptq=gptq,
            own_groups=own_groups,
        )


def _check_gptq(statistics: object, quantization: Quantization | None, dequantize: bool) -> None:
    """GPTQ takes Hessians and gives affine codes.

    Raises:
        UsageError: There are none, or other codes are wished.
    """
    if statistics is None:
        raise UsageError(
            "--gptq needs Hessians: requant calibrate MODEL --hessian -o stats.safetensors, then "
            "--gptq --imatrix stats.safetensors"
        )
    if dequantize:
        raise UsageError("choose one: --dequantize or --gptq")
    if quantization is not None and quantization.mode is not QuantMode.AFFINE:
        raise UsageError(f"--gptq gives affine codes; leave --mode {quantization.mode.value} out")


def _check_alone(
    quantization: Quantization | None,
    bits: int | None,
    mode: str | None,
    recipe: object,
    dequantize: bool,
) -> None:
    """A budget chooses bits itself.

    Raises:
        UsageError: Something else is to choose them too.
    """
    given = {
        "a Quantization": quantization,
        "--bits": bits,
        "--mode": mode,
        "--recipe": recipe,
        "--dequantize": dequantize or None,
    }
    if other := [name for name, value in given.items() if value is not None]:
        raise UsageError(
            f"--budget chooses bits itself: leave {' and '.join(other)} out. --override fixes "
            "layers, --group-size the group of all others, --save-recipe keeps a table to edit"
        )


_DEFAULTS = {f.name: f.default for f in fields(ConvertOptions)}
_LEGAL: dict[str, tuple[str | None, ...]] = {
    "dtype": (None, *DTYPES.values()),
    "layout": LAYOUTS,
    "act_order": ACT_ORDERS,
    "search": SEARCHES,
}


def _check_told(name: str, value: object, default: object) -> None:
    """Raise ValueError where a record holds what no wish can be."""
    if name in _LEGAL:
        legal = value in _LEGAL[name]
    elif isinstance(default, bool):
        legal = isinstance(value, bool)
    elif isinstance(default, int):
        legal = isinstance(value, int) and 0 < value <= MAX_INT and not isinstance(value, bool)
    elif name == "nonfinite_layers":
        legal = isinstance(value, frozenset) and all(isinstance(x, str) for x in value)
    elif name in ("config_from", "budget", "statistics"):
        legal = value is None or isinstance(value, str)
    else:
        return
    if not legal:
        raise ValueError(f"{name} is {shown(value)}")


def _spec_data(spec: Spec) -> Any:
    return spec.to_dict() if isinstance(spec, Quantization) else "skip"


def _spec(data: Any) -> Spec:
    return SKIP if data == "skip" else _checked(Quantization.from_dict(data))


def _quantization(data: Any) -> Quantization | None:
    return None if data is None else _checked(Quantization.from_dict(data))


def _checked(quantization: Quantization) -> Quantization:
    """The same, if MLX has it."""
    mode = quantization.mode.value
    check_quantization(quantization.bits, quantization.group_size, mode)
    return quantization


def _recipe(data: Mapping[str, Any]) -> Recipe:
    return recipe_from_dict({**data, "default": _quantization(data["default"])})


def _default_of(
    recipe: Recipe,
    wish: Quantization | None,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
) -> Quantization | None:
    """The default under a recipe: what was wished rules, and the recipe's own fills the rest."""
    default = Quantization.affine(64, 4) if recipe.is_mixed else recipe.default
    if wish is None:
        return default
    if recipe.is_mixed and wish.mode is not QuantMode.AFFINE:
        raise UsageError(f"recipe {recipe.name} is for the affine mode, not {wish.mode.value}")
    if default is None or mode is not None or (bits is None and group_size is None):
        return wish
    return resolve_quantization(
        bits or default.bits, group_size or default.group_size, default.mode.value
    )
