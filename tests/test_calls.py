"""A call with many positional arguments does not say what they are: six or more have names."""

import ast
from pathlib import Path

import requant

PACKAGE = Path(requant.__file__).parent
MOST = 5


def calls(path: Path) -> list[str]:
    """Calls with more than ``MOST`` positional arguments.

    Kernels take pointers, sizes and arrays by position: calls of ``_native`` are not counted.
    """
    return [
        f"{path}:{node.lineno}: {ast.unparse(node.func)} takes {len(node.args)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and len(node.args) > MOST
        and not ast.unparse(node.func).startswith("_native.")
    ]


def test_no_call_has_more_than_five_positional_arguments() -> None:
    assert [x for path in sorted(PACKAGE.rglob("*.py")) for x in calls(path)] == []
