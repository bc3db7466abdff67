"""Shell completion: scripts that shells take, and what is offered for words and values."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from requant.quantization.config import QuantMode
from requant.quantization.options import DTYPES

BIN = Path(sys.executable).parent
SHELLS = {"bash": ["-n"], "zsh": ["-n"], "fish": ["--no-execute"]}


def ask(**variables: str) -> str:
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | variables
    done = subprocess.run(["requant"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def offered(*words: str) -> list[str]:
    """What bash would offer for the last word."""
    line = " ".join(("requant", *words))
    return ask(
        COMP_WORDS=line, COMP_CWORD=str(len(words)), _REQUANT_COMPLETE="complete_bash"
    ).split()


@pytest.mark.sweep(1)
@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_of_the_shell(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(ask(_REQUANT_COMPLETE=f"source_{shell}"))
    text = script.read_text()
    assert f"_REQUANT_COMPLETE=complete_{shell}" in text
    assert {"bash": "complete -o", "zsh": "#compdef requant", "fish": "--command requant"}[
        shell
    ] in text
    if shutil.which(shell) is not None:
        checked = subprocess.run([shell, *SHELLS[shell], script], capture_output=True, text=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


@pytest.mark.slow
def test_bash_completes() -> None:
    """The whole way: the script in a bash, a line, and what is in COMPREPLY."""
    line = (
        f'PATH={BIN}:$PATH; eval "$(_REQUANT_COMPLETE=source_bash requant)"; '
        "COMP_WORDS=(requant conv); COMP_CWORD=1; _requant_completion requant; "
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("convert", "")


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered(shell: str) -> None:
    answer = ask(
        _REQUANT_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="requant conv",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert "convert" in answer and "inspect" not in answer


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, values",
    [
        ("--mode", [mode.value for mode in QuantMode]),
        ("--dtype", DTYPES),
        ("--layout", ["auto", "keep", "mlx-lm"]),
        ("--act-order", ["requantize", "dense", "refuse"]),
        ("--search", ["off", "fast", "best"]),
        ("--recipe", ["mixed_3_6", "ends-8"]),
    ],
)
def test_values_are_offered(option: str, values: list[str]) -> None:
    assert set(values) <= set(offered("convert", "a", "b", option, ""))


@pytest.mark.slow
def test_a_begun_value_is_completed() -> None:
    assert offered("convert", "a", "b", "--mode", "nv") == ["nvfp4"]
    assert offered("recipes", "mixed_3") == [f"mixed_3_{bits}" for bits in (4, 6, 5, 8)]


@pytest.mark.slow
def test_options_of_a_command_are_offered() -> None:
    assert offered("verify", "--max") == ["--max-memory"]
