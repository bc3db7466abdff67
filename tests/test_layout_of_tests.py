"""What tests share lies in ``tests/support``: no test module imports another, or a conftest."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
MODULES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))


def imported(module: Path) -> list[str]:
    """Full names of what a module imports from ``tests``, or relatively (with the dots)."""
    found = []
    for node in ast.walk(ast.parse((TESTS / module).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [f"{base}.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith((".", "tests"))]


def test_imports_of_test_modules() -> None:
    for module in MODULES:
        for name in imported(module):
            assert not name.startswith("."), f"{module}: {name}: import from tests absolutely"
            parts = name.split(".")[1:]
            private = [part for part in parts if part == "conftest" or part.startswith("test_")]
            assert private == [], f"{module}: {name}: what two modules need belongs in support"


def test_support_is_found() -> None:
    """The check sees the imports that there are."""
    assert "tests.support.safetensors_files.write_file" in imported(
        Path("support", "checkpoints.py")
    )
