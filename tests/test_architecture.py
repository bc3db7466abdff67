"""The architecture that docs/architecture.md describes is the one of the code."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "requant"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
MODULES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def layers() -> list[list[str]]:
    """The lines of the import-linter contract, highest first."""
    (contract,) = CONTRACT["contracts"]
    return [[name.strip() for name in line.split("|")] for line in contract["layers"]]


def test_imports_go_downward() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_contract_ignores_no_import() -> None:
    (contract,) = CONTRACT["contracts"]
    assert contract["type"] == "layers"
    assert contract["exhaustive"] is True
    assert not [key for key in (*contract, *CONTRACT) if "ignore" in key or "exclude" in key]


def test_imports_are_absolute() -> None:
    """``import-linter`` follows relative imports too; readers and scripts should not have to."""
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_the_page_has_the_layers_in_the_order_of_the_contract() -> None:
    table = PAGE.partition("| package | purpose |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    contract = [line for line in layers() if line != ["__main__"]]
    # errors and text, two lines of the contract, have one line on the page.
    expected = [sorted(line) for line in contract[:-2]] + [["errors", "text"]]
    assert [sorted(row) for row in rows] == expected


def test_few_modules_are_outside_packages() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert loose == {"__main__", "errors", "text"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_states_its_purpose_in_one_line(name: str) -> None:
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text("utf-8"))
    docstring = ast.get_docstring(tree) or ""
    assert re.fullmatch(r"\S.{10,}\.", docstring.splitlines()[0])


def test_every_module_has_a_docstring() -> None:
    silent = [str(x) for x in MODULES if not ast.get_docstring(ast.parse(x.read_text("utf-8")))]
    assert silent == []


def test_tests_mirror_the_packages() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    others = {"end_to_end", "support", "docs", "fuzz"}
    assert folders - others <= set(PACKAGES)
    assert set(PACKAGES) - folders <= {"nn"}, "tests/packings/test_rotated.py covers nn"


def test_the_map_of_the_formats_names_every_module() -> None:
    folder = PACKAGE / "formats"
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    table, _, shared = docstring.partition("\n\nShared by several")
    rows = table.partition("is read\n")[2].splitlines()
    named = {name for row in rows for name in re.findall(r"\w+", row[38:])}
    named |= set(re.findall(r"``([a-z]\w+)``", shared)) - {"gptq_awq_rules"}
    assert named == {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_modules_that_the_page_names_exist() -> None:
    names = set(re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)", PAGE))
    modules = {name for name in names if name.partition(".")[0] in PACKAGES}
    assert {"sources.open", "planning.target_selection", "packings.awq"} <= modules
    missing = [name for name in sorted(modules) if not exists(name)]
    assert missing == []


def exists(name: str) -> bool:
    """Whether ``package.module``, or ``package.name`` of a package's own names, exists."""
    if find_spec(f"requant.{name}"):
        return True
    package, _, attribute = name.rpartition(".")
    tree = ast.parse((PACKAGE / package.replace(".", "/") / "__init__.py").read_text("utf-8"))
    return attribute in {getattr(node, "name", "") for node in tree.body}


def test_importing_requant_stays_light() -> None:
    heavy = "mlx mlx_lm torch transformers rich typer click huggingface_hub safetensors regex"
    code = f"import sys, requant; print([m for m in {heavy.split()!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
