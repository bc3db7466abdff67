"""An option is written once: one more field of the table is all that it takes.

Python, the command line, the record, the command of a report and the reference follow.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import requant
from requant.execution import option_keywords
from requant.quantization.options import ConvertOptions, RunOptions

PACKAGE = Path(requant.__file__).parent
ROOT = PACKAGE.parents[1]
MICRO = ROOT / "examples" / "micro-llama"
KEYWORDS = (ROOT / "scripts" / "option_keywords.py").read_text()

FIELD = """    sparkle: str = option(
        types.choice("none", "some", "much", default="none"),
        doc="How much the output sparkles in Python.",
        help="How much the output sparkles.",
        metavar="AMOUNT",
    )
"""

# The copy, not the package that an editable install leads to.
PRELUDE = """
import os, sys
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)
import requant
assert requant.__file__.startswith(os.environ["COPY"]), requant.__file__
"""
COMMAND = "from requant.cli import run; run(sys.argv[1:])"
USE = """
import inspect, json, sys
import requant, requant.mlx_lm
from requant.quantization.options import ConvertOptions

source, output = sys.argv[1:]
functions = (requant.convert, requant.plan, requant.mlx_lm.load)
requant.convert(source, output, bits=4, layout="keep", sparkle="much")
record = json.load(open(output + "/requant.json"))
try:
    requant.plan(source, sparkle="glitter")
except ValueError as error:
    message = str(error)
print(json.dumps({
    "signatures": [str(inspect.signature(x).parameters["sparkle"]) for x in functions],
    "documented": ["sparkle: How much the output sparkles in P" in x.__doc__ for x in functions],
    "record": record["options"]["sparkle"],
    "read back": ConvertOptions.from_dict(record["options"]).sparkle,
    "again": requant.read_figures(output).command("SOURCE"),
    "message": message,
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A copy of the package whose table has one more field; nothing else is changed."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "requant", ignore=shutil.ignore_patterns("__pycache__"))
    module = Path(sys.modules[ConvertOptions.__module__].__file__ or "")
    table = folder / "requant" / module.relative_to(PACKAGE)
    text = table.read_text()
    mark = "    keep_extra: bool = option("
    assert text.count(mark) == 1
    table.write_text(text.replace(mark, FIELD + mark))
    path = os.pathsep.join([str(folder), *sys.path])
    return os.environ | {"PYTHONPATH": path, "COPY": str(folder)}


def run(environment: dict[str, str], code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_new_field_is_an_option_of_python(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run(environment, USE, str(MICRO), str(tmp_path / "out")))
    assert found == {
        "signatures": ["sparkle: 'str' = 'none'"] * 3,
        "documented": [True] * 3,
        "record": "much",
        "read back": "much",
        "again": "requant convert SOURCE OUTPUT --bits 4 --layout keep --sparkle much",
        "message": "no such sparkle: 'glitter'; known: 'none', 'some', 'much'",
    }


@pytest.mark.slow
def test_a_new_field_is_an_option_of_the_commands(environment: dict[str, str], tmp_path: Path):
    for command in ("convert", "plan", "generate"):
        text = run(environment, COMMAND, command, "--help")
        assert "--sparkle AMOUNT" in text and "How much the output sparkles." in text
    output = tmp_path / "out"
    run(environment, COMMAND, "convert", str(MICRO), str(output), "--sparkle", "some")
    assert json.loads((output / "requant.json").read_text())["options"]["sparkle"] == "some"


@pytest.mark.slow
def test_a_new_field_is_a_keyword_for_type_checkers(environment: dict[str, str]) -> None:
    assert "\n    sparkle: str\n" in run(environment, KEYWORDS)


def test_the_keywords_for_type_checkers_are_those_of_the_table() -> None:
    """Where this fails: scripts/generate-keywords."""
    done = subprocess.run([sys.executable, "-c", KEYWORDS], capture_output=True, text=True)
    assert Path(option_keywords.__file__).read_text() == done.stdout


@pytest.mark.parametrize("function", [requant.plan, requant.convert])
def test_a_keyword_that_is_none_is_a_type_error(function: object) -> None:
    with pytest.raises(TypeError, match=r"argument 'group_sise'; did you mean 'group_size'\?"):
        function("source", *["out"] * (function is requant.convert), group_sise=64)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dequantize": "yes"}, "dequantize is 'yes', expected true or false"),
        ({"bits": "4"}, "bits is '4', expected a whole number"),
        ({"shard_size": 0}, "shard_size is 0, expected a number of bytes from 1"),
        ({"layout": "x"}, "no such layout: 'x'; known: 'auto', 'keep', 'mlx-lm'"),
        ({"dequantize": True, "bits": 4}, "choose one: dequantize, or bits"),
        ({"gptq": True}, "--gptq needs Hessians"),
        ({"budget": 4, "bits": 4}, "--budget chooses bits itself: leave --bits out"),
        ({"protect": ["a=6"]}, "--override a=6 sets bits without a budget"),
    ],
)
def test_values_are_checked_when_options_are_made(arguments: dict, message: str) -> None:
    with pytest.raises((requant.UsageError, requant.UnknownValueError)) as raised:
        ConvertOptions.from_arguments(**arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, []),
        ({"bits": 4}, ["--bits", "4"]),
        ({"group_size": 32}, ["--group-size", "32"]),
        ({"mode": "MXFP4"}, ["--mode", "mxfp4"]),
        (
            {"quantization": requant.Quantization.affine(32, 6)},
            ["--bits", "6", "--group-size", "32"],
        ),
        ({"budget": 4.5, "group_size": 128}, ["--group-size", "128", "--budget", "4.5"]),
        (
            {"budget": 4, "protect": ["a=b=6", ("c", 4)]},
            ["--budget", "4", "--protect", "a=b=6", "--protect", "c=4"],
        ),
        ({"recipe": "ends-8"}, ["--recipe", "ends-8"]),
        ({"recipe": "mixed_3_6", "bits": 4}, ["--bits", "4", "--recipe", "mixed_3_6"]),
        ({"overrides": ["a=8:32", "b=skip"]}, ["--override", "a=8:32", "--override", "b=skip"]),
        ({"only": ["a", "b"]}, ["--only", "a", "--only", "b"]),
        ({"dtype": "bfloat16", "dequantize": True}, ["--dequantize", "--dtype", "bfloat16"]),
        ({"shard_size": 1 << 20}, ["--shard-size", "1MiB"]),
        ({"statistics": Path("s.gguf")}, ["--search", "best", "--imatrix", "s.gguf"]),
        ({"nonfinite_layers": frozenset("a")}, ["--allow-nonfinite"]),
    ],
    ids=str,
)
def test_options_as_they_are_typed(arguments: dict, words: list[str]) -> None:
    assert ConvertOptions.from_arguments(**arguments).command_words() == words


def test_options_of_a_run_are_checked() -> None:
    with pytest.raises(requant.UsageError, match="resume is 'no', expected true or false"):
        RunOptions.from_arguments(resume="no")
