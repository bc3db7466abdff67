"""Every format against what can go wrong with names: each is read right, or rejected by name.

Nothing that holds codes may leave as a dense tensor, and no values may be other than those that
the source represents.

There are too many combinations of format, part, name and dtype to convert each: the tables are
walked so that every pair of two columns occurs (every format with every dtype and every name,
every dtype with every name), by steps that differ from format to format.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import requant
from requant.formats.scale_names import CODE_ENDINGS
from tests.support.format_folders import IN, OUT, SOURCES, Source
from tests.support.mlx_reference import mlx_values
from tests.support.number_formats import BF16, e4m3
from tests.support.safetensors_files import read_folder

pytestmark = pytest.mark.sweep(1)

FORMATS = list(SOURCES)
FLOATS = ("float16", "float32", "bfloat16")


@contextmanager
def case(*what: object) -> Iterator[None]:
    """A failure inside names the case."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {', '.join(map(str, what))}")
        raise


def check_dense(made: dict[str, np.ndarray], source: Source, more: dict[str, Any]) -> None:
    """Only known tensors, and in each the values that the source represents."""
    for name, array in made.items():
        path = name.removesuffix(".weight")
        assert path in source.values, f"{name} went out as {array.dtype} {array.shape}"
        assert array.dtype in (np.float32, np.int64) or array.ndim < 2
        allowed = [source.values[path], *more.get(path, ())]
        assert any(np.array_equal(array, values) for values in allowed), name


def check_quantized(made: dict[str, np.ndarray], block: Any, source: Source, more: Any) -> None:
    """Codes are those of layers that MLX dequantizes to about the values."""
    paths = {
        name[:-7] for name in made if name.endswith(".scales") and f"{name[:-6]}weight" in made
    }
    for name, array in made.items():
        if not (array.dtype.name in FLOATS or array.dtype == np.int64 or array.ndim < 2):
            path, _, role = name.rpartition(".")
            assert path in paths and role in ("weight", "scales"), name
    for path in paths:
        spec = {"mode": "affine"} | block.get(path, block)
        values = np.asarray(mlx_values(made, path, spec), np.float32)
        allowed = [source.values[path], *more.get(path, ())]
        near = [np.abs(values - x).max() <= 0.02 * np.abs(x).max() for x in allowed]
        assert any(near), path


def outcome(source: Source, names: tuple[str, ...] = (), **more: Any) -> str:
    """What the source becomes: "read" if it is right, else what is said; one of ``names`` in it.

    ``more`` has further values that a layer may represent.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = source.write(Path(place) / "source")
        words = []
        for number, options in enumerate(({"dequantize": True, "dtype": "float32"}, {"bits": 8})):
            output = Path(place) / f"out{number}"
            try:
                report = requant.convert(folder, output, layout="keep", **options)
            except requant.RequantError as error:
                assert not output.exists()
                words.append(str(error))
                continue
            if number == 0:
                check_dense(read_folder(output), source, more)
            else:
                block = report.plan.quantization
                assert block is not None
                check_quantized(read_folder(output), block.to_dict(), source, more)
            words.append("read")
    if words[0] != "read":
        assert words[1] != "read"
        assert any(name in words[0] for name in names), words[0]
        inspected(source, words[0])
    return words[0]


def inspected(source: Source, rejection: str) -> None:
    """Other ways in reject the same: ``inspect`` lists it, ``transform_weights`` raises it."""
    with tempfile.TemporaryDirectory() as place:
        inspection = requant.inspect(source.write(Path(place) / "source"))
        assert inspection.problems
        assert all(str(problem)[:4000] in rejection for problem in inspection.problems)
    if not source.metadata and "quantization_config" in source.config:
        with pytest.raises(requant.RequantError):
            requant.transform_weights(source.tensors, source.config["quantization_config"])


@pytest.mark.parametrize("name", FORMATS)
def test_whole(name: str) -> None:
    assert outcome(SOURCES[name]()) == "read"


# -- stacks that are not of the folder's format, or lie under names that it has not -----------
STACKS: dict[str, np.ndarray] = {
    "I32": np.full((2, 64, 16), 0x12345678, np.int32),
    "U32": np.full((2, 64, 16), 0x12345678, np.uint32),
    "U8": np.full((2, 64, 64), 0x5A, np.uint8),
    "I8": np.full((2, 64, 128), 90, np.int8),
    "I16": np.full((2, 64, 32), 0x1234, np.int16),
    "F8_E4M3": e4m3(2, 64, 128),
}
STACK_NAMES = (
    ("experts.gate_up_proj", "experts.gate_up_proj_weight_scale"),
    ("experts.gate_up_proj", "experts.gate_up_proj_scaling"),  # no name of a scale
    ("experts.gate_up_proj_packed", "experts.gate_up_proj_scale"),
    ("experts.w13_weight", "experts.w13_weight_scale_inv"),
    ("experts.w2_weight", "experts.w2_absmax"),
    ("experts.down_proj", "experts.down_proj_zero_point"),
    ("experts.down_proj_blocks", "experts.down_proj_qzeros"),
    ("experts.0.w1.kernel", "experts.0.w1.factor"),
)


@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_stacks(name: str) -> None:
    """Odd scales (37 in a row) fit no format, so that none may read them."""
    first = [*FORMATS, "dense"].index(name)
    for number, dtype in enumerate(STACKS):
        for step in (0, 4):  # six dtypes, two names each: all eight names
            codes, scale = STACK_NAMES[(first + number + step) % len(STACK_NAMES)]
            source = dense() if name == "dense" else SOURCES[name]()
            source.tensors |= {codes: STACKS[dtype], scale: np.ones((2, 64, 37), BF16)}
            ends = (end for end in CODE_ENDINGS if end and codes.endswith(end))
            path = next((codes.removesuffix(end) for end in ends), codes)
            with case(dtype, codes, scale):
                assert outcome(source, (codes, f"{path}: ", scale)) != "read"


def dense() -> Source:
    source = SOURCES["awq"]()
    for name in source.parts:
        del source.tensors[name]
    source.config = {}
    return source


# -- parts renamed, missing, and of nothing ----------------------------------------------------
ENDINGS = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scales",
    "scale",
    "scale_inv",
    "scales",
    "weight.absmax",
    "SCB",
    "zero_point",
    "qzeros",
    "zeros",
    "weight_global_scale",
    "weight_scale_2",
    "qweight",
    "weight_packed",
    "weight",
    "kernel",
    "something",
)


@pytest.mark.parametrize("name", FORMATS)
def test_renamed_parts(name: str) -> None:
    """Each part under a third of the names; the parts of a format together have all of them."""
    for number, part in enumerate(SOURCES[name]().parts, FORMATS.index(name)):
        for ending in ENDINGS[number % 3 :: 3]:
            source = SOURCES[name]()
            path = next(iter(source.values))
            renamed = f"{path}.{ending}"
            if renamed not in source.tensors:
                source.tensors[renamed] = source.tensors.pop(part)
                with case(part, ending):
                    outcome(source, (path, part, renamed))


@pytest.mark.parametrize("name", FORMATS)
def test_missing_parts(name: str) -> None:
    for part in SOURCES[name]().parts:
        source = SOURCES[name]()
        path = next(iter(source.values))
        del source.tensors[part]
        with case(part):
            allowed = [source.optional[part]] if part in source.optional else []
            outcome(source, (path,), **{path: allowed})


STRAY = (
    "weight_scale",
    "weight_scale_inv",
    "scales",
    "weight.absmax",
    "qzeros",
    "SCB",
    "weight_zero_point",
    "weight_global_scale",
    "weight_scale_2",
    "pre_quant_scale",
    "g_idx",
)


@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_stray_scales(name: str) -> None:
    """Next to floats and next to nothing, in turn."""
    for number, ending in enumerate(STRAY, [*FORMATS, "dense"].index(name)):
        source = dense() if name == "dense" else SOURCES[name]()
        siblings = ("head", "nothing")[number % 2]
        stray = f"{siblings}.{ending}"
        source.tensors[stray] = np.full((OUT, 4), 0.5, np.float32)
        with case(stray):
            declared = outcome(source, (stray, f"{siblings}: has no {siblings}."))
            assert declared != "read"
            assert "remove the block" not in declared


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_layer_of_floats_next_to_the_scales_of_the_first(name: str) -> None:
    """The dense weight of a layer that is quantized: one of the two is stale."""
    source = SOURCES[name]()
    path = next(iter(source.values))
    stale = path if name == "mxfp4" else f"{path}.weight"
    if stale in source.tensors:
        stale = f"{path}.weight_packed"
    source.tensors[stale] = np.ones((OUT, IN), BF16)
    assert outcome(source, (path,)) != "read"


@pytest.mark.parametrize("name", FORMATS)
def test_what_else_lies_in_a_quantized_layer(name: str) -> None:
    """A factor under a name that nobody knows may belong to the arithmetic; a bias is known."""
    source = SOURCES[name]()
    path = next(iter(source.values))
    joint = "_" if name == "mxfp4" else "."
    for role in ("factor", "rescale", "gamma"):
        source.tensors[f"{path}{joint}{role}"] = np.full(OUT, 2, BF16)
        assert outcome(source, (f"{path}{joint}{role}",)) != "read"
        del source.tensors[f"{path}{joint}{role}"]
    bias = np.ones(OUT, np.float32)
    source.tensors[f"{path}{joint}bias"] = bias
    source.values[f"{path}{joint}bias"] = bias
    assert outcome(source) == "read"


# -- what configs say --------------------------------------------------------------------------
LISTS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "exclude")


NESTED = ("text_config", "llm_config", "thinker_config", "language_config")


@pytest.mark.parametrize("name", [x for x in FORMATS if x != "mlx"])
def test_excluded_layers_that_hold_codes(name: str) -> None:
    """Two of the lists; ``test_exclusions`` goes through all of them."""
    for step in (0, 2):
        source = SOURCES[name]()
        path, key = next(iter(source.values)), LISTS[(FORMATS.index(name) + step) % len(LISTS)]
        source.config["quantization_config"] = source.config["quantization_config"] | {key: [path]}
        with case(key):
            outcome(source, (path,))


@pytest.mark.parametrize("name", [x for x in FORMATS if x != "mlx"])
def test_nested_configs(name: str) -> None:
    """One of the keys; ``test_nested_blocks`` goes through all of them."""
    source = SOURCES[name]()
    key = NESTED[FORMATS.index(name) % len(NESTED)]
    block = source.config.pop("quantization_config")
    source.config[key] = {"hidden_size": 64, "quantization_config": block}
    with case(key):
        outcome(source, (next(iter(source.values)), "config.json"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_format_in_the_folder(name: str) -> None:
    """Every fourth; ``test_other_layers`` makes floats of every pair."""
    for second in FORMATS[FORMATS.index(name) // 2 % 4 :: 4]:
        source, other = SOURCES[name](), SOURCES[second]()
        path = next(iter(other.values))
        for part in other.parts:
            source.tensors[part.replace(path, "other", 1)] = other.tensors[part]
        source.values["other"] = other.values[path]
        with case(second):
            outcome(source, ("other", "up"))


# -- anything else -----------------------------------------------------------------------------
WORDS = st.sampled_from([*ENDINGS, "bias", "weight_shape", "g_idx", "zero", "biases", "_data"])
JOINTS = st.sampled_from([".", "_", "._", ".weight.", "_weight_"])
Change = Callable[[Source, str, str], Any]


def removed(source: Source, part: str, name: str) -> None:
    source.tensors.pop(part)


def renamed(source: Source, part: str, name: str) -> None:
    source.tensors.setdefault(name, source.tensors.pop(part))


def doubled(source: Source, part: str, name: str) -> None:
    source.tensors.setdefault(name, source.tensors[part])


def stacked(source: Source, part: str, name: str) -> None:
    array = source.tensors[part]
    source.tensors.setdefault(f"experts.{name}", np.stack([array, array]))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    format=st.sampled_from(FORMATS),
    change=st.sampled_from([removed, renamed, doubled, stacked]),
    at=st.integers(0, 9),
    joint=JOINTS,
    word=WORDS,
    owner=st.sampled_from(["", "head", "other"]),
)
def test_no_change_of_names_lets_codes_out(
    format: str, change: Change, at: int, joint: str, word: str, owner: str
) -> None:
    source = SOURCES[format]()
    path = next(iter(source.values))
    part = source.parts[at % len(source.parts)]
    target = owner or path
    change(source, part, f"{target}{joint}{word}")
    more = {path: [source.optional[part]] if part in source.optional else []}
    for name, array in source.tensors.items():
        # Floats of any name may be a dense tensor, and so may vectors of integers and I64.
        if array.dtype.name in FLOATS or array.ndim < 2 or array.dtype == np.int64:
            source.values.setdefault(name.removesuffix(".weight"), array.astype(np.float32))
    outcome(source, (path, target, part, "experts."), **more)
