"""Data flows one way: a module imports the ground floor and lower numbers, never higher."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "requant"

# The floors of docs/architecture.md, lowest first; a module may import its own floor.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("limits",),
    ("errors", "dtypes", "reasons", "_native"),
    ("patterns",),
    ("schema",),
    ("arrays", "safetensors_header"),
    ("triples", "weights", "awq_weights", "specs", "allocation", "budget_measurements"),
    ("recipes",),
    ("option_table",),
    ("wishes", "option_signatures"),
    ("adapters",),
    ("source_folder", "subfolders", "gguf_model"),
    ("source_listing", "shard_index"),
    ("checkpoint",),
    ("safetensors_folder",),
    ("gguf",),
    ("sources",),
    ("statistics", "hub_client"),
    ("downloads", "hub_listing", "hub_places", "hub_transfer"),
    ("hub",),
    ("formats", "outputs", "mlx_lm_classes", "mlx_lm_layout"),
    ("load_check", "row_ranges"),
    ("same_values", "head_names", "relayout", "left_dense", "loader_names"),
    ("tied_heads", "idle_tensors", "blueprint", "plan_source"),
    ("target_fitting",),
    ("choices", "layout_selection", "steps"),
    ("unnamed_matrices", "output_config", "plan_notes", "requests", "weighting", "hessians"),
    ("planner", "journal", "staging"),
    ("sink", "memory", "findings"),
    ("chunks", "source_reader", "consuming", "preflight"),
    ("damage",),
    ("operations",),
    ("execute",),
    ("record", "source_removal"),
    ("writer",),
    ("report", "running", "transform", "budgets"),
    ("conversion", "turning"),
    ("nn", "figures"),
    ("page",),
    ("inspection", "mlx_lm", "verification"),
    ("evaluation", "publishing"),
    ("comparison", "calibration"),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """First part below ``requant`` of everything that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "requant":
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_its_own_floor_and_lower_ones(path: Path) -> None:
    mine = place(path)
    assert mine in FLOOR_OF, f"{mine} stands on no floor: add it here and in architecture.md"
    higher = {name for name in imported(path) if FLOOR_OF[name] > FLOOR_OF[mine]}
    assert not higher, f"{mine} reaches up to {', '.join(sorted(higher))}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [path.name for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_architecture_page_names_every_module() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"^(?:│?  )*([\w/]+?)(?:\.py|/)\s", page, re.M))
    assert {place(path) for path in modules()} - {"__init__", "__main__"} <= named


def test_no_module_imports_one_below_its_line_of_the_page() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    tree = page.partition("src/requant/\n")[2].partition("```")[0]
    lines = re.findall(r"^  (\w+)(?:\.py|/)\s", tree, re.M)
    line_of = {name: number for number, name in enumerate(lines)}
    upward = {
        f"{mine} <- {other}"
        for path in modules()
        if (mine := place(path)) in line_of
        for other in imported(path) & line_of.keys()
        if line_of[other] > line_of[mine]
    }
    assert upward == set()


def test_the_route_of_one_tensor_names_what_is_there() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    route = page.partition("## The route of one tensor")[2].partition("\n## ")[0]
    named = re.findall(r"`((?:\w+\.)+\w+)`", route)
    for module, name in (dotted.rsplit(".", 1) for dotted in named if dotted[0].islower()):
        if module.partition(".")[0] in FLOOR_OF:
            assert hasattr(import_module(f"requant.{module}"), name), f"{module} has no {name}"
    assert "sources.read_checkpoint" in named


def test_the_map_of_the_formats_names_every_module_of_theirs_and_no_other() -> None:
    folder = PACKAGE / "formats"
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    table = docstring.partition("is read\n")[2].partition("\n\n")[0]
    of_formats = {name for line in table.splitlines() for name in re.findall(r"\w+", line[38:])}
    shared = docstring.partition("Shared by several of them:")[2].partition("\n\n``")[0]
    named = of_formats | set(re.findall(r"``([a-z]\w+)``", shared))
    assert named == {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_the_road_of_an_awq_folder_names_what_is_there() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    road = page.partition("An AutoAWQ folder, for one:")[2].partition("\n## ")[0]
    named = [dotted.split(".") for dotted in re.findall(r"`((?:\w+\.)+\w+)`", road)]
    named = [names for names in named if names[-1] != "py"]
    for module, *names in named:
        found = import_module(f"requant.formats.{module}")
        for name in names:
            found = getattr(found, name)
    assert ["qweight_layouts", "Layouts", "packing"] in named


def test_importing_requant_stays_light() -> None:
    heavy = "mlx torch transformers rich typer click huggingface_hub safetensors"
    code = f"import sys, requant; print([m for m in {heavy.split()!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
