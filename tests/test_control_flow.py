"""Code decides by codes, classes and fields, never by the text of a message for people."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "requant"

# Attributes and variables that hold sentences: of a reason, a note, a problem, an error.
ATTRIBUTES = {"text", "message", "reason", "why", "notes"}
VARIABLES = {"message", "reason", "why", "note", "notes"}
PARSING = {
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "partition",
    "rpartition",
    "find",
    "index",
    "count",
    "search",
    "match",
    "fullmatch",
}
# Module and function -> why it reads a text all the same.
ALLOWED = {
    ("layouts/conversion_trace.py", "_explain"): "MLX's libraries raise built-in exceptions",
    ("libraries/forward_pass.py", "_needs_metal"): "MLX raises RuntimeError for it",
    ("core/strict_json.py", "parse_json_object"): "Python's advice is cut off, nothing decided",
    ("quantization/config.py", "parse_quantization"): "Python's advice is cut off, nothing decided",
}


def offences(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Function and line of everything that compares or parses a text for people."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            errors = {
                node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)
            }
            for node in ast.walk(function):
                if _reads_text(node, errors):
                    yield function.name, node.lineno


def _reads_text(node: ast.AST, errors: set[str | None]) -> bool:
    if isinstance(node, ast.Compare):
        by_text = all(isinstance(op, ast.In | ast.NotIn | ast.Eq | ast.NotEq) for op in node.ops)
        sides = (node.left, *node.comparators)
        words = any(isinstance(x, ast.Constant) and isinstance(x.value, str) for x in sides)
        return by_text and words and any(_is_text(x, errors) for x in sides)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr not in PARSING:
            return False
        return any(_is_text(x, errors) for x in (node.func.value, *node.args))
    return False


def _is_text(node: ast.expr, errors: set[str | None]) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in ATTRIBUTES
    if isinstance(node, ast.Name):
        return node.id in VARIABLES
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        return node.func.id == "str" and getattr(node.args[0], "id", "") in errors
    return False


def test_no_text_for_people_is_read() -> None:
    found = [
        f"{name}:{line} in {function}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in (path.relative_to(PACKAGE).as_posix(),)
        for function, line in offences(ast.parse(path.read_text()))
        if (name, function) not in ALLOWED
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        'return "skipped" in layer.reason',
        'return layer.reason == "norm"',
        'return [x for x in plan.notes if "tokenizer" in x.text]',
        'return message.startswith("is a folder")',
        "return re.search('a', problem.message)",
    ],
)
def test_the_check_finds(line: str) -> None:
    tree = ast.parse(f"def f(layer, plan, message, problem):\n    {line}\n")
    assert len(list(offences(tree))) == 1


def test_the_check_finds_the_text_of_an_error() -> None:
    source = (
        "def f():\n    try: g()\n    except OSError as error:\n        return 'x' in str(error)\n"
    )
    assert len(list(offences(ast.parse(source)))) == 1
