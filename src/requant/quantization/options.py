"""What the user asks for: the table of options, checked before anything is read.

``ConvertOptions`` say what becomes of a source, and are recorded in the output; ``RunOptions``
say how a run goes about it. One field is one option: its documentation, its spelling on the
command line, the way it is read, checked, recorded and printed are the field's metadata.
To add an option, add a field; then run ``scripts/generate-keywords``.
"""

# ruff: noqa: RUF009  # option() makes a field

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from requant.errors import ParseError, UnknownValueError, UsageError
from requant.quantization.config import SKIP, Quantization, QuantMode
from requant.quantization.modes import SEARCH_LEVELS, check_quantization, resolve_quantization
from requant.quantization.option_table import (
    CALLBACK,
    FLAG,
    INTEGER,
    PATH,
    SIZE,
    TEXT,
    Option,
    ValueType,
    choice,
    option,
    options_of,
    patterns,
)
from requant.quantization.recipe_files import load_recipe, recipe_from_dict, recipe_names
from requant.quantization.recipes import Recipe
from requant.quantization.size_budget import parse_budget
from requant.quantization.specs import Spec, check_regex, format_spec, parse_spec
from requant.text import join_first

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

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


# -- types of single options -----------------------------------------------------------------


def _quantization_from_json(data: Any) -> Quantization | None:
    return None if data is None else _validated(Quantization.from_dict(data))


def _validated(quantization: Quantization) -> Quantization:
    """The same, if MLX has it."""
    mode = quantization.mode.value
    check_quantization(quantization.bits, quantization.group_size, mode)
    return quantization


def _spec_to_json(spec: Spec) -> Any:
    return spec.to_dict() if isinstance(spec, Quantization) else "skip"


def _override_from_json(data: Any) -> Override:
    pattern, spec = data
    check_regex(str(pattern), "--override")
    return str(pattern), SKIP if spec == "skip" else _validated(Quantization.from_dict(spec))


def _parse_dtype(word: Any) -> str:
    if word not in DTYPES:
        raise UnknownValueError("no such dtype", str(word), list(DTYPES))
    return DTYPES[word]


_QUANTIZATION = ValueType(
    annotation="Quantization",
    expected="a Quantization",
    is_valid=lambda value: isinstance(value, Quantization),
    parse=lambda value: _validated(value) if isinstance(value, Quantization) else value,
    to_json=lambda value: value and value.to_dict(),
    from_json=_quantization_from_json,
    on_command_line="",
)
_MODE = replace(
    choice(*(mode.value for mode in QuantMode)),
    parse=lambda value: value.lower() if isinstance(value, str) else value,
)
_DTYPE = ValueType(
    annotation="str",
    expected=f"one of {', '.join(DTYPES.values())}",
    is_valid=lambda value: value in DTYPES.values(),
    parse=_parse_dtype,
    to_words=lambda value: [word for word, name in DTYPES.items() if name == value],
    choices=tuple(DTYPES),
)
_OVERRIDES = ValueType(
    annotation="Iterable[str | tuple[str, Spec | str]]",
    expected="a list of REGEX=SPEC",
    is_valid=lambda value: isinstance(value, tuple),
    parse=lambda value: (value,) if isinstance(value, str) else tuple(value),
    to_words=lambda value: [f"{pattern}={format_spec(spec)}" for pattern, spec in value],
    to_json=lambda value: [[pattern, _spec_to_json(spec)] for pattern, spec in value],
    from_json=lambda data: tuple(map(_override_from_json, data)),
    on_command_line="texts",
)
_RECIPE = ValueType(
    annotation="str | os.PathLike[str]",
    expected="a recipe",
    is_valid=lambda value: isinstance(value, Recipe),
    parse=load_recipe,
    to_words=lambda recipe: [
        recipe.name if recipe.name in recipe_names() else f"{recipe.name}.toml"
    ],
    to_json=lambda value: value and asdict(value),
    from_json=lambda data: (
        data and recipe_from_dict({**data, "default": _quantization_from_json(data.get("default"))})
    ),
)
_BUDGET = ValueType(
    annotation="str | float",
    expected="bits per weight or a size",
    is_valid=lambda value: isinstance(value, str),
    parse=lambda value: parse_budget(value).text,
    from_json=lambda data: data if data is None else parse_budget(_text(data)).text,
)
_LAYERS = ValueType(
    annotation="Iterable[str]",
    expected="a list of layers",
    is_valid=lambda value: isinstance(value, frozenset) and all(isinstance(x, str) for x in value),
    to_json=sorted,
    from_json=frozenset,
    on_command_line="",
)


def _text(data: Any) -> str:
    if not isinstance(data, str):
        raise TypeError(f"budget is {data!r}, expected a text")
    return data


# -- what is printed for options that depend on others ---------------------------------------


def _quantization_words(options: ConvertOptions) -> list[str]:
    """A Quantization that was given as such, in the options that say the same."""
    quantization, recipe = options.quantization, options.recipe
    given = (options.bits, options.group_size, options.mode) != (None, None, None)
    if quantization is None or given or options.budget is not None:
        return []
    if recipe is not None and quantization == _recipe_default(recipe):
        return []
    if quantization.mode is not QuantMode.AFFINE:
        return ["--mode", quantization.mode.value]
    return ["--bits", str(quantization.bits), "--group-size", str(quantization.group_size)]


def _recipe_words(options: ConvertOptions) -> list[str]:
    """The recipe; one of the user's own is written as ``NAME.toml``: its file is not at hand.

    What a budget chose is chosen again by the budget.
    """
    if options.recipe is None or options.budget is not None:
        return []
    return ["--recipe", *_RECIPE.to_words(options.recipe)]


def _nonfinite_words(options: ConvertOptions) -> list[str]:
    return ["--allow-nonfinite"] if options.nonfinite_layers else []


# -- the table -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What to do with a source. ``options_of(ConvertOptions)`` is the table of its fields."""

    quantization: Quantization | None = option(
        None,
        type=_QUANTIZATION,
        doc="Target of the chosen layers. None keeps a quantized source as it is and means "
        "affine, 4 bits, group 64 for a dense one.",
        words=_quantization_words,
    )
    bits: int | None = option(
        None,
        type=INTEGER,
        doc="With ``group_size`` and ``mode``, another way to give ``quantization``; what is not "
        "given takes MLX's default for the mode.",
        help="Bits per weight; affine: 1 to 6, 8.",
        metavar="N",
    )
    group_size: int | None = option(
        None,
        type=INTEGER,
        doc="Inputs that share a scale.",
        help="Inputs that share a scale; affine: 32 64 128.",
        metavar="N",
    )
    mode: str | None = option(
        None,
        type=_MODE,
        doc='"affine", "mxfp4", "mxfp8" or "nvfp4".',
        help="Quantization mode: affine, mxfp4, mxfp8 or nvfp4.",
        metavar="MODE",
    )
    dequantize: bool = option(
        False, type=FLAG, doc="Write every layer dense.", flags=("--dequantize", "-d")
    )
    dtype: str | None = option(
        None,
        type=_DTYPE,
        doc='"float16", "bfloat16" or "float32" for floating tensors; cast before they are '
        "quantized. The field holds the name of a safetensors header (BF16).",
        help="Dtype of floating tensors: float16, bfloat16 or float32.",
        metavar="DTYPE",
    )
    overrides: tuple[Override, ...] = option(
        (),
        type=_OVERRIDES,
        doc='``"REGEX=SPEC"`` or ``(regex, spec)`` on layer paths; the last match wins.',
        help="For layers whose path matches REGEX: bits (8), bits:group (8:32), a mode, or skip. "
        "Repeatable; the last that matches wins.",
        flags=("--override",),
        metavar="REGEX=SPEC",
    )
    only: tuple[str, ...] = option(
        (),
        type=patterns("--only"),
        doc="Regexes; layers whose path matches none of them are left as they are.",
        help="Quantize only layers whose path matches REGEX. Repeatable.",
        metavar="REGEX",
    )
    recipe: Recipe | None = option(
        None,
        type=_RECIPE,
        doc='Name of a recipe ("mixed_3_6", ``requant recipes`` lists them) or path of a TOML '
        "file: per-layer targets by role, name pattern and block position. ``bits``, "
        "``group_size`` and ``mode`` replace its default; ``overrides`` win over its rules.",
        help="Per-layer bits by role, name pattern and block position: a built-in name (`requant "
        "recipes`) or a TOML file.",
        metavar="NAME|FILE",
        completions=recipe_names,
        words=_recipe_words,
    )
    layout: str = option(
        "auto",
        type=choice("auto", "keep", "mlx-lm"),
        doc='"mlx-lm" (names, shapes, choice of layers and config of mlx-lm\'s converter; an '
        'error where it cannot be), "keep" (the source\'s tensor names), or "auto": the first '
        "where mlx-lm is installed and takes this checkpoint, else the second and a note that "
        "says why.",
        help="mlx-lm: what mlx-lm's converter would write; keep: the source's tensor names; "
        "auto: mlx-lm if installed and the model is supported, otherwise keep.",
        metavar="LAYOUT",
        functions=("convert", "plan"),
    )
    keep_extra: bool = option(
        False,
        type=FLAG,
        doc="In mlx-lm's layout, keep tensors that its class has no use for (towers for images "
        "and sound, MTP heads) under their own names instead of dropping them; a note says "
        "whether mlx-lm still loads the result.",
        help="Keep tensors that mlx-lm's class drops (vision, audio, MTP), as they are. mlx-lm "
        "may then need `strict=False` to load the result; the plan says so.",
        functions=("convert", "plan"),
    )
    act_order: str = option(
        "requantize",
        type=choice("requantize", "dense", "refuse"),
        doc="GPTQ layers with act-order (desc_act), where the order of inputs cannot be moved "
        'into the layer before: "requantize" (8 bits), "dense" or "refuse".',
        help="What to do with GPTQ act-order (desc_act) layers that MLX cannot represent: "
        "requantize (8 bits), dense or refuse.",
        metavar="ACTION",
    )
    fold_rotation: bool = option(
        False,
        type=FLAG,
        doc="ParoQuant: fold the rotation of inputs into the weights and requantize to 8 bits; "
        "else the rotation stays next to the codes, and only ``requant.mlx_lm.load`` runs it.",
        help="ParoQuant: fold the rotation into the weights and requantize to 8 bits.",
    )
    search: str = option(
        "off",
        type=choice("off", *SEARCH_LEVELS),
        doc='"off" (as ``mx.quantize``, bit for bit), "fast" or "best": look for scales and '
        "biases with a smaller squared error at the same size (docs/quantization/search.md).",
        help="How scales are chosen: off (as mx.quantize), fast, or best (lowest MSE, slower).",
        metavar="LEVEL",
    )
    statistics: str | None = option(
        None,
        type=PATH,
        doc="Importance of each input for the search: a file of ``calibrate``, or llama.cpp's "
        'imatrix. Turns ``search`` to "best" where that is "off".',
        help="Importance matrix for the scale search: llama.cpp imatrix (.gguf, .dat) or a file "
        "from `requant calibrate`.",
        flags=("--imatrix",),
        metavar="FILE",
    )
    gptq: bool = option(
        False,
        type=FLAG,
        doc="Apply GPTQ with the Hessians in ``statistics`` (``calibrate(..., hessian=True)``); "
        "affine layers only.",
        help="Apply GPTQ with the Hessians in --imatrix (`requant calibrate --hessian`). Affine "
        "only.",
    )
    config_from: str | None = option(
        None,
        type=PATH,
        doc="For GGUF: the folder of the original model, whose config.json and tokenizer files "
        "are taken instead of what the metadata say.",
        help="GGUF: take config.json and tokenizer files of the original model's folder.",
        metavar="FOLDER",
    )
    budget: str | None = option(
        None,
        type=_BUDGET,
        doc='4.5 (bits per weight) or "12GB" (bytes of all tensors): choose bits and group size '
        "per layer to minimise quantization error within it. The source is measured first; "
        "``overrides`` and ``only`` win, ``group_size`` holds for all other layers.",
        help="Mixed precision: choose bits and group size per layer to minimise quantization "
        "error within a target size (4.5 bits per weight, or 12GB). Reads the weights.",
        metavar="SIZE",
    )
    shard_size: int = option(
        5 << 30,
        type=SIZE,
        doc="Most bytes of one output file.",
        help="Most bytes of one weight file.",
        metavar="SIZE",
        functions=("convert", "plan"),
    )
    nonfinite_layers: frozenset[str] = option(
        frozenset(),
        type=_LAYERS,
        doc="Layers that a run found to hold NaN or Inf; they are left as they are.",
        functions=(),
        words=_nonfinite_words,
    )

    def __post_init__(self) -> None:
        """Check each field, and those that must fit together.

        Raises:
            UsageError: Options contradict each other.
            UnknownValueError: A word is none of the choices.
        """
        for name, entry in options_of(ConvertOptions).items():
            entry.check(getattr(self, name))
        if self.dequantize and (self.quantization is not None or self.recipe is not None):
            raise UsageError("choose one: dequantize, or bits, group size, mode and recipe")
        if self.gptq:
            _check_gptq(self)

    @property
    def own_groups(self) -> bool:
        """Whether layers whose codes stay keep their own group size: none was asked for."""
        target = (self.bits, self.mode) != (None, None)
        return target and self.group_size is None and self.recipe is None

    @classmethod
    def from_arguments(
        cls, quantization: Quantization | None = None, **arguments: Any
    ) -> ConvertOptions:
        """Check and assemble keyword arguments; the command line gives the same.

        Args:
            quantization: As the field.
            **arguments: The other fields, as signatures show them: paths, names of recipes and
                ``REGEX=SPEC`` are read here.

        Raises:
            UsageError: Options contradict each other or cannot be parsed.
            OutOfRangeError: MLX has no such bits or group size in the mode.
            UnknownValueError: A word is none of the choices.
        """
        table = options_of(ConvertOptions)
        given = {"quantization": quantization, **arguments}
        values = {name: _parsed(table[name], value) for name, value in given.items()}
        _check_budget_is_exclusive(values)
        quantization = _target(values)
        recipe: Recipe | None = values.get("recipe")
        values["quantization"] = quantization
        values["overrides"] = tuple(
            parse_override(text, quantization) for text in values.get("overrides", ())
        )
        if values.get("search", "off") == "off":
            if recipe is not None and recipe.search:
                values["search"] = recipe.search
            elif values.get("statistics") is not None:
                values["search"] = "best"
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON data; ``from_dict`` reads them back equal."""
        table = options_of(ConvertOptions)
        return {name: entry.type.to_json(getattr(self, name)) for name, entry in table.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConvertOptions:
        """Read what ``to_dict`` gave.

        Raises:
            ParseError: It is not that.
        """
        table = options_of(ConvertOptions)
        try:
            if unknown := sorted(str(key) for key in data.keys() - table.keys()):
                raise ValueError(f"{join_first(unknown)} is none of them")
            return cls(**{name: x.type.from_json(data[name]) for name, x in table.items()})
        except KeyError as error:
            raise ParseError(
                f"these are not options of this version of requant: {error} is missing"
            ) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ParseError(
                f"these are not options of this version of requant: {error}"
            ) from error

    def command_words(self) -> list[str]:
        """The options as they are typed after ``requant convert SOURCE OUTPUT``."""
        table = options_of(ConvertOptions)
        return [word for entry in table.values() for word in entry.command_words(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a conversion is run; nothing of it changes the bytes of the output."""

    save_recipe: str | None = option(
        None,
        type=PATH,
        doc="File for what ``budget`` chose, to be edited and given as ``recipe``.",
        help="Write what --budget chose as a recipe, to be edited and given to --recipe.",
        metavar="FILE",
        functions=("convert", "plan"),
    )
    max_memory: int | None = option(
        None,
        type=SIZE,
        doc="Most bytes to hold in memory, mapped pages aside.",
        help="Memory limit: 500MB, 2GB (thousands), 1GiB, 1G (1024s), or bytes.",
        metavar="SIZE",
    )
    threads: int | None = option(
        None,
        type=INTEGER,
        doc="Worker threads; every processor by default.",
        help="Worker threads; by default one a processor.",
        flags=("--threads", "-j"),
        metavar="N",
        minimum=1,
    )
    force: bool = option(
        False,
        type=FLAG,
        doc="Replace an existing output folder.",
        help="Replace an existing OUTPUT.",
        flags=("--force", "-f"),
        functions=("convert",),
    )
    resume: bool = option(
        True,
        type=FLAG,
        doc="Resume the same conversion after a stop; False starts over.",
        help="Start over instead of going on where a stopped run was.",
        is_negated=True,
        functions=("convert",),
    )
    consume_source: bool = option(
        False,
        type=FLAG,
        doc="Delete each weight file of the source once all that needs it is durably written; "
        "everything is computed and checked once before the first goes. Of a source on the hub, "
        "a few weight files at a time are on the disk, and none is checked before.",
        help="Delete each weight file of SOURCE once all made from it is on the disk. Needs "
        "--yes, but for the hub, of which a few files are here at a time.",
        functions=("convert",),
    )
    yes: bool = option(
        False,
        type=FLAG,
        doc="Must be true with ``consume_source``, but for the hub: nothing can be verified "
        "against the source afterwards.",
        help="Confirm deletion of the source weights.",
        functions=("convert",),
    )
    allow_nonfinite: bool = option(
        False,
        type=FLAG,
        doc="Leave a layer with NaN or Inf as it is instead of stopping.",
        help="Leave layers with NaN or Inf as they are.",
        functions=("convert", "load"),
        commands=("convert",),
    )
    allow_overflow: bool = option(
        False,
        type=FLAG,
        doc="Let values that a cast to ``dtype`` cannot hold become infinite.",
        help="Let values too large for --dtype be infinite.",
        functions=("convert", "load"),
        commands=("convert",),
    )
    progress: Callable[..., None] | None = option(
        None,
        type=CALLBACK,
        doc="Called about ten times a second with a ``Progress``.",
    )
    chunk_bytes: int | None = option(
        None,
        type=SIZE,
        doc="Bytes of one worker's chunk; the result does not depend on it.",
        functions=("convert", "load"),
        commands=(),
    )
    revision: str | None = option(
        None,
        type=TEXT,
        doc="Of a source on the hub: branch, tag or commit.",
        help="Of a repository on the hub: branch, tag or commit.",
        metavar="REV",
    )

    def __post_init__(self) -> None:
        """Check each field.

        Raises:
            UsageError: A value is of another type.
        """
        for name, entry in options_of(RunOptions).items():
            entry.check(getattr(self, name))

    @classmethod
    def from_arguments(cls, **arguments: Any) -> RunOptions:
        """Check and assemble keyword arguments; the command line gives the same."""
        table = options_of(RunOptions)
        return cls(**{name: _parsed(table[name], value) for name, value in arguments.items()})

    def check_save_recipe(self, options: ConvertOptions) -> None:
        """Check the file for a recipe before anything is measured.

        Raises:
            UsageError: There is no budget, the file's name is not a recipe's, or it is there
                already.
        """
        if self.save_recipe is None:
            return
        path = Path(self.save_recipe)
        if options.budget is None:
            raise UsageError(
                "--save-recipe keeps what --budget chooses; give --budget 4 or the like"
            )
        if path.suffix != ".toml":
            raise UsageError(f"--save-recipe {path}: --recipe reads names that end in .toml")
        if path.exists():
            raise UsageError(f"--save-recipe {path} is there already; remove it or name another")
        if not path.parent.is_dir():
            raise UsageError(f"--save-recipe {path}: there is no folder {path.parent}")


def _parsed(entry: Option, argument: Any) -> Any:
    """The field's value of an argument, checked by itself."""
    value = argument if argument is None else entry.type.parse(argument)
    entry.check(value)
    return value


def _target(values: Mapping[str, Any]) -> Quantization | None:
    """The quantization that ``bits``, ``group_size``, ``mode`` and ``recipe`` come to.

    Raises:
        UsageError: It is said twice, or the recipe is for another mode.
        OutOfRangeError: MLX has no such bits or group size in the mode.
        UnknownValueError: Unknown mode.
    """
    bits, group_size, mode = (values.get(name) for name in ("bits", "group_size", "mode"))
    target: Quantization | None = values["quantization"]
    if (bits, group_size, mode) != (None, None, None):
        if target is not None:
            raise UsageError("give either a Quantization, or bits, group_size and mode")
        target = resolve_quantization(bits, group_size, mode)
    recipe: Recipe | None = values.get("recipe")
    if recipe is None or values.get("dequantize"):
        return target
    default = _recipe_default(recipe)
    if target is None:
        return default
    if recipe.is_mixed and target.mode is not QuantMode.AFFINE:
        raise UsageError(f"recipe {recipe.name} is for the affine mode, not {target.mode.value}")
    if default is None or mode is not None or (bits is None and group_size is None):
        return target
    return resolve_quantization(
        bits or default.bits, group_size or default.group_size, default.mode.value
    )


def _recipe_default(recipe: Recipe) -> Quantization | None:
    """What a recipe gives to layers that it does not name."""
    return Quantization.affine(64, 4) if recipe.is_mixed else recipe.default


def _check_gptq(options: ConvertOptions) -> None:
    """GPTQ takes Hessians and gives affine codes.

    Raises:
        UsageError: There are none, or other codes are asked for.
    """
    if options.statistics is None:
        raise UsageError(
            "--gptq needs Hessians: requant calibrate MODEL --hessian -o stats.safetensors, then "
            "--gptq --imatrix stats.safetensors"
        )
    if options.dequantize:
        raise UsageError("choose one: --dequantize or --gptq")
    target = options.quantization
    if target is not None and target.mode is not QuantMode.AFFINE:
        raise UsageError(f"--gptq gives affine codes; leave --mode {target.mode.value} out")


def _check_budget_is_exclusive(arguments: Mapping[str, Any]) -> None:
    """A budget chooses bits itself.

    Checked on the arguments: once chosen, the options hold the budget and its recipe.

    Raises:
        UsageError: Something else is to choose them too.
    """
    if arguments.get("budget") is None:
        return
    given = {
        "a Quantization": arguments["quantization"],
        "--bits": arguments.get("bits"),
        "--mode": arguments.get("mode"),
        "--recipe": arguments.get("recipe"),
        "--dequantize": arguments.get("dequantize") or None,
    }
    if other := [name for name, value in given.items() if value is not None]:
        raise UsageError(
            f"--budget chooses bits itself: leave {' and '.join(other)} out. --override fixes "
            "layers, --group-size the group of all others, --save-recipe keeps a table to edit"
        )
