"""One tool: each command has an example that parses, each option its name in Python.

Goes over whatever commands there are, so a new one is held to the same.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import requant
import requant.mlx_lm
from requant.execution.resources import plan_resources
from requant.quantization.option_table import options_of
from requant.quantization.options import ConvertOptions, RunOptions
from requant.quantization.recipe_files import load_recipe
from requant.quantization.size_budget import parse_size
from requant.reports.html import render_page
from tests.support.commands import COMMANDS, Result, check_usage

# Where the function of a command is another, or several, than ``requant.NAME``.
PUBLIC_FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "convert": (requant.convert, requant.upload),
    "generate": (requant.convert, requant.mlx_lm.generate),  # load's options are convert's
    "compare": (requant.compare, requant.compare_outputs),
    "plan": (requant.plan, plan_resources),
    "recipes": (load_recipe,),
    "report": (requant.read_figures, render_page),
}
# Options with another form in Python: what they are there.
OTHERWISE = {
    "json": "to_dict() of what a function returns",
    "quiet": "a library prints nothing",
    "html": "render_page(read_figures(output)) returns the page",
    "override": "overrides=, a sequence",
    "imatrix": "statistics=",
    "image": "images= of requant.mlx_vlm.generate, a sequence",
    "no_resume": "resume=False",
    "upload_to": "requant.upload(output, repository)",
    "dry_run": "requant.plan(...)",
    "help": "help(requant.convert)",
}


def functions(command: str) -> tuple[Callable[..., Any], ...]:
    return PUBLIC_FUNCTIONS.get(command) or (getattr(requant, command),)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_name_in_python(command: str) -> None:
    known = {
        name for function in functions(command) for name in inspect.signature(function).parameters
    }
    for parameter in COMMANDS[command].params:
        spelt = {text.lstrip("-").replace("-", "_") for text in parameter.opts}
        assert spelt & known or {parameter.name} & OTHERWISE.keys(), (
            f"requant {command} {parameter.opts}: no parameter of that name"
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command: str) -> None:
    for parameter in COMMANDS[command].params:
        assert parameter.help and parameter.help.endswith("."), parameter.opts


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(requant: Callable[..., Result], command: str) -> None:
    text = requant(command, "--help").out
    examples = re.findall(r"^ +(requant .*)$", text, re.M)
    assert any(line.split()[1] == command for line in examples), text
    for line in examples:
        check_usage(line)


def test_the_functions_take_the_options_of_the_table() -> None:
    table = options_of(ConvertOptions, RunOptions)
    functions = {"plan": requant.plan, "convert": requant.convert, "load": requant.mlx_lm.load}
    for name, function in functions.items():
        found = inspect.signature(function).parameters
        for entry in table.values():
            assert (entry.name in found) == (name in entry.functions), (name, entry.name)
            if entry.name in found:
                assert found[entry.name].default == entry.default
                assert f"\n    {entry.name}: " in (inspect.getdoc(function) or "")
        assert inspect.Parameter.VAR_KEYWORD not in {x.kind for x in found.values()}


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_python(command: str) -> None:
    known = {
        n: p
        for function in functions(command)
        for n, p in inspect.signature(function).parameters.items()
    }
    for option in COMMANDS[command].params:
        python = known.get(option.name)
        if python is None or python.default is inspect.Parameter.empty:
            continue
        reported = parse_size(option.default) if option.name == "shard_size" else option.default
        assert (reported or None) == (python.default or None), f"{command} --{option.name}"


def test_help_of_the_program_cuts_no_sentence(requant: Callable[..., Result]) -> None:
    text = requant("--help").out
    assert "..." not in text.partition("Commands:")[2]
    assert requant("help").out == text
    for command in COMMANDS:
        assert requant("help", command).out == requant(command, "-h").out
    assert "Did you mean 'convert'" in requant("help", "convret").err


def test_help_fits_a_terminal(requant: Callable[..., Result]) -> None:
    for command in COMMANDS:
        wide = [line for line in requant(command, "--help").out.splitlines() if len(line) > 100]
        assert not wide


def test_the_parser_is_really_asked() -> None:
    with pytest.raises(AssertionError, match="No such option"):
        check_usage("requant plan a --no-such-thing")
    with pytest.raises(AssertionError, match="no such command"):
        check_usage("requant no-such-thing a")
    check_usage("requant recipes ends-8 > mine.toml")
