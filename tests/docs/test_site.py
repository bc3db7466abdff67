"""The documentation builds strictly: no broken links, anchors or names, and nothing is fetched."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import requant

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCHEMAS = sorted((ROOT / "src" / "requant" / "schemas").glob("*.json"))


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    env["https_proxy"] = env["http_proxy"]  # a build that fetches fails
    return subprocess.run(
        [*command, "-f", config, "-d", site], env=env, capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text())


def test_every_page_is_there(site: Path) -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"]
    for page in pages:
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text()
    for name in requant.__all__:
        # An alias has the id of the object that it names.
        assert re.search(rf'id="requant\.(\w+\.)*{name}"', page), name


def test_examples_of_docstrings_are_code(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text()
    assert ">>> " not in re.sub(r"(?s)<pre.*?</pre>", "", page).replace("&gt;", ">")
    assert "quantize_weights" in page and '<span class="gp">' in page


def test_the_commands_are_those_of_the_program(site: Path) -> None:
    from tests.support.commands import COMMANDS

    page = text_of(site / "reference" / "commands.html")
    for name, command in COMMANDS.items():
        assert f"Usage: requant {name}" in page
        for option in command.params:
            assert option.opts[-1] in page or option.metavar in page


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.stem)
def test_the_keys_of_every_document_are_explained(site: Path, schema: Path) -> None:
    page = (site / "json.html").read_text()
    for key in json.loads(schema.read_text())["properties"]:
        assert f"<code>{key}</code>" in page


def test_pages_need_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        for found in re.findall(
            r'(?:<script|<img|<link)[^>]+?(?:src|href)="([^"]+)"', page.read_text()
        ):
            assert not found.startswith(("http", "//")), f"{page}: {found}"


@pytest.mark.parametrize(
    "wrong", ["[x](no-such-page.md)", "[x](hub.md#no-such-heading)", "[x](../src/no_such.py)"]
)
def test_a_broken_link_fails(tmp_path: Path, wrong: str) -> None:
    """The strict build fails on broken links; three pages only, to be quick."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("site_hooks.py", "site_docstrings.py", "hub.md"):
        shutil.copy(ROOT / "docs" / name, docs)
    hub = (docs / "hub.md").read_text()
    (docs / "hub.md").write_text(re.sub(r"\]\((?!http)[^)]*\)", "]", hub))
    (docs / "index.md").write_text(f"# Home\n\n[hub](hub.md)\n\n{wrong}\n")
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text().split("\nnav:")[0])
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "no" in done.stdout + done.stderr
