"""``--quality`` and ``--calibrate`` as options: what they stand for, and their words."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from requant.errors import UnknownValueError, UsageError
from requant.quantization.options import ConvertOptions
from requant.quantization.qualities import QUALITIES
from requant.quantization.recipe_files import parse_recipe, recipe_from_dict, to_toml


def made(**arguments: Any) -> ConvertOptions:
    return ConvertOptions.from_arguments(**arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("off", None, False)),
        ({"quality": "fast"}, (QUALITIES["fast"].search, None, False)),
        ({"quality": "balanced"}, ("best", (), False)),
        ({"quality": "best"}, ("best", (), True)),
        ({"calibrate": True}, ("best", (), True)),
        ({"calibrate": "a.txt"}, ("best", ("a.txt",), True)),
        ({"calibrate": ["a", "b"], "quality": "balanced"}, ("best", ("a", "b"), False)),
        ({"calibrate": False, "bits": 3}, ("off", None, False)),
        ({"calibrate": True, "mode": "mxfp4"}, ("best", (), False)),
        ({"quality": "best", "search": "fast"}, ("fast", (), True)),
        ({"quality": "best", "statistics": "s.gguf"}, ("best", None, True)),
        ({"quality": "balanced", "statistics": "s.gguf"}, ("best", None, False)),
    ],
)  # fmt: skip
def test_what_they_stand_for(arguments: dict[str, Any], expected: tuple[Any, ...]) -> None:
    options = made(**arguments)
    assert (options.search, options.calibrate, options.gptq) == expected
    assert ConvertOptions.from_dict(options.to_dict()) == options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quality": "best", "bits": 3}, ["--bits", "3", "--quality", "best"]),
        ({"calibrate": True}, ["--calibrate"]),
        ({"calibrate": "a b"}, ["--calibrate=a b"]),
        ({"quality": "balanced", "calibrate": ["x"]}, ["--quality", "balanced", "--calibrate=x"]),
        ({"quality": "best", "search": "fast"}, ["--quality", "best", "--search", "fast"]),
        ({"quality": "best", "statistics": "s.gguf"}, ["--quality", "best", "--imatrix", "s.gguf"]),
    ],
)  # fmt: skip
def test_words_give_the_same_options(arguments: dict[str, Any], words: list[str]) -> None:
    """What is implied is not spelled; the file that a calibration made is not either."""
    options = made(**arguments)
    assert options.command_words() == words
    if options.calibrate is not None:
        assert replace(options, statistics="made").command_words() == words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quality": "best", "dequantize": True}, "--dequantize or --quality best"),
        ({"calibrate": True, "dequantize": True}, "--dequantize or --calibrate"),
        (
            {"calibrate": True, "statistics": "s"},
            "--calibrate collects statistics, --imatrix reads",
        ),
        ({"calibrate": "a.txt", "quality": "fast"}, "--quality fast takes no text"),
    ],
)
def test_contradictions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(**arguments)


def test_an_unknown_quality() -> None:
    with pytest.raises(UnknownValueError, match="no such quality"):
        made(quality="better")


def test_a_recipe_sets_the_quality() -> None:
    text = 'quality = "balanced"\n[default]\nbits = 4\n'
    recipe = parse_recipe(text, "mine.toml")
    assert recipe.quality == "balanced"
    assert parse_recipe(to_toml(recipe), "mine.toml") == recipe

    assert recipe_from_dict(asdict(recipe) | {"default": recipe.default}) == recipe
    with pytest.raises(UsageError, match="quality: is 'good', expected fast, balanced or best"):
        parse_recipe('quality = "good"\n[default]\nbits = 4\n', "mine.toml")


def test_an_option_wins_over_the_recipe(tmp_path: Any) -> None:
    path = tmp_path / "r.toml"
    path.write_text('quality = "balanced"\n[default]\nbits = 4\n')
    assert made(recipe=path).calibrate == ()
    assert made(recipe=path, quality="fast").calibrate is None
