"""Hooks of mkdocs: generated parts of pages, and links to files outside docs/.

Help texts, schemas and the Python reference are generated from the code. Links to files outside
docs/ become links to the repository, or plain text if none is configured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Insert generated parts, and replace links that leave docs/."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", _commands())
    if "<!-- schemas -->" in markdown:
        markdown = markdown.replace("<!-- schemas -->", _schemas())
    if "<!-- the rest -->" in markdown:
        markdown = markdown.replace("<!-- the rest -->", _other_names(markdown))
    folder = Path(page.file.abs_src_path).parent
    return _LINK.sub(lambda found: _outward(found, folder, config), markdown)


def _outward(found: re.Match[str], folder: Path, config: Any) -> str:
    text, target = found[1], (folder / found[2]).resolve()
    docs = Path(config.docs_dir).resolve()
    if target.is_relative_to(docs):
        return found[0]
    if not target.exists():
        raise FileNotFoundError(f"{folder}: {found[2]} does not exist")
    if not config.repo_url:
        return text
    return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{target.relative_to(ROOT)})"


def _commands() -> str:
    """The help of every command, as in a terminal."""
    import typer

    from requant.cli.application import app

    group = typer.main.get_command(app)
    context: Any = group.make_context("requant", ["recipes"], resilient_parsing=True)
    sections = []
    for name in group.list_commands(context):  # type: ignore[attr-defined]
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        sections.append(f"## requant {name}\n\n```text\n{command.get_help(inner)}\n```\n")
    return "\n".join(sections)


def _other_names(markdown: str) -> str:
    """A reference entry for each public name without one on the page."""
    import requant

    documented = set(re.findall(r"^::: requant\.(\w+)$", markdown, re.M))
    rest = [name for name in requant.__all__ if name not in documented]
    return "".join(f"::: requant.{name}\n\n" for name in rest)


def _schemas() -> str:
    """The keys of each schema, then the definitions that several of them use."""
    sections, parts = [], {}
    for file in sorted((ROOT / "src" / "requant" / "schemas").glob("*.json")):
        schema = json.loads(file.read_text("utf-8"))
        parts |= schema.get("$defs", {})
        sections.append(f"### requant {file.stem} --json\n\n{_keys(schema)}")
    named = (f"### {name}\n\n{_keys(part)}" for name, part in sorted(parts.items()))
    return "\n\n".join([*sections, "## Shared definitions", *named])


def _keys(schema: dict[str, Any]) -> str:
    lines = [schema.get("description", ""), "", "| key | type | |", "|---|---|---|"]
    for key, part in schema["properties"].items():
        description = part.get("description", "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(part)} | {description} |")
    return "\n".join(lines)


def _type(part: dict[str, Any]) -> str:
    """A schema in words: ``list of [group](#group)``."""
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "anyOf" in part:
        return " or ".join(_type(x) for x in part["anyOf"])
    if "const" in part:
        return f"`{part['const']}`"
    kinds = part.get("type", "any")
    words = [kinds] if isinstance(kinds, str) else kinds
    if "array" in words and "items" in part:
        words = [f"list of {_type(part['items'])}" if x == "array" else x for x in words]
    if part.get("type") == "object" and "additionalProperties" in part:
        return f"object of {_type(part['additionalProperties'])}"
    return " or ".join(words)
