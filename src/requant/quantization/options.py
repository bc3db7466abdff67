"""The table of options.

``ConvertOptions`` determine the output and are recorded in it; ``RunOptions`` control how the
conversion runs. Each field is one option. Its documentation, its spelling on the command line, and
how it is read, checked, recorded and printed are metadata of the field. To add an option, add a
field; then run ``scripts/generate-keywords``.
"""

# ruff: noqa: RUF009  # option() returns a dataclass field

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.errors import ParseError, UsageError
from requant.quantization import option_types as types
from requant.quantization.config import Quantization, QuantMode
from requant.quantization.modes import SEARCH_LEVELS, resolve_quantization
from requant.quantization.option_table import Option, option, options_of
from requant.quantization.part import Part
from requant.quantization.qualities import QUALITIES, Quality, with_quality
from requant.quantization.recipes import Recipe
from requant.text import join_first

DTYPES = types.DTYPES
STATISTICS = "stats.safetensors"  # a name for a statistics file in messages
LAYOUTS = ("keep", "mlx-lm", "mlx-vlm", "mlx-audio", "mlx-embeddings")

# -- command-line words of options that depend on others -------------------------------------


def _quantization_words(options: ConvertOptions) -> list[str]:
    """A Quantization that was given as an object, as --mode, --bits and --group-size."""
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
    """The recipe, unless a budget chose it and will choose it again."""
    if options.recipe is None or options.budget is not None:
        return []
    return ["--recipe", *types.RECIPE.to_words(options.recipe)]


def _implied(options: ConvertOptions) -> Quality | None:
    """What a quality or a calibration stands for; None without one."""
    if options.quality is None and options.calibrate is None:
        return None
    return QUALITIES[options.quality or "best"]


def _calibration_words(options: ConvertOptions) -> list[str]:
    """The texts; nothing where the quality itself calibrates with the bundled one."""
    texts = options.calibrate
    if texts is None or (not texts and options.quality is not None):
        return []
    return [f"--calibrate={text}" for text in texts] or ["--calibrate"]


def _search_words(options: ConvertOptions) -> list[str]:
    implied = _implied(options)
    return (
        []
        if options.search == (implied.search if implied else "off")
        else ["--search", options.search]
    )


def _statistics_words(options: ConvertOptions) -> list[str]:
    """The file, unless the conversion makes it itself."""
    if options.statistics is None or options.calibrate is not None:
        return []
    return ["--imatrix", options.statistics]


def _gptq_words(options: ConvertOptions) -> list[str]:
    implied = _implied(options)
    return ["--gptq"] if options.gptq and not (implied and implied.gptq) else []


# -- the table -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Options that determine the output; ``options_of(ConvertOptions)`` is their table."""

    quantization: Quantization | None = option(
        types.QUANTIZATION,
        doc="Target of the chosen layers. None keeps a quantized source as it is and means "
        "affine, 4 bits, group 64 for a dense one.",
        words=_quantization_words,
    )
    bits: int | None = option(
        types.INTEGER,
        doc="With ``group_size`` and ``mode``, another way to give ``quantization``; what is not "
        "given takes MLX's default for the mode.",
        help="Bits per weight; affine: 1 to 6, 8.",
    )
    group_size: int | None = option(
        types.INTEGER, doc="Inputs that share a scale; affine: 32, 64 or 128."
    )
    mode: str | None = option(types.MODE, doc="Quantization mode: affine, mxfp4, mxfp8 or nvfp4.")
    dequantize: bool = option(
        types.FLAG, doc="Write every layer dense.", flags=("--dequantize", "-d")
    )
    dtype: str | None = option(
        types.DTYPE,
        doc='"float16", "bfloat16" or "float32" for floating tensors; cast before they are '
        "quantized. The field holds the name of a safetensors header (BF16).",
        help="Dtype of floating tensors: float16, bfloat16 or float32.",
    )
    overrides: tuple[types.Override, ...] = option(
        types.OVERRIDES,
        doc='``"REGEX=SPEC"`` or ``(regex, spec)`` on layer paths; the last match wins.',
        help="For layers whose path matches REGEX: bits (8), bits:group (8:32), a mode, or skip. "
        "Repeatable; the last that matches wins.",
        flags=("--override",),
    )
    only: tuple[str, ...] = option(
        types.PATTERNS,
        doc="Regexes; layers whose path matches none of them are left as they are.",
        help="Quantize only layers whose path matches REGEX. Repeatable.",
    )
    recipe: Recipe | None = option(
        types.RECIPE,
        doc='Name of a recipe ("mixed_3_6", ``requant recipes`` lists them) or path of a TOML '
        "file: per-layer targets by role, name pattern and block position. ``bits``, "
        "``group_size`` and ``mode`` replace its default; ``overrides`` win over its rules.",
        help="Per-layer bits by role, name pattern and block position: a built-in name (`requant "
        "recipes`) or a TOML file.",
        words=_recipe_words,
    )
    layout: str = option(
        types.choice("auto", *LAYOUTS, default="auto"),
        doc='"mlx-lm", "mlx-vlm", "mlx-audio", "mlx-embeddings" (names, shapes, choice of layers '
        'and config of that library\'s converter; an error where it cannot be), "keep" (the '
        'source\'s tensor names), or "auto": mlx-vlm for a model with images, mlx-audio for '
        "one with sound, where they are installed and have its class; else mlx-lm; else keep "
        "and a note that says why.",
        help="The library whose converter's output to write (mlx-lm, mlx-vlm, mlx-audio, "
        "mlx-embeddings); keep: the source's tensor names; auto: the library that is installed "
        "and suits the model, otherwise keep.",
        metavar="LAYOUT",
        functions=("convert", "plan"),
    )
    keep_extra: bool = option(
        types.FLAG,
        doc="In a library's layout, keep tensors that its class has no use for (towers for images "
        "and sound, MTP heads) under their own names instead of dropping them; a note says "
        "whether the library still loads the result.",
        help="Keep tensors that the library's class drops (vision, audio, MTP), as they are. It "
        "may then need `strict=False` to load the result; the plan says so.",
        functions=("convert", "plan"),
    )
    act_order: str = option(
        types.choice("requantize", "dense", "refuse", default="requantize"),
        doc="GPTQ layers with act-order (desc_act), where the order of inputs cannot be moved "
        'into the layer before: "requantize" (8 bits), "dense" or "refuse".',
        help="What to do with GPTQ act-order (desc_act) layers that MLX cannot represent: "
        "requantize (8 bits), dense or refuse.",
        metavar="ACTION",
    )
    fold_rotation: bool = option(
        types.FLAG,
        doc="ParoQuant: fold the rotation of inputs into the weights and requantize to 8 bits; "
        "else the rotation stays next to the codes, and only ``requant.mlx_lm.load`` runs it.",
        help="ParoQuant: fold the rotation into the weights and requantize to 8 bits.",
    )
    quality: str | None = option(
        types.choice(*QUALITIES),
        doc='One choice for ``search``, ``calibrate`` and ``gptq``: "fast" needs no data, '
        '"balanced" weights the search by statistics of a text, "best" applies GPTQ as well. '
        "Options that are given themselves win.",
        help="One choice for the options below: fast (no data), balanced (--calibrate without "
        "--gptq), best (--calibrate and --gptq).",
        metavar="QUALITY",
        functions=("convert", "plan"),
    )
    calibrate: tuple[str, ...] | None = option(
        types.TEXTS,
        doc="Run the model over a text first, as ``calibrate`` does, and convert with the "
        "statistics: True for the text that comes with requant, or text files. Means "
        '``quality="best"`` where that is not given. Needs mlx-lm.',
        help="Run the model over a text first and convert with the statistics; with GPTQ unless "
        "--quality says otherwise. TEXT is a file .txt or .jsonl, or --calibrate=FILE with any "
        "name; without it, a text that comes with requant. Repeatable.",
        words=_calibration_words,
        functions=("convert", "plan"),
    )
    search: str = option(
        types.choice("off", *SEARCH_LEVELS, default="off"),
        doc='"off" (as ``mx.quantize``, bit for bit), "fast" or "best": look for scales and '
        "biases with a smaller weighted error at the same size (docs/quantization/search.md).",
        help="How scales are chosen: off (as mx.quantize), fast, or best (least error, slower).",
        metavar="LEVEL",
        words=_search_words,
    )
    statistics: str | None = option(
        types.PATH,
        doc="Importance of each input for the search: a file of ``calibrate``, or llama.cpp's "
        'imatrix. Turns ``search`` to "best" where that is "off".',
        help="Importance matrix for the scale search: llama.cpp imatrix (.gguf, .dat) or a file "
        "from `requant calibrate`.",
        flags=("--imatrix",),
        words=_statistics_words,
    )
    gptq: bool = option(
        types.FLAG,
        doc="Apply GPTQ with the Hessians in ``statistics`` (``calibrate(..., hessian=True)``); "
        "affine layers only.",
        help="Apply GPTQ with the Hessians in --imatrix (`requant calibrate --hessian`). Affine "
        "only.",
        words=_gptq_words,
    )
    config_from: str | None = option(
        types.PATH,
        doc="For GGUF: the folder of the original model, whose config.json and tokenizer files "
        "are taken instead of what the metadata say.",
        help="GGUF: take config.json and tokenizer files of the original model's folder.",
        metavar="FOLDER",
    )
    mmproj: str | None = option(
        types.TEXT,
        doc="For GGUF: the file next to the model that holds its vision part, or ``none`` to "
        "convert the language model alone. By default the one file with mmproj in its name, "
        "unless the layout is mlx-lm's, which has no images.",
        help="GGUF: the vision part next to the model; none converts the language model alone. "
        "Default: the one file named mmproj, if there is one.",
        metavar="FILE",
        functions=("convert", "plan"),
    )
    budget: str | None = option(
        types.BUDGET,
        doc='4.5 (bits per weight) or "12GB" (bytes of all tensors): choose bits and group size '
        "per layer to minimise quantization error within it. The source is measured first; "
        "``overrides`` and ``only`` win, ``group_size`` holds for all other layers.",
        help="Mixed precision: choose bits and group size per layer to minimise quantization "
        "error within a target size (4.5 bits per weight, or 12GB). Reads the weights.",
    )
    protect: tuple[types.Protection, ...] = option(
        types.PROTECTIONS,
        doc='``"REGEX=BITS"`` or ``(regex, bits)`` on layer paths: layers that match have at least '
        "so many bits in what ``budget`` chooses; the largest match holds. Codes that stay what "
        "they are in the source lose nothing and may have fewer.",
        help="With --budget: at least BITS bits (2 to 8) for layers whose path matches REGEX. "
        "Repeatable; the largest that matches holds.",
    )
    shard_size: int = option(
        types.SIZE,
        default=5 << 30,
        doc="Most bytes of one weight file.",
        functions=("convert", "plan"),
    )
    nonfinite_layers: frozenset[str] = option(
        types.LAYERS,
        doc="Layers that a run found to hold NaN or Inf; they are left as they are.",
        functions=(),
        words=lambda options: ["--allow-nonfinite"] if options.nonfinite_layers else [],
    )

    def __post_init__(self) -> None:
        _check_fields(self, options_of(ConvertOptions))
        if self.dequantize and (self.quantization is not None or self.recipe is not None):
            raise UsageError("choose one: dequantize, or bits, group size, mode and recipe")
        if self.gptq:
            _check_gptq(self)

    @property
    def own_groups(self) -> bool:
        """Whether layers whose codes are kept also keep their group size: no other is given."""
        target = (self.bits, self.mode) != (None, None)
        return target and self.group_size is None and self.recipe is None

    @classmethod
    def from_arguments(
        cls, quantization: Quantization | None = None, **arguments: Any
    ) -> ConvertOptions:
        """Make options from arguments of Python or the command line: files are read, texts parsed.

        Raises:
            UsageError: Options contradict each other or cannot be parsed.
            OutOfRangeError: MLX has no such bits or group size in the mode.
            UnknownValueError: A word is none of the choices.
        """
        values = _parse({"quantization": quantization, **arguments}, options_of(ConvertOptions))
        _check_budget_is_exclusive(values)
        quantization = _target(values)
        recipe: Recipe | None = values.get("recipe")
        values["quantization"] = quantization
        values["overrides"] = tuple(
            types.parse_override(text, quantization) for text in values.get("overrides", ())
        )
        if values.get("search", "off") == "off":
            if recipe is not None and recipe.search:
                values["search"] = recipe.search
            elif values.get("statistics") is not None:
                values["search"] = "best"
        return cls(**with_quality(values))

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON data; ``from_dict`` reads them back equal."""
        table = options_of(ConvertOptions)
        return {name: entry.type.to_json(getattr(self, name)) for name, entry in table.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConvertOptions:
        """Read the result of ``to_dict``.

        Raises:
            ParseError: ``data`` is not such a result, or one of another version.
        """
        table = options_of(ConvertOptions)
        try:
            if unknown := sorted(str(key) for key in data.keys() - table.keys()):
                raise ValueError(f"{join_first(unknown)} is none of them")
            return cls(**{name: x.type.from_json(data[name]) for name, x in table.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ParseError(f"these are not options of this version of requant: {why}") from error

    def calibration_words(self, source: str) -> list[str]:
        """The command that makes the statistics of ``calibrate`` as a file of their own."""
        words = ["requant", "calibrate", source, "-o", STATISTICS]
        words += [word for text in self.calibrate or () for word in ("--text", text)]
        return words + ["--hessian"] * self.gptq

    def command_words(self) -> list[str]:
        """The options as they are typed after ``requant convert SOURCE OUTPUT``."""
        table = options_of(ConvertOptions)
        return [word for entry in table.values() for word in entry.command_words(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options of a run, which do not change the bytes of the output."""

    save_recipe: str | None = option(
        types.PATH,
        doc="File for what ``budget`` chose, to be edited and given as ``recipe``.",
        help="Write what --budget chose as a recipe, to be edited and given to --recipe.",
        functions=("convert", "plan"),
    )
    max_memory: int | None = option(
        types.SIZE,
        doc="Most bytes to hold in memory.",
        help="Memory limit: 500MB, 2GB (thousands), 1GiB, 1G (1024s), or bytes.",
    )
    threads: int | None = option(
        types.INTEGER,
        doc="Worker threads; every processor by default.",
        help="Worker threads; by default one a processor.",
        flags=("--threads", "-j"),
        minimum=1,
    )
    force: bool = option(
        types.FLAG,
        doc="Replace an existing output.",
        help="Replace an existing OUTPUT.",
        flags=("--force", "-f"),
        functions=("convert",),
    )
    resume: bool = option(
        types.FLAG,
        default=True,
        doc="Resume the same conversion after a stop; False starts over.",
        help="Start over instead of resuming a stopped run.",
        is_negated=True,
        functions=("convert",),
    )
    consume_source: bool = option(
        types.FLAG,
        doc="Delete each weight file of the source once all that needs it is durably written; "
        "everything is computed and checked once before the first goes. Of a source on the hub, "
        "a few weight files at a time are on the disk, and none is checked before.",
        help="Delete each weight file of SOURCE once all made from it is on the disk. Needs "
        "--yes, but for the hub, of which a few files are here at a time.",
        functions=("convert",),
    )
    yes: bool = option(
        types.FLAG,
        doc="Must be true with ``consume_source``, but for the hub: nothing can be verified "
        "against the source afterwards.",
        help="Confirm deletion of the source weights.",
        functions=("convert",),
    )
    part: Part | None = option(
        types.PART,
        doc='The part of the plan to run, as "3/8"; others may run at the same time on other '
        "machines that share the folder of OUTPUT. ``join`` then completes it.",
        help="Run one part of the plan, as 3/8, in a folder that several machines share; `requant "
        "join OUTPUT` then completes it.",
        functions=("convert",),
    )
    engine: str | None = option(
        types.choice("ray"),
        doc='"ray": run the parts of the plan as tasks of a Ray cluster whose machines share the '
        "folder of OUTPUT, and join them.",
        help="Run the parts of the plan on a Ray cluster whose machines share the folder of "
        "OUTPUT, then join them. Needs the extra ray.",
        functions=("convert",),
        metavar="ENGINE",
    )
    address: str | None = option(
        types.TEXT,
        doc='With ``engine``: the cluster, "auto" (the one that this machine belongs to, the '
        'default), "HOST:PORT" or "ray://HOST:PORT".',
        help="With --engine: auto (the cluster of this machine, the default), HOST:PORT or "
        "ray://HOST:PORT.",
        functions=("convert",),
        metavar="ADDRESS",
    )
    parts: int | None = option(
        types.INTEGER,
        doc="With ``engine``: the number of parts; by default 4 for each that can run at a time.",
        help="With --engine: number of parts; by default 4 for each that can run at a time.",
        functions=("convert",),
        minimum=1,
    )
    verify_load: bool = option(
        types.FLAG,
        doc="Load the finished output as ``verify(output, load=True)`` does; an output that does "
        "not load or gives values that are not finite is an error, and stays.",
        help="Load the finished OUTPUT with its MLX library, as `requant verify OUTPUT --load`; "
        "an OUTPUT that does not load is an error, and stays.",
        functions=("convert",),
    )
    allow_nonfinite: bool = option(
        types.FLAG,
        doc="Leave a layer with NaN or Inf as it is instead of stopping.",
        help="Leave layers with NaN or Inf as they are.",
        functions=("convert", "load"),
        commands=("convert",),
    )
    allow_overflow: bool = option(
        types.FLAG,
        doc="Let values that a cast to ``dtype`` cannot hold become infinite.",
        help="Let values too large for --dtype be infinite.",
        functions=("convert", "load"),
        commands=("convert",),
    )
    progress: Callable[..., None] | None = option(
        types.CALLBACK, doc="Called about ten times a second with a ``Progress``."
    )
    chunk_bytes: int | None = option(
        types.SIZE,
        doc="Bytes that one worker takes and holds at a time; the result does not depend on it.",
        functions=("convert", "load"),
        commands=(),
    )
    revision: str | None = option(
        types.TEXT, doc="Of a repository on the hub: branch, tag or commit.", metavar="REV"
    )

    def __post_init__(self) -> None:
        _check_fields(self, options_of(RunOptions))

    @classmethod
    def from_arguments(cls, **arguments: Any) -> RunOptions:
        """Make options from keyword arguments of Python or of the command line."""
        return cls(**_parse(arguments, options_of(RunOptions)))

    def check_save_recipe(self, options: ConvertOptions) -> None:
        """Raise UsageError if ``save_recipe`` cannot be written, before anything is measured."""
        if self.save_recipe is None:
            return
        path = Path(self.save_recipe)
        if options.budget is None:
            raise UsageError("--save-recipe writes what --budget chooses: add --budget, as in 4.5")
        if path.suffix != ".toml":
            raise UsageError(f"--save-recipe {path}: --recipe reads names that end in .toml")
        if path.exists():
            raise UsageError(f"--save-recipe {path} is there already; remove it or name another")
        if not path.parent.is_dir():
            raise UsageError(f"--save-recipe {path}: there is no folder {path.parent}")


def _check_fields(options: ConvertOptions | RunOptions, table: Mapping[str, Option]) -> None:
    for name, entry in table.items():
        entry.check(getattr(options, name))


def _parse(arguments: Mapping[str, Any], table: Mapping[str, Option]) -> dict[str, Any]:
    """The fields for keyword arguments, each checked without regard to the others."""
    values = {}
    for name, argument in arguments.items():
        values[name] = argument if argument is None else table[name].type.parse(argument)
        table[name].check(values[name])
    return values


def _target(values: Mapping[str, Any]) -> Quantization | None:
    """The quantization that follows from ``bits``, ``group_size``, ``mode`` and ``recipe``."""
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
    """The target of layers that a recipe does not name."""
    return Quantization.affine(64, 4) if recipe.is_mixed else recipe.default


def _check_gptq(options: ConvertOptions) -> None:
    """Check that there are Hessians for GPTQ and that the mode is affine."""
    if options.statistics is None and options.calibrate is None:
        raise UsageError(
            "--gptq needs Hessians: --calibrate collects them; or requant calibrate MODEL "
            "--hessian -o stats.safetensors, then --gptq --imatrix stats.safetensors"
        )
    if options.dequantize:
        raise UsageError("choose one: --dequantize or --gptq")
    target = options.quantization
    if target is not None and target.mode is not QuantMode.AFFINE:
        raise UsageError(f"--gptq gives affine codes; leave --mode {target.mode.value} out")


def _check_budget_is_exclusive(arguments: Mapping[str, Any]) -> None:
    """Check that no other option than the budget chooses bits.

    The arguments are checked: later the options have both the budget and the recipe it chose.
    """
    if arguments.get("budget") is None:
        if protected := arguments.get("protect"):
            pattern, bits = protected[0]
            raise UsageError(
                f"--protect {pattern}={bits} is the least that --budget gives a layer: add "
                f"--budget, as in 4.5. --override {pattern}={bits} sets bits without a budget"
            )
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
