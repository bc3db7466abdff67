"""What --json prints is what the shipped schemas say, for every command that has the option."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from requant.reports.record_summary import SCHEMA_VERSION
from tests.support.commands import COMMANDS, Result

MICRO = Path(__file__).parents[2] / "examples" / "micro-llama"
WITH_JSON = [name for name, c in COMMANDS.items() if any(p.name == "json" for p in c.params)]
Requant = Callable[..., Result]


def schema(command: str) -> dict[str, Any]:
    place = files("requant") / "schemas" / f"{command}.json"
    assert place.is_file(), f"requant {command} --json has no src/requant/schemas/{command}.json"
    loaded: dict[str, Any] = json.loads(place.read_text("utf-8"))
    return loaded


def closed(node: Any) -> Any:
    """The same schema, rejecting keys that it does not describe."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: closed(value) for key, value in node.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def check(command: str, text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text)
    jsonschema.Draft202012Validator(closed(schema(command))).validate(document)
    assert next(iter(document)) == "schema"
    return document


@pytest.mark.parametrize("command", WITH_JSON)
def test_every_command_has_a_schema_that_explains(command: str) -> None:
    found = schema(command)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["title"] == f"requant {command} --json"
    assert found["properties"]["schema"]["const"] == SCHEMA_VERSION
    assert found["description"]
    for name, part in found["properties"].items():
        reported = part.get("description") or "items" in part
        assert reported, f"{command}.json: {name} has no description"


def test_no_schema_is_left_over() -> None:
    found = {Path(x.name).stem for x in (files("requant") / "schemas").iterdir()}
    assert found == set(WITH_JSON)


@pytest.fixture
def output(requant: Requant, tmp_path: Path) -> Path:
    requant("convert", MICRO, tmp_path / "out", "--bits", 4, "--layout", "keep", "--quiet")
    return tmp_path / "out"


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "options",
    [
        ("--bits", 4),
        ("--mode", "nvfp4", "--dtype", "float16"),
        ("--dequantize", "--layout", "keep"),
        ("--recipe", "down-6", "--search", "fast"),
        ("--only", "mlp", "--override", "down_proj=skip", "--layout", "keep"),
    ],
)
def test_plan_and_convert(requant: Requant, tmp_path: Path, options: tuple[object, ...]) -> None:
    plan = check("plan", requant("plan", MICRO, *options, "--json").out)
    made = check("convert", requant("convert", MICRO, tmp_path / "out", *options, "--json").out)
    assert made["plan_hash"] == plan["hash"]
    check("report", requant("report", tmp_path / "out", "--json").out)
    check("inspect", requant("inspect", tmp_path / "out", "--json").out)
    check("plan", requant("plan", tmp_path / "out", "-d", "--layout", "keep", "--json").out)


def test_verify(requant: Requant, output: Path) -> None:
    assert check("verify", requant("verify", output, "--json").out)["ok"]
    assert check("verify", requant("verify", MICRO, output, "--json").out)["source"]
    with open(output / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    found = requant("verify", output, "--json")
    assert found.code == 1 and check("verify", found.out)["problems"]


def test_a_folder_with_problems(requant: Requant, tmp_path: Path) -> None:
    import numpy as np

    from tests.support.checkpoints import write_model
    from tests.support.number_formats import BF16

    tensors = {"up.weight": np.zeros((8, 8), np.uint32), "norm.weight": np.ones(8, BF16)}
    config = {"quantization": {"group_size": 64, "bits": 4}}
    found = requant("inspect", write_model(tmp_path / "bad", tensors, config), "--json")
    assert found.code == 1 and check("inspect", found.out)["problems"]


def test_recipes(requant: Requant) -> None:
    every = check("recipes", requant("recipes", "--json").out)["recipes"]
    one = check("recipes", requant("recipes", "ends-8", "--json").out)["recipes"]
    assert one[0] in every and len(every) > len(one) == 1


def test_upload_preview(requant: Requant, output: Path) -> None:
    made = check("upload", requant("upload", output, "me/it", "--dry-run", "--json").out)
    assert made["url"] == "" and "README.md" in made["files"]


def test_generate(requant: Requant) -> None:
    words = ("--prompt", "The file", "--max-tokens", 2, "--json")
    assert check("generate", requant("generate", MICRO, *words).out)["tokens"] == 2


@pytest.mark.slow
def test_compare(requant: Requant, output: Path, tmp_path: Path) -> None:
    found = check("compare", requant("compare", MICRO, output, "--json").out)
    assert found["layers"] and found["evaluation"] is None
    text = tmp_path / "text.txt"
    text.write_text("The file is read, and the words of it are counted. " * 8)
    words = ("--text", text, "--tokens", 64, "--window", 32, "--json")
    found = check("compare", requant("compare", MICRO, output, *words).out)
    assert found["evaluation"]["windows"] == 2


def test_calibrate(requant: Requant, tmp_path: Path) -> None:
    words = ("--tokens", 64, "--window", 32, "--hessian", "--json")
    done = requant("calibrate", MICRO, "-o", tmp_path / "stats.safetensors", *words)
    assert check("calibrate", done.out)["hessians"]


def test_the_check_can_fail(requant: Requant) -> None:
    document = json.loads(requant("recipes", "--json").out)
    for wrong in ({"more": 1}, {"schema": 2}, {"recipes": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            check("recipes", json.dumps(document | wrong))


@pytest.mark.slow
def test_compare_of_several_outputs(requant: Requant, output: Path, tmp_path: Path) -> None:
    """The document is drawn in the page, and is a table of the card."""
    text = tmp_path / "text.txt"
    text.write_text("A tensor is a run of bytes with a shape, and a file holds many. " * 20)
    words = ("compare", MICRO, output, MICRO, "--text", text, "--tokens", 96, "--window", 48)
    scores = check("compare", requant(*words, "--json").out)["scores"]
    assert [score["output"] for score in scores] == [str(output), str(MICRO)]
    assert "99th percentile" in requant(*words).out
    (tmp_path / "s.json").write_text(requant(*words, "--json").out)
    page = tmp_path / "page.html"
    assert requant("report", output, "--html", page, "--scores", tmp_path / "s.json").code == 0
    assert "Size against KL divergence" in page.read_text()
    card = requant("upload", output, "me/out", "--dry-run", "--scores", tmp_path / "s.json")
    assert "## Quality" in card.out, card.err
    assert "--text FILE" in requant("compare", MICRO, output, MICRO).err
    assert "--cache is for several" in requant("compare", MICRO, output, "--cache", "c").err
    assert "--html FILE" in requant("report", output, "--scores", "s.json").err
