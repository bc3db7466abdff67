"""What is installed, and under which names."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import requant


def test_version_is_the_package_s() -> None:
    assert requant.__version__ == metadata.version("requant")


def test_exported_names_are_sorted_and_there() -> None:
    names = requant.__all__
    assert [name for name in names if not hasattr(requant, name)] == []
    upper = [n for n in names if n.isupper()]
    classes = [n for n in names if n[0].isupper() and not n.isupper()]
    functions = [n for n in names if n[0].islower()]
    assert names == sorted(upper) + sorted(classes) + sorted(functions)


def test_it_is_typed_and_has_its_command() -> None:
    package = Path(requant.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "kernels" / "_native.pyi").is_file()
    commands = metadata.entry_points(group="console_scripts", name="requant")
    assert [command.value for command in commands] == ["requant.__main__:main"]


def test_what_is_promised_to_pip() -> None:
    about = metadata.metadata("requant")
    assert about["License-Expression"] == "MIT"
    assert about["Requires-Python"] == ">=3.11"
    assert {"mlx", "hub", "test", "dev"} <= set(about.get_all("Provides-Extra"))
    runtime = [r for r in metadata.requires("requant") or [] if "extra ==" not in r]
    names = sorted(r.split(">")[0] for r in runtime)
    assert names == ["ml_dtypes", "numpy", "regex", "rich", "typer"]


def test_import_loads_no_module_before_a_name_is_used() -> None:
    code = "import sys, requant; print(sorted(x for x in sys.modules if x.startswith('requant')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "['requant']\n"


def test_every_public_name_is_in_its_module() -> None:
    assert sorted(requant.__all__) == sorted({"SKIP", *requant._MODULE_OF})
    assert all(hasattr(requant, name) for name in requant.__all__)
    assert not hasattr(requant, "no_such_name")
